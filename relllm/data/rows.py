"""The row: what every corpus is turned into, and all that training and evaluation know of a corpus.

What lives here: the columns with their types, the check of a row, and what the parser of a corpus returns. What does
not: reading a corpus (one file each).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS
from relllm.processing.audio_relllm import AudioSource


class Row(TypedDict):
    """One utterance.

    Attributes:
        id (`str`): Unique in the corpus.
        audio (`str`, or what `load_audio` takes): Read late; mono and 16 kHz once read.
        text (`str` or `None`): Transcript.
        response (`str` or `None`): The reply to learn.
        emotion (`str` or `None`): One of `EMOTIONS` or `FURTHER_EMOTIONS`; `None` where unlabelled or outside the set.
        arousal, dominance, valence (`float` or `None`): In [0, 1].
        dimension_source (`str` or `None`): `"label"` where people gave the three, `"pseudo:<model id>"` where
            `relllm annotate` did; `None` where nothing is known of them.
        speaker, session, split, language (`str` or `None`): For splits without leaks.
    """

    id: str
    audio: AudioSource
    text: str | None
    response: str | None
    emotion: str | None
    arousal: float | None
    dominance: float | None
    valence: float | None
    dimension_source: str | None
    speaker: str | None
    session: str | None
    split: str | None
    language: str | None


COLUMNS = tuple(Row.__annotations__)
LABEL_SOURCE = "label"
PSEUDO_SOURCE = "pseudo:"  # and the model that gave them

LabelSet = Literal["4", "5", "all"]
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "4": EMOTIONS[:4],  # the usual task on IEMOCAP
    "5": EMOTIONS,  # the original's, and ESD's
    "all": EMOTIONS + FURTHER_EMOTIONS,
}


@dataclass(frozen=True)
class Dropped:
    """One utterance that is not in the data set.

    Attributes:
        id (`str`): As the corpus names it.
        reason (`str`): A category: the same words for the same reason.
        detail (`str`): The value, the file, the line.
    """

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class CorpusFacts:
    """What the data card says of a corpus.

    Attributes:
        name (`str`): Short, as on the command line.
        title (`str`): In full.
        language (`str`): BCP-47, for example `"en"`.
        licence (`str`): Hugging Face's id of the licence, mostly `"other"`.
        terms (`str`): Under which terms people have it, and what may be published.
        homepage (`str`): Where it is obtained.
        citation (`str`): BibTeX.
    """

    name: str
    title: str
    language: str
    licence: str
    terms: str
    homepage: str
    citation: str


@dataclass
class Corpus:
    """What the parser of a corpus returns; nothing is decoded yet.

    Attributes:
        facts (`CorpusFacts`): Of the corpus.
        rows (`list[Row]`): All columns; `audio` is an absolute path.
        dropped (`list[Dropped]`): What the labels or the tree rule out.
        notes (`list[str]`): What a person should know, for example a split folder that contradicts the number.
    """

    facts: CorpusFacts
    rows: list[Row]
    dropped: list[Dropped]
    notes: list[str]


def validate_row(row: Mapping[str, object]) -> None:
    """Checks one row against the columns above. Columns other than `id` and `audio` may be missing, which means
    `None`.

    Args:
        row (`Mapping[str, object]`): A row as a preparer made it.

    Raises:
        ValueError: A column that is unknown, missing or of the wrong type, an emotion that is not canonical, a
        dimension outside
            [0, 1]. The message names the row's id.
    """
    row_id = row.get("id")
    if not isinstance(row_id, str) or not row_id:
        raise ValueError(f"Every row needs an 'id', a non-empty string; got {row_id!r} in the row {dict(row)!r:.200}.")
    if unknown := [column for column in row if column not in COLUMNS]:
        raise ValueError(f"Row {row_id!r}: unknown columns {unknown}; expected {list(COLUMNS)}. Rename or drop them.")
    if row.get("audio") in (None, ""):
        raise ValueError(f"Row {row_id!r}: no audio. Give a path, a waveform, or leave the row out.")
    for column in ("text", "response", "emotion", "dimension_source", "speaker", "session", "split", "language"):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"Row {row_id!r}: {column} is {value!r}, expected a string or None. Convert it.")
    emotion = row.get("emotion")
    if emotion is not None and emotion not in EMOTIONS + FURTHER_EMOTIONS:
        raise ValueError(
            f"Row {row_id!r}: emotion {emotion!r} is not canonical; expected one of "
            f"{', '.join(EMOTIONS + FURTHER_EMOTIONS)} or None. Use `relllm.labels.canonical_emotion`."
        )
    source = row.get("dimension_source")
    if source not in (None, LABEL_SOURCE) and not str(source).startswith(PSEUDO_SOURCE):
        raise ValueError(
            f"Row {row_id!r}: dimension_source is {source!r}, expected {LABEL_SOURCE!r}, "
            f"'{PSEUDO_SOURCE}<model id>' or None. Rename it."
        )
    for dimension in DIMENSIONS:
        value = row.get(dimension)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"Row {row_id!r}: {dimension} is {value!r}, expected a number in [0, 1] or None.")
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(
                f"Row {row_id!r}: {dimension} is {value}, expected [0, 1] or None. Normalise the corpus's own scale, "
                "for example (x - 1) / 6 for MSP-Podcast and (x - 1) / 4 for IEMOCAP."
            )
