"""Corpora whose paths or tables say what is in a clip: one mechanism; `patterns.yaml` has seven of them.

A corpus of your own is a pattern in a YAML file, or a regular expression on the command line: docs/data.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .. import parsing
from ..rows import Corpus, CorpusFacts, Dropped
from ..table_files import read_table

NO_MATCH = "path is not of the pattern"
FACTS = tuple(one.name for one in fields(CorpusFacts) if one.name != "name")  # as a pattern's file may have them
TERMS = "Your own recordings: publish neither audio nor transcripts unless those who speak agreed to it."
OWN = CorpusFacts("folder", "Recordings", "", "other", TERMS)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How a corpus says what is in a clip. Groups of the regular expressions are columns of a row, or parts of `id`.

    All three regular expressions are read without regard to case; those of paths match the end of one, from the
    beginning of a folder's or file's name.
    """

    path: str  # of audio files
    table: str | None = None  # of the paths of tables; what its groups say holds for all of its lines
    line: str | None = None  # of the lines of a table that is no CSV file; others are no labels
    id: str = "{name}"  # of a clip and of its line, made of groups and columns; `name` is the file's without suffix
    columns: Mapping[str, str] = field(default_factory=dict)  # ours -> the table's
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column -> code -> word
    scale: str | None = None  # of the dimensions, as `--scale`
    facts: CorpusFacts = OWN


def load_pattern(given: str) -> Pattern:
    """Return the pattern of an expression or a `.yaml` file, with the fields of [`Pattern`] and of `FACTS`."""
    if Path(given).suffix.lower() not in (".yaml", ".yml"):
        pattern = Pattern(path=given, id="{stem}")
    else:
        # Texts only: YAML has 01 as a number, and no as false.
        content = yaml.load(Path(given).expanduser().read_text(encoding="utf-8"), yaml.BaseLoader)
        known = [*(one.name for one in fields(Pattern) if one.name != "facts"), *FACTS]
        if not isinstance(content, dict) or "path" not in content or set(content) - set(known):
            raise ValueError(f"{given} holds {content!r:.200}; expected `path`, and of {known[1:]}.")
        pattern = _make_pattern({"id": "{stem}"} | content, "folder", Path(given).stem)
    for name in ("path", "table", "line"):
        try:
            re.compile(f"(?:{getattr(pattern, name) or ''})")
        except re.error as error:
            raise ValueError(f"{given}: {name} is no regular expression ({error}).") from error
    pairs = [pattern.columns, pattern.maps, *(pattern.maps.values() if isinstance(pattern.maps, Mapping) else ())]
    if not all(isinstance(words, Mapping) for words in pairs):
        raise ValueError(f"{given}: columns are pairs of names, and maps has pairs for each column.")
    return pattern


def _make_pattern(told: Mapping[str, Any], name: str, title: str) -> Pattern:
    facts = _make_facts(told, name, title)
    return Pattern(**{field: value for field, value in told.items() if field not in FACTS}, facts=facts)


def _make_facts(told: Mapping[str, Any], name: str, title: str) -> CorpusFacts:
    known = {field: told[field] for field in FACTS if field in told}
    return CorpusFacts(**{**asdict(OWN), "title": title, **known, "name": name})


def find_fields(
    pattern: Pattern, root: Path, audio: Sequence[str], tables: Sequence[str], corpus: Corpus
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield place and fields of each clip; what is no clip, and a line or a clip without the other, is dropped.

    `audio` and `tables` are the paths of files beneath `root`. Raises `ValueError` where nothing matches.
    """
    clips: dict[str, dict[str, object]] = {}
    for path, groups in _match_paths(pattern.path, audio):
        if groups is None:
            corpus.dropped.append(Dropped(path, NO_MATCH, path))
            continue
        row_id = _name(pattern, groups, path)
        if row_id in clips:
            corpus.dropped.append(Dropped(row_id, parsing.REPEATED, f"{path}, first {clips[row_id]['audio']}"))
        else:
            clips[row_id] = groups | {"id": row_id, "audio": path}
    if not clips:
        shown = parsing.name_some(audio[:3]) or "no audio files"
        raise ValueError(f"{root}: expected audio files like {pattern.path}; found {shown}. Check ROOT.")
    if pattern.table is None:
        yield from ((str(clip["audio"]), clip) for clip in clips.values())
        return
    labelled = set()
    for place, labels in _read_labels(pattern, root, tables):
        row_id = _name(pattern, labels, place)
        if row_id in clips:
            labelled.add(row_id)
            told = {name: value for name, value in labels.items() if value is not None}
            yield place, {**labels, **clips[row_id], **told}
        else:
            corpus.dropped.append(Dropped(row_id, parsing.NO_AUDIO, place))
    parsing.drop_unlabelled(corpus, labelled, {name: str(clip["audio"]) for name, clip in clips.items()})


def _match_paths(expression: str, paths: Sequence[str]) -> Iterator[tuple[str, dict[str, object] | None]]:
    """Yield paths with their groups, `None` where they do not match."""
    compiled = re.compile(f"(?:.*/)?(?:{expression})", flags=re.IGNORECASE)
    for path in paths:
        matched, pure = compiled.fullmatch(path), PurePosixPath(path)
        named = {"name": pure.stem, "stem": str(pure.with_suffix(""))}
        yield path, None if matched is None else {**named, **matched.groupdict()}


def _name(pattern: Pattern, groups: Mapping[str, object], place: str) -> str:
    try:
        return pattern.id.format_map(groups)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{place}: the id {pattern.id!r} needs {error}; there is {list(groups)}.") from error


def _read_labels(pattern: Pattern, root: Path, tables: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield place and fields of each line of the tables."""
    matched = {path: groups for path, groups in _match_paths(pattern.table or "", tables) if groups is not None}
    if not matched:
        raise ValueError(f"{root}: expected tables like {pattern.table}; found {parsing.name_some(tables[:3])}.")
    for path, groups in matched.items():
        groups = {name: value for name, value in groups.items() if name not in ("name", "stem")}
        if pattern.line is None:
            yield from ((f"{path}:{number}", groups | row) for number, row in read_table(root / path))
            continue
        for number, line in enumerate(parsing.read_lines(root / path)[0], start=1):
            if found := re.fullmatch(pattern.line, line, flags=re.IGNORECASE):
                yield f"{path}:{number}", groups | found.groupdict()


_TOLD = yaml.load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
CORPUS_FACTS = {name: _make_facts(told, name, name) for name, told in _TOLD.items()}
PATTERNS = {name: _make_pattern(told, name, name) for name, told in _TOLD.items() if "path" in told}
