"""What trains, how fast, and what is frozen: the paper's rule, what a run changes of it, the table that says so."""

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn
from transformers import Trainer

from relllm.modeling.lora_relllm import has_adapters, is_lora_parameter
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from .config import ReLLMSettings

HEADS = ("emotion_head", "dimension_head")
# Of a part of the model the setting of its own learning rate.
RATES = {"multi_modal_projector": "projector_learning_rate", **dict.fromkeys(HEADS, "heads_learning_rate")}


class TrainableRow(NamedTuple):
    """A line of the table."""

    module: str  # a part of `ReLLMModel`; the LoRA is a part of its own, `"lora"`
    parameters: int
    trainable: int
    dtype: str  # for example `"bfloat16"`; several are joined by a comma


def keep_unpacked(model: nn.Module) -> None:
    """Hold 4-bit layers to the layout that has gradients, in place: in eval mode bitsandbytes packs them for a CPU."""
    for layer in (layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)


def prepare_trainable(
    model: ReLLMForConditionalGeneration, unfreeze: Iterable[str] = (), unused: Collection[str] = ()
) -> None:
    """Freeze what the paper freezes and the heads that no loss reaches (`unused`), whose gradient DDP would wait for;
    unfreeze what is asked for, and hold what trains in float32, in place.
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
    parts: dict[str, list[tuple[int, bool, str]]] = {}
    for name, weight in model.named_parameters():
        size = getattr(weight, "ds_numel", weight.numel())  # ZeRO 3 leaves an empty tensor and this
        parts.setdefault(_part_of(name), []).append((size, weight.requires_grad, str(weight.dtype)[len("torch.") :]))
    rows = []
    for part, weights in parts.items():
        trainable = sum(size for size, trains, _ in weights if trains)
        dtypes = ", ".join(sorted({dtype for *_, dtype in weights}))
        rows.append(TrainableRow(part, sum(size for size, *_ in weights), trainable, dtypes))
    return rows


def _part_of(name: str) -> str:
    match = re.search(r"(?:^|\.)model\.(\w+)", name)  # behind the prefixes of wrappers
    return "lora" if is_lora_parameter(name) else match[1] if match else name


def draw_table(rows: Iterable[TrainableRow], args: ReLLMSettings) -> Table:
    """Return the table as it is printed."""
    columns = ("module", "parameters", "trainable", "learning rate", "dtype")
    table = Table(*columns, title="What trains", title_justify="left")
    for row in rows:
        own = getattr(args, RATES[row.module]) if row.module in RATES else None
        rate = args.learning_rate if own is None else own
        trains = (f"{row.trainable:,}", f"{rate:g}") if row.trainable else ("-", "-")
        table.add_row(row.module, f"{row.parameters:,}", *trains, row.dtype)
    return table


class LearningRatesMixin(Trainer):
    """For a trainer whose projector and heads may have learning rates of their own, in groups beside Transformers'."""

    _own_rates: dict[str, float] = {}  # by setting, of the last update

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Do as Transformers, with the learning rates that settings give; `ValueError` if the optimizer has none."""
        optimizer = super().create_optimizer(model)
        wanted = {setting for setting in RATES.values() if getattr(self.args, setting) is not None}
        if wanted and not any("rate_of" in group for group in optimizer.param_groups):
            named = (self.model if model is None else model).named_parameters()
            settings = {parameter: RATES.get(_part_of(name)) for name, parameter in named}
            groups = []
            for group in optimizer.param_groups:
                shares: dict[str | None, list[nn.Parameter]] = {None: []}
                for parameter in group["params"]:
                    own = settings.get(parameter)
                    shares.setdefault(own if own in wanted else None, []).append(parameter)
                if not shares[None] and len(shares) > 1:
                    del shares[None]
                for setting, parameters in shares.items():
                    rate = {} if setting is None else {"lr": getattr(self.args, setting), "rate_of": setting}
                    groups.append({**group, "params": parameters, **rate})
            if wanted - {group.get("rate_of") for group in groups}:
                raise ValueError(
                    f"{', '.join(sorted(wanted))}: this optimizer ({type(optimizer).__name__}) divides the weights "
                    "otherwise. Choose another `optim`, or give its groups their rates where you make it."
                )
            optimizer.param_groups[:] = groups
        return optimizer

    def _get_learning_rate(self) -> float:
        groups = self.optimizer.param_groups
        self._own_rates = {group["rate_of"]: float(group["lr"]) for group in groups if "rate_of" in group}
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Do as the others, with these learning rates beside `learning_rate`."""
        if "learning_rate" in logs:
            logs |= self._own_rates
        super().log(logs, start_time)
