"""What the parsers of corpora share. Nothing here opens audio; a folder is listed without a `stat` for each file."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from relllm.labels import canonical_emotion

from .rows import LABEL_SETS, LABEL_SOURCE, Corpus, Dropped, LabelSet, Row, make_row

# Reasons of `Dropped`: the same words for the same reason.
NO_AUDIO = "no audio file"
NO_LABEL = "no label"
BAD_LINE = "label line does not parse"
UNKNOWN_EMOTION = "unknown emotion name"
OUTSIDE_SET = "emotion outside the label set"
OUTSIDE_SCALE = "dimension outside the scale"
REPEATED = "repeated id"

AUDIO_SUFFIX = ".wav"
_NUMBER = re.compile(r"-?\d+(\.\d+)?", flags=re.ASCII)
_SHOWN = 20  # names in a note or an error; the rest is counted
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Label:
    """What a corpus says of one utterance, as its files have it."""

    id: str
    emotion: str | None  # `None` where the labels are hidden
    dimensions: dict[str, str]  # on the corpus's own scale
    where: str  # file and line
    speaker: str | None = None
    session: str | None = None
    split: str | None = None


def keep_first(found: Iterable[Label | Dropped], corpus: Corpus) -> dict[str, Label]:
    """Return the labels by id; what does not parse and what comes again is dropped."""
    labels: dict[str, Label] = {}
    for entry in found:
        if isinstance(entry, Dropped):
            corpus.dropped.append(entry)
        elif entry.id in labels:
            corpus.dropped.append(Dropped(entry.id, REPEATED, f"{entry.where}, first in {labels[entry.id].where}"))
        else:
            labels[entry.id] = entry
    return labels


def label_to_row(
    label: Label, audio: str | None, *, label_set: LabelSet, scale: tuple[float, float], merge_excited: bool = False
) -> Row | Dropped:
    """Return the row of a labelled utterance in English, or the reason why there is none."""
    known: dict[str, object] = {}
    if label.emotion is not None:
        try:
            emotion = canonical_emotion(label.emotion)
        except ValueError as error:
            return Dropped(label.id, UNKNOWN_EMOTION, f"{label.where}: {error}")
        emotion = "happy" if merge_excited and emotion == "excited" else emotion
        if is_outside(emotion, label_set):
            return Dropped(label.id, OUTSIDE_SET, label.emotion)
        if odd := {name: value for name, value in label.dimensions.items() if not _NUMBER.fullmatch(value)}:
            return Dropped(label.id, BAD_LINE, f"{label.where}: {odd} is no number")
        try:
            dimensions = normalise({name: float(value) for name, value in label.dimensions.items()}, *scale)
        except ValueError as error:
            return Dropped(label.id, OUTSIDE_SCALE, f"{label.where}: {error} (emotion {label.emotion})")
        known = {"emotion": emotion, **dimensions, "dimension_source": LABEL_SOURCE}
    if audio is None:
        return Dropped(label.id, NO_AUDIO, label.where)
    of_label = {"speaker": label.speaker, "session": label.session, "split": label.split, "language": "en"}
    return make_row(id=label.id, audio=audio, **of_label, **known)


def drop_unlabelled(corpus: Corpus, labels: Iterable[str], audio: Mapping[str, str]) -> None:
    """Count the audio files that no label is about."""
    known = {*labels, *(entry.id for entry in corpus.dropped)}
    corpus.dropped += [Dropped(name, NO_LABEL, path) for name, path in audio.items() if name not in known]


def is_outside(emotion: str | None, label_set: LabelSet) -> bool:
    """Return whether an utterance is kept out. `None`, "other" or "no agreement", has a place in `"all"` only."""
    return label_set != "all" if emotion is None else emotion not in LABEL_SETS[label_set]


def normalise(values: Mapping[str, float], lowest: float, highest: float) -> dict[str, float]:
    """Map ratings by dimension from a corpus's scale to [0, 1]; one outside it is a `ValueError`, not clipped."""
    for dimension, value in values.items():
        if not lowest <= value <= highest:
            raise ValueError(f"{dimension} is {value:g}, expected {lowest:g} to {highest:g}")
    return {dimension: (value - lowest) / (highest - lowest) for dimension, value in values.items()}


def find_tree(root: Path, locate: Callable[[Path], Path | None], wanted: str) -> Path:
    """Return the absolute folder where `locate` finds the tree of a corpus, `wanted` in words.

    Without such a tree a `ValueError` says what is there, and whether it is one level up or down.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {state}; expected a folder with {wanted}.")
    found = locate(root)
    if found is not None:
        return found
    folders, files = list_folder(root)
    near = [path for path in (root.parent, *(root / name for name in folders)) if _is_tree(path, locate)]
    there = name_some(map(str, near))
    remedy = f"It is in {there}: give that." if near else "Give the folder that has them."
    content = name_some([f"{name}/" for name in folders] + files) or "nothing"
    raise ValueError(f"{root}: expected {wanted}; found {content}. {remedy}")


def _is_tree(folder: Path, locate: Callable[[Path], Path | None]) -> bool:
    try:
        return locate(folder) is not None
    except PermissionError:  # somebody else's folder beside the corpus
        return False


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files, without what macOS leaves behind."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def walk_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders beneath a folder and then the folder itself: deeper ones come first."""
    for name in list_folder(folder)[0]:
        yield from walk_folders(folder / name)
    yield folder


def list_audio(folder: Path) -> dict[str, str]:
    """Return the audio files of a folder, not of those in it: name without suffix -> absolute path."""
    prefix = f"{folder.absolute()}{os.sep}"
    names = (name for name in list_folder(folder)[1] if name.lower().endswith(AUDIO_SUFFIX))
    return {name[: -len(AUDIO_SUFFIX)]: prefix + name for name in names}


def read_lines(path: Path, fallbacks: Sequence[str] = ()) -> tuple[list[str], str]:
    """Return the stripped lines of a text file whose encoding nobody wrote down, and the encoding.

    After a byte order mark and UTF-8 the `fallbacks` are tried, then Windows-1252 and Latin-1, which knows every byte.
    """
    content = path.read_bytes()
    marked = [encoding for mark, encoding in _BOMS if content.startswith(mark)]
    for encoding in (*marked, "utf-8", *fallbacks, "cp1252", "latin-1"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        # Not `splitlines`, which would also split at characters that are no end of a line in these files.
        return [line.strip() for line in re.split("\r\n|\r|\n", text)], encoding
    raise AssertionError("Latin-1 decodes every byte.")


def note(corpus: Corpus, names: Iterable[str], text: str) -> None:
    """Add a note with `{names}`, of which there are `{count}`, unless there are none."""
    if listed := list(names):
        corpus.notes.append(text.format(count=f"{len(listed):,}", names=name_some(listed)))


def name_some(names: Iterable[str]) -> str:
    """Return the first names for a note or an error, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
