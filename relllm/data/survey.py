"""What rows can teach: how many have audio, a reply, a transcript and labels, counted before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS

from .rows import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

READ = {*COLUMNS, "messages", "audios", "length"}
SHOWN_IDS = 3
TRAINING = "training"


@dataclass
class RowSurvey:
    """Counts over the rows of a split."""

    rows: int
    columns: list[str]
    audio: int = 0
    replies: int = 0
    transcripts: int = 0
    emotions: Counter[str] = field(default_factory=Counter)  # by name, of clips
    dimensions: dict[str, int] = field(default_factory=dict)  # values in [0, 1], of clips
    outside: dict[str, list[float]] = field(default_factory=dict)  # values that are not
    without_reply: list[str] = field(default_factory=list)  # ids or places of the first ones
    ids_by_emotion: dict[str, list[str]] = field(default_factory=dict)  # the first ones

    @property
    def unread(self) -> list[str]:
        """Name the columns that nothing reads."""
        return sorted(set(self.columns) - READ)


def survey_rows(rows: Dataset) -> RowSurvey:
    """Count what the rows of a split have; audio is not decoded."""
    survey = RowSurvey(len(rows), list(rows.column_names))
    columns = {name: rows[name] for name in READ & set(rows.column_names) - {"audio", "audios", "length"}}
    ids = [str(value) for value in columns.get("id", range(len(rows)))]
    messages = columns.get("messages") or [None] * len(rows)
    replies = columns.get("response") or [None] * len(rows)
    has_column = "audio" in survey.columns or "audios" in survey.columns
    for row_id, conversation, response in zip(ids, messages, replies, strict=True):
        replied = bool(response) if conversation is None else _has_reply(conversation)
        survey.replies += replied
        survey.audio += has_column or (conversation is not None and _has_audio(conversation))
        if not replied and len(survey.without_reply) < SHOWN_IDS:
            survey.without_reply.append(row_id)
    survey.transcripts = sum(bool(text) and all(_each(text)) for text in columns.get("text", ()))
    for row_id, value in zip(ids, columns.get("emotion", ()), strict=False):
        for name in filter(None, _each(value)):
            survey.emotions[name] += 1
            shown = survey.ids_by_emotion.setdefault(name, [])
            if len(shown) < SHOWN_IDS:
                shown.append(row_id)
    for name in DIMENSIONS:
        values = [float(one) for value in columns.get(name, ()) for one in _each(value) if one is not None]
        values = [value for value in values if value == value]  # not NaN, a missing value as well
        if outside := [value for value in values if not 0 <= value <= 1]:
            survey.outside[name] = outside
        survey.dimensions[name] = len(values) - len(outside)
    return survey


def survey_splits(train_rows: object, eval_rows: object) -> dict[str, RowSurvey]:
    """Survey what a run trains and evaluates on, by name; streams and other sequences are passed over."""
    from datasets import Dataset

    splits = {TRAINING: train_rows}
    splits |= {f"evaluation {name}": rows for name, rows in eval_rows.items()} if isinstance(eval_rows, dict) else {}
    splits |= {} if isinstance(eval_rows, dict) else {"evaluation": eval_rows}
    return {name: survey_rows(rows) for name, rows in splits.items() if isinstance(rows, Dataset)}


def emotions_of(survey: RowSurvey | None) -> list[str]:
    """Return the classes of a head for these rows: the package's names in their order, then others by the alphabet.

    Rows without emotions, and a stream, give the package's five.
    """
    if survey is None:
        return list(EMOTIONS)
    known = [name for name in (*EMOTIONS, *FURTHER_EMOTIONS) if name in survey.emotions]
    return [*known, *sorted(survey.emotions.keys() - set(known))] or list(EMOTIONS)


def check_surveys(
    surveys: Mapping[str, RowSurvey], emotion_labels: Sequence[str], weights: Mapping[str, float]
) -> None:
    """Raise a `ValueError` where rows do not feed a loss that has a weight, or hold what it cannot take.

    Args:
        surveys (`Mapping[str, RowSurvey]`): As of [`survey_splits`]; only the training rows have to feed the losses.
        emotion_labels (`Sequence[str]`): The classes of the model's head.
        weights (`Mapping[str, float]`): `response_loss_weight` and its kin.
    """
    for name, survey in surveys.items():
        _check_values(survey, f"the {name} rows", emotion_labels, weights)
        if name == TRAINING:
            _check_fed(survey, weights)


def _check_fed(survey: RowSurvey, weights: Mapping[str, float]) -> None:
    fed = {
        "response_kl_weight": (survey.transcripts, "a transcript in `text`"),
        "emotion_loss_weight": (survey.emotions.total(), "an `emotion`"),
        "dimension_loss_weight": (sum(survey.dimensions.values()), f"any of {', '.join(DIMENSIONS)}"),
    }
    for name, (count, wanted) in fed.items():
        if weights[name] > 0 and survey.rows and not count:
            raise ValueError(
                f"{name} is {weights[name]}, and no training row has {wanted}; the columns are {survey.columns}. "
                "Set it to 0, or rename a column."
            )


def _check_values(survey: RowSurvey, split: str, emotion_labels: Sequence[str], weights: Mapping[str, float]) -> None:
    has = f"the columns are {survey.columns}"
    if survey.rows and not survey.audio:
        raise ValueError(f"None of {split} has audio; {has}. Name the column `audio`.")
    replied = weights["response_loss_weight"] > 0 or weights["response_kl_weight"] > 0
    if replied and survey.replies < survey.rows:
        raise ValueError(
            f"{survey.rows - survey.replies} of {survey.rows} of {split} have no reply to learn (rows "
            f"{', '.join(survey.without_reply)}, …); {has}. Write replies with `relllm write-targets`, leave them "
            "out, or train the heads alone with response_loss_weight: 0."
        )
    if weights["emotion_loss_weight"] > 0 and (foreign := sorted(survey.emotions.keys() - set(emotion_labels))):
        listed = "; ".join(
            f"{name!r} in {survey.emotions[name]} (rows {', '.join(survey.ids_by_emotion[name])})" for name in foreign
        )
        raise ValueError(
            f"{split} has emotions that are none of the model's {list(emotion_labels)}: {listed}. Map them, make them "
            "empty, or train a new model with emotion_labels that has them."
        )
    for name, values in survey.outside.items():
        raise ValueError(
            f"{len(values)} values of {name} in {split} are outside [0, 1], from {min(values):g} to {max(values):g}. "
            "Normalise the column first."
        )


def draw_survey(surveys: Mapping[str, RowSurvey]) -> Table:
    """Return the table of counts, one column a split."""
    from rich.table import Table

    table = Table("", *surveys, title="What the rows teach", title_justify="left")
    emotions = list(dict.fromkeys(name for one in surveys.values() for name in one.emotions))
    lines = {
        "rows": [one.rows for one in surveys.values()],
        "with audio": [one.audio for one in surveys.values()],
        "with a reply": [one.replies for one in surveys.values()],
        "with a transcript": [one.transcripts for one in surveys.values()],
        **{f"emotion: {name}": [one.emotions[name] for one in surveys.values()] for name in emotions},
        **{name: [one.dimensions[name] for one in surveys.values()] for name in DIMENSIONS},
    }
    for title, counts in lines.items():
        table.add_row(title, *(f"{count:,}" if count else "-" for count in counts))
    if unread := sorted({name for one in surveys.values() for name in one.unread}):
        table.caption = f"Columns that nothing reads: {', '.join(unread)}."
    return table


def _each(value: object) -> Iterable:
    return value if isinstance(value, (list, tuple)) else (value,)


def _has_reply(messages: Sequence[Mapping]) -> bool:
    return any(message["role"] == "assistant" and bool(message.get("content")) for message in messages)


def _has_audio(messages: Sequence[Mapping]) -> bool:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return any(part["type"] == "audio" for content in contents for part in content)
