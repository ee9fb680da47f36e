"""What became of the rows of a corpus, as numbers.

What lives here: counting. What does not: drawing (`plots.py`) and the data card (`card.py`), which says less: the
report has ids and paths and is for the person who prepared the corpus.
"""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import soundfile

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS

from .rows import Corpus

if TYPE_CHECKING:
    from .preparing import Shard

FORMAT = "relllm-data-1"  # raise it when the same rows would give other bytes
UNSPLIT = "unsplit"  # the files with the rows that belong to no split
UNLABELLED = "unlabelled"


@dataclass
class SplitSummary:
    """What is known of the kept rows of a split.

    Attributes:
        durations_s (`list[float]`): Of each row, in seconds.
        emotions, speakers, sessions (`Counter`): Rows by value; `"unlabelled"` for none.
        dimensions (`dict[str, list[float]]`): Labels of the rows that have them.
        points (`list[tuple[float, float, str]]`): Valence, arousal and emotion of the rows that have both numbers.
    """

    durations_s: list[float] = field(default_factory=list)
    emotions: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    sessions: Counter[str] = field(default_factory=Counter)
    dimensions: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in DIMENSIONS})
    points: list[tuple[float, float, str]] = field(default_factory=list)


def summarise_shards(results: Sequence[tuple[Shard, Mapping]]) -> dict[str, SplitSummary]:
    """Numbers of each split that has rows, from the shards and their journal's entries."""
    summary: dict[str, SplitSummary] = defaultdict(SplitSummary)
    for shard, entry in results:
        for index, duration_s, _ in entry["kept"]:
            row = shard.rows[index]
            split = summary[row["split"] or UNSPLIT]
            split.durations_s.append(duration_s)
            split.emotions[row["emotion"] or UNLABELLED] += 1
            split.speakers[row["speaker"] or UNLABELLED] += 1
            split.sessions[row["session"] or UNLABELLED] += 1
            for name, value in (
                ("arousal", row["arousal"]),
                ("dominance", row["dominance"]),
                ("valence", row["valence"]),
            ):
                if value is not None:
                    split.dimensions[name].append(value)
            if row["valence"] is not None and row["arousal"] is not None:
                split.points.append((row["valence"], row["arousal"], row["emotion"] or UNLABELLED))
    return dict(summary)


def build_report(
    corpus: Corpus,
    results: Sequence[tuple[Shard, Mapping]],
    summary: Mapping[str, SplitSummary],
    settings: Mapping[str, object],
) -> dict:
    """The content of `report.json`; the same rows and settings give the same report.

    Args:
        corpus ([`Corpus`]): With what the parser dropped.
        results (`Sequence[tuple[Shard, Mapping]]`): Shards and their journal's entries.
        summary (`Mapping[str, SplitSummary]`): Of the kept rows.
        settings (`Mapping`): Of the run.

    Returns:
        `dict`: JSON can hold it.
    """
    entries = [entry for _, entry in results]
    dropped: dict[str, list[dict]] = defaultdict(list)
    for item in [*map(asdict, corpus.dropped), *(item for entry in entries for item in entry["dropped"])]:
        dropped[item["reason"]].append({"id": item["id"], "detail": item["detail"]})
    overshoot = {name: samples for entry in entries for name, samples in entry["overshoot"].items()}
    return {
        "format": FORMAT,
        "corpus": corpus.facts.name,
        "title": corpus.facts.title,
        "rows": {"kept": sum(len(entry["kept"]) for entry in entries), "dropped": sum(map(len, dropped.values()))},
        "hours": round(sum(sum(split.durations_s) for split in summary.values()) / 3600, 4),
        "splits": {name: _describe_split(split) for name, split in summary.items()},
        "speakers_in_several_splits": _shared_speakers(summary),
        "dropped": {
            reason: {"count": len(clips), "clips": clips}
            for reason, clips in sorted(dropped.items(), key=lambda item: (-len(item[1]), item[0]))
        },
        "kept_but_marked": {
            mark: [name for entry in entries for name in entry[mark]] for mark in ("silent", "clipped")
        },
        "conversion": {
            "converted": sum(entry["converted"] for entry in entries),
            "samples_set_to_full_scale": overshoot,
        },
        "notes": corpus.notes,
        "settings": settings,
        "versions": _versions(),
    }


def order_emotions(names: Sequence[str]) -> list[str]:
    """Emotions in the package's order, unlabelled rows last."""
    order = (*EMOTIONS, *FURTHER_EMOTIONS, UNLABELLED)
    return sorted(set(names), key=order.index)


def _describe_split(split: SplitSummary) -> dict:
    durations = sorted(split.durations_s)
    return {
        "rows": len(durations),
        "hours": round(sum(durations) / 3600, 4),
        "duration_s": {"shortest": durations[0], "median": durations[len(durations) // 2], "longest": durations[-1]},
        "emotions": {name: split.emotions[name] for name in order_emotions(list(split.emotions))},
        "dimensions": {
            name: {"rows": len(values), "mean": round(sum(values) / len(values), 4) if values else None}
            for name, values in split.dimensions.items()
        },
        "speakers": dict(sorted(split.speakers.items())),
        "sessions": dict(sorted(split.sessions.items())),
    }


def _shared_speakers(summary: Mapping[str, SplitSummary]) -> list[str]:
    counts = Counter(name for split in summary.values() for name in split.speakers if name != UNLABELLED)
    return sorted(name for name, num_splits in counts.items() if num_splits > 1)


def _versions() -> dict[str, str]:
    from relllm import __version__

    packages = ("datasets", "numpy", "pyarrow", "soundfile", "torch", "torchaudio")
    return {
        "relllm": __version__,
        "python": platform.python_version(),
        "libsndfile": soundfile.__libsndfile_version__,
        **{name: version(name) for name in packages},
    }
