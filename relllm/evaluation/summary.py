"""From the lines of `predictions.jsonl` to the numbers of `metrics.json`, and to its plots.

It decides which clips count for which number. Everything is computed from the lines alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relllm.labels import DIMENSIONS
from relllm.metrics import calibration_metrics, dimension_metrics, recognition_metrics
from relllm.plots import plot_confusion_matrix, plot_levels, plot_reliability, plot_valence_arousal

from .evaluation_settings import LEVELS, MECHANISMS, WAYS

SCALE = "[0, 1]"


def summarize_clips(lines: Sequence[Mapping], labels: Sequence[str]) -> dict:
    """Return the keys `recognition`, `dimensions` and `empathy` of `metrics.json`, those that the lines allow.

    An answer that names no emotion counts as wrong. Clips that could not be read count for nothing here; neither do
    clips without an emotion of the label set for recognition, or without the dimension for that dimension.

    Args:
        lines (`Sequence[Mapping]`): Of `predictions.jsonl`, without the settings.
        labels (`Sequence[str]`): The emotions that were to choose from.
    """
    recognition = {way: part for way in WAYS if (part := _recognition_of(lines, labels, way)) is not None}
    parts = {
        "recognition": recognition or None,
        "dimensions": _dimensions(lines),
        "empathy": {name: part for name in MECHANISMS if (part := _empathy(lines, name)) is not None} or None,
    }
    return {name: part for name, part in parts.items() if part is not None}


def count_clips(lines: Sequence[Mapping], labels: Sequence[str]) -> dict:
    """Count how many clips there are, failed, have no emotion in the label set; whose dimensions are a model's."""
    failed = {line["id"]: line["error"] for line in lines if "error" in line}
    read = [line for line in lines if "error" not in line]
    outside = sum(line["emotion"] is not None and line["emotion"] not in labels for line in read)
    labelled = [line for line in read if any(line[name] is not None for name in DIMENSIONS)]
    return {
        "num_clips": len(lines),
        "num_failed": len(failed),
        "num_speakers": len({line["speaker"] for line in lines} - {None}),
        "num_without_emotion": sum(line["emotion"] is None for line in read),
        "num_outside_label_set": outside,
        "dimension_sources": dict(Counter(line["dimension_source"] or "not stated" for line in labelled)),
        "failed": failed,
    }


def mean_over_folds(folds: Sequence[Mapping]) -> dict:
    """Return the unweighted mean over folds of every number that [`summarize_clips`] gives.

    It is `None` where a fold has none.
    """
    measures: dict[str, Callable[[Mapping], Mapping]] = {
        "recognition": lambda part: {name: part.get(name) for name in ("ua", "wa", "macro_f1", "ece") if name in part},
        "dimensions": lambda part: {name: part[name] for name in ("ccc", "pearson", "rmse")},
        "empathy": lambda part: {"mean_level": part["mean_level"]},
    }
    found: dict[str, dict] = {}
    for task, measure in measures.items():
        rows = [fold[task] for fold in folds if task in fold]
        if len(rows) < len(folds):
            continue
        shared = [name for name in rows[0] if all(isinstance(row.get(name), Mapping) for row in rows)]
        found[task] = {name: _mean([measure(row[name]) for row in rows]) for name in shared}
    return found


def draw_plots(lines: Sequence[Mapping], metrics: Mapping, folder: Path, *, title: str) -> list[Path]:
    """Draw confusion matrix and reliability curve of each way, the valence-arousal plane, the levels of empathy.

    Args:
        lines (`Sequence[Mapping]`): Of `predictions.jsonl`, without the settings.
        metrics (`Mapping`): What [`summarize_clips`] made of them.
        folder (`Path`): Where the PNG files go.
    """
    drawn = []
    for way, part in metrics.get("recognition", {}).items():
        heading = f"{title}: {way}, UA {part['ua']:.3f}"
        matrix, names = _with_unparsed(lines, part, way)
        drawn.append(plot_confusion_matrix(matrix, names, folder / f"confusion_matrix_{way}.png", title=heading))
        if "bins" in part:
            heading = f"{title}: {way}, ECE {part['ece']:.3f}"
            drawn.append(plot_reliability(part["bins"], folder / f"reliability_{way}.png", title=heading))
    plane = [line for line in lines if _in_plane(line)]
    if plane:
        drawn.append(
            plot_valence_arousal(
                [line["valence"] for line in plane],
                [line["arousal"] for line in plane],
                [line["dimensions"]["valence"] for line in plane],
                [line["dimensions"]["arousal"] for line in plane],
                [line["emotion"] or "no emotion" for line in plane],
                folder / "valence_arousal.png",
                title=title,
            )
        )
    if "empathy" in metrics:
        levels = {title: {name: part["levels"] for name, part in metrics["empathy"].items() if name in MECHANISMS}}
        drawn.append(plot_levels(levels, folder / "levels.png"))
    return drawn


def _with_unparsed(lines: Sequence[Mapping], part: Mapping, way: str) -> tuple[list[list[int]], list[str]]:
    """The confusion matrix with a class for answers that name no emotion, so that a row has all clips of its class."""
    matrix, names = part["confusion_matrix"], list(part["class_names"])
    if not part["num_unparsed"]:
        return matrix, names
    asked = [line for line in lines if "recognition" in line and line["recognition"][way]["emotion"] is None]
    missing = Counter(line["emotion"] for line in asked)
    rows = [[*row, missing[name]] for row, name in zip(matrix, names, strict=True)]
    return [*rows, [0] * (len(names) + 1)], [*names, "unparsed"]


def _recognition_of(lines: Sequence[Mapping], labels: Sequence[str], way: str) -> dict | None:
    asked = [line for line in lines if line["emotion"] in labels and way in line.get("recognition", {})]
    if not asked:
        return None
    truth = [line["emotion"] for line in asked]
    answers = [line["recognition"][way] for line in asked]
    if way == "generated":
        return {**recognition_metrics(truth, [answer["emotion"] for answer in answers], labels)}
    likeliest = [max(labels, key=lambda name, row=answer: row[name]) for answer in answers]  # type: ignore[misc]
    calibration = calibration_metrics(truth, answers, labels)
    return {
        **recognition_metrics(truth, likeliest, labels),
        "ece": calibration["ece"],
        "bins": calibration["bins"],
    }


def _dimensions(lines: Sequence[Mapping]) -> dict | None:
    read = [line for line in lines if "dimensions" in line]
    if not read:
        return None
    labels = {name: [line[name] for line in read] for name in DIMENSIONS}
    predictions = {name: [line["dimensions"][name] for line in read] for name in DIMENSIONS}
    return {**dimension_metrics(labels, predictions), "scale": SCALE}


def _empathy(lines: Sequence[Mapping], mechanism: str) -> dict | None:
    levels = [line["empathy"][mechanism]["level"] for line in lines if mechanism in line.get("empathy", {})]
    if not levels:
        return None
    return {
        "mean_level": sum(levels) / len(levels),
        "levels": [levels.count(level) for level in range(LEVELS)],
        "num_replies": len(levels),
    }


def _in_plane(line: Mapping) -> bool:
    return "dimensions" in line and line["valence"] is not None and line["arousal"] is not None


def _mean(rows: Sequence[Mapping]) -> dict[str, float | None]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: None if None in values else sum(values) / len(values) for name, values in columns.items()}
