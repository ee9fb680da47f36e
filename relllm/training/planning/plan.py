"""`relllm plan`: memory, largest batch and speed of a run before a GPU is rented, from the settings of `relllm train`.

Only configurations and a tokenizer are read; no weights, no data. Estimates to choose hardware by, not measurements.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

import torch
import yaml
from rich.console import Console
from rich.table import Table

from relllm.setting import check_limits, read_recipe, setting

from ..building import build_config
from ..config import ReLLMScriptArguments, ReLLMSFTConfig, check_places
from ..freezing import draw_table, trainable_table
from ..settings import SettingsParser
from .memory import MemoryPlan, RowSize, TrainingStep
from .micro_batch import choose_micro_batch, list_micro_batches, step_settings

PARTS = (  # of a `MemoryPlan`
    *("weights", "gradients", "optimiser", "autocast copies of weights", "activations kept for the backward pass"),
    *("workspace of the widest layer", "(before these: the widest moment of a tower)"),
)
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass
class PlanArguments(RowSize):
    """What `relllm plan` assumes of the GPU and of a typical row."""

    gpu_memory: str = setting("80GB", "Of one GPU, such as 24GB or 80GiB.")
    reserve: float = setting(0.1, "Share of it left for CUDA and fragmentation.")
    peak_tflops: float = setting(312.0, "Dense bfloat16 peak (A100: 312, H100: 989).")
    utilisation: float = setting(0.3, "Share of the peak that is reached.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.gpu_memory)
        check_limits(self, {"reserve": "[0, 1)", "utilisation": "(0, 1]", "peak_tflops": "(0, inf)"})


def parse_bytes(text: str) -> float:
    """Return 24e9 for `"24GB"`, 80 * 2**30 for `"80GiB"`; raise `ValueError` if it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"Expected a size such as 24GB or 80GiB, got {text!r}.")
    return float(match[1]) * UNITS[match[2] or ""]


def parse_plan(arguments: Sequence[str]) -> tuple[PlanArguments, ReLLMScriptArguments, ReLLMSFTConfig]:
    """Read settings; where neither flags nor file name a precision, it is bfloat16, wherever the plan is made."""
    given = list(arguments)
    if not {"bf16", "fp16"} & _named_settings(given):
        given += ["--bf16", "true"]
    if not torch.cuda.is_available():
        given += ["--use_cpu", "true"]
    plan, script, args = SettingsParser.of("relllm plan", PlanArguments, ReLLMScriptArguments, ReLLMSFTConfig)(given)
    return plan, script, args


def run_plan(assumed: PlanArguments, script: ReLLMScriptArguments, args: ReLLMSFTConfig, console: Console) -> bool:
    """Print the tables of `relllm plan`, and return whether the batch of the settings fits the GPU."""
    check_places(script, data=False)
    config = build_config(script)
    dtype = script.dtype or getattr(config.text_config, "dtype", None) or torch.float32
    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    own = {"load_in_4bit": script.load_in_4bit, "full_window": script.full_window is not False}
    settings = step_settings(args, dtype, **own)
    step = TrainingStep(config, settings, assumed)
    update = args.per_device_train_batch_size * args.gradient_accumulation_steps
    memory = parse_bytes(assumed.gpu_memory) * (1 - assumed.reserve)
    batch_size = choose_micro_batch(list_micro_batches(args, step.sequence), step, memory)[0].rows
    plan, largest, flops = step.memory(batch_size), step.largest_batch(memory), step.flops()
    rows = assumed.peak_tflops * 1e12 * assumed.utilisation / flops  # a second
    console.print(draw_table(trainable_table(step.model), args))
    console.print(_memory_table(plan, batch_size))
    fits = plan.total <= memory
    verdict = "fits" if fits else "does not fit"
    console.print(
        f"A batch of {batch_size} {verdict} a GPU of {assumed.gpu_memory} ({1 - assumed.reserve:.0%} of it used "
        f"here); the largest batch is {largest}.",
        style="green" if fits else "red",
    )
    console.print(
        f"Speed: about {rows * step.sequence:,.0f} tokens or {rows:.1f} rows a second on one GPU, "
        f"{update / rows:.1f} s an update of {update} rows ({flops / 1e12:.2f} TFLOP a row)."
    )
    console.print(_assumptions(assumed, step), style="dim", highlight=False)
    return fits


def _named_settings(arguments: Sequence[str]) -> set[str]:
    """Return the names of the settings that flags and the YAML file give."""
    parts = [part for text in arguments for part in (text.split("=", 1) if text.startswith("--") else [text])]
    names = {part[2:].replace("-", "_") for part in parts if part.startswith("--")}
    with suppress(yaml.YAMLError, ValueError, OSError, IndexError):  # which the parser says
        names |= set(read_recipe(parts[parts.index("--config") + 1]))
    return names


def _memory_table(plan: MemoryPlan, batch_size: int) -> Table:
    unit, size_of_unit = ("GB", 1e9) if plan.total > 1e9 else ("MB", 1e6)
    table = Table("", unit, title=f"Memory of a step with {batch_size} rows", title_justify="left")
    for name, size in zip(PARTS, astuple(plan), strict=True):
        table.add_row(name, f"{size / size_of_unit:.2f}")
    table.add_section()
    table.add_row("peak", f"{plan.total / size_of_unit:.2f}")
    return table


def _assumptions(assumed: PlanArguments, step: TrainingStep) -> str:
    settings = step.settings
    dtype = str(settings.dtype).removeprefix("torch.")
    autocast = "bfloat16" if settings.bf16 else "no"
    checkpointing = "on" if settings.gradient_checkpointing else "off"
    return (
        f"Assumed: rows of {assumed.audio_seconds:g} s ({step.audio_positions} audio positions), "
        f"{assumed.prompt_tokens} prompt and {assumed.reply_tokens} reply tokens, {step.sequence} positions in all; "
        f"frozen weights in {dtype}, {autocast} autocast, gradient checkpointing {checkpointing}, optimiser "
        f"{settings.optimizer}; attention in one fused kernel; {assumed.reserve:.0%} of the memory in reserve; "
        f"{assumed.peak_tflops:g} TFLOP/s at {assumed.utilisation:.0%}. One process: under DDP each GPU takes this "
        "and the gradients once more; FSDP2 and ZeRO divide what they shard. Longer rows of a batch pad the others: "
        "plan with a long row for the memory, a typical one for the speed."
    )
