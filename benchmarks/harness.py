"""Measuring: variants take turns within one run, medians and their ratio are kept, with versions and hardware.

A ratio within one run survives a slow machine, and with one thread a busy one as well: then the clock is the processor
time of this process, which others cannot take. Seconds are for orientation only.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("relllm", "torch", "transformers", "peft", "trl", "datasets", "soundfile", "torchaudio")
Name = TypeVar("Name")


def interleave(
    variants: Mapping[Name, Callable[[], object]], *, rounds: int = 7, warmups: int = 1
) -> dict[Name, float]:
    """Runs the variants in turn, round after round.

    Args:
        variants (`Mapping`): What to time, by name.
        rounds (`int`, *optional*, defaults to 7): Timed rounds.
        warmups (`int`, *optional*, defaults to 1): Rounds before, which are not timed.

    Returns:
        `dict`: Median seconds of each variant, by [`read_clock`].
    """
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    for round_number in range(warmups + rounds):
        for name, run in variants.items():
            start = read_clock()
            run()
            if round_number >= warmups:
                seconds[name].append(read_clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_clock() -> float:
    """Seconds: processor time of this process where it has one thread, else wall time (after the GPU's queue)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def resident_mib(*, peak: bool = False) -> float:
    """Resident memory of this process in MiB, now or at its peak since [`reset_peak`] (Linux)."""
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    """Sets the peak of [`resident_mib`] back to what is in use now: freed memory goes to the system first (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def figure(what: str, reached: float, to_reach: str = "", **more: object) -> dict[str, object]:
    """One row of a table.

    Args:
        what (`str`): What is measured, with its unit where it is not a ratio.
        reached (`float`): The number.
        to_reach (`str`, *optional*): `"<= x"` or `">= x"`; empty where a number is only for orientation.
        more: Further numbers.
    """
    met = ""
    if to_reach:
        sign, goal = to_reach.split()
        met = "yes" if (reached <= float(goal) if sign == "<=" else reached >= float(goal)) else "no"
    return {"what": what, "to reach": to_reach, "reached": reached, "met": met, **more}


def environment() -> dict[str, object]:
    """Versions and hardware of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "clock": "wall" if torch.cuda.is_available() or torch.get_num_threads() > 1 else "processor time",
        "load_average": os.getloadavg()[0],
    }


def report(name: str, rows: list[dict[str, object]], *, about: str, clock: str | None = None) -> None:
    """Prints the rows as a table and writes `results/NAME.json`.

    Args:
        name (`str`): Of the benchmark.
        rows (`list[dict]`): One dictionary a figure, of [`figure`] or its like, all with the same keys.
        about (`str`): One sentence: what was measured, at which sizes.
        clock (`str`, *optional*): What the seconds are, where they are not of [`read_clock`].
    """
    table = Table(*rows[0], title=f"{name}: {about}")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "environment": environment() | ({"clock": clock} if clock else {}), "rows": rows}
    partial = RESULTS / f"{name}.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(RESULTS / f"{name}.json")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
