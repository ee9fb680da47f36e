"""The numbers of a run for the terminal."""

from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from relllm.labels import DIMENSIONS

from .evaluation_settings import MECHANISMS, WAYS

SHOWN = 10  # clips that could not be read


def report_run(metrics: Mapping, out: Path, console: Console) -> None:
    """Print a run's numbers, what they leave out, and the clips that could not be read; in the main process."""
    if not PartialState().is_main_process:
        return
    data, folds = metrics["data"], metrics["folds"]
    pooled = f", pooled over {len(folds['values'])} folds of {folds['column']}" if folds else ""
    console.print(f"[bold]{metrics['name']}[/bold] ({metrics['system']}): {data['num_clips']} clips{pooled}")
    for table in _number_tables(metrics):
        console.print(table)
    for task, reason in metrics["left_out"].items():
        console.print(f"not measured: {task}: {reason}")
    for column, meaning in (
        ("num_without_emotion", "without an emotion"),
        ("num_outside_label_set", "with an emotion outside the label set"),
    ):
        if data[column]:
            console.print(f"{data[column]} clips {meaning} count for no recognition number")
    if data["num_failed"]:
        console.print(f"[red]{data['num_failed']} clips could not be read[/red] and count for nothing:")
        for row_id, reason in list(data["failed"].items())[:SHOWN]:
            console.print(f"  {row_id}: {reason}", markup=False)
    console.print(f"Predictions, metrics and plots: [bold]{out}[/bold]")


def _number_tables(metrics: Mapping) -> list[Table]:
    tables = []
    if recognition := metrics.get("recognition"):
        table = Table("emotion by", "UA", "WA", "macro-F1", "ECE", "unparsed", "clips", title_justify="left")
        for way in (way for way in WAYS if way in recognition):
            part = recognition[way]
            scores = [_decimals(part[name]) for name in ("ua", "wa", "macro_f1")]
            ece = _decimals(part["ece"]) if "ece" in part else ""
            table.add_row(way, *scores, ece, str(part["num_unparsed"]), str(part["num_clips"]))
        tables.append(table)
    if dimensions := metrics.get("dimensions"):
        table = Table(f"dimension, {dimensions['scale']}".replace("[", r"\["), "CCC", "Pearson", "RMSE", "clips")
        for name in DIMENSIONS:
            part = dimensions[name]
            table.add_row(name, *(_decimals(part[key]) for key in ("ccc", "pearson", "rmse")), str(part["num_clips"]))
        tables.append(table)
    if empathy := metrics.get("empathy"):
        table = Table("empathy", "mean level", "level 0 / 1 / 2", "replies")
        for name in (name for name in MECHANISMS if name in empathy):
            part = empathy[name]
            counts = " / ".join(str(count) for count in part["levels"])
            table.add_row(name, _decimals(part["mean_level"]), counts, str(part["num_replies"]))
        tables.append(table)
    return tables


def _decimals(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
