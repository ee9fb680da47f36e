"""From the lines of `predictions.jsonl` alone to the numbers of `metrics.json`, its plots and the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from relllm.data.rows import LABEL_SETS
from relllm.labels import DIMENSIONS
from relllm.metrics import calibration_metrics, dimension_metrics, recognition_metrics, vote_metrics
from relllm.plots import plot_confusion_matrix, plot_levels, plot_reliability, plot_valence_arousal

from .evaluation_settings import EMPATHY_PARTS, LEVELS, WAYS
from .wording import describe_wording

MEASURES = {  # whose mean over folds is told
    "recognition": ("ua", "wa", "macro_f1", "ece"),
    "dimensions": ("ccc", "pearson", "rmse"),
    "empathy": ("mean_level",),
    "replies": ("value",),
}
TABLES = {  # of the terminal
    "recognition": ("ua", "wa", "macro_f1", "ece", "num_unparsed", "num_clips"),
    "votes": ("any_rater_macro_f1", "jensen_shannon", "ece", "num_clips"),
    "dimensions": ("ccc", "pearson", "rmse", "num_clips"),
    "empathy": ("mean_level", "levels", "mean_tokens", "share_cut", "num_replies"),
    "replies": ("value", "num_replies"),
}
SHOWN = 10  # clips that could not be read


def summarize_clips(lines: Sequence[Mapping], labels: Sequence[str]) -> dict:
    """Return the keys `recognition`, `dimensions`, `empathy` and `replies` of `metrics.json` that the lines allow.

    An answer that names no emotion counts as wrong. Clips that could not be read count for nothing here; neither do
    clips without an emotion of `labels` for recognition, or without the dimension for that dimension.
    """
    recognition = {way: part for way in WAYS if (part := _recognition_of(lines, labels, way))}
    parts = {
        "recognition": recognition or None,
        "dimensions": _dimensions(lines),
        "empathy": {name: part for name in EMPATHY_PARTS if (part := summarize_levels(lines, name)) is not None}
        or None,
        "replies": _wording(lines),
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
    """Return the unweighted mean over folds of every number of [`summarize_clips`]; `None` where a fold has none."""
    found: dict[str, dict] = {}
    for task, measures in MEASURES.items():
        of_task = [fold.get(task, {}) for fold in folds]
        for name, first in of_task[0].items():
            if isinstance(first, Mapping) and all(name in of for of in of_task):
                parts = [of[name] for of in of_task]
                columns = {key: [part[key] for part in parts] for key in measures if key in first}
                means = {key: None if None in of else sum(of) / len(of) for key, of in columns.items()}
                found.setdefault(task, {})[name] = means
    return found


def draw_plots(lines: Sequence[Mapping], metrics: Mapping, folder: Path, *, title: str) -> list[Path]:
    """Draw confusion matrix and reliability curve of each way, the valence-arousal plane, the levels of empathy."""
    drawn = []
    for way, part in metrics.get("recognition", {}).items():
        heading = f"{title}: {way}, UA {part['ua']:.3f}"
        matrix, names = _with_unparsed(lines, part, way)
        drawn.append(plot_confusion_matrix(matrix, names, folder / f"confusion_matrix_{way}.png", title=heading))
        if "bins" in part:
            heading = f"{title}: {way}, ECE {part['ece']:.3f}"
            drawn.append(plot_reliability(part["bins"], folder / f"reliability_{way}.png", title=heading))
    axes = ("valence", "arousal")
    plane = [line for line in lines if set(axes) <= {k for k in line.get("dimensions", ()) if line[k] is not None}]
    if plane:
        true = [[line[name] for line in plane] for name in axes]
        heard = [[line["dimensions"][name] for line in plane] for name in axes]
        emotions = [line["emotion"] or "no emotion" for line in plane]
        path = folder / "valence_arousal.png"
        drawn.append(plot_valence_arousal(true[0], true[1], heard[0], heard[1], emotions, path, title=title))
    if "empathy" in metrics:
        levels = {title: {name: part["levels"] for name, part in metrics["empathy"].items() if name in EMPATHY_PARTS}}
        drawn.append(plot_levels(levels, folder / "levels.png"))
    return drawn


def report_run(metrics: Mapping, out: Path, console: Console) -> None:
    """Print a run's numbers, what they leave out, and the clips that could not be read; in the main process."""
    if not PartialState().is_main_process:
        return
    data, folds, seen = metrics["data"], metrics["folds"], metrics["training"]
    pooled = f", pooled over {len(folds['values'])} folds of {folds['column']}" if folds else ""
    console.print(f"{metrics['name']} ({metrics['system']}): {data['num_clips']} clips{pooled}")
    for table in _number_tables(metrics):
        console.print(table)
    for task, reason in metrics["left_out"].items():
        console.print(f"not measured: {task}: {reason}")
    outside = "with an emotion outside the label set"
    for count, which in (("num_without_emotion", "without an emotion"), ("num_outside_label_set", outside)):
        if data[count]:
            console.print(f"{data[count]} clips {which} count for no recognition number")
    if metrics["system"] != "text-only" and not seen["recorded"]:
        console.print("which rows trained this model is not recorded: whether it has read these is not known")
    if count := seen["trained_on"] + seen["validated_on"]:
        console.print(f"{count} of the clips are rows that it was trained on, or evaluated on meanwhile", style="red")
    if missing := _classes_without_clips(metrics):
        console.print(missing)
    if data["num_failed"]:
        console.print(f"{data['num_failed']} clips could not be read and count for nothing:", style="red")
        for row_id, reason in list(data["failed"].items())[:SHOWN]:
            console.print(f"  {row_id}: {reason}", markup=False)
    console.print(f"Predictions, metrics and plots: {out}")


def _classes_without_clips(metrics: Mapping) -> str | None:
    """Say which emotions to choose from no clip has, and which label set has the others alone."""
    recalls: dict = next((part["recall"] for part in metrics.get("recognition", {}).values()), {})
    absent = [name for name, recall in recalls.items() if recall is None]
    if not absent:
        return None
    sets = [name for name, labels in LABEL_SETS.items() if set(labels) == set(recalls) - set(absent)]
    offer = f"; --label-set {sets[0]} asks for the others alone" if sets else ""
    return f"no clip is {' or '.join(absent)}, which can be answered and is then wrong{offer}"


def _with_unparsed(lines: Sequence[Mapping], part: Mapping, way: str) -> tuple[list[list[int]], list[str]]:
    """Return the confusion matrix with a class for answers that name no emotion."""
    matrix, names = part["confusion_matrix"], list(part["class_names"])
    if not part["num_unparsed"]:
        return matrix, names
    asked = [line for line in lines if "recognition" in line and line["recognition"][way]["emotion"] is None]
    missing = Counter(line["emotion"] for line in asked)
    rows = [[*row, missing[name]] for row, name in zip(matrix, names, strict=True)]
    return [*rows, [0] * (len(names) + 1)], [*names, "unparsed"]


def _recognition_of(lines: Sequence[Mapping], labels: Sequence[str], way: str) -> dict | None:
    answered = [line for line in lines if way in line.get("recognition", {})]
    asked = [line for line in answered if line["emotion"] in labels]
    if not asked:
        return None
    truth = [line["emotion"] for line in asked]
    found: dict = {**recognition_metrics(truth, [answered_emotion(line, way, labels) for line in asked], labels)}
    if way != "generated":
        calibration = calibration_metrics(truth, [line["recognition"][way] for line in asked], labels)
        found |= {"ece": calibration["ece"], "bins": calibration["bins"]}
    rated = [line for line in answered if set(line.get("emotion_votes") or ()) & set(labels)]
    if rated:  # by any rater, also where there is no majority
        answers = [answered_emotion(line, way, labels) for line in rated]
        votes, majority = ([line[name] for line in rated] for name in ("emotion_votes", "emotion"))
        probabilities = None if way == "generated" else [line["recognition"][way] for line in rated]
        found["votes"] = vote_metrics(votes, answers, labels, probabilities=probabilities, labels=majority)
    return found


def answered_emotion(line: Mapping, way: str, labels: Sequence[str]) -> str | None:
    """Return what a line answers in one way of recognition: the likeliest label, or the one generated, if any."""
    answer = line["recognition"][way]
    return answer["emotion"] if way == "generated" else max(labels, key=answer.__getitem__)


def _dimensions(lines: Sequence[Mapping]) -> dict | None:
    read = [line for line in lines if "dimensions" in line]
    names = [name for name in DIMENSIONS if all(name in line["dimensions"] for line in read)]  # all models were taught
    if not read or not names:
        return None
    labels = {name: [line[name] for line in read] for name in names}
    predictions = {name: [line["dimensions"][name] for line in read] for name in names}
    return {**dimension_metrics(labels, predictions), "scale": "[0, 1]"}


def summarize_levels(lines: Iterable[Mapping], mechanism: str) -> dict | None:
    """Return mean and counts of the levels of one mechanism, and the length of the replies; `None` without any."""
    parts = [part for line in lines if (part := line.get("empathy", {}).get(mechanism))]
    if not parts:
        return None
    by_level = [[part for part in parts if part["level"] == level] for level in range(LEVELS)]
    mean_level = sum(part["level"] for part in parts) / len(parts)
    found = {"mean_level": mean_level, "levels": [*map(len, by_level)], "num_replies": len(parts)}
    if not all("tokens" in part for part in parts):  # of an older release
        return found
    lengths = [[part["tokens"] for part in of] for of in (parts, *by_level)]
    mean_tokens, *of_level = (sum(tokens) / len(tokens) if tokens else None for tokens in lengths)
    share_cut = sum(part["cut"] for part in parts) / len(parts)
    return {**found, "mean_tokens": mean_tokens, "mean_tokens_of_level": of_level, "share_cut": share_cut}


def _wording(lines: Sequence[Mapping]) -> dict | None:
    replies = [line["reply"] for line in lines if "reply" in line]
    found = describe_wording(replies) if replies else {}
    return {name: {"value": value, "num_replies": len(replies)} for name, value in found.items()} or None


def _number_tables(metrics: Mapping) -> Iterator[Table]:
    votes = {way: of["votes"] for way, of in metrics.get("recognition", {}).items() if "votes" in of}
    for part, columns in TABLES.items():
        table = Table(part, *columns)
        for name, row in (votes if part == "votes" else metrics.get(part, {})).items():
            if isinstance(row, Mapping) and columns[0] in row:
                table.add_row(name, *(show_value(row.get(column)) for column in columns))
        if table.row_count:
            yield table


def show_value(value: float | list[int] | None) -> str:
    """Return a number, or counts, as a table of the terminal has it."""
    if isinstance(value, list):
        return " / ".join(map(str, value))
    return "—" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
