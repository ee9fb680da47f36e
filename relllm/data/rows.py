"""The row: what every corpus is turned into, and all that training and evaluation know of a corpus."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS

if TYPE_CHECKING:
    from relllm.processing.audio_relllm import AudioSource


class Row(TypedDict):
    """One utterance; `None` is what nobody knows."""

    id: str  # unique in the corpus
    audio: AudioSource  # read late; mono and 16 kHz once read
    text: str | None  # transcript
    response: str | None  # the reply to learn
    emotion: str | None  # of `EMOTIONS` or `FURTHER_EMOTIONS`
    emotion_votes: list[str] | None  # one name for each vote of a rater; "other" where it has no canonical name
    arousal: float | None  # in [0, 1], as the next two
    dominance: float | None
    valence: float | None
    dimension_source: str | None  # "label" where people gave the three, "pseudo:<model id>" where a tower did
    speaker: str | None
    session: str | None
    split: str | None
    language: str | None  # BCP-47, for example "en"
    gender: str | None  # as the corpus writes it, in lower case
    style: str | None  # for example "improvised" or "scripted"
    events: list[str] | None  # what is heard beside words, for example "laughter"


COLUMNS = tuple(Row.__annotations__)
LIST_COLUMNS = ("emotion_votes", "events")
OTHER = "other"  # among votes
LABEL_SOURCE = "label"
PSEUDO_SOURCE = "pseudo:"  # and the model that gave them

ALL = "all"  # every split, as `datasets` names it
UNSPLIT = "unsplit"  # the files with the rows that belong to no split
_SPLIT = re.compile(r"\w+(\.\w+)*", flags=re.ASCII)  # as the Hub and `datasets` have them; it names files
_SPLIT_NAMES = {"training": "train", "testing": "test"}
_SPLIT_NAMES |= dict.fromkeys(("dev", "devel", "development", "val", "valid"), "validation")

LabelSet = Literal["4", "5", "all"]
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "4": EMOTIONS[:4],  # the usual task on IEMOCAP
    "5": EMOTIONS,  # the original's, and ESD's
    "all": EMOTIONS + FURTHER_EMOTIONS,
}


@dataclass(frozen=True)
class Dropped:
    """One utterance that is not in the data set."""

    id: str  # as the corpus names it
    reason: str  # a category: the same words for the same reason
    detail: str = ""  # the value, the file, the line


@dataclass(frozen=True)
class CorpusFacts:
    """What the data card says of a corpus."""

    name: str  # short, as on the command line
    title: str
    language: str  # BCP-47
    licence: str  # Hugging Face's id of the licence, mostly "other"
    terms: str  # under which terms people have it, and what may be published
    homepage: str = ""
    citation: str = ""  # BibTeX
    licence_name: str = "terms-of-its-owner"  # of one that is "other", for the Hub


@dataclass
class Corpus:
    """What the parser of a corpus returns; nothing is decoded yet."""

    facts: CorpusFacts
    rows: list[Row]  # all columns; `audio` is an absolute path
    dropped: list[Dropped]  # what the labels or the tree rule out
    notes: list[str]  # what a person should know, for example a split folder that contradicts the number
    blanked: list[Dropped] = field(default_factory=list)  # of rows that stay: values that were left empty
    own_emotions: Collection[str] = ()  # names that are kept although they are not canonical

    def add(self, made: Row | Dropped) -> None:
        """Keep a row, or count what is dropped."""
        if isinstance(made, Dropped):
            self.dropped.append(made)
        else:
            self.rows.append(made)


def make_row(**known: object) -> Row:
    """Return a row with `None` in the columns that are not given."""
    return cast(Row, dict.fromkeys(COLUMNS) | known)


def fold_split(name: str) -> str:
    """Return a split as this package names it: `"Train"` is `"train"`; `"dev"` and `"val"` are `"validation"`.

    Raises `ValueError` for what no split can be called: a path, a name with hyphens, `"all"`.
    """
    folded = name.strip().lower()
    folded = _SPLIT_NAMES.get(folded, folded if folded in ("train", "validation", "test") else name.strip())
    if _SPLIT.fullmatch(folded) is None or folded.lower() in (ALL, UNSPLIT):
        raise ValueError(
            f"the split is called {name!r}; expected letters, digits and underscores, and neither {ALL!r} nor "
            f"{UNSPLIT!r}. Rename it, or map it: --splits {name}=train."
        )
    return folded


def validate_row(row: Mapping[str, object], own_emotions: Collection[str] = ()) -> None:
    """Raise `ValueError`, with the row's id, where a row breaks the types and ranges of [`Row`].

    Columns other than `id` and `audio` may be missing. `own_emotions` are names beside the canonical ones.
    """
    row_id, emotion, source = row.get("id"), row.get("emotion"), row.get("dimension_source")
    if not isinstance(row_id, str) or not row_id:
        raise ValueError(f"Every row needs an 'id', a non-empty string; got {row_id!r} in the row {dict(row)!r:.200}.")
    if unknown := [column for column in row if column not in COLUMNS]:
        raise ValueError(f"Row {row_id!r}: unknown columns {unknown}; expected {list(COLUMNS)}. Rename or drop them.")
    if row.get("audio") in (None, ""):
        raise ValueError(f"Row {row_id!r}: no audio. Give a path, a waveform, or leave the row out.")
    for column in [name for name in row if name not in ("id", "audio", *DIMENSIONS)]:  # the first of the row is named
        value, is_list = row[column], column in LIST_COLUMNS
        parts = value if is_list and isinstance(value, list) else [value]
        if value is not None and (
            is_list != isinstance(value, list) or not all(isinstance(one, str) for one in parts)
        ):
            wanted = "a list of names" if is_list else "a string"
            raise ValueError(f"Row {row_id!r}: {column} is {value!r}, expected {wanted} or None. Convert it.")
    if row.get("split") is not None and fold_split(str(row["split"])) != row["split"]:
        raise ValueError(f"Row {row_id!r}: the split is {row['split']!r}; use `relllm.data.rows.fold_split`.")
    if emotion not in (*LABEL_SETS["all"], *own_emotions, None):
        raise ValueError(
            f"Row {row_id!r}: emotion {emotion!r} is not canonical; expected one of {', '.join(LABEL_SETS['all'])} or "
            "None. Use `relllm.labels.canonical_emotion`."
        )
    if source not in (None, LABEL_SOURCE) and not str(source).startswith(PSEUDO_SOURCE):
        wanted = f"{LABEL_SOURCE!r}, '{PSEUDO_SOURCE}<model id>' or None"
        raise ValueError(f"Row {row_id!r}: dimension_source is {source!r}, expected {wanted}. Rename it.")
    for name in DIMENSIONS:
        value = 0 if row.get(name) is None else row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(
                f"Row {row_id!r}: {name} is {value!r}, expected [0, 1] as a number, or None. Normalise the corpus's "
                "own scale, for example (x - 1) / 6 for MSP-Podcast and (x - 1) / 4 for IEMOCAP."
            )
