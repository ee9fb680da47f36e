"""Folders that `relllm evaluate` wrote, read back to be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from relllm.data.table_files import read_table
from relllm.labels import DIMENSIONS

from .evaluation_settings import FORMAT, HELD_OUT, METRICS, PREDICTIONS, SYSTEMS


@dataclass(frozen=True)
class Run:
    """One system on one data set."""

    path: Path
    name: str  # what the system was called
    system: str
    data: dict  # the part `data` of metrics.json: corpus, split, held_out, fingerprint, …
    clips: dict[str, dict]  # what was read of each clip, by id; clips that failed are left out
    class_names: dict[str, list[str]]  # of each way of recognition
    protocol: dict[str, object]  # what runs on a corpus must share, where both have it
    scorer_quality: dict  # of each scorer, as `read_quality` has it, by `EMPATHY_PARTS`; empty in older runs
    conditions: dict  # how it was asked: "longest reply", "prompts", "precision", "versions"; empty where not recorded
    seen: dict  # what its training has to do with the rows, as `find_seen` has it; empty in older runs
    folds: dict  # as in metrics.json, where the predictions of several folds are pooled; else empty


def read_predictions(out: Path) -> tuple[dict, list[dict]]:
    """Return the settings and the lines of a run's `predictions.jsonl`."""
    rows = [row for _, row in read_table(out / PREDICTIONS)]
    if len(rows) < 2:
        raise ValueError(f"{out / PREDICTIONS} has no clips. Delete it, and evaluate again.")
    return rows[0]["settings"], rows[1:]


def read_run(path: Path) -> Run:
    """Read metrics.json and predictions.jsonl of a complete run."""
    for name in (METRICS, PREDICTIONS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}: it is no complete run. `relllm evaluate … --out {path}` writes one, and goes "
                "on where it was interrupted."
            )
    metrics = json.loads((path / METRICS).read_text(encoding="utf-8"))
    if (found := metrics.get("format")) != FORMAT:
        raise ValueError(f"{path / METRICS} has the format {found!r}, expected {FORMAT!r}. Evaluate again.")
    if metrics["system"] not in SYSTEMS:
        raise ValueError(f"{path}: the system is {metrics['system']!r}, expected one of {', '.join(SYSTEMS)}.")
    scorers, further = (metrics.get("empathy", {}).get(key) or {} for key in ("scorers", "held_out_scorers"))
    class_names = {way: numbers["class_names"] for way, numbers in metrics.get("recognition", {}).items()}
    folds, conditions = metrics.get("folds") or {}, _conditions(metrics)
    protocol = {name: metrics["data"].get(name) for name in ("split", "held_out", "limit", "fingerprint")}
    protocol["folds"] = folds.get("column")
    protocol |= {f"classes ({way})": names for way, names in class_names.items()}
    for what, one in (("held-out empathy scorers", further), ("empathy scorers", scorers)):
        if one.get("fingerprint") is not None:
            protocol[what] = one["fingerprint"] + ", in windows" * bool(one.get("in_windows"))
    if "empathy scorers" in protocol and "longest reply" in conditions:
        protocol["longest reply (max_new_tokens)"] = conditions["longest reply"]
    held_out_quality = {HELD_OUT[name]: quality for name, quality in (further.get("quality") or {}).items()}
    return Run(
        path=path,
        name=str(metrics.get("name") or path.name),
        system=metrics["system"],
        data=metrics["data"],
        clips={line["id"]: _without_nan(line) for line in read_predictions(path)[1] if "error" not in line},
        class_names=class_names,
        protocol=protocol,
        scorer_quality={**(scorers.get("quality") or {}), **held_out_quality},
        conditions=conditions,
        seen=metrics.get("training") or {},
        folds=folds,
    )


def _without_nan(line: dict) -> dict:
    """Take a label that is NaN, as tables have it, for none."""
    return {name: None if value != value else value for name, value in line.items()}


def group_by_corpus(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each corpus, which must have the same clips, labels, classes, scorers and folds.

    Where a corpus was measured in several ways (splits, held-out rows, label sets, data), each by two runs or more,
    each is a group of its own, named by what sets it apart.
    """
    corpora: dict[str, list[Run]] = {}
    for run in runs:
        corpora.setdefault(str(run.data.get("corpus") or run.data.get("id")), []).append(run)
    groups = {title: of for corpus, members in corpora.items() for title, of in _split_by_protocol(corpus, members)}
    for corpus, members in groups.items():
        for first, other in combinations(members, 2):
            _check_same_data(corpus, first, other)
    return groups


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Say in what else the runs of one corpus differ: prompts, precision, versions; and what is not recorded."""
    notes = []
    for what in dict.fromkeys(name for run in runs for name in run.conditions):
        values = [(run.conditions[what], run.name) for run in runs if what in run.conditions]
        if len({str(value) for value, _ in values}) > 1:
            each = ", ".join(dict.fromkeys(f"{value} ({name})" for value, name in values))
            notes.append(f"the runs differ in {what}" + ("" if what == "prompts" else f": {each}"))
        if lacking := dict.fromkeys(run.name for run in runs if what not in run.conditions):
            notes.append(f"{what} of {', '.join(lacking)} is not recorded: evaluate again to have it compared")
    return notes


def _conditions(metrics: dict) -> dict:
    """Return how a run was asked; what stands in a prompt for the clip, which is its system's, counts for nothing."""
    parts = ("prompts", "model", "generation", "versions")
    prompts, model, generation, versions = (metrics.get(name) or {} for name in parts)
    spoken = {name: re.sub(r"\{transcript\}|<\|audio\|>", "…", text) for name, text in prompts.items()}
    found = {
        "prompts": json.dumps(spoken, sort_keys=True) if prompts else None,
        "precision": model.get("dtype"),
        "longest reply": generation.get("max_new_tokens", {}).get("reply"),
        **{f"version of {name}": versions.get(name) for name in ("relllm", "transformers", "torch")},
    }
    return {name: value for name, value in found.items() if value is not None}


def _split_by_protocol(corpus: str, members: list[Run]) -> list[tuple[str, list[Run]]]:
    """Return the runs of each way a corpus was measured; all under its name if one way has a single run.

    A run without recognition has no classes: it belongs to each way that is its own but for them.
    """
    known = dict.fromkeys(_protocol(run) for run in members if run.class_names)
    ways: dict[tuple[str, ...], list[Run]] = {}
    for run in members:
        own = _protocol(run)
        like = [way for way in known if all(mine in ("", its) for mine, its in zip(own, way, strict=True))]
        for way in like or [own]:
            ways.setdefault(way, []).append(run)
    if len(ways) == 1 or any(len([run for run in of if run.class_names] or of) < 2 for of in ways.values()):
        return [(corpus, members)]
    differing = [at for at, values in enumerate(zip(*ways, strict=True)) if len(set(values)) > 1]
    words = [at for at in differing if at < len(next(iter(ways))) - 1]  # the data, where nothing else does
    titles = [", ".join(filter(None, [corpus, *(way[at] for at in words or differing)])) for way in ways]
    return list(zip(titles, ways.values(), strict=True))


def _protocol(run: Run) -> tuple[str, ...]:
    """Return split, what is held out, folds, classes (empty without) and data of a run, in words."""
    shared, classes = run.protocol, next(iter(run.class_names.values()), [])
    held_out = f"held out {shared['held_out']}" if shared["held_out"] else "no rows held out"
    folds = f"folds by {shared['folds']}" if shared["folds"] else "no folds"
    fingerprint = str(shared["fingerprint"]).removeprefix("sha256:")[:8]
    return str(shared["split"]), held_out, folds, f"{len(classes)} classes" if classes else "", fingerprint


def _check_same_data(corpus: str, first: Run, other: Run) -> None:
    for what in (name for name in first.protocol if name in other.protocol):
        one, two = first.protocol[what], other.protocol[what]
        if one != two:
            raise ValueError(
                f"{first.path} and {other.path} are both on {corpus}, but their {what} differ: {one!r} and {two!r}. "
                "Only runs on the same clips, measured alike, can be compared; evaluate one of them again."
            )
    for clip_id in first.clips.keys() & other.clips.keys():
        for label in ("emotion", *DIMENSIONS):
            one, two = first.clips[clip_id].get(label), other.clips[clip_id].get(label)
            if one != two:
                raise ValueError(
                    f"Clip {clip_id!r}: {label} is {one!r} in {first.path} and {two!r} in {other.path}. The runs are "
                    "on different labels; evaluate one of them again."
                )
