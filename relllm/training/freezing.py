"""What trains, how fast, and what is frozen: the paper's rule, what a run changes of it, the table that says so."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from relllm.modeling.lora_relllm import has_adapters, is_lora_parameter
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from .config import ReLLMSettings

HEADS = ("emotion_head", "dimension_head")
# Of a part of the model the setting of its own learning rate.
RATES = {"multi_modal_projector": "projector_learning_rate", **dict.fromkeys(HEADS, "heads_learning_rate")}


@dataclass
class TrainableRow:
    """A line of the table."""

    module: str  # a part of `ReLLMModel`; the LoRA is a part of its own, `"lora"`
    parameters: int
    trainable: int
    dtype: str  # for example `"bfloat16"`; several are joined by a comma


def keep_unpacked(model: nn.Module) -> None:
    """Hold 4-bit layers to the layout that has gradients, in place.

    bitsandbytes packs them anew for a CPU at the first pass in eval mode, an evaluation between two steps for one, and
    nothing behind a packed layer gets a gradient from then on.
    """
    for layer in model.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def prepare_trainable(
    model: ReLLMForConditionalGeneration, unfreeze: Iterable[str] = (), unused: Collection[str] = ()
) -> None:
    """Freeze what the paper freezes, unfreeze what is asked for, and hold what trains in float32, in place.

    Heads that no loss reaches (`unused`, of `HEADS`) are frozen too: DDP waits for the gradient of everything that
    trains. `unfreeze` takes `"audio_tower"`, `"emotion_tower"` and `"text_model"`.
    """
    if has_adapters(model):
        raise ValueError(
            "PEFT has put an adapter on top of the model, and ReLLMSFTTrainer trains the model below it. Take it off "
            "(`unload()`, `delete_adapter`), or train it with TRL's SFTTrainer or your own loop."
        )
    base = model.base_model
    base.freeze()
    for name in HEADS:
        getattr(base, name).requires_grad_(name not in unused)
    for name in unfreeze:
        tower = getattr(base, name)
        if tower is None:
            raise ValueError(f"unfreeze has {name!r}, and this model has none (emotion_fusion='none').")
        tower.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


@contextmanager
def lora_counts_as_adapter(model: ReLLMForConditionalGeneration) -> Iterator[None]:
    """Mark a model with a LoRA as having an adapter within the `with` block: one in 4 bit does not train without."""
    before = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = before or model.config.lora_config is not None
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def trainable_table(model: nn.Module) -> list[TrainableRow]:
    """Return what trains and what is frozen now, part by part; the model may be wrapped for several processes."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(_part_of(name), []).append(parameter)
    return [
        TrainableRow(
            part,
            sum(map(_size, parameters)),
            sum(_size(parameter) for parameter in parameters if parameter.requires_grad),
            ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        )
        for part, parameters in parts.items()
    ]


def learning_rate_of(args: ReLLMSettings, part: str) -> float:
    """Return the peak learning rate of a part of the model, named as in the table."""
    own = getattr(args, RATES[part]) if part in RATES else None
    return args.learning_rate if own is None else own


def _part_of(name: str) -> str:
    match = re.search(r"(?:^|\.)model\.(\w+)", name)  # behind the prefixes of wrappers
    return "lora" if is_lora_parameter(name) else match[1] if match else name


def _size(parameter: nn.Parameter) -> int:
    size: int = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor and this
    return size


def draw_table(rows: Iterable[TrainableRow], args: ReLLMSettings) -> Table:
    """Return the table as it is printed."""
    columns = ("module", "parameters", "trainable", "learning rate", "dtype")
    table = Table(*columns, title="What trains", title_justify="left")
    for row in rows:
        trains = (f"{row.trainable:,}", f"{learning_rate_of(args, row.module):g}") if row.trainable else ("-", "-")
        table.add_row(row.module, f"{row.parameters:,}", *trains, row.dtype)
    return table


class LearningRatesMixin(Trainer):
    """For a trainer whose projector and heads may have learning rates of their own; `args` are a [`ReLLMSettings`].

    Each of Transformers' groups (with weight decay, and without) is divided: first what trains at `learning_rate`, if
    anything does, then a group for each setting. The log's `learning_rate` is that of the first group of all.
    """

    _own_rates: dict[str, float] = {}  # by setting, of the last update

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Do as Transformers, with the learning rates that settings give; `ValueError` if the optimizer has none."""
        optimizer = super().create_optimizer(model)
        wanted = {setting for setting in RATES.values() if getattr(self.args, setting) is not None}
        if wanted and not any("rate_of" in group for group in optimizer.param_groups):
            settings = {
                parameter: RATES[part]
                for name, parameter in (self.model if model is None else model).named_parameters()
                if (part := _part_of(name)) in RATES and RATES[part] in wanted
            }
            groups = [part for group in optimizer.param_groups for part in self._divide(group, settings)]
            if wanted - {group.get("rate_of") for group in groups}:
                raise ValueError(
                    f"{', '.join(sorted(wanted))}: this optimizer ({type(optimizer).__name__}) divides the weights "
                    "otherwise. Choose another `optim`, or give its groups their rates where you make it."
                )
            optimizer.param_groups[:] = groups
        return optimizer

    def _divide(self, group: dict[str, Any], settings: dict[nn.Parameter, str]) -> Iterator[dict[str, Any]]:
        """Yield the groups that one becomes; `settings` are those of the weights with a rate of their own."""
        shares: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            shares.setdefault(settings.get(parameter), []).append(parameter)
        if None in shares or not shares:
            yield {**group, "params": shares.pop(None, [])}
        for setting, parameters in shares.items():
            yield {**group, "params": parameters, "lr": getattr(self.args, str(setting)), "rate_of": setting}

    def _get_learning_rate(self) -> float:
        groups = self.optimizer.param_groups
        self._own_rates = {group["rate_of"]: float(group["lr"]) for group in groups if "rate_of" in group}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Do as the others, with these learning rates beside `learning_rate`."""
        if "learning_rate" in logs:
            logs |= self._own_rates
        super().log(logs, start_time)


class TrainableTableCallback(TrainerCallback):
    """Prints the table once, at the start of a run, on the main process; `disable_tqdm=True` silences it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: object, model: nn.Module, **kwargs: object
    ) -> None:
        assert isinstance(args, ReLLMSettings)
        if state.is_world_process_zero and not args.disable_tqdm:
            beside_the_bar = Console(stderr=True, markup=False)
            beside_the_bar.print(draw_table(trainable_table(model), args))
