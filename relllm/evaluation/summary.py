"""From the lines of `predictions.jsonl` alone to the numbers of `metrics.json`, its plots and the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from relllm.data.rows import LABEL_SETS
from relllm.labels import DIMENSIONS
from relllm.metrics import VoteMetrics, calibration_metrics, dimension_metrics, recognition_metrics, vote_metrics
from relllm.plots import plot_confusion_matrix, plot_levels, plot_reliability, plot_valence_arousal

from .evaluation_settings import EMPATHY_PARTS, LEVELS, REPLY_PARTS, WAYS
from .wording import describe_wording

MEASURES = {  # whose mean over folds is told
    "recognition": ("ua", "wa", "macro_f1", "ece"),
    "dimensions": ("ccc", "pearson", "rmse"),
    "empathy": ("mean_level",),
    "replies": ("value",),
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
        rows = [fold[task] for fold in folds if task in fold]
        if len(rows) < len(folds):
            continue
        shared = [name for name in rows[0] if all(isinstance(row.get(name), Mapping) for row in rows)]
        found[task] = {name: _mean([row[name] for row in rows], measures) for name in shared}
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
    axes = {"valence", "arousal"}
    plane = [line for line in lines if axes <= {k for k in line.get("dimensions", ()) if line[k] is not None}]
    if plane:
        valence, arousal = ([line[name] for line in plane] for name in ("valence", "arousal"))
        heard = [[line["dimensions"][name] for line in plane] for name in ("valence", "arousal")]
        emotions = [line["emotion"] or "no emotion" for line in plane]
        path = folder / "valence_arousal.png"
        drawn.append(plot_valence_arousal(valence, arousal, heard[0], heard[1], emotions, path, title=title))
    if "empathy" in metrics:
        levels = {title: {name: part["levels"] for name, part in metrics["empathy"].items() if name in EMPATHY_PARTS}}
        drawn.append(plot_levels(levels, folder / "levels.png"))
    return drawn


def report_run(metrics: Mapping, out: Path, console: Console) -> None:
    """Print a run's numbers, what they leave out, and the clips that could not be read; in the main process."""
    if not PartialState().is_main_process:
        return
    data, folds = metrics["data"], metrics["folds"]
    pooled = f", pooled over {len(folds['values'])} folds of {folds['column']}" if folds else ""
    console.print(f"{metrics['name']} ({metrics['system']}): {data['num_clips']} clips{pooled}")
    for table in _number_tables(metrics):
        console.print(table)
    for task, reason in metrics["left_out"].items():
        console.print(f"not measured: {task}: {reason}")
    without, outside = "without an emotion", "with an emotion outside the label set"
    for count, which in ((data["num_without_emotion"], without), (data["num_outside_label_set"], outside)):
        if count:
            console.print(f"{count} clips {which} count for no recognition number")
    seen = metrics.get("training") or {}
    if metrics["system"] != "text-only" and seen and not seen["recorded"]:
        console.print("which rows trained this model is not recorded: whether it has read these is not known")
    if count := seen.get("trained_on", 0) + seen.get("validated_on", 0):
        console.print(f"{count} of the clips are rows that it was trained on, or evaluated on meanwhile", style="red")
    for missing in _classes_without_clips(metrics):
        console.print(missing)
    if data["num_failed"]:
        console.print(f"{data['num_failed']} clips could not be read and count for nothing:", style="red")
        for row_id, reason in list(data["failed"].items())[:SHOWN]:
            console.print(f"  {row_id}: {reason}", markup=False)
    console.print(f"Predictions, metrics and plots: {out}")


def _classes_without_clips(metrics: Mapping) -> list[str]:
    """Say which emotions to choose from no clip has, and which label set has the others alone."""
    part = next(iter(metrics.get("recognition", {}).values()), None)
    absent = [] if part is None else [name for name, recall in part["recall"].items() if recall is None]
    if part is None or not absent:
        return []
    present = set(part["class_names"]) - set(absent)
    sets = [name for name, labels in LABEL_SETS.items() if set(labels) == present]
    offer = f"; --label-set {sets[0]} asks for the others alone" if sets else ""
    return [f"no clip is {' or '.join(absent)}, which can be answered and is then wrong{offer}"]


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
    return {**found, "votes": _votes(rated, labels, way)} if rated else found


def _votes(rated: Sequence[Mapping], labels: Sequence[str], way: str) -> VoteMetrics:
    """Hold the answers against every rater's vote; clips without a majority count too."""
    votes = [line["emotion_votes"] for line in rated]
    answers = [answered_emotion(line, way, labels) for line in rated]
    probabilities = None if way == "generated" else [line["recognition"][way] for line in rated]
    majority = [line["emotion"] for line in rated]
    return vote_metrics(votes, answers, labels, probabilities=probabilities, labels=majority)


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
    if not all("tokens" in part for part in parts):  # of an older release, or of another `score`
        return found
    lengths = [[part["tokens"] for part in of] for of in (parts, *by_level)]
    mean_tokens, *of_level = (sum(tokens) / len(tokens) if tokens else None for tokens in lengths)
    share_cut = sum(part["cut"] for part in parts) / len(parts)
    return {**found, "mean_tokens": mean_tokens, "mean_tokens_of_level": of_level, "share_cut": share_cut}


def _wording(lines: Sequence[Mapping]) -> dict | None:
    replies = [line["reply"] for line in lines if "reply" in line]
    found = describe_wording(replies) if replies else {}
    return {name: {"value": value, "num_replies": len(replies)} for name, value in found.items()} or None


def _mean(rows: Sequence[Mapping], measures: Sequence[str]) -> dict[str, float | None]:
    columns = {name: [row[name] for row in rows] for name in measures if name in rows[0]}
    return {name: None if None in values else sum(values) / len(values) for name, values in columns.items()}


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
        table = Table("by votes", "macro-F1, any rater's", "Jensen-Shannon", "ECE", "clips")
        for way in (way for way in WAYS if "votes" in recognition.get(way, {})):
            part = recognition[way]["votes"]
            scores = [_decimals(part[name]) for name in ("any_rater_macro_f1", "jensen_shannon", "ece")]
            table.add_row(way, *scores, str(part["num_clips"]))
        tables += [table] if table.row_count else []
    if dimensions := metrics.get("dimensions"):
        table = Table(f"dimension, {dimensions['scale']}", "CCC", "Pearson", "RMSE", "clips")
        for name in (name for name in DIMENSIONS if name in dimensions):
            part = dimensions[name]
            table.add_row(name, *(_decimals(part[key]) for key in ("ccc", "pearson", "rmse")), str(part["num_clips"]))
        tables.append(table)
    if empathy := metrics.get("empathy"):
        table = Table("empathy", "mean level", "level 0 / 1 / 2", "replies", "mean tokens", "read in part")
        for name in (name for name in EMPATHY_PARTS if name in empathy):
            part = empathy[name]
            counts = " / ".join(str(count) for count in part["levels"])
            lengths = [f"{part['mean_tokens']:.0f}", f"{part['share_cut']:.0%}"] if "share_cut" in part else ["—", "—"]
            table.add_row(name, _decimals(part["mean_level"]), counts, str(part["num_replies"]), *lengths)
        tables.append(table)
    if wording := metrics.get("replies"):
        table = Table("replies", "words", "repetition", "distinct-2", "replies")
        values = (_decimals(wording[name]["value"]) for name in REPLY_PARTS)
        table.add_row("mean", *values, str(wording["words"]["num_replies"]))
        tables.append(table)
    return tables


def _decimals(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
