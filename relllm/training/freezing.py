"""What trains and what is frozen: the paper's rule, what a run changes of it, and the table that says so."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from relllm.modeling.lora_relllm import has_adapters, is_lora_parameter
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

HEADS = ("emotion_head", "dimension_head")


@dataclass
class TrainableRow:
    """A line of the table."""

    module: str  # a part of `ReLLMModel`; the LoRA is a part of its own, `"lora"`
    parameters: int
    trainable: int
    dtype: str  # for example `"bfloat16"`; several are joined by a comma


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
        match = re.search(r"(?:^|\.)model\.(\w+)", name)  # behind the prefixes of wrappers
        part = "lora" if is_lora_parameter(name) else match[1] if match else name
        parts.setdefault(part, []).append(parameter)
    return [
        TrainableRow(
            part,
            sum(map(_size, parameters)),
            sum(_size(parameter) for parameter in parameters if parameter.requires_grad),
            ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        )
        for part, parameters in parts.items()
    ]


def _size(parameter: nn.Parameter) -> int:
    size: int = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor and this
    return size


def draw_table(rows: Iterable[TrainableRow]) -> Table:
    """Return the table as it is printed."""
    table = Table("module", "parameters", "trainable", "dtype", title="What trains", title_justify="left")
    for row in rows:
        table.add_row(row.module, f"{row.parameters:,}", f"{row.trainable:,}" if row.trainable else "-", row.dtype)
    return table


class TrainableTableCallback(TrainerCallback):
    """Prints the table once, at the start of a run, on the main process; `disable_tqdm=True` silences it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: object, model: nn.Module, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            Console(stderr=True).print(draw_table(trainable_table(model)))  # beside the progress bar
