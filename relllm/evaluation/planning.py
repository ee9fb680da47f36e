"""What a run of `relllm evaluate` is to do: its settings, the rows, the tasks, the batches.

What lives here: every check that can be made before a model is loaded. What does not: the run (`run.py`).
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
from datasets import Dataset

from relllm.data.loading import load_corpus
from relllm.data.rows import LABEL_SETS, LabelSet
from relllm.labels import DIMENSIONS, EMOTIONS

from .asking import TASKS, Questions, Task, render_prompts
from .predicting import System, load_config, load_tokenizer, resolve_system


@dataclass(frozen=True)
class EvaluationSettings:
    """Of one run.

    Args:
        model (`str`): A ReLLM checkpoint, or with `text-only` any causal LM: a directory or a Hub id.
        data (`str`): As [`~relllm.data.loading.load_corpus`] takes it.
        out (`Path`): Folder of the run.
        tasks (`tuple[str, ...]`, *optional*): Of `"ser"`, `"dimensions"` and `"empathy"`; by default those that
            system, data and scorers allow.
        system (`str`, *optional*): `"re-llm"`, `"speech-only"` or `"text-only"`; by default what the checkpoint is.
        label_set (`str`, *optional*): `"4"`, `"5"` or `"all"`; by default the checkpoint's own emotions.
        split (`str`, *optional*, defaults to `"test"`): Of the data; `"all"` for every row.
        held_out (`str`, *optional*): `"column=value"`: the rows of the split `"test"`, made at reading.
        empathy_scorers (`str`, *optional*): Folder of trained scorers.
        revision (`str`, *optional*, defaults to `"main"`): Of the model on the Hub.
        batch_size (`int`, *optional*, defaults to 16): Clips at once, in each process.
        max_new_tokens (`int`, *optional*, defaults to 128): Longest reply.
        device (`str`, *optional*, defaults to `"auto"`): `"cpu"`, `"cuda"`, ….
        dtype (`str`, *optional*, defaults to `"auto"`): The checkpoint's own, or `"float32"`, `"bfloat16"`,
            `"float16"`.
        limit (`int`, *optional*): Only the first so many rows.
        seed (`int`, *optional*, defaults to 0): Answers are greedy, so it changes nothing today; it is recorded.
        name (`str`, *optional*): What tables call the run; by default the folder's name.

    Raises:
        ValueError: On a task, precision or number that is none.
    """

    model: str
    data: str
    out: Path
    tasks: tuple[Task, ...] | None = None
    system: System | None = None
    label_set: LabelSet | None = None
    split: str = "test"
    held_out: str | None = None
    empathy_scorers: str | None = None
    revision: str = "main"
    batch_size: int = 16
    max_new_tokens: int = 128
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    seed: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks or () if task not in TASKS]
        if unknown or self.tasks == ():
            raise ValueError(f"Unknown tasks {unknown}; expected some of {', '.join(TASKS)}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if self.label_set is not None and self.label_set not in LABEL_SETS:
            raise ValueError(f"label_set must be one of {', '.join(LABEL_SETS)}, got {self.label_set!r}.")
        for name, value in (("batch_size", self.batch_size), ("limit", self.limit or 1)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass
class Plan:
    """A run that can begin: everything has been checked, and no model is loaded yet.

    Attributes:
        rows (`datasets.Dataset`): To be answered for, in their order.
        system (`str`), questions ([`Questions`]): Who is asked what.
        prompts (`dict[str, str]`): As the tokenizer gets them.
        identity (`dict`): What must not change when the run goes on; the first line of `predictions.jsonl`.
        left_out (`dict[str, str]`): Tasks that are not measured, and why.
    """

    rows: Dataset
    system: System
    questions: Questions
    prompts: dict[str, str]
    identity: dict = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def plan_run(settings: EvaluationSettings, *, with_scorers: bool) -> Plan:
    """Reads data and configuration and checks that every task can be measured.

    Raises:
        ValueError: See [`~relllm.evaluation.evaluating.evaluate`].
    """
    config = load_config(settings.model, settings.revision)
    system = resolve_system(config, settings.system, settings.model)
    rows = _load_rows(settings)
    if settings.label_set is not None:
        labels = LABEL_SETS[settings.label_set]
    else:
        labels = tuple(config.emotion_labels) if config.model_type == "relllm" else EMOTIONS
    obstacles = _obstacles(rows, system, labels, with_scorers)
    for task in settings.tasks or ():
        if task in obstacles:
            raise ValueError(f"Task {task!r} cannot be measured: {obstacles[task]}. Mend it, or leave {task} out.")
    tasks = settings.tasks or tuple(task for task in TASKS if task not in obstacles)
    if not tasks:
        raise ValueError(f"Nothing can be measured of {settings.data}: {obstacles}.")
    questions = Questions(tuple(task for task in TASKS if task in tasks), labels, settings.max_new_tokens)
    tokenizer, template, _ = load_tokenizer(settings.model, settings.revision)
    prompts = render_prompts(tokenizer, template, questions, audio=system != "text-only")
    left_out = {} if settings.tasks else obstacles
    return Plan(rows, system, questions, prompts, left_out=left_out)


def plan_batches(rows: Dataset, batch_size: int, system: System) -> list[list[int]]:
    """Rows of like length, the longest first: what does not fit in memory shows at once, and little is padded."""
    columns = [name for name in ("audio", "duration_s", "text") if name in rows.column_names]
    lengths = [_length(row, system) for row in rows.select_columns(columns)]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _load_rows(settings: EvaluationSettings) -> Dataset:
    if settings.held_out is not None:
        rows = load_corpus(settings.data, settings.split, held_out=settings.held_out)
    else:
        rows = load_corpus(settings.data, settings.split)
    assert isinstance(rows, Dataset)  # it is not streamed
    if lacking := sorted({"id", "audio"} - set(rows.column_names)):
        raise ValueError(f"{settings.data} lacks the columns {lacking}; it has {rows.column_names}.")
    rows = rows.select(range(min(len(rows), settings.limit or len(rows))))
    seen: set[object] = set()
    for row_id in rows["id"]:
        if not isinstance(row_id, str) or row_id in seen:
            raise ValueError(f"{settings.data}: every row needs an `id` of its own, a string; got {row_id!r} (again).")
        seen.add(row_id)
    if not seen:
        raise ValueError(f"{settings.data} has no rows in the split {settings.split!r}.")
    return rows


def _obstacles(rows: Dataset, system: System, labels: Sequence[str], with_scorers: bool) -> dict[str, str]:
    """Tasks that cannot be measured, and why."""

    def any_of(column: str) -> bool:
        return column in rows.column_names and any(value not in (None, "") for value in rows[column])

    found: dict[str, str] = {}
    emotions = set(rows["emotion"]) if "emotion" in rows.column_names else set()
    if not emotions & set(labels):
        found["ser"] = f"no row has an emotion of the label set ({', '.join(labels)})"
    if system == "text-only":
        found["dimensions"] = "a text-only system has no dimensions"
    elif not any(any_of(name) for name in DIMENSIONS):
        found["dimensions"] = f"no row has any of {', '.join(DIMENSIONS)}"
    if not with_scorers:
        found["empathy"] = "there are no scorers (--empathy-scorers DIR; `relllm empathy train` makes them)"
    if not any_of("text"):
        needs_text = TASKS if system == "text-only" else ("empathy",)
        found |= dict.fromkeys(needs_text, "no row has a transcript (`text`)")
    return found


def _length(row: Mapping, system: System) -> float:
    """Seconds of a clip, characters of a transcript; 0 where the header does not say, which reading will explain."""
    if system == "text-only":
        return len(row.get("text") or "")
    if row.get("duration_s") is not None:
        return float(row["duration_s"])
    audio = row["audio"]
    if isinstance(audio, Mapping):
        audio = audio["bytes"] if audio.get("bytes") is not None else audio.get("path")
    try:
        info = soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else str(audio).removeprefix("file://"))
    except (OSError, RuntimeError):  # soundfile's errors are RuntimeErrors
        return 0.0
    duration_s = info.frames / info.samplerate if info.samplerate else 0.0
    return duration_s if math.isfinite(duration_s) else 0.0


__all__ = ["EvaluationSettings", "Plan", "plan_batches", "plan_run"]
