"""`relllm evaluate`: a system over a data set, into a folder with predictions, metrics and plots.

Everything is checked before a model is loaded. The main process appends what all have finished to its journal,
`predictions.jsonl`. Batches are planned over all rows, done or not, so a clip is always in the company it would have
had.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedConfig, set_seed

from relllm.data.clips import clip_duration
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
    EvaluationSettings,
    System,
)
from .fingerprints import check_extras, data_fingerprint, describe_hardware, folder_fingerprint, model_fingerprint
from .leakage import check_unseen, find_seen
from .predicting import Predictor, load_predictor, load_tokenizer, resolve_system
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
    left_out: dict[str, str]  # tasks that are not measured, and why
    seen: dict[str, object]  # what the model's training has read of the rows
    towers: Mapping[str, Mapping]  # name and revision of the parts of the model
    identity: dict = field(default_factory=dict)  # what must not change when the run goes on


def evaluate(settings: EvaluationSettings, *, progress: bool = True) -> dict:
    """Measure a system and write `predictions.jsonl`, `metrics.json` and `plots/`.

    Killed, the same call goes on where it was; complete, it returns what is there. In several processes
    (`accelerate launch`) they share the clips and the files are the same; each returns the content of `metrics.json`.
    Before anything runs, a task that cannot be measured and a folder of another run are a `ValueError`.
    """
    check_extras("Evaluation", "audmetric", "matplotlib", "scikit-learn")
    set_seed(settings.seed)
    state = PartialState(cpu=settings.device == "cpu", timeout=PATIENCE)
    if settings.engine == "vllm":
        from relllm.inference.vllm import check_vllm

        check_vllm()
        if state.num_processes > 1:
            arguments = '--engine-args {"tensor_parallel_size": 2}'
            raise ValueError(f"vLLM shares its work out itself: one process, {arguments}.")
    plan = _plan_run(settings)
    plan.identity = _from_main(state, lambda: _run_identity(settings, plan))
    if not _from_main(state, lambda: _is_complete(settings.output_dir, plan.identity)):
        _answer(settings, plan, state, progress=progress)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(settings, plan)
        state.wait_for_everyone()
    return json.loads((settings.output_dir / METRICS).read_text(encoding="utf-8"))


def write_predictions(out: Path, identity: Mapping, lines: Sequence[Mapping]) -> None:
    """Write `predictions.jsonl` in this order; the file is complete or the one before."""
    with write_whole(out / PREDICTIONS) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in ({"settings": identity}, *lines)))


def _plan_run(settings: EvaluationSettings) -> Plan:
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
    rows = _load_rows(settings, system)
    seen = _find_seen(settings, config, system, rows)
    labels = _labels_of(settings, config)
    obstacles = _obstacles(settings, config, rows, system, labels)
    for task in settings.tasks or ():
        if task in obstacles:
            raise ValueError(f"Task {task!r} cannot be measured: {obstacles[task]}. Mend it, or leave {task} out.")
    tasks = tuple(task for task in TASKS if task in (settings.tasks or TASKS) and task not in obstacles)
    if not tasks:
        raise ValueError(f"Nothing can be measured of {settings.data}: {obstacles}.")
    tokenizer, template, processor = load_tokenizer(settings.model, settings.revision)
    questions = Questions(tasks, labels, settings.max_new_tokens, ways=settings.ways)
    if processor is not None:  # a ReLLM is asked as it was trained
        questions = replace(questions, instruction=processor.instruction, system_prompt=processor.system_prompt)
    prompts = render_prompts(tokenizer, template, questions, audio=system not in READERS)
    towers = getattr(config, "towers", None) or {}
    if adapter is not None:
        towers = {"text_model": {"name": adapter["base_model_name_or_path"], "revision": adapter.get("revision")}}
    return Plan(rows, system, questions, prompts, {} if settings.tasks else obstacles, seen, towers)


def plan_batches(rows: Dataset, batch_size: int, system: System, text_column: str = "text") -> list[list[int]]:
    """Batch rows of like length, the longest first: what does not fit shows at once, and little is padded."""
    if system in READERS:
        lengths: list[float] = [len(text or "") for text in rows[text_column]]
    else:
        columns = [name for name in ("audio", "duration_s") if name in rows.column_names]
        lengths = [_duration(row) for row in rows.select_columns(columns)]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _load_rows(settings: EvaluationSettings, system: System) -> Dataset:
    rows = load_corpus(settings.data, settings.split or "all", held_out=settings.held_out)
    assert isinstance(rows, Dataset)  # it is not streamed
    check_columns(rows, {"id", "audio"})
    rows = rows.select(range(min(len(rows), settings.limit or len(rows))))
    check_ids(rows)
    if settings.text_column is not None and system not in READERS:
        raise ValueError(f"--text-column {settings.text_column} is for those that read; {system!r} hears the clips.")
    if settings.text_column not in (None, *rows.column_names):
        raise ValueError(f"{settings.data} has no column {settings.text_column!r}; it has {rows.column_names}.")
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


def _obstacles(
    settings: EvaluationSettings, config: PreTrainedConfig, rows: Dataset, system: System, labels: Sequence[str]
) -> dict[str, str]:
    """Tasks that cannot be measured, and why."""

    def any_of(column: str) -> bool:
        return column in rows.column_names and any(value not in (None, "") for value in rows[column])

    found: dict[str, str] = {}
    reads, read = system in READERS, settings.text_column or "text"
    taught = getattr(config, "trained_readings", None)
    if not (set(rows["emotion"]) if "emotion" in rows.column_names else set()) & set(labels):
        found["ser"] = f"no row has an emotion of the label set ({', '.join(labels)})"
    if set(settings.ways) == {"head"} and (reads or (taught is not None and "emotion" not in taught)):
        found["ser"] = "it has no head that a training has taught emotions (--ways head)"
    if reads:
        found["dimensions"] = "a text-only system has no dimensions"
    elif taught is not None and not set(DIMENSIONS) & set(taught):
        found["dimensions"] = "no training has taught them to the model (trained_readings in its config.json)"
    elif not any(map(any_of, DIMENSIONS)):
        found["dimensions"] = f"no row has any of {', '.join(DIMENSIONS)}"
    if settings.empathy_scorers is None:
        found["empathy"] = "there are no scorers (--empathy-scorers DIR; `relllm empathy train` makes them)"
    if reads and not any_of(read):
        found |= dict.fromkeys(TASKS, f"no row has a transcript (`{read}`)")
    if not any_of("text"):
        found["empathy"] = "no row has a transcript (`text`)"
    return found


def _duration(row: Mapping) -> float:
    """Return the seconds of a clip; 0 where its header does not say, which reading will explain."""
    if row.get("duration_s") is not None:
        return float(row["duration_s"])
    try:
        return clip_duration(row["audio"])
    except (OSError, RuntimeError, TypeError, ArithmeticError):  # soundfile's errors are RuntimeErrors
        return 0.0


def _answer(settings: EvaluationSettings, plan: Plan, state: PartialState, *, progress: bool) -> None:
    """Append a line for every clip that has none yet, the processes a batch each at a time; if any, load a model."""
    is_main, at_once = state.is_main_process, state.num_processes
    journal = Journal(settings.output_dir / PREDICTIONS, plan.identity) if is_main else None
    with journal or nullcontext():
        done = _from_main(state, lambda: set(journal.done if journal else ()))
        ids = plan.rows["id"]
        batches = plan_batches(plan.rows, settings.batch_size, plan.system, settings.text_column or "text")
        todo = [batch for batch in batches if not all(ids[index] in done for index in batch)]
        if not todo:
            return
        device = state.device if settings.device == "auto" else settings.device
        predictor = load_predictor(settings, plan.system, plan.questions, device)
        score = _load_score(settings, str(device)) if "empathy" in plan.questions.tasks else None
        shown = {"desc": "Evaluating", "unit": "clip", "disable": not (progress and is_main)}
        with tqdm(total=len(ids), initial=len(done), **shown) as bar:
            for start in range(0, len(todo), at_once):
                own = todo[start + state.process_index : start + at_once][:1]
                entries = [line for batch in own for line in _predict(predictor, plan.rows.select(batch), score)]
                found = [line for line in gather_object(entries) if line["id"] not in done]
                if journal:
                    journal.append(found)
                bar.update(len(found))


def _finish(settings: EvaluationSettings, plan: Plan) -> None:
    found = {line["id"]: line for line in read_predictions(settings.output_dir)[1]}
    lines = [found[row_id] for row_id in plan.rows["id"]]
    write_predictions(settings.output_dir, plan.identity, lines)
    summary = summarize_clips(lines, plan.questions.labels)
    name = settings.name or settings.output_dir.name
    draw_plots(lines, summary, settings.output_dir / PLOTS, title=name)
    places = {kind: (tower.get("name"), tower.get("revision")) for kind, tower in plan.towers.items()}
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
    scorers = {"scorers": settings.empathy_scorers, "held_out_scorers": settings.held_out_scorers}
    for key, place in scorers.items():
        if "empathy" in metrics and place is not None:
            own = {"id": place, "fingerprint": plan.identity[f"{key}_fingerprint"], "quality": read_quality(place)}
            metrics["empathy"][key] = {**own, "in_windows": settings.reply_windows}
    write_json(metrics, settings.output_dir / METRICS)


def _predict(predictor: Predictor, rows: Dataset, score: Score | None) -> list[dict]:
    """Return the lines of a batch."""
    asked, lines = list(rows), []
    for row, parts in zip(asked, predictor.predict(asked), strict=True):
        votes = {"emotion_votes": row["emotion_votes"]} if row.get("emotion_votes") else {}
        lines.append({**{name: row.get(name) for name in COLUMNS}, **votes, **parts})
    if score is not None:
        both = zip(asked, lines, strict=True)
        replied = [(row["text"], line) for row, line in both if "reply" in line and (row["text"] or "").strip()]
        levels = score([(text, line["reply"]) for text, line in replied]) if replied else []
        for (_, line), empathy in zip(replied, levels, strict=True):
            line["empathy"] = empathy
    return lines


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
    text, further = settings.text_column, settings.held_out_scorers
    places = {"scorers_fingerprint": settings.empathy_scorers, "held_out_scorers_fingerprint": further}
    scorers = {name: None if place is None else folder_fingerprint(place) for name, place in places.items()}
    ours, held_out = scorers.values()
    if held_out is not None and held_out == ours:
        raise ValueError(f"--held-out-scorers {further} are the weights of --empathy-scorers. Train others.")
    record = read_training_record(settings.model, revision=settings.revision)
    if held_out is not None and held_out == record.get("scorers_fingerprint"):
        raise ValueError(f"--held-out-scorers {further} rewarded {settings.model}: its record says so. Train others.")
    identity = {
        "task": "evaluate",
        "system": plan.system,
        "model_fingerprint": model_fingerprint(settings.model, revision=settings.revision),
        "data_fingerprint": data_fingerprint(plan.rows),
        "questions": asdict(plan.questions),
        "prompts": plan.prompts,
        **scorers,
        **{name: getattr(settings, name) for name in ("dtype", "seed", "reply_windows", "text_column", "engine")},
        "engine_args": json.loads(settings.engine_args or "{}"),
        "text_fingerprint": None if text is None else rows_fingerprint(plan.rows, ("id", text)),
    }
    return json.loads(json.dumps(identity))


def _is_complete(out: Path, identity: Mapping) -> bool:
    return (out / METRICS).is_file() and (out / PREDICTIONS).is_file() and read_predictions(out)[0] == identity


def _from_main(state: PartialState, make: Callable):  # type: ignore[no-untyped-def]
    """Return what the main process makes, in every process."""
    made = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0]
