"""Your own speech as rows: a table with paths and any of the columns, or a bare folder of audio files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from relllm.labels import DIMENSIONS, canonical_emotion

from .. import parsing
from ..data_settings import FolderSettings
from ..loading import read_table
from ..rows import COLUMNS, LABEL_SOURCE, Corpus, CorpusFacts, Dropped, Row, validate_row

TABLES = (".jsonl", ".csv")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".sph")
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".amr", ".3gp", ".mov")  # soundfile cannot
PATH_COLUMNS = ("audio", "path", "file_name")  # the last is that of the audio folders of `datasets`

# Reasons of `Dropped` that no other corpus has.
BAD_ROW = "row does not validate"
NO_PATH = "no path of a local file"


def parse_folder(settings: FolderSettings) -> Corpus:
    """Read a table of utterances, whose paths are relative to its folder, or list the audio files of a folder.

    Where no table gives an id, it is the path without its suffix. Rows without an emotion stay with label set `"all"`
    only. The notes name the columns of the table that a row has no place for.

    Raises:
        FileNotFoundError: Nothing is at `root`.
        ValueError: `root` is another kind of file, a folder without audio, a table without a column of paths, or a
            line is no row.
    """
    root = settings.root.expanduser().absolute()
    table = _find_table(root)
    folder = root if table is None else table.parent
    terms = (
        "Your own recordings: nothing is known here of the consent of those who speak. Publish neither audio nor "
        "transcripts unless they agreed to it."
    )
    corpus = Corpus(CorpusFacts("folder", folder.name, settings.language or "", "other", terms), [], [], [])
    found = _list_audio_files(folder, corpus) if table is None else _read_fields(table, corpus)
    seen: set[str] = set()
    for place, fields in found:
        made = _fields_to_row(fields, place, folder, settings)
        if not isinstance(made, Dropped) and made["id"] in seen:
            made = Dropped(made["id"], parsing.REPEATED, place)
        elif not isinstance(made, Dropped):
            seen.add(made["id"])
        corpus.add(made)
    return corpus


def _find_table(root: Path) -> Path | None:
    """Find the table at `root`, or in it; `None` for a bare folder."""
    if root.is_dir():
        found = [root / f"metadata{suffix}" for suffix in TABLES if (root / f"metadata{suffix}").is_file()]
        if len(found) > 1:
            raise ValueError(f"{root} holds {parsing.name_some(path.name for path in found)}. Give the one to read.")
        return found[0] if found else None
    if not root.exists():
        raise FileNotFoundError(f"Nothing is at {root}. Give a .csv or .jsonl table, or a folder of audio files.")
    if root.suffix.lower() not in TABLES:
        raise ValueError(f"{root} is a {root.suffix or 'nameless kind of'} file; expected .csv, .jsonl or a folder.")
    return root


def _list_audio_files(folder: Path, corpus: Corpus) -> list[tuple[str, dict[str, object]]]:
    """Place and fields of each audio file, sorted by path."""
    paths = sorted(inner / name for inner in parsing.walk_folders(folder) for name in parsing.list_folder(inner)[1])
    audio = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES + OTHER_SUFFIXES]
    if not audio:
        wanted = f"no audio files ({', '.join(AUDIO_SUFFIXES)}) and no metadata.jsonl or metadata.csv"
        raise ValueError(f"{folder} holds {wanted}. Give the table itself if it has another name.")
    if others := len(paths) - len(audio):
        corpus.notes.append(f"Files that are no audio, left out: {others:,}.")
    return [(str(path), {"audio": str(path.relative_to(folder))}) for path in audio]


def _read_fields(table: Path, corpus: Corpus) -> list[tuple[str, dict[str, object]]]:
    """Place and known fields of each line; `audio` from whichever column has the paths."""
    lines = [(f"{table.name}:{number}", fields) for number, fields in read_table(table)]
    if not lines:
        raise ValueError(f"{table} holds no rows.")
    names = list(dict.fromkeys(name for _, fields in lines for name in fields))
    column = next((name for name in PATH_COLUMNS if name in names), None)
    if column is None:
        wanted = ", ".join(PATH_COLUMNS)
        raise ValueError(f"{table} has the columns {names}, none of {wanted}. Name the paths `audio`.")
    strange = [name for name in names if name not in COLUMNS and name != column]
    parsing.note(corpus, strange, "Columns that a row has no place for, left out: {names}.")
    return [(place, fields | {"audio": fields.get(column)}) for place, fields in lines]


def _fields_to_row(fields: Mapping[str, object], place: str, folder: Path, settings: FolderSettings) -> Row | Dropped:
    """Make a valid row, or say why it is none."""
    audio = fields["audio"]
    if not isinstance(audio, str) or not audio or "://" in audio:
        return Dropped(str(fields.get("id") or place), NO_PATH, f"{place}: {audio!r:.200}")
    row: dict[str, object] = {name: _as_text(name, fields.get(name)) for name in COLUMNS}
    row_id = row["id"] = row["id"] or os.path.splitext(audio)[0]
    row["audio"] = str(folder / audio)
    for name, default in (("split", settings.split), ("language", settings.language)):
        row[name] = default if row[name] is None else row[name]
    known = {name: row[name] for name in DIMENSIONS if row[name] is not None}
    if known and row["dimension_source"] is None:
        row["dimension_source"] = LABEL_SOURCE
    for name, value in known.items():
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            return Dropped(str(row_id), parsing.OUTSIDE_SCALE, f"{place}: {name} is {value}, expected [0, 1]")
    reason = parsing.UNKNOWN_EMOTION
    try:
        if isinstance(row["emotion"], str):
            row["emotion"] = canonical_emotion(row["emotion"])
        reason = BAD_ROW
        validate_row(row)
    except ValueError as error:
        return Dropped(str(row_id), reason, f"{place}: {error}")
    valid = cast(Row, row)
    if parsing.is_outside(valid["emotion"], settings.label_set):
        return Dropped(valid["id"], parsing.OUTSIDE_SET, str(valid["emotion"]))
    return valid


def _as_text(name: str, value: object) -> object:
    """Write a number as a name: tables have speakers 1, 2, 3. An empty text is a missing value."""
    if name not in DIMENSIONS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value == "" else value
