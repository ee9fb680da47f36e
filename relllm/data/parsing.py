"""What the parsers of corpora share: finding the tree, listing it, text of unknown encoding, the label set, the scale.

What lives here: that, and the reasons for which an utterance is left out. What does not: the format of any corpus (one
file each). Nothing here opens audio, and a folder is listed in one pass without a `stat` for each file.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .rows import LABEL_SETS

# Reasons of `Dropped`: the same words for the same reason.
NO_AUDIO = "no audio file"
NO_LABEL = "no label"
BAD_LINE = "label line does not parse"
UNKNOWN_EMOTION = "unknown emotion name"
OUTSIDE_SET = "emotion outside the label set"
OUTSIDE_SCALE = "dimension outside the scale"
REPEATED = "repeated id"

AUDIO_SUFFIX = ".wav"
_SHOWN = 20  # names in a note or an error; the rest is counted
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def check_label_set(label_set: str) -> None:
    """Raises `ValueError` for a label set that is not one of `LABEL_SETS`."""
    if label_set not in LABEL_SETS:
        raise ValueError(f"label_set is {label_set!r}, expected one of {', '.join(map(repr, LABEL_SETS))}.")


def is_outside(emotion: str | None, label_set: str) -> bool:
    """Whether an utterance is to be kept out. `None`, "other" or "no agreement", has a place in `"all"` only."""
    return label_set != "all" if emotion is None else emotion not in LABEL_SETS[label_set]


def normalise(values: Mapping[str, float], lowest: float, highest: float) -> dict[str, float]:
    """Maps ratings from a corpus's scale to [0, 1].

    Args:
        values (`Mapping[str, float]`): Ratings by dimension.
        lowest (`float`): Of the scale: becomes 0.
        highest (`float`): Of the scale: becomes 1.

    Returns:
        `dict[str, float]`: In [0, 1].

    Raises:
        ValueError: A rating outside the scale, which is named; nothing is clipped.
    """
    for dimension, value in values.items():
        if not lowest <= value <= highest:
            raise ValueError(f"{dimension} is {value:g}, expected {lowest:g} to {highest:g}")
    return {dimension: (value - lowest) / (highest - lowest) for dimension, value in values.items()}


def find_tree(root: Path, locate: Callable[[Path], Path | None], wanted: str) -> Path:
    """The folder where the tree of a corpus begins, absolute.

    Args:
        root (`Path`): What the user gave.
        locate (`Callable[[Path], Path | None]`): From a folder to where the tree begins, `None` if it is not there.
        wanted (`str`): The tree in words, for the error.

    Returns:
        `Path`: What `locate` gave.

    Raises:
        ValueError: If there is no such tree. The message says what is there, and whether the tree is one level up or
            down.
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
    remedy = (
        f"It is in {name_some(str(path) for path in near)}: give that." if near else "Give the folder that has them."
    )
    content = name_some([f"{name}/" for name in folders] + files) or "nothing"
    raise ValueError(f"{root}: expected {wanted}; found {content}. {remedy}")


def _is_tree(folder: Path, locate: Callable[[Path], Path | None]) -> bool:
    try:
        return locate(folder) is not None
    except PermissionError:  # somebody else's folder beside the corpus
        return False


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, each sorted.

    What macOS leaves behind is no part of a corpus: `._*` and other dotfiles, and `__MACOSX`.
    """
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def list_audio(folder: Path) -> dict[str, str]:
    """Audio files of a folder, not of the folders in it: name without suffix -> absolute path."""
    _, files = list_folder(folder)
    prefix = f"{folder.absolute()}{os.sep}"
    suffix_length = len(AUDIO_SUFFIX)
    return {name[:-suffix_length]: prefix + name for name in files if name.lower().endswith(AUDIO_SUFFIX)}


def read_lines(path: Path, fallbacks: Sequence[str] = ()) -> tuple[list[str], str]:
    """The lines of a text file whose encoding nobody wrote down.

    Args:
        path (`Path`): The file.
        fallbacks (`Sequence[str]`, *optional*): Encodings to try, in this order, after a byte order mark and UTF-8.
            Windows-1252 and Latin-1, which knows every byte, come last.

    Returns:
        `tuple[list[str], str]`: The lines, stripped, without a byte order mark; the encoding that read them.
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


def name_some(names: Iterable[str]) -> str:
    """Names for a note or an error: the first ones, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN:,} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
