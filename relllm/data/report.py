"""What became of the rows of a corpus, as numbers; with ids and paths, for the person who prepared it."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import soundfile

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS

from .rows import UNSPLIT, Corpus

FORMAT = "relllm-data-3"  # raise it when the same rows would give other bytes
UNLABELLED = "unlabelled"


@dataclass
class SplitSummary:
    """What is known of the rows of a split; `"unlabelled"` counts what is not."""

    rows: int = 0
    with_text: int = 0
    durations_s: list[float] = field(default_factory=list)
    emotions: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    sessions: Counter[str] = field(default_factory=Counter)
    dimensions: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in DIMENSIONS})
    # Valence, arousal and emotion of the rows that have both numbers.
    points: list[tuple[float, float, str]] = field(default_factory=list)

    def describe(self) -> dict:
        """Return the numbers as a report has them; durations are empty where none is known."""
        durations = sorted(self.durations_s)
        span = {"shortest": 0, "median": len(durations) // 2, "longest": -1} if durations else {}
        return {
            "rows": self.rows,
            "with_text": self.with_text,
            "hours": round(sum(durations) / 3600, 4) if durations else None,
            "duration_s": {name: durations[place] for name, place in span.items()},
            "emotions": {name: self.emotions[name] for name in order_emotions(self.emotions)},
            "dimensions": {
                name: {"rows": len(values), "mean": round(sum(values) / len(values), 4) if values else None}
                for name, values in self.dimensions.items()
            },
            "speakers": dict(sorted(self.speakers.items())),
            "sessions": dict(sorted(self.sessions.items())),
        }


def summarise_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, SplitSummary]:
    """Return the numbers of each split that has rows; what nobody knows of a row may be absent or `None`."""
    summary: dict[str, SplitSummary] = defaultdict(SplitSummary)
    for row in rows:
        split = summary[row["split"] or UNSPLIT]
        split.rows += 1
        split.with_text += bool(row.get("text"))
        split.durations_s += [row["duration_s"]] if row.get("duration_s") is not None else []
        emotion = row.get("emotion") or UNLABELLED
        split.emotions[emotion] += 1
        split.speakers[row.get("speaker") or UNLABELLED] += 1
        split.sessions[row.get("session") or UNLABELLED] += 1
        known = {name: row[name] for name in DIMENSIONS if row.get(name) is not None}
        for name, value in known.items():
            split.dimensions[name].append(value)
        if {"valence", "arousal"} <= known.keys():
            split.points.append((known["valence"], known["arousal"], emotion))
    return dict(summary)


def build_report(
    corpus: Corpus, entries: Sequence[Mapping], summary: Mapping[str, SplitSummary], settings: Mapping[str, object]
) -> dict:
    """Return the content of `report.json`, from the journal's entries; the same rows and settings give the same."""
    unusable = [item for entry in entries for item in entry["dropped"]]
    unread = {item["id"] for item in unusable}
    dropped = [*map(asdict, corpus.dropped), *unusable]
    voices = Counter(name for split in summary.values() for name in split.speakers if name != UNLABELLED)
    overshoot = {name: samples for entry in entries for name, samples in entry["overshoot"].items()}
    return {
        "format": FORMAT,
        "corpus": corpus.facts.name,
        "title": corpus.facts.title,
        "facts": asdict(corpus.facts),
        "rows": {"kept": sum(len(entry["kept"]) for entry in entries), "dropped": len(dropped)},
        "hours": round(sum(sum(split.durations_s) for split in summary.values()) / 3600, 4),
        "splits": {name: split.describe() for name, split in summary.items()},
        "speakers_in_several_splits": sorted(name for name, count in voices.items() if count > 1),
        "dropped": _group_by_reason(dropped),
        "left_empty": _group_by_reason(asdict(one) for one in corpus.blanked if one.id not in unread),
        "kept_but_marked": {mark: [one for entry in entries for one in entry[mark]] for mark in ("silent", "clipped")},
        "conversion": {
            "converted": sum(entry["converted"] for entry in entries),
            "samples_set_to_full_scale": overshoot,
        },
        "notes": corpus.notes,
        "settings": settings,
        "versions": find_versions("datasets", "numpy", "pyarrow", "soundfile", "torch", "torchaudio")
        | {"libsndfile": soundfile.__libsndfile_version__},
    }


def order_emotions(names: Iterable[str]) -> list[str]:
    """Return emotions in the package's order, then others by the alphabet, unlabelled rows last."""
    given = set(names)
    known = [name for name in (*EMOTIONS, *FURTHER_EMOTIONS) if name in given]
    return known + sorted(given.difference(known), key=lambda name: (name == UNLABELLED, name))


def _group_by_reason(items: Iterable[Mapping]) -> dict[str, dict]:
    """Group what is left out, the most frequent reason first."""
    grouped: dict[str, list[dict]] = defaultdict(list)
    for item in items:
        grouped[item["reason"]].append({"id": item["id"], "detail": item["detail"]})
    ordered = sorted(grouped.items(), key=lambda item: (-len(item[1]), item[0]))
    return {reason: {"count": len(clips), "clips": clips} for reason, clips in ordered}


def find_versions(*names: str) -> dict[str, str]:
    """Return the versions of packages that results depend on, and of Python and this package."""
    from relllm import __version__

    return {"relllm": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
