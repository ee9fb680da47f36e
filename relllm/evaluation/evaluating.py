"""`relllm evaluate`: a system over a data set, into a folder with predictions, metrics and plots.

What lives here: processes, resuming, the files. What does not: checks and batches (`planning.py`), asking a model
(`predicting.py`), numbers (`summary.py`), pooling folds (`folds.py`).

Design: every process appends what it has finished to a journal of its own; the main one's is `predictions.jsonl`. At
the end, and when a killed run goes on, the main process collects the others' journals, and once every clip is there it
writes `predictions.jsonl` anew in the order of the data. Batches are planned over all rows, done or not, so a clip is
always in the company it would have had.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import set_seed

from relllm import __version__
from relllm.data.journal import Journal, write_json
from relllm.inference.replies import GREEDY
from relllm.labels import DIMENSIONS
from relllm.modeling.assembly_relllm import find_commit

from .asking import RECOGNITION_TOKENS, Questions
from .fingerprints import data_fingerprint, folder_fingerprint, model_fingerprint
from .planning import EvaluationSettings, Plan, plan_batches, plan_run
from .predicting import Predictor, load_config, load_predictor
from .summary import count_clips, draw_plots, summarize

FORMAT = "relllm-run-1"
PREDICTIONS, METRICS, PLOTS = "predictions.jsonl", "metrics.json", "plots"
COLUMNS = ("id", "speaker", "session", "duration_s", "emotion", *DIMENSIONS, "dimension_source")  # of a row, in a line
PATIENCE = timedelta(days=2)  # that one process waits for another
Score: TypeAlias = Callable[[Sequence[tuple[str, str]]], list[dict]]  # pairs of seeker post and reply -> levels


def evaluate(settings: EvaluationSettings, *, score: Score | None = None, progress: bool = True) -> dict:
    """Measures a system and writes `predictions.jsonl`, `metrics.json` and `plots/`.

    Killed, the same call goes on where it was; complete, it returns what is there. In several processes
    (`accelerate launch`) they share the clips and the files are the same.

    Args:
        settings ([`EvaluationSettings`]): What to measure.
        score (`Callable`, *optional*): Scores `(seeker post, reply)` pairs, in place of `settings.empathy_scorers`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: The content of `metrics.json`, in every process.

    Raises:
        ValueError: If a task cannot be measured, the system contradicts the checkpoint, or `out` belongs to a run with
            other settings; before anything runs.
        ImportError: If an extra is missing.
    """
    _check_extras()
    set_seed(settings.seed)
    state = PartialState(cpu=settings.device == "cpu", timeout=PATIENCE)
    plan = plan_run(settings, with_scorers=score is not None or settings.empathy_scorers is not None)
    plan.identity = _from_main(state, lambda: _identity(settings, plan))
    if _from_main(state, lambda: _is_complete(settings.out, plan.identity)):
        return json.loads((settings.out / METRICS).read_text(encoding="utf-8"))
    _answer(settings, plan, state, score, progress=progress)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(settings, plan)
    state.wait_for_everyone()
    return json.loads((settings.out / METRICS).read_text(encoding="utf-8"))


def collect_journals(out: Path, identity: Mapping) -> dict[str, dict]:
    """All finished lines by id. Those that other processes left in journals of their own move to the main one.

    Raises:
        ValueError: If they are of other settings.
        BlockingIOError: If another run is writing there.
    """
    with Journal(out / PREDICTIONS, identity) as journal:
        for path in sorted(out.glob("predictions.part*.jsonl")):
            with Journal(path, identity) as part:
                journal.append(entry for row_id, entry in part.done.items() if row_id not in journal.done)
            path.unlink()
        return dict(journal.done)


def read_predictions(out: Path) -> tuple[dict, list[dict]]:
    """Settings and lines of a run's `predictions.jsonl`.

    Args:
        out (`Path`): Folder of the run.
    """
    first, *lines = (out / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return json.loads(first)["settings"], [json.loads(line) for line in lines]


def write_predictions(out: Path, identity: Mapping, lines: Sequence[Mapping]) -> None:
    """`predictions.jsonl` in this order; the file is complete or the one before."""
    partial = out / f"{PREDICTIONS}.partial"
    partial.unlink(missing_ok=True)
    with Journal(partial, identity) as journal:
        journal.append(lines)
        partial.replace(out / PREDICTIONS)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "numpy", "scikit-learn", "audmetric")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"relllm": __version__, "python": platform.python_version(), **found}


def _answer(
    settings: EvaluationSettings, plan: Plan, state: PartialState, score: Score | None, *, progress: bool
) -> None:
    """Appends a line for every clip of this process that has none yet; without one, no model is loaded."""
    done = _from_main(state, lambda: set(collect_journals(settings.out, plan.identity)))
    batches = plan_batches(plan.rows, settings.batch_size, plan.system)[state.process_index :: state.num_processes]
    ids = plan.rows["id"]
    todo = [batch for batch in batches if not all(ids[index] in done for index in batch)]
    if not todo:
        return
    device = state.device if settings.device == "auto" else settings.device
    options = {"revision": settings.revision, "dtype": settings.dtype}
    predictor = load_predictor(settings.model, plan.system, plan.questions, device=device, **options)
    if score is None and "empathy" in plan.questions.tasks:
        score = _load_score(settings, str(device))
    name = PREDICTIONS if state.is_main_process else f"predictions.part{state.process_index}.jsonl"
    total, left = sum(map(len, batches)), sum(map(len, todo))
    hidden = not (progress and state.is_main_process)
    with (
        Journal(settings.out / name, plan.identity) as journal,
        tqdm(total=total, initial=total - left, desc="Evaluating", unit="clip", disable=hidden) as bar,
    ):
        for entries in _predict(predictor, plan.rows, todo, done, score):
            journal.append(entries)
            bar.update(len(entries))


def _finish(settings: EvaluationSettings, plan: Plan) -> None:
    found = collect_journals(settings.out, plan.identity)
    lines = [found[row_id] for row_id in plan.rows["id"]]
    write_predictions(settings.out, plan.identity, lines)
    summary = summarize(lines, plan.questions.labels)
    name = settings.name or settings.out.name
    draw_plots(lines, summary, settings.out / PLOTS, title=name)
    config = load_config(settings.model, settings.revision)
    towers = getattr(config, "towers", None) or {}
    metrics = {
        "format": FORMAT,
        "system": plan.system,
        "name": name,
        "model": {
            "id": settings.model,
            "revision": find_commit(settings.model, settings.revision),
            "fingerprint": plan.identity["model_fingerprint"],
            "towers": {kind: _source(tower) for kind, tower in towers.items()},
            "dtype": settings.dtype,
        },
        "data": {
            "id": settings.data,
            "corpus": _corpus_name(settings.data),
            "split": settings.split,
            "held_out": settings.held_out,
            "limit": settings.limit,
            "fingerprint": plan.identity["data_fingerprint"],
            **count_clips(lines, plan.questions.labels),
        },
        "prompts": plan.prompts,
        "label_set": list(plan.questions.labels),
        "generation": generation_settings(plan.questions),
        "seed": settings.seed,
        "versions": versions(),
        "hardware": _hardware(settings.device),
        **summary,
        "left_out": plan.left_out,
        "folds": None,
    }
    if "empathy" in metrics:
        metrics["empathy"]["scorers"] = {
            "id": settings.empathy_scorers,
            "fingerprint": plan.identity["scorers_fingerprint"],
        }
    write_json(metrics, settings.out / METRICS)


def generation_settings(questions: Questions) -> dict:
    """How answers are drawn."""
    greedy = {name: value for name, value in GREEDY.items() if value is not None}
    return {**greedy, "max_new_tokens": {"recognition": RECOGNITION_TOKENS, "reply": questions.max_new_tokens}}


def _predict(
    predictor: Predictor, rows: Dataset, batches: Sequence[Sequence[int]], done: Container[str], score: Score | None
) -> Iterator[list[dict]]:
    """Lines batch by batch, without those of clips that are done."""
    for batch in batches:
        asked = list(rows.select(batch))
        lines = [
            {**{name: row.get(name) for name in COLUMNS}, **parts}
            for row, parts in zip(asked, predictor.predict(asked), strict=True)
        ]
        if score is not None:
            pairs = {
                index: (row["text"], lines[index]["reply"])
                for index, row in enumerate(asked)
                if "reply" in lines[index] and (row["text"] or "").strip()
            }
            for index, empathy in zip(pairs, score(list(pairs.values())) if pairs else [], strict=True):
                lines[index]["empathy"] = empathy
        yield [line for line in lines if line["id"] not in done]


def _load_score(settings: EvaluationSettings, device: str) -> Score:
    from .empathy.scoring import load_scorers, score_pairs

    assert settings.empathy_scorers is not None  # else the task is left out
    scorers = load_scorers(settings.empathy_scorers)
    return lambda pairs: score_pairs(scorers, pairs, batch_size=settings.batch_size, device=device)


def _identity(settings: EvaluationSettings, plan: Plan) -> dict:
    scorers = settings.empathy_scorers
    return {
        "task": "evaluate",
        "system": plan.system,
        "model_fingerprint": model_fingerprint(settings.model, revision=settings.revision),
        "data_fingerprint": data_fingerprint(plan.rows),
        "scorers_fingerprint": folder_fingerprint(scorers) if scorers is not None else None,
        "questions": json.loads(json.dumps(asdict(plan.questions))),
        "prompts": plan.prompts,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }


def _is_complete(out: Path, identity: Mapping) -> bool:
    return (out / METRICS).is_file() and (out / PREDICTIONS).is_file() and read_predictions(out)[0] == identity


def _from_main(state: PartialState, make: Callable):  # type: ignore[no-untyped-def]
    """What the main process makes, in every process."""
    made = [make() if state.is_main_process else None]
    return broadcast_object_list(made)[0]


def _check_extras() -> None:
    """Says at the beginning what would be missing at the end."""
    for name in ("audmetric", "matplotlib", "scikit-learn"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"Evaluation needs {name}: `pip install relllm[eval]`.") from error


def _corpus_name(data: str) -> str:
    """What `relllm prepare` wrote down; else the folder's name, `iemocap` of `data/iemocap/targets.jsonl`."""
    path = Path(data)
    folder = path.absolute().parent if path.is_file() else path
    report = folder / "report.json"
    prepared = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    return str(prepared.get("corpus", folder.name))


def _source(tower: Mapping) -> str:
    return f"{tower['name']}@{tower['revision']}" if tower.get("revision") else str(tower["name"])


def _hardware(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


__all__ = [
    "Score",
    "collect_journals",
    "evaluate",
    "generation_settings",
    "read_predictions",
    "versions",
    "write_predictions",
]
