"""Folders that `relllm evaluate` wrote, read back to be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from .evaluation_settings import FORMAT, HELD_OUT, METRICS, PREDICTIONS, SYSTEMS


@dataclass(frozen=True)
class Run:
    """One system on one data set."""

    path: Path
    name: str  # what the system was called
    system: str
    data: dict  # the part `data` of metrics.json: corpus, split, held_out, fingerprint, …
    clips: dict[str, dict]  # what was read of each clip, by id; clips that failed are left out
    failed: tuple[str, ...]  # ids of the clips that could not be read
    class_names: dict[str, list[str]]  # of each way of recognition
    scorers: str | None  # fingerprint of what scored the replies
    held_out_scorers: str | None  # and of what scored them beside
    scorer_quality: dict  # of each scorer, as `read_quality` has it, by `EMPATHY_PARTS`; empty in older runs
    conditions: dict  # how it was asked: "longest reply", "prompts", "precision", "versions"; empty where not recorded
    seen: dict  # what its training has to do with the rows, as `find_seen` has it; empty in older runs
    fold_column: str | None  # what the folds are, where the predictions of several folds are pooled
    fold_means: dict  # as in metrics.json; empty without folds


def read_run(path: Path) -> Run:
    """Read metrics.json and predictions.jsonl of a complete run."""
    for name in (METRICS, PREDICTIONS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}: it is no complete run. `relllm evaluate … --out {path}` writes one, and goes "
                "on where it was interrupted."
            )
    metrics = _parse_object((path / METRICS).read_text(encoding="utf-8"), str(path / METRICS))
    found = metrics.get("format")
    if found != FORMAT or not isinstance(metrics.get("data"), dict):
        raise ValueError(f"{path / METRICS} has the format {found!r}, expected {FORMAT!r}. Evaluate again.")
    if metrics.get("system") not in SYSTEMS:
        raise ValueError(f"{path}: the system is {metrics.get('system')!r}, expected one of {', '.join(SYSTEMS)}.")
    clips = _read_clips(path / PREDICTIONS)
    folds = metrics.get("folds") or {}
    scorers, further = (metrics.get("empathy", {}).get(key) or {} for key in ("scorers", "held_out_scorers"))
    return Run(
        path=path,
        name=str(metrics.get("name") or path.name),
        system=metrics["system"],
        data=metrics["data"],
        clips={clip_id: clip for clip_id, clip in clips.items() if "error" not in clip},
        failed=tuple(clip_id for clip_id, clip in clips.items() if "error" in clip),
        class_names={way: numbers["class_names"] for way, numbers in metrics.get("recognition", {}).items()},
        scorers=_name_scorers(scorers),
        held_out_scorers=_name_scorers(further),
        scorer_quality={
            **(scorers.get("quality") or {}),
            **{HELD_OUT[name]: quality for name, quality in (further.get("quality") or {}).items()},
        },
        conditions=_conditions(metrics),
        seen=metrics.get("training") or {},
        fold_column=folds.get("column"),
        fold_means=folds.get("mean", {}),
    )


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
            _check_same_labels(first, other)
    return groups


def find_differences(runs: Iterable[Run]) -> list[str]:
    """Say in what else the runs of one corpus differ: prompts, precision, versions; and what is not recorded."""
    members = list(runs)
    notes = []
    for what in dict.fromkeys(name for run in members for name in run.conditions):
        values = [(run.conditions[what], run.name) for run in members if what in run.conditions]
        if len({str(value) for value, _ in values}) > 1:
            each = ", ".join(dict.fromkeys(f"{value} ({name})" for value, name in values))
            notes.append(f"the runs differ in {what}" + ("" if what == "prompts" else f": {each}"))
        if lacking := dict.fromkeys(run.name for run in members if what not in run.conditions):
            notes.append(f"{what} of {', '.join(lacking)} is not recorded: evaluate again to have it compared")
    return notes


def _conditions(metrics: dict) -> dict:
    """Return how a run was asked; what stands in a prompt for the clip, which is its system's, counts for nothing."""
    found: dict[str, object] = {}
    if prompts := metrics.get("prompts"):
        spoken = {name: re.sub(r"\{transcript\}|<\|audio\|>", "…", text) for name, text in prompts.items()}
        found["prompts"] = json.dumps(spoken, sort_keys=True)
    if (dtype := (metrics.get("model") or {}).get("dtype")) is not None:
        found["precision"] = dtype
    if longest := ((metrics.get("generation") or {}).get("max_new_tokens") or {}).get("reply"):
        found["longest reply"] = longest
    for name in ("relllm", "transformers", "torch"):
        if version := (metrics.get("versions") or {}).get(name):
            found[f"version of {name}"] = version
    return found


def _name_scorers(scorers: dict) -> str | None:
    """Return the fingerprint of what scored the replies, and how it read them."""
    name = scorers.get("fingerprint")
    return f"{name}, in windows" if name is not None and scorers.get("in_windows") else name


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
    data, classes = run.data, next(iter(run.class_names.values()), [])
    held_out = f"held out {data['held_out']}" if data.get("held_out") else "no rows held out"
    folds = f"folds by {run.fold_column}" if run.fold_column else "no folds"
    fingerprint = str(data.get("fingerprint")).removeprefix("sha256:")[:8]
    return str(data.get("split")), held_out, folds, f"{len(classes)} classes" if classes else "", fingerprint


def _check_same_data(corpus: str, first: Run, other: Run) -> None:
    names = ("split", "held_out", "limit", "fingerprint")
    pairs: list[tuple] = [(name, first.data.get(name), other.data.get(name)) for name in names]
    pairs.append(("folds", first.fold_column, other.fold_column))
    if first.held_out_scorers is not None and other.held_out_scorers is not None:
        pairs.append(("held-out empathy scorers", first.held_out_scorers, other.held_out_scorers))
    if first.scorers is not None and other.scorers is not None:
        pairs.append(("empathy scorers", first.scorers, other.scorers))
        longest = "longest reply"
        if longest in first.conditions and longest in other.conditions:
            pairs.append((f"{longest} (max_new_tokens)", first.conditions[longest], other.conditions[longest]))
    for way in first.class_names.keys() & other.class_names.keys():
        pairs.append((f"classes ({way})", first.class_names[way], other.class_names[way]))
    for what, one, two in pairs:
        if one != two:
            raise ValueError(
                f"{first.path} and {other.path} are both on {corpus}, but their {what} differ: {one!r} and {two!r}. "
                "Only runs on the same clips, measured alike, can be compared; evaluate one of them again."
            )


def _check_same_labels(first: Run, other: Run) -> None:
    for clip_id in first.clips.keys() & other.clips.keys():
        for label in ("emotion", "arousal", "dominance", "valence"):
            one, two = first.clips[clip_id].get(label), other.clips[clip_id].get(label)
            if one != two:
                raise ValueError(
                    f"Clip {clip_id!r}: {label} is {one!r} in {first.path} and {two!r} in {other.path}. The runs are "
                    "on different labels; evaluate one of them again."
                )


def _read_clips(path: Path) -> dict[str, dict]:
    clips: dict[str, dict] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        clip = _parse_object(line, f"{path}:{number}")
        if "settings" in clip and "id" not in clip:
            continue
        if not isinstance(clip.get("id"), str):
            raise ValueError(f"{path}:{number} is no clip: it has no `id`. Evaluate again.")
        clips[clip["id"]] = clip
    if not clips:
        raise ValueError(f"{path} has no clips. Evaluate again.")
    return clips


def _parse_object(text: str, where: str) -> dict:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}). Evaluate again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is no JSON object. Evaluate again.")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")
