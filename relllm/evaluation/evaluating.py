"""`relllm evaluate`: a system over a data set, into a folder with predictions, metrics and plots.

Everything is checked before a model is loaded. Every process appends what it has finished to its own journal; at the
end, and when a killed run goes on, the main one collects them into its own, `predictions.jsonl`. Batches are planned
over all rows, done or not, so a clip is always in the company it would have had.
"""

import io
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import soundfile
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedConfig, set_seed

from relllm.data.journal import Journal, check_columns, check_ids, rows_fingerprint, write_json, write_whole
from relllm.data.loading import corpus_name, load_corpus
from relllm.data.membership import is_text_model_trained, read_training_record
from relllm.data.report import find_versions
from relllm.data.rows import LABEL_SETS
from relllm.inference.replies import GREEDY
from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.modeling.checkpoint_relllm import find_commit
from relllm.modeling.places_relllm import check_place

from .adapters import ADAPTER_CONFIG, read_adapter, read_config
from .asking import RECOGNITION_TOKENS, Questions, render_prompts
from .empathy.quality import check_scorers, read_quality
from .evaluation_settings import (
    FORMAT,
    HELD_OUT,
    METRICS,
    PREDICTIONS,
    READERS,
    TASKS,
    WAYS,
    EvaluationSettings,
    System,
)
from .fingerprints import check_extras, data_fingerprint, describe_hardware, folder_fingerprint, model_fingerprint
from .leakage import check_unseen, find_seen
from .predicting import Predictor, load_in_vllm, load_predictor, load_tokenizer, resolve_system
from .runs import read_predictions
from .summary import count_clips, draw_plots, summarize_clips

PLOTS = "plots"
COLUMNS = ("id", "speaker", "session", "duration_s", "emotion", *DIMENSIONS, "dimension_source")  # of a row, in a line
PATIENCE = timedelta(days=2)  # that one process waits for another
Score: TypeAlias = Callable[[Sequence[tuple[str, str]]], list[dict]]  # pairs of seeker post and reply -> levels


@dataclass
class Plan:
    """A run that can begin: everything has been checked, and no model is loaded yet."""

    rows: Dataset  # to be answered for, in their order
    system: System
    questions: Questions
    prompts: dict[str, str]  # as the tokenizer gets them
    identity: dict = field(default_factory=dict)  # what must not change when the run goes on
    left_out: dict[str, str] = field(default_factory=dict)  # tasks that are not measured, and why
    seen: dict[str, object] = field(default_factory=dict)  # what the model's training has read of the rows


def evaluate(settings: EvaluationSettings, *, score: Score | None = None, progress: bool = True) -> dict:
    """Measure a system and write `predictions.jsonl`, `metrics.json` and `plots/`.

    Killed, the same call goes on where it was; complete, it returns what is there. In several processes
    (`accelerate launch`) they share the clips and the files are the same; each returns the content of `metrics.json`.
    `score` takes `(seeker post, reply)` pairs, in place of `settings.empathy_scorers`. Before anything runs, a task
    that cannot be measured, and a folder of a run with other settings, are a `ValueError`.
    """
    check_extras("Evaluation", "audmetric", "matplotlib", "scikit-learn")
    set_seed(settings.seed)
    state = PartialState(cpu=settings.device == "cpu", timeout=PATIENCE)
    if settings.engine == "vllm":
        from relllm.inference.vllm import check_vllm

        check_vllm()
    if settings.engine == "vllm" and state.num_processes > 1:
        raise ValueError('vLLM shares its work out itself: one process, --engine-args {"tensor_parallel_size": 2}.')
    plan = _plan_run(settings, with_scorers=score is not None or settings.empathy_scorers is not None)
    plan.identity = _from_main(state, lambda: _run_identity(settings, plan))
    if not _from_main(state, lambda: _is_complete(settings.output_dir, plan.identity)):
        _answer(settings, plan, state, score, progress=progress)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(settings, plan)
        state.wait_for_everyone()
    return json.loads((settings.output_dir / METRICS).read_text(encoding="utf-8"))


def collect_journals(out: Path, identity: Mapping) -> dict[str, dict]:
    """Return all finished lines by id; those in journals of other processes move to the main one.

    Lines of other settings are a `ValueError`, another run writing there is a `BlockingIOError`.
    """
    with Journal(out / PREDICTIONS, identity) as journal:
        for path in sorted(out.glob("predictions.part*.jsonl")):
            with Journal(path, identity) as part:
                journal.append(entry for row_id, entry in part.done.items() if row_id not in journal.done)
            path.unlink()
        return dict(journal.done)


def write_predictions(out: Path, identity: Mapping, lines: Sequence[Mapping]) -> None:
    """Write `predictions.jsonl` in this order; the file is complete or the one before."""
    with write_whole(out / PREDICTIONS) as partial:
        partial.unlink(missing_ok=True)
        with Journal(partial, identity) as journal:
            journal.append(lines)


def _plan_run(settings: EvaluationSettings, *, with_scorers: bool) -> Plan:
    """Read data and configuration, and check that every task can be measured."""
    check_place(settings.model, holds=("config.json", ADAPTER_CONFIG))
    for scorers in filter(None, (settings.empathy_scorers, settings.held_out_scorers)):
        if not settings.allow_weak_scorers:
            check_scorers(scorers)
    config = read_config(settings.model, settings.revision)
    adapter = read_adapter(settings.model, settings.revision)
    system = resolve_system(config, settings.system, settings.model, tuned=adapter is not None)
    if system in READERS and settings.tower_cache_dir is not None:
        raise ValueError(f"{system} runs no towers: leave tower_cache_dir out.")
    rows = _load_rows(settings)
    seen = _find_seen(settings, config, system, rows)
    labels = _labels_of(settings, config)
    if settings.text_column is not None:
        _check_text_column(settings, system, rows)
    obstacles = _obstacles(rows, system, labels, with_scorers, settings.text_column or "text")
    taught = getattr(config, "trained_readings", None)
    if system not in READERS and taught is not None and not set(DIMENSIONS) & set(taught):
        obstacles["dimensions"] = "no training has taught them to the model (trained_readings in its config.json)"
    if set(settings.ways) == {"head"} and (system in READERS or (taught is not None and "emotion" not in taught)):
        obstacles["ser"] = "it has no head that a training has taught emotions (--ways head)"
    for task in settings.tasks or ():
        if task in obstacles:
            raise ValueError(f"Task {task!r} cannot be measured: {obstacles[task]}. Mend it, or leave {task} out.")
    tasks = settings.tasks or tuple(task for task in TASKS if task not in obstacles)
    if not tasks:
        raise ValueError(f"Nothing can be measured of {settings.data}: {obstacles}.")
    tokenizer, template, processor = load_tokenizer(settings.model, settings.revision)
    questions = Questions(tuple(task for task in TASKS if task in tasks), labels, settings.max_new_tokens)
    questions = replace(questions, ways=settings.ways)
    if processor is not None:  # a ReLLM is asked as it was trained
        questions = replace(questions, instruction=processor.instruction, system_prompt=processor.system_prompt)
    prompts = render_prompts(tokenizer, template, questions, audio=system not in READERS)
    return Plan(rows, system, questions, prompts, left_out={} if settings.tasks else obstacles, seen=seen)


def plan_batches(rows: Dataset, batch_size: int, system: System, text_column: str = "text") -> list[list[int]]:
    """Batch rows of like length, the longest first: what does not fit shows at once, and little is padded."""
    if system in READERS:
        lengths: list[float] = [len(text or "") for text in rows[text_column]]
    else:
        columns = [name for name in ("audio", "duration_s") if name in rows.column_names]
        lengths = [_duration(row) for row in rows.select_columns(columns)]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _load_rows(settings: EvaluationSettings) -> Dataset:
    rows = load_corpus(settings.data, settings.split or "all", held_out=settings.held_out)
    assert isinstance(rows, Dataset)  # it is not streamed
    check_columns(rows, {"id", "audio"})
    rows = rows.select(range(min(len(rows), settings.limit or len(rows))))
    check_ids(rows)
    return rows


def _labels_of(settings: EvaluationSettings, config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the emotions to choose from: a ReLLM's, or those of the rows that an LLM was fine-tuned on."""
    if settings.label_set is not None:
        return LABEL_SETS[settings.label_set]
    if config.model_type == "relllm":
        return tuple(config.emotion_labels)
    return tuple(read_training_record(settings.model, revision=settings.revision).get("emotion_labels", EMOTIONS))


def _find_seen(settings: EvaluationSettings, config: PreTrainedConfig, system: System, rows: Dataset) -> dict:
    """Return what the training has read of the rows, which is refused unless it is allowed."""
    record, towers = read_training_record(settings.model, revision=settings.revision), getattr(config, "towers", None)
    if system == "text-only" and config.model_type == "relllm" and not is_text_model_trained(record):
        record, towers = {}, None  # its LLM with the LoRA off: nothing of them is in it
    seen = find_seen(record, rows, towers=towers)
    if not settings.allow_seen:
        check_unseen(seen, len(rows), settings.model)
    return seen


def _check_text_column(settings: EvaluationSettings, system: System, rows: Dataset) -> None:
    if system not in READERS:
        raise ValueError(f"--text-column {settings.text_column} is for those that read; {system!r} hears the clips.")
    if settings.text_column not in rows.column_names:
        raise ValueError(f"{settings.data} has no column {settings.text_column!r}; it has {rows.column_names}.")


def _obstacles(rows: Dataset, system: System, labels: Sequence[str], with_scorers: bool, read: str) -> dict[str, str]:
    """Tasks that cannot be measured, and why."""

    def any_of(column: str) -> bool:
        return column in rows.column_names and any(value not in (None, "") for value in rows[column])

    found: dict[str, str] = {}
    emotions = set(rows["emotion"]) if "emotion" in rows.column_names else set()
    if not emotions & set(labels):
        found["ser"] = f"no row has an emotion of the label set ({', '.join(labels)})"
    if system in READERS:
        found["dimensions"] = "a text-only system has no dimensions"
    elif not any(any_of(name) for name in DIMENSIONS):
        found["dimensions"] = f"no row has any of {', '.join(DIMENSIONS)}"
    if not with_scorers:
        found["empathy"] = "there are no scorers (--empathy-scorers DIR; `relllm empathy train` makes them)"
    if system in READERS and not any_of(read):
        found |= dict.fromkeys(TASKS, f"no row has a transcript (`{read}`)")
    if not any_of("text"):
        found["empathy"] = "no row has a transcript (`text`)"
    return found


def _duration(row: Mapping) -> float:
    """Return the seconds of a clip; 0 where its header does not say, which reading will explain."""
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


def _answer(
    settings: EvaluationSettings, plan: Plan, state: PartialState, score: Score | None, *, progress: bool
) -> None:
    """Append a line for every clip of this process that has none yet; without one, no model is loaded."""
    done = _from_main(state, lambda: set(collect_journals(settings.output_dir, plan.identity)))
    text_column = settings.text_column or "text"
    batches = plan_batches(plan.rows, settings.batch_size, plan.system, text_column)
    batches = batches[state.process_index :: state.num_processes]
    ids = plan.rows["id"]
    todo = [batch for batch in batches if not all(ids[index] in done for index in batch)]
    if not todo:
        return
    device = state.device if settings.device == "auto" else settings.device
    options: dict = {"revision": settings.revision, "dtype": settings.dtype, "text_column": text_column}
    predictor: Predictor
    if settings.engine == "vllm":
        arguments = settings.engine_args
        predictor = load_in_vllm(settings.model, plan.system, plan.questions, arguments=arguments, **options)
    else:
        options["tower_cache_dir"] = settings.tower_cache_dir
        predictor = load_predictor(settings.model, plan.system, plan.questions, device=device, **options)
    if score is None and "empathy" in plan.questions.tasks:
        score = _load_score(settings, str(device))
    name = PREDICTIONS if state.is_main_process else f"predictions.part{state.process_index}.jsonl"
    total, left = sum(map(len, batches)), sum(map(len, todo))
    hidden = not (progress and state.is_main_process)
    with (
        Journal(settings.output_dir / name, plan.identity) as journal,
        tqdm(total=total, initial=total - left, desc="Evaluating", unit="clip", disable=hidden) as bar,
    ):
        for entries in _predict(predictor, plan.rows, todo, done, score):
            journal.append(entries)
            bar.update(len(entries))


def _finish(settings: EvaluationSettings, plan: Plan) -> None:
    found = collect_journals(settings.output_dir, plan.identity)
    lines = [found[row_id] for row_id in plan.rows["id"]]
    write_predictions(settings.output_dir, plan.identity, lines)
    summary = summarize_clips(lines, plan.questions.labels)
    name = settings.name or settings.output_dir.name
    draw_plots(lines, summary, settings.output_dir / PLOTS, title=name)
    config = read_config(settings.model, settings.revision)
    towers = getattr(config, "towers", None) or {}
    if (adapter := read_adapter(settings.model, settings.revision)) is not None:
        towers = {"text_model": {"name": adapter["base_model_name_or_path"], "revision": adapter.get("revision")}}
    places = {kind: (tower.get("name"), tower.get("revision")) for kind, tower in towers.items()}
    greedy = {name: value for name, value in GREEDY.items() if value is not None}
    limits = {"recognition": RECOGNITION_TOKENS, "reply": plan.questions.max_new_tokens}
    packages = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "audmetric")
    device = PartialState().device if settings.device == "auto" else torch.device(settings.device)
    metrics = {
        "format": FORMAT,
        "system": plan.system,
        "name": name,
        "model": {
            "id": settings.model,
            "revision": find_commit(settings.model, settings.revision),
            "fingerprint": plan.identity["model_fingerprint"],
            "towers": {kind: "@".join(filter(None, place)) for kind, place in places.items()},
            "dtype": settings.dtype,
        },
        "data": {
            "id": settings.data,
            "corpus": corpus_name(settings.data),
            "split": settings.split or "all",
            "held_out": settings.held_out,
            "limit": settings.limit,
            "text_column": settings.text_column,
            "fingerprint": plan.identity["data_fingerprint"],
            **count_clips(lines, plan.questions.labels),
        },
        "prompts": plan.prompts,
        "label_set": list(plan.questions.labels),
        "generation": {**greedy, "max_new_tokens": limits},
        "seed": settings.seed,
        "versions": find_versions(*packages),
        "hardware": describe_hardware(device),
        **summary,
        "left_out": plan.left_out,
        "training": plan.seen,
        "folds": None,
    }
    if "empathy" in metrics:
        metrics["empathy"]["scorers"] = _describe_scorers(settings.empathy_scorers, plan, settings)
        if settings.held_out_scorers is not None:
            further = _describe_scorers(settings.held_out_scorers, plan, settings, "held_out_scorers_fingerprint")
            metrics["empathy"]["held_out_scorers"] = further
    write_json(metrics, settings.output_dir / METRICS)


def _describe_scorers(
    scorers: str | None, plan: Plan, settings: EvaluationSettings, key: str = "scorers_fingerprint"
) -> dict:
    quality = {} if scorers is None else read_quality(scorers)
    same = {"id": scorers, "fingerprint": plan.identity[key], "in_windows": settings.reply_windows}
    return {**same, "quality": quality}


def _predict(
    predictor: Predictor, rows: Dataset, batches: Sequence[Sequence[int]], done: Container[str], score: Score | None
) -> Iterator[list[dict]]:
    """Yield the lines of each batch, without those of clips that are done."""
    for batch in batches:
        asked = list(rows.select(batch))
        lines = []
        for row, parts in zip(asked, predictor.predict(asked), strict=True):
            votes = {"emotion_votes": row["emotion_votes"]} if row.get("emotion_votes") else {}
            lines.append({**{name: row.get(name) for name in COLUMNS}, **votes, **parts})
        if score is not None:
            both = zip(asked, lines, strict=True)
            replied = [(row["text"], line) for row, line in both if "reply" in line and (row["text"] or "").strip()]
            levels = score([(text, line["reply"]) for text, line in replied]) if replied else []
            for (_, line), empathy in zip(replied, levels, strict=True):
                line["empathy"] = empathy
        yield [line for line in lines if line["id"] not in done]


def _load_score(settings: EvaluationSettings, device: str) -> Score:
    from .empathy.scoring import load_scorers, score_pairs

    assert settings.empathy_scorers is not None  # else the task is left out
    scorers = load_scorers(settings.empathy_scorers)
    further = load_scorers(settings.held_out_scorers) if settings.held_out_scorers is not None else {}
    how: dict = {"batch_size": settings.batch_size, "device": device, "windows": settings.reply_windows}

    def score(pairs: Sequence[tuple[str, str]]) -> list[dict]:
        both = zip(score_pairs(scorers, pairs, **how), score_pairs(further, pairs, **how), strict=True)
        return [one | {HELD_OUT[name]: part for name, part in other.items()} for one, other in both]

    return score


def _run_identity(settings: EvaluationSettings, plan: Plan) -> dict:
    scorers, further, text = settings.empathy_scorers, settings.held_out_scorers, settings.text_column
    fingerprint = folder_fingerprint(scorers) if scorers is not None else None
    held_out = {"held_out_scorers_fingerprint": folder_fingerprint(further)} if further is not None else {}
    if fingerprint in held_out.values():
        raise ValueError(f"--held-out-scorers {further} are the weights of --empathy-scorers. Train others.")
    rewarding = read_training_record(settings.model, revision=settings.revision).get("scorers_fingerprint")
    if rewarding is not None and rewarding in held_out.values():
        raise ValueError(f"--held-out-scorers {further} rewarded {settings.model}: its record says so. Train others.")
    questions = asdict(plan.questions)
    if plan.questions.ways == WAYS:  # of older runs too
        del questions["ways"]
    engine = {"engine": "vllm", "engine_args": json.loads(settings.engine_args or "{}")}
    return {
        "task": "evaluate",
        "system": plan.system,
        "model_fingerprint": model_fingerprint(settings.model, revision=settings.revision),
        "data_fingerprint": data_fingerprint(plan.rows),
        "scorers_fingerprint": fingerprint,
        "questions": json.loads(json.dumps(questions)),
        "prompts": plan.prompts,
        "dtype": settings.dtype,
        "seed": settings.seed,
        **held_out,
        **({"reply_windows": True} if settings.reply_windows else {}),
        **({"text_column": text, "text_fingerprint": rows_fingerprint(plan.rows, ("id", text))} if text else {}),
        **(engine if settings.engine == "vllm" else {}),
    }


def _is_complete(out: Path, identity: Mapping) -> bool:
    return (out / METRICS).is_file() and (out / PREDICTIONS).is_file() and read_predictions(out)[0] == identity


def _from_main(state: PartialState, make: Callable):  # type: ignore[no-untyped-def]
    """Return what the main process makes, in every process."""
    made = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0]
