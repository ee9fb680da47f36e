"""What rows can teach: how many have audio, a reply, a transcript and labels, counted before a model is loaded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.processing.processing_relllm import audio_parts

from .report import order_emotions
from .rows import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

READ = {*COLUMNS, "messages", "audios", "length", "chosen", "rejected"}
SHOWN_IDS = 3
TRAINING = "training"
TASKS = {  # that a clip may be taught as, and what a row needs for each
    "reply": "a reply (`response`, or `messages`)",
    "recognition": "one `emotion`",
    "transcription": "the `text` of one clip",
}


@dataclass
class RowSurvey:
    """Counts over the rows of a split."""

    rows: int
    columns: list[str]
    audio: int = 0
    transcripts: int = 0
    emotions: Counter[str] = field(default_factory=Counter)  # by name, of clips
    dimensions: dict[str, int] = field(default_factory=dict)  # values in [0, 1], of clips
    outside: dict[str, list[float]] = field(default_factory=dict)  # values that are not
    fed: Counter[tuple[str, ...]] = field(default_factory=Counter)  # rows by the tasks that they can feed
    ids_by_fed: dict[tuple[str, ...], list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    ids_by_emotion: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def replies(self) -> int:
        """Count the rows that have a reply."""
        return self.feeding("reply")

    def feeding(self, task: str) -> int:
        """Count the rows that can feed a task."""
        return sum(count for fed, count in self.fed.items() if task in fed)

    def idle(self, tasks: Iterable[str]) -> tuple[int, list[str]]:
        """Count the rows that can feed none of some tasks, and name the first ones."""
        found = [fed for fed in self.fed if not set(fed).intersection(tasks)]
        first = sorted(place for fed in found for place in self.ids_by_fed[fed])
        return sum(self.fed[fed] for fed in found), [name for _, name in first[:SHOWN_IDS]]


def fed_tasks(row: Mapping) -> tuple[str, ...]:
    """Return the tasks that a row can feed; its audio is not looked at."""
    conversation = row.get("messages")
    written = (message for message in conversation or () if message["role"] == "assistant")
    has = {
        "reply": bool(row.get("response")) if conversation is None else any(one.get("content") for one in written),
        "recognition": bool(only_one(row.get("emotion"))),
        "transcription": bool((only_one(row.get("text")) or "").strip()),
    }
    return tuple(task for task in TASKS if has[task])


def only_one(value: object) -> str | None:
    """Return the label or transcript of a row of one clip; `None` where there is none, or are several."""
    values = list(_each(value))
    return values[0] if len(values) == 1 else None


def survey_rows(rows: Dataset) -> RowSurvey:
    """Count what the rows of a split have; audio is not decoded."""
    survey = RowSurvey(len(rows), list(rows.column_names))
    columns = {name: rows[name][:] for name in READ & set(rows.column_names) - {"audio", "audios", "length"}}
    ids = [str(value) for value in columns.get("id", range(len(rows)))]
    has_column = "audio" in survey.columns or "audios" in survey.columns
    for index, row_id in enumerate(ids):
        row = {name: values[index] for name, values in columns.items()}
        fed = fed_tasks(row)
        survey.fed[fed] += 1
        survey.ids_by_fed[fed].append((index, row_id))
        survey.audio += has_column or bool(audio_parts(row.get("messages") or ()))
        for name in filter(None, _each(row.get("emotion"))):
            survey.emotions[name] += 1
            survey.ids_by_emotion[name].append(row_id)
    survey.transcripts = sum(bool(text) and all(_each(text)) for text in columns.get("text", ()))
    for name in DIMENSIONS:
        values = [float(one) for value in columns.get(name, ()) for one in _each(value) if one is not None]
        values = [value for value in values if value == value]  # not NaN, a missing value as well
        if outside := [value for value in values if not 0 <= value <= 1]:
            survey.outside[name] = outside
        survey.dimensions[name] = len(values) - len(outside)
    return survey


def survey_splits(train_rows: object, eval_rows: object, parts: Mapping | None = None) -> dict[str, RowSurvey]:
    """Survey what a run trains and evaluates on, and the `parts` of the first, by name; streams are passed over."""
    from datasets import Dataset

    named = eval_rows if isinstance(eval_rows, dict) else {"": eval_rows}
    splits = {TRAINING: train_rows, **{f"{TRAINING} {name}": rows for name, rows in (parts or {}).items()}}
    splits |= {f"evaluation {name}".strip(): rows for name, rows in named.items()}
    return {name: survey_rows(rows) for name, rows in splits.items() if isinstance(rows, Dataset)}


def emotions_of(survey: RowSurvey | None) -> list[str]:
    """Return the classes of a head for these rows; without any, and of a stream, they are the package's five."""
    return order_emotions(survey.emotions) if survey and survey.emotions else list(EMOTIONS)


def check_surveys(
    surveys: Mapping[str, RowSurvey],
    emotion_labels: Sequence[str],
    weights: Mapping[str, float],
    tasks: Sequence[str] = ("reply",),
) -> None:
    """Raise a `ValueError` where rows do not feed a task, or a loss that has a weight, or hold what it cannot take.

    Only the training rows of [`survey_splits`] have to feed the losses. `emotion_labels` are the model's, `weights`
    `response_loss_weight` and its kin, and `tasks`, of `TASKS`, what clips are taught as.
    """
    for name, survey in surveys.items():
        _check_values(survey, f"the {name} rows", emotion_labels, weights, tasks)
    training = surveys.get(TRAINING)
    if training is None or not training.rows:
        return
    for task in tasks if len(tasks) > 1 else ():
        if not training.feeding(task):
            counts = ", ".join(f"{one}: {training.feeding(one)}" for one in tasks)
            raise ValueError(
                f"The task {task!r} is given, and none of {training.rows} training rows has {TASKS[task]}; rows for "
                f"each task: {counts}; the columns are {training.columns}. Leave it out of tasks, or add the column."
            )
    fed = {
        "response_kl_weight": (training.transcripts, "a transcript in `text`"),
        "emotion_loss_weight": (training.emotions.total(), "an `emotion`"),
        "dimension_loss_weight": (sum(training.dimensions.values()), f"any of {', '.join(DIMENSIONS)}"),
    }
    for name, (count, wanted) in fed.items():
        if weights[name] > 0 and not count:
            raise ValueError(
                f"{name} is {weights[name]}, and no training row has {wanted}; the columns are {training.columns}. "
                "Set it to 0, or rename a column."
            )


def _check_values(
    survey: RowSurvey, split: str, emotion_labels: Sequence[str], weights: Mapping[str, float], tasks: Sequence[str]
) -> None:
    has = f"the columns are {survey.columns}"
    if survey.rows and not survey.audio:
        raise ValueError(f"None of {split} has audio; {has}. Name the column `audio`.")
    replied = weights["response_loss_weight"] > 0 or weights["response_kl_weight"] > 0
    count, first = survey.idle(tasks)
    if replied and count:
        what = "no reply to learn" if list(tasks) == ["reply"] else f"nothing for any of the tasks {', '.join(tasks)}"
        raise ValueError(
            f"{count} of {survey.rows} of {split} have {what} (rows {', '.join(first)}, …); {has}. Write replies with "
            "`relllm write-targets`, leave them out, or train the heads alone with response_loss_weight: 0."
        )
    named = weights["emotion_loss_weight"] > 0 or "recognition" in tasks
    if named and (foreign := sorted(survey.emotions.keys() - set(emotion_labels))):
        ids = {name: ", ".join(survey.ids_by_emotion[name][:SHOWN_IDS]) for name in foreign}
        listed = "; ".join(f"{name!r} in {survey.emotions[name]} (rows {ids[name]})" for name in foreign)
        raise ValueError(
            f"{split} has emotions that are none of the model's {list(emotion_labels)}: {listed}. Map them, make them "
            "empty, or train a new model with emotion_labels that has them."
        )
    for name, values in survey.outside.items():
        outside = f"outside [0, 1], from {min(values):g} to {max(values):g}"
        raise ValueError(f"{len(values)} values of {name} in {split} are {outside}. Normalise the column first.")


def fed_readings(survey: RowSurvey | None, weights: Mapping[str, float]) -> list[str]:
    """Name the readings, `"emotion"` and the dimensions, that a training teaches; a stream has what has a weight."""
    weight = {"emotion": weights["emotion_loss_weight"], **dict.fromkeys(DIMENSIONS, weights["dimension_loss_weight"])}
    counts = weight if survey is None else {"emotion": survey.emotions.total(), **survey.dimensions}
    return [name for name in weight if counts[name] and weight[name] > 0]


def draw_survey(surveys: Mapping[str, RowSurvey], tasks: Sequence[str] = ()) -> Table:
    """Return the table of counts, one column a split; with `tasks`, the rows that can feed each."""
    from rich.table import Table

    table = Table("", *surveys, title="What the rows teach", title_justify="left")
    emotions = list(dict.fromkeys(name for one in surveys.values() for name in one.emotions))
    lines = {
        "rows": [one.rows for one in surveys.values()],
        "with audio": [one.audio for one in surveys.values()],
        "with a reply": [one.replies for one in surveys.values()],
        "with a transcript": [one.transcripts for one in surveys.values()],
        **{f"for {task}": [one.feeding(task) for one in surveys.values()] for task in tasks},
        **{f"emotion: {name}": [one.emotions[name] for one in surveys.values()] for name in emotions},
        **{name: [one.dimensions[name] for one in surveys.values()] for name in DIMENSIONS},
    }
    for title, counts in lines.items():
        table.add_row(title, *(f"{count:,}" if count else "-" for count in counts))
    if unread := sorted({name for one in surveys.values() for name in one.columns if name not in READ}):
        table.caption = f"Columns that nothing reads: {', '.join(unread)}."
    return table


def _each(value: object) -> Iterable:
    return value if isinstance(value, (list, tuple)) else (value,)
