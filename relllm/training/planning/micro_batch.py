"""`per_device_train_batch_size: auto`: how many rows go through at once, chosen by the device's memory.

The largest micro-batch that [`TrainingStep`] expects to fit is tried on the longest rows, forward and backward, and
what runs out of memory is halved; the rows of an update stay the recipe's.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from relllm.modeling.configuration_relllm import ReLLMConfig

from ..collator import ReLLMCollator
from ..config import CHECKPOINTING, ReLLMSFTConfig
from ..lengths import GroupByLengthMixin
from ..losses import IGNORE_INDEX
from ..objective import RunningMeans
from ..tasks import GIVEN_TASK
from .memory import FRAMES_A_SECOND, RowSize, StepSettings, TrainingStep

RESERVE = 0.1  # of the memory, left for fragmentation
# A product with this many positions is limited by arithmetic on current cards (an H100's bfloat16 ridge is at about
# 300): from here on, recomputing activations costs a third, and more rows at once gain little.
ENOUGH_POSITIONS = 512


class MicroBatch(NamedTuple):
    """Rows that go through at once, and whether the LLM's activations are computed again instead of kept."""

    rows: int
    checkpointing: bool


def list_micro_batches(args: ReLLMSFTConfig, positions: int) -> list[MicroBatch]:
    """Return those that a run's settings allow, the fastest first; `positions` are a long row's in the LLM."""
    sizes = [args.per_device_train_batch_size]
    if "per_device_train_batch_size" in args.automatic:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    if not args.automatic.intersection(CHECKPOINTING):
        return [MicroBatch(size, bool(args.gradient_checkpointing)) for size in sizes]
    enough = [size for size in sizes if size == sizes[0] or size * positions >= ENOUGH_POSITIONS]
    return [MicroBatch(size, False) for size in enough] + [MicroBatch(size, True) for size in sizes]


def choose_micro_batch(
    choices: Sequence[MicroBatch],
    step: TrainingStep,
    memory: float,
    fits: Callable[[MicroBatch], bool] = lambda choice: True,
) -> list[MicroBatch]:
    """Return the first that is planned to stay within `memory` bytes and then `fits`, alone in a list; none if none.

    The last is tried whatever the plan says. `step` keeps the checkpointing of the one that was tried last.
    """
    for choice in choices:
        step.settings = dataclasses.replace(step.settings, gradient_checkpointing=choice.checkpointing)
        if (choice == choices[-1] or step.memory(choice.rows).total <= memory) and fits(choice):
            return [choice]
    return []


def row_size(batch: Mapping[str, Tensor], config: ReLLMConfig) -> RowSize:
    """Return the size of the only row of a batch."""
    audio = int((batch["input_ids"] == config.audio_token_id).sum())
    reply = max(int((batch["labels"] != IGNORE_INDEX).sum()), 1)
    seconds = max(audio, 1) * 2 ** len(config.projector_kernel_sizes) / FRAMES_A_SECOND
    return RowSize(seconds, max(batch["input_ids"].shape[1] - audio - reply, 0), reply)


def free_bytes(device: torch.device) -> float | None:
    """Return what this process may still take of a device's memory; `None` where it is not told, as of a CPU."""
    if device.type not in ("cuda", "xpu"):
        return None
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return float(free + module.memory_reserved(device) - module.memory_allocated(device))


def peak_bytes(device: torch.device, run: Callable[[], object]) -> float:
    """Return the most memory that a call takes of an accelerator, above what was taken before it."""
    module = torch.get_device_module(device)
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    run()
    return float(module.max_memory_allocated(device) - before)


class MicroBatchMixin(GroupByLengthMixin):
    """For `per_device_train_batch_size: auto`, before the others of an SFT trainer in the bases."""

    _means: RunningMeans
    _total_train_tokens: int

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Do as the others, with as many rows at once as fit where the settings leave that open."""
        self.fit_micro_batch()
        return super().train(*args, **kwargs)

    def fit_micro_batch(self) -> None:
        """Choose the micro-batch, set it, and say so; with settings that name one, do nothing."""
        args = self.args
        assert isinstance(args, ReLLMSFTConfig)
        if not args.automatic:
            return
        given = args.per_device_train_batch_size
        rows, chosen = given * args.gradient_accumulation_steps, MicroBatch(given, bool(args.gradient_checkpointing))
        free, why = free_bytes(args.device), ""
        if free is None:
            why = f"nobody tells the memory of a {args.device.type}"
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_model_parallel:
            why = "the model is spread over devices, and one of them tells nothing"
        elif (longest := self._longest_rows(rows)) is None:
            why = "the rows do not tell their lengths without being decoded"
        else:
            agreed = self.accelerator.gather(torch.tensor([free * (1 - RESERVE)], device=args.device)).min().item()
            drawn = [] if args.device.type == "cpu" else [args.device]
            with torch.random.fork_rng(drawn, device_type=args.device.type):
                chosen, why = self._try_micro_batches(longest, agreed)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = chosen.rows, rows // chosen.rows
        self._train_batch_size = args.train_batch_size
        for name in CHECKPOINTING:
            if hasattr(args, name):
                setattr(args, name, chosen.checkpointing)
        if self.is_world_process_zero():
            shares = f"{chosen.rows} at once × {rows // chosen.rows} × {args.world_size} processes"
            how = f"with{'' if chosen.checkpointing else 'out'} gradient checkpointing"
            print(f"{rows * args.world_size} rows an update: {shares}, {how} ({why}).", flush=True)

    def _longest_rows(self, count: int) -> list[dict] | None:
        """Return so many rows of the training data, the longest first; some several times where there are few."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset):
            return None
        name = self.args.length_column_name
        try:
            lengths = rows[name] if name in rows.column_names else self.measure_rows(rows)
        except ValueError:  # of a header that cannot be read
            return None
        order = sorted(range(len(rows)), key=list(lengths).__getitem__, reverse=True)
        return [rows[order[place % len(order)]] for place in range(count)]

    def _try_micro_batches(self, longest: list[dict], free: float) -> tuple[MicroBatch, str]:
        """Return the first micro-batch that is planned to fit and then does, on all processes, and what it takes."""
        args, config = self.args, self.model.config
        assert isinstance(args, ReLLMSFTConfig)
        collate = self.data_collator
        if isinstance(collate, ReLLMCollator):
            if (mix := collate.mix) is not None:  # what this epoch has drawn for a row is not its longest
                longest = [{**row, GIVEN_TASK: (mix.longest(row), False)} for row in longest]
            collate = dataclasses.replace(collate, tower_cache=None)  # in the first epoch the towers run
        size = row_size(collate(longest[:1]), config)
        own = {"load_in_4bit": bool(getattr(self.model, "is_quantized", False))}
        own["full_window"] = self.processing_class.feature_extractor.full_window
        step = TrainingStep(copy.deepcopy(config), step_settings(args, self.model.dtype, **own), size)
        plan, peaks = step.memory(1), {}
        # What a step does not show: the optimizer's state, and DDP's buckets.
        later = plan.optimizer + (plan.gradients / 2 if args.world_size > 1 else 0)

        def fits(choice: MicroBatch) -> bool:
            batch, peaks[choice] = collate(longest[: choice.rows]), math.inf
            try:
                peaks[choice] = later + peak_bytes(args.device, lambda: self._try_step(batch, choice.checkpointing))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            self.model.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            return bool(self.accelerator.gather(torch.tensor([peaks[choice] <= free], device=args.device)).all())

        choices = list_micro_batches(args, step.sequence)
        chosen = choose_micro_batch(choices, step, free + plan.weights, fits)
        if not chosen:
            raise RuntimeError(
                f"{choices[-1].rows} rows of {step.sequence} positions do not train in the {free / 1e9:.1f} GB free "
                "beside the model. Shorten the clips, or take recipes/qlora_7b.yaml or recipes/accelerate/fsdp2.yaml."
            )
        taken = f"{peaks[chosen[0]] / 1e9:.1f} of the {free / 1e9:.1f} GB free beside the model"
        return chosen[0], f"the longest rows, of {step.sequence} positions, take {taken}"

    def _try_step(self, batch: dict[str, Tensor], checkpointing: bool) -> None:
        """Run a forward and a backward pass as in training, but on this process alone; only gradients stay."""
        _switch_checkpointing(self.model, checkpointing, self.args)
        self.model.train()
        gather, tokens = self.accelerator.gather_for_metrics, self._total_train_tokens
        self.accelerator.gather_for_metrics = lambda value: value
        try:
            with self.accelerator.autocast():
                loss = self.compute_loss(self.model, self._prepare_inputs(batch))
        finally:  # what was computed is in no log
            self.accelerator.gather_for_metrics, self._total_train_tokens = gather, tokens
            self._metrics["train"].clear()
            self._means.take("train")
        loss.backward()


def step_settings(
    args: ReLLMSFTConfig, dtype: torch.dtype, *, load_in_4bit: bool = False, full_window: bool = True
) -> StepSettings:
    """Return what of a run's settings, and of its model's, decides its memory."""
    return StepSettings(
        dtype=dtype,
        bf16=bool(args.bf16 or args.fp16),
        gradient_checkpointing=bool(args.gradient_checkpointing),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        load_in_4bit=load_in_4bit,
        full_window=full_window,
        unfreeze=tuple(args.unfreeze),
        unused=args.unused_heads,
        num_processes=args.world_size,
        teacher=args.response_kl_weight > 0,
    )


def _switch_checkpointing(model: PreTrainedModel, on: bool, args: TrainingArguments) -> None:
    """Switch it as `Trainer.train` does, by the name that this release of Transformers has."""
    name = CHECKPOINTING[hasattr(model, "activation_checkpointing_enable")]
    if not on:
        return getattr(model, f"{name}_disable")()
    kwargs = dict(getattr(args, f"{name}_kwargs") or {})
    options = {option: kwargs.pop(option) for option in ("every_n_layers", "offload") if option in kwargs}
    return getattr(model, f"{name}_enable")(kwargs or None, **options)
