"""Your own speech as rows: a table with paths and any of the columns, files whose names say it, or a bare folder."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, cast

from relllm.labels import DIMENSIONS, canonical_emotion, find_emotion

from .. import parsing
from ..data_settings import FolderSettings, LabelSettings, read_scales, read_words
from ..rows import COLUMNS, LABEL_SOURCE, LIST_COLUMNS, Corpus, Dropped, Row, fold_split, validate_row
from ..table_files import parse_number, read_table
from .patterns import OWN, Pattern, find_fields, load_pattern

TABLES = (".jsonl", ".csv", ".tsv")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".sph")
OTHER_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".amr", ".3gp", ".mov")  # soundfile cannot
# What labs call the columns, in lower case and without what is between words; the first that is there is taken.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {name: (name,) for name in COLUMNS} | {
    "id": ("id", "uttid", "utteranceid"),
    "audio": ("audio", "path", "filename", "file", "filepath", "audiopath", "audiofile", "wav", "wavpath", "wavfile"),
    "text": ("text", "transcript", "transcription", "sentence", "utterance"),
    "response": ("response", "reply"),
    "emotion": ("emotion", "label", "emotionlabel", "emotionclass", "emoclass", "category"),
    "emotion_votes": ("emotionvotes", "votes"),
    "arousal": ("arousal", "activation", "emoact"),
    "dominance": ("dominance", "emodom"),
    "valence": ("valence", "emoval"),
    "dimension_source": ("dimensionsource",),
    "speaker": ("speaker", "speakerid", "spk", "spkid", "spkrid", "actor"),
    "split": ("split", "splitset", "partition", "subset"),
    "language": ("language", "lang"),
    "gender": ("gender", "sex"),
}
MOST_OUTSIDE = 0.1  # of the values of a column; more are on another scale

# Reasons of `Dropped` that no other corpus has.
BAD_ROW = "row does not validate"
NO_PATH = "no path of a local file"

Fields: TypeAlias = tuple[str, dict[str, object]]  # file and line, and what they say of a clip by our columns
Words: TypeAlias = Mapping[str, Mapping[str, str]]  # column -> code -> word
Scales: TypeAlias = Mapping[str, parsing.Scale]


def parse_folder(settings: FolderSettings) -> Corpus:
    """Read a table of utterances, whose paths are relative to its folder, or list the audio files of a folder.

    Where no table gives an id, it is the path without its suffix. Rows without an emotion stay with label set `"all"`
    only. The notes name the columns of the table that a row has no place for. What cannot be read, an emotion or split
    of an unknown name, and a column of dimensions on another scale are a `ValueError`.
    """
    name = settings.name
    if settings.pattern is not None:
        pattern = load_pattern(settings.pattern)
        named = pattern if name is None else replace(pattern, facts=replace(pattern.facts, name=name, title=name))
        return parse_pattern(named, settings)
    root = settings.root.expanduser().absolute()
    tables = _find_tables(root)
    folder = root if root.is_dir() else root.parent
    facts = replace(OWN, name=name or "folder", title=name or folder.name, language=settings.language or "")
    corpus = Corpus(facts, [], [], [])
    found = [one for table, split in tables for one in _read_fields(table, split, folder, corpus, settings)]
    add_rows(found if tables else _list_audio_files(folder, corpus), folder, corpus, settings, {})
    return corpus


def parse_pattern(pattern: Pattern, settings: LabelSettings) -> Corpus:
    """Read a folder of audio files, as a pattern over paths and tables says; raises as [`parse_folder`] does."""
    root = settings.root.expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder. Give the one of the audio files.")
    corpus = Corpus(replace(pattern.facts, language=settings.language or pattern.facts.language), [], [], [])
    files = _walk_files(root)
    audio, tables = (
        [path.relative_to(root).as_posix() for path in files if _is_audio(path) == is_so] for is_so in (True, False)
    )
    columns = {**pattern.columns, **read_words(settings.columns, "columns")}
    clips = list(find_fields(pattern, root, audio, tables, corpus))
    if names := {name for _, fields in clips for name in fields}:
        _check_columns(columns, names)
    found = [
        (place, fields | {ours: fields.get(theirs) for ours, theirs in columns.items()}) for place, fields in clips
    ]
    settings = replace(settings, scale=settings.scale or pattern.scale, language=corpus.facts.language or None)
    add_rows(found, root, corpus, settings, pattern.maps)
    return corpus


def add_rows(found: Iterable[Fields], folder: Path, corpus: Corpus, settings: LabelSettings, maps: Words) -> None:
    """Add a row for each clip, or what is wrong with it; `maps` has words for the codes of a column."""
    given = {"emotion": read_words(settings.emotions, "emotions"), "split": read_words(settings.splits, "splits")}
    maps = {name: {**maps.get(name, {}), **given.get(name, {})} for name in maps.keys() | given.keys()}
    found = [(place, _clean(place, fields, maps, settings)) for place, fields in found]
    _name_emotions(found, corpus, settings, maps["emotion"])
    scales = _choose_scales(found, read_scales(settings.scale))
    seen: set[str] = set()
    for place, fields in found:
        blanked = len(corpus.blanked)
        made = _fields_to_row(place, fields, folder, corpus, settings, scales)
        if not isinstance(made, Dropped) and made["id"] in seen:
            made = Dropped(made["id"], parsing.REPEATED, place)
        if isinstance(made, Dropped):
            del corpus.blanked[blanked:]
        else:
            seen.add(made["id"])
        corpus.add(made)


def _find_tables(root: Path) -> list[tuple[Path, str | None]]:
    """Find the table at `root`, in it, or in each of the folders of splits in it; none in a bare folder."""
    if root.is_dir():
        found = _find_metadata(root, None)
        return found or [one for name in parsing.list_folder(root)[0] for one in _find_metadata(root / name, name)]
    if not root.exists():
        raise FileNotFoundError(f"Nothing is at {root}. Give a .csv or .jsonl table, or a folder of audio files.")
    if root.suffix.lower() not in TABLES:
        raise ValueError(f"{root} is a {root.suffix or 'nameless kind of'} file; expected .csv, .jsonl or a folder.")
    return [(root, None)]


def _find_metadata(folder: Path, split: str | None) -> list[tuple[Path, str | None]]:
    found = [folder / f"metadata{suffix}" for suffix in TABLES if (folder / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {parsing.name_some(path.name for path in found)}. Give the one to read.")
    return [(table, split) for table in found]


def _walk_files(folder: Path) -> list[Path]:
    return sorted(inner / name for inner in parsing.walk_folders(folder) for name in parsing.list_folder(inner)[1])


def find_audio(folder: Path) -> list[Path]:
    """Return the audio files in a folder and its folders, sorted; hidden ones are left out."""
    return [path for path in _walk_files(folder) if _is_audio(path)]


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES + OTHER_SUFFIXES


def _list_audio_files(folder: Path, corpus: Corpus) -> list[Fields]:
    paths = _walk_files(folder)
    audio = [path for path in paths if _is_audio(path)]
    if not audio:
        wanted = f"no audio files ({', '.join(AUDIO_SUFFIXES)}) and no metadata.jsonl or metadata.csv"
        raise ValueError(f"{folder} holds {wanted}. Give the table itself if it has another name.")
    if others := len(paths) - len(audio):
        corpus.notes.append(f"Files that are no audio, left out: {others:,}.")
    return [(str(path), {"audio": str(path.relative_to(folder))}) for path in audio]


def _read_fields(table: Path, split: str | None, root: Path, corpus: Corpus, settings: FolderSettings) -> list[Fields]:
    """Return the lines of a table by our names of columns; paths are relative to the root."""
    lines = [(f"{table.relative_to(root)}:{number}", fields) for number, fields in read_table(table)]
    if not lines:
        raise ValueError(f"{table} holds no rows.")
    names = list(dict.fromkeys(name for _, fields in lines for name in fields))
    renamed = _match_columns(names, read_words(settings.columns, "columns"))
    strange = [name for name in names if name not in renamed.values()]
    if "audio" not in renamed:
        wanted = ", ".join(COLUMN_NAMES["audio"])
        raise ValueError(f"{table} has the columns {names}, none of {wanted}. Name it: --columns audio=THEIRS.")
    if strange and not settings.unlabelled and not {"emotion", *DIMENSIONS} & renamed.keys():
        raise ValueError(
            f"{table} has no column of emotions: {strange} are not understood. Name it, --columns "
            f"emotion={strange[0]}, or say that there is none: --unlabelled."
        )
    parsing.note(corpus, strange, "Columns that a row has no place for, left out: {names}.")
    found = []
    for place, fields in lines:
        ours = {name: fields.get(theirs) for name, theirs in renamed.items()}
        if isinstance(ours["audio"], str) and ours["audio"].strip() and "://" not in ours["audio"]:
            ours["audio"] = str(table.parent.relative_to(root) / ours["audio"])
        if ours.get("split") is None:
            ours["split"] = split
        found.append((place, ours))
    return found


def _match_columns(names: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """Find our columns among the names of a table's: ours -> theirs."""
    _check_columns(given, names)
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(re.sub(r"[\W_]+", "", name.lower()), name)
    found = {ours: next((plain[one] for one in known if one in plain), "") for ours, known in COLUMN_NAMES.items()}
    return {ours: theirs for ours, theirs in found.items() if theirs not in ("", *given.values())} | dict(given)


def _check_columns(given: Mapping[str, str], names: Iterable[str]) -> None:
    if strange := [ours for ours in given if ours not in COLUMNS]:
        raise ValueError(f"columns has {strange}, expected of {list(COLUMNS)}.")
    if absent := [theirs for theirs in given.values() if theirs not in names]:
        raise ValueError(f"columns names {absent}, which is not there; there is {sorted(names)}.")


def _clean(place: str, told: Mapping[str, object], maps: Words, settings: LabelSettings) -> dict[str, object]:
    """Return all columns with words for codes, numbers where numbers belong, and splits by our names."""
    fields: dict[str, object] = {}
    for name in COLUMNS:
        value = _as_value(name, told.get(name))
        words = maps.get("emotion" if name == "emotion_votes" else name, {})
        fields[name] = [_word(one, words) for one in value] if isinstance(value, list) else _word(value, words)
    for name, default in (("split", settings.split), ("language", settings.language)):
        fields[name] = default if fields[name] is None else fields[name]
    if isinstance(fields["gender"], str):
        fields["gender"] = {"f": "female", "m": "male"}.get(fields["gender"].lower(), fields["gender"].lower())
    if isinstance(fields["split"], str):
        try:
            fields["split"] = fold_split(fields["split"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return fields


def _word(value: object, words: Mapping[str, str]) -> object:
    return words.get(value, words.get(value.lower(), value)) if isinstance(value, str) else value


def _as_value(name: str, value: object) -> object:
    """Write a number as a name: tables have speakers 1, 2, 3. An empty text is a missing value."""
    if isinstance(value, str):
        value = value.strip() or None
    if name in DIMENSIONS:
        with contextlib.suppress(ValueError):  # what is no number stays, and its row does not validate
            value = parse_number(value) if isinstance(value, str) else value
        return None if isinstance(value, float) and math.isnan(value) else value
    if name in LIST_COLUMNS and isinstance(value, str):
        return [part.strip() for part in re.split("[;|,]", value) if part.strip()]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _name_emotions(found: list[Fields], corpus: Corpus, settings: LabelSettings, words: Mapping[str, str]) -> None:
    """Learn which names beside the canonical ones stay; one that nobody said anything about is a `ValueError`."""
    counts = Counter(str(fields["emotion"]) for _, fields in found if fields["emotion"] is not None)
    told = {word for word in words.values() if find_emotion(word, "?") == "?"}
    unknown = {name: n for name, n in counts.items() if find_emotion(name, "?") == "?" and name not in told}
    if unknown and settings.unknown_emotions == "stop":
        listed = ", ".join(f"{name!r} ({count:,})" for name, count in unknown.items())
        raise ValueError(
            f"Emotions with unknown names: {listed}. Say what they mean, --emotions {next(iter(unknown))}=neutral (or "
            "=other, for none), or --unknown-emotions keep (under their own names) or drop (their rows)."
        )
    corpus.own_emotions = {*told, *unknown} if settings.unknown_emotions == "keep" else told


def _choose_scales(found: list[Fields], given: Scales) -> Scales:
    """Return the scale of each dimension; one that is not told and that values exceed is a `ValueError`."""
    for name in DIMENSIONS:
        values = [value for _, fields in found if isinstance(value := fields[name], (int, float))]
        low, high = given.get(name, (0.0, 1.0))
        outside = sum(not low <= value <= high for value in values)
        if outside > (MOST_OUTSIDE * len(values) if name in given else 0):
            raise ValueError(
                f"{name} goes from {min(values):g} to {max(values):g}, and {outside:,} of {len(values):,} values are "
                f"outside [{low:g}, {high:g}]: it is on another scale. Name its lowest and highest rating: "
                f"--scale 1,5 or --scale {name}=1,7."
            )
    return {name: given.get(name, (0.0, 1.0)) for name in DIMENSIONS}


def _fields_to_row(
    place: str, fields: Mapping[str, object], folder: Path, corpus: Corpus, settings: LabelSettings, scales: Scales
) -> Row | Dropped:
    """Make a valid row, or say why it is none."""
    row, audio = dict(fields), fields["audio"]
    if not isinstance(audio, str) or "://" in audio:
        return Dropped(str(row["id"] or place), NO_PATH, f"{place}: {audio!r:.200}")
    row_id = row["id"] = row["id"] or os.path.splitext(audio)[0]
    row["audio"] = str(folder / audio)
    for name in DIMENSIONS:
        if isinstance(value := row[name], (int, float)) and not isinstance(value, bool):
            row[name] = parsing.scale_rating(value, scales[name], name, (str(row_id), place), corpus)
            row["dimension_source"] = row["dimension_source"] or LABEL_SOURCE
    own, votes = corpus.own_emotions, row["emotion_votes"]
    if isinstance(votes, list):
        row["emotion_votes"] = [vote if vote in own else parsing.name_vote(vote) for vote in map(str, votes)]
    reason = parsing.UNKNOWN_EMOTION
    try:
        if isinstance(row["emotion"], str) and row["emotion"] not in own:
            row["emotion"] = canonical_emotion(row["emotion"])
        reason = BAD_ROW
        validate_row(row, own)
    except ValueError as error:
        return Dropped(str(row_id), reason, f"{place}: {error}")
    valid = cast(Row, row)
    if parsing.is_outside(valid["emotion"], settings.label_set):
        return Dropped(valid["id"], parsing.OUTSIDE_SET, str(valid["emotion"]))
    return valid
