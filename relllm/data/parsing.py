"""What the parsers of corpora share. Nothing here opens audio, and no file is asked for its `stat`."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from relllm.labels import canonical_emotion, find_emotion

from .rows import LABEL_SETS, LABEL_SOURCE, OTHER, Corpus, Dropped, LabelSet, Row, make_row

# Reasons of `Dropped`: the same words for the same reason.
NO_AUDIO = "no audio file"
NO_LABEL = "no label"
BAD_LINE = "label line does not parse"
UNKNOWN_EMOTION = "unknown emotion name"
OUTSIDE_SET = "emotion outside the label set"
OUTSIDE_SCALE = "dimension outside the scale"
REPEATED = "repeated id"

Scale: TypeAlias = tuple[float, float]  # its lowest and highest rating
_NUMBER = re.compile(r"-?\d+(\.\d+)?", flags=re.ASCII)
_TOLD = ("speaker", "session", "split", "gender", "style")  # of a label, which a row has alike
_SHOWN = 20  # names in a note or an error; the rest is counted


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
    gender: str | None = None
    style: str | None = None
    votes: list[str] = field(default_factory=list)  # of single raters, as they wrote them


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
    label: Label, audio: str | None, corpus: Corpus, *, label_set: LabelSet, scale: Scale, merge_excited: bool = False
) -> Row | Dropped:
    """Return the row of a labelled utterance in English, or the reason why there is none.

    A rating outside the scale is left empty, and the corpus is told; the row stays.
    """
    merged = {"excited": "happy"} if merge_excited else {}
    known: dict[str, object] = {name: getattr(label, name) for name in _TOLD}
    if label.emotion is not None:
        try:
            emotion = canonical_emotion(label.emotion)
        except ValueError as error:
            return Dropped(label.id, UNKNOWN_EMOTION, f"{label.where}: {error}")
        emotion = merged.get(str(emotion), emotion)
        if is_outside(emotion, label_set):
            return Dropped(label.id, OUTSIDE_SET, label.emotion)
        if odd := {name: value for name, value in label.dimensions.items() if not _NUMBER.fullmatch(value)}:
            return Dropped(label.id, BAD_LINE, f"{label.where}: {odd} is no number")
        known |= {"emotion": emotion, "dimension_source": LABEL_SOURCE}
    if audio is None:
        return Dropped(label.id, NO_AUDIO, label.where)
    for name, value in label.dimensions.items() if label.emotion is not None else ():
        known[name] = scale_rating(float(value), scale, name, (label.id, label.where), corpus)
    votes = map(name_vote, label.votes)
    known["emotion_votes"] = [merged.get(vote, vote) for vote in votes] or None
    return make_row(id=label.id, audio=audio, language="en", **known)


def name_vote(written: str) -> str:
    """Return the canonical name of an emotion that one rater gave, "other" where it has none."""
    return find_emotion(written, OTHER) or OTHER


def scale_rating(value: float, scale: Scale, name: str, row: tuple[str, str], corpus: Corpus) -> float | None:
    """Return a rating in [0, 1], of a row's id and place; outside its scale it is left empty, and the corpus told."""
    low, high = scale
    if low <= value <= high:
        return (value - low) / (high - low)
    wrong = f"{row[1]}: {name} is {value:g}, expected {low:g} to {high:g}"
    corpus.blanked.append(Dropped(row[0], OUTSIDE_SCALE, wrong))
    return None


def drop_unlabelled(corpus: Corpus, labels: Iterable[str], audio: Mapping[str, str]) -> None:
    """Count the audio files that no label is about."""
    known = {*labels, *(entry.id for entry in corpus.dropped)}
    corpus.dropped += [Dropped(name, NO_LABEL, path) for name, path in audio.items() if name not in known]


def is_outside(emotion: str | None, label_set: LabelSet) -> bool:
    """Return whether an utterance is kept out. `None`, "other" or "no agreement", has a place in `"all"` only."""
    return label_set != "all" and emotion not in LABEL_SETS[label_set]


def find_tree(root: Path, locate: Callable[[Path], Path | None], wanted: str) -> Path:
    """Return the absolute folder where the tree of a corpus begins, which `locate` finds in a folder.

    Without one a `ValueError` has it in words (`wanted`), what is there instead, and whether it is a level up or down.
    """
    root = root.expanduser().absolute()
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {state}; expected a folder with {wanted}.")
    if found := locate(root):
        return found
    folders, files = list_folder(root)
    around = (root.parent, *(root / name for name in folders))
    near = name_some(str(path) for path in around if _has_tree(path, locate))
    remedy = f"It is in {near}: give that." if near else "Give the folder that has them."
    content = name_some([f"{name}/" for name in folders] + files) or "nothing"
    raise ValueError(f"{root}: expected {wanted}; found {content}. {remedy}")


def _has_tree(folder: Path, locate: Callable[[Path], Path | None]) -> bool:
    try:
        return locate(folder) is not None
    except PermissionError:  # somebody else's folder beside the corpus
        return False


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the files in a folder, without dotfiles and `__MACOSX`."""
    with os.scandir(folder) as entries:
        kept = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    files = [name for name, is_folder in kept if not is_folder]
    return [name for name, is_folder in kept if is_folder and name != "__MACOSX"], files


def walk_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders beneath a folder and then the folder itself: deeper ones come first."""
    for name in list_folder(folder)[0]:
        yield from walk_folders(folder / name)
    yield folder


def list_audio(folder: Path) -> dict[str, str]:
    """Return the WAV files of a folder, not of those in it: name without suffix -> absolute path."""
    prefix = f"{folder.absolute()}{os.sep}"
    return {name[:-4]: prefix + name for name in list_folder(folder)[1] if name.lower().endswith(".wav")}


def decode_text(path: Path, fallbacks: Sequence[str] = ()) -> tuple[str, str]:
    """Return what is in a text file and the encoding that read it: UTF-8, a fallback, Windows-1252, or Latin-1."""
    content = path.read_bytes()
    marked = ("utf-16",) if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ()
    for encoding in (*marked, "utf-8-sig", *fallbacks, "cp1252", "latin-1"):
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes every byte.")


def read_lines(path: Path, fallbacks: Sequence[str] = ()) -> tuple[list[str], str]:
    """Return the stripped lines of a text file and its encoding, as [`decode_text`] finds it."""
    text, encoding = decode_text(path, fallbacks)
    # Not `splitlines`, which would also split at characters that are no end of a line in these files.
    return [line.strip() for line in re.split("\r\n|\r|\n", text)], encoding


def note(corpus: Corpus, names: Iterable[str], text: str) -> None:
    """Add a note with `{names}`, of which there are `{count}`, unless there are none."""
    if listed := list(names):
        corpus.notes.append(text.format(count=f"{len(listed):,}", names=name_some(listed)))


def name_some(names: Iterable[str]) -> str:
    """Return the first names for a note or an error, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
