"""The evidence of a card: what runs measured on one checkpoint, without anything of the corpora.

It is kept in `evaluation.json` beside the card. `predictions.jsonl`, with a corpus's ids and words, is never opened.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from relllm.data.journal import read_json
from relllm.evaluation.evaluation_settings import EMPATHY_PARTS, FORMAT, METRICS

EVIDENCE_FORMAT = "relllm-evaluation-1"
EVIDENCE_NAME = "evaluation.json"
# Of a run's metrics.json, what may be published. Not its `data.id` and `name`, which are paths as a rule, nor what a
# protocol holds out by name: speakers and sessions are a corpus's own ids.
PUBLIC_KEYS = (
    *("system", "generation", "prompts", "label_set", "seed", "versions", "hardware"),
    *("recognition", "dimensions", "empathy", "replies", "training"),
)
PUBLIC_DATA_KEYS = ("split", "limit", "fingerprint", "num_clips", "num_failed", "num_speakers")
READINGS = {
    "generated": "in the model's own words",
    "likelihood": "by the likelihood of each label",
    "head": "by the emotion head",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CORPUS_NAME = re.compile(r"[\w.-]+")
PUBLISHED_METRICS = {"ua": ("recall", "UA"), "wa": ("accuracy", "WA"), "macro_f1": ("f1", "macro-F1")}  # type, name


def read_public_run(folder: Path, fingerprint: str) -> dict[str, object]:
    """Read what may be published of one run; one that measured another model is a `ValueError`."""
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: that run is not finished. Go on with `relllm evaluate` first.")
    metrics = _load_json(path, FORMAT)
    found, folds = metrics["model"].get("fingerprint"), metrics.get("folds")
    of_folds = list((folds or {}).get("models", {}).values())
    if fingerprint not in (found, *of_folds):
        raise ValueError(
            f"{folder} measured another model: its fingerprint is {str(found)[:23]}…, and this one's is "
            f"{fingerprint[:23]}…. A card has metrics of its own model only, or of the folds that it is one of. "
            "Evaluate this one with `relllm evaluate`."
        )
    data = metrics["data"]
    public = {key: _without_paths(metrics[key]) for key in PUBLIC_KEYS if metrics.get(key) is not None}
    corpus = str(data.get("corpus"))
    public["data"] = {
        "corpus": corpus if data.get("corpus") and CORPUS_NAME.fullmatch(corpus) else "private",
        "held_out_by": str(data["held_out"]).partition("=")[0] if data.get("held_out") else None,
        **{key: _without_paths(data.get(key)) for key in PUBLIC_DATA_KEYS},
        # labelled by people or by a model, which may be a folder
        "dimension_sources": {str(_without_paths(s)): n for s, n in data.get("dimension_sources", {}).items()},
    }
    if folds:
        counts = {"num_folds": len(folds["values"]), "num_models": len(set(of_folds))}
        public["folds"] = {"column": folds["column"], **counts, "mean": folds.get("mean")}
    return public


def read_corpora(record: Mapping) -> list[dict]:
    """List what is known of the corpora that a training's record names, where `prepare` wrote no facts the name."""
    facts: Mapping[str, Mapping] = record.get("corpus_facts", {})
    names = [name for name in record.get("seen_corpora", ()) if CORPUS_NAME.fullmatch(name)]
    return [{"name": name, "title": name, **facts.get(name, {})} for name in names]


def hub_datasets(record: Mapping) -> list[str]:
    """List the data sets of the Hub that a training read; one of this machine is recorded without its folder."""
    named = [str(record[name]) for name in ("data", "eval_data") if record.get(name)]
    return list(dict.fromkeys(name for name in named if HUB_ID.fullmatch(name)))


def started_from(record: Mapping) -> str | None:
    """Return the checkpoint of the Hub that a training went on with."""
    name = str(record.get("model_name_or_path", ""))
    return name if HUB_ID.fullmatch(name) else None


def describe_rewards(record: Mapping) -> str:
    """Say what a training was rewarded for, by its pairs, or what it starts from; `""` where nothing was rewarded."""
    weights: Mapping[str, float] = {**record.get("rewarded", {}), **record.get("rewards", {})}
    return ", ".join(f"{name} × {weight:g}".replace("-", "−") for name, weight in weights.items())


def read_evidence(folder: Path) -> dict | None:
    """Read the `evaluation.json` of a checkpoint's folder; `None` if there is none."""
    path = folder / EVIDENCE_NAME
    return _load_json(path, EVIDENCE_FORMAT) if path.is_file() else None


def eval_results(runs: Sequence[Mapping]) -> list[EvalResult]:
    """List every number of some runs as the front matter of a card has it; undefined ones are left out."""
    return [result for run in runs for result in _results_of_run(run) if result.metric_value is not None]


def describe_data(run: Mapping) -> str:
    """Name the corpus and split of a run, with how it was held out."""
    data = run["data"]
    split = f"{data['corpus']} {data['split'] or ''}".strip()
    if folds := run.get("folds"):
        models = f" of {folds['num_models']} models" if folds.get("num_models", 1) > 1 else ""
        return f"{split}, {folds['num_folds']} folds by {folds['column']}{models}"
    return f"{split}, held out by {data['held_out_by']}" if data["held_out_by"] else split


def _results_of_run(run: Mapping) -> Iterator[EvalResult]:
    data: dict[str, Any] = {"dataset_type": run["data"]["corpus"], "dataset_name": describe_data(run)}

    def result(task: tuple[str, str], metric: str, name: str, value: object) -> EvalResult:
        told: dict[str, Any] = {"task_type": task[0], "task_name": task[1], "metric_type": metric, "metric_name": name}
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        rounded = round(float(value), 4) if is_number else None  # type: ignore[arg-type]
        return EvalResult(**data, **told, dataset_split=run["data"]["split"], metric_value=rounded)

    recognition = ("audio-classification", "Speech emotion recognition")
    for reading, scores in run.get("recognition", {}).items():
        for key, (metric, short) in PUBLISHED_METRICS.items():
            yield result(recognition, metric, f"{short}, {READINGS.get(reading, reading)}", scores.get(key))
    regression = ("tabular-regression", "Emotion dimensions")
    for dimension, scores in run.get("dimensions", {}).items():
        if isinstance(scores, Mapping):
            yield result(regression, "ccc", f"CCC of {dimension}", scores.get("ccc"))
    generation = ("text-generation", "Empathy of the replies")
    for mechanism in EMPATHY_PARTS:
        level = run.get("empathy", {}).get(mechanism, {}).get("mean_level")
        yield result(generation, "empathy", f"Mean level of {mechanism} (0 to 2)", level)


def cell(value: object) -> str:
    """Write a value as a table in a card shows it; `–` for what is undefined."""
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _load_json(path: Path, expected: str) -> dict:
    content = read_json(path)
    if content.get("format") != expected:
        raise ValueError(f"{path} has the format {content.get('format')!r}, expected {expected!r}.")
    return content


def _without_paths(value: object) -> object:
    """Leave out the paths of a machine."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and (re.match(r"~|\.{0,2}/", value) or ("/" in value and os.path.exists(value))):
        return "a local path"
    return value
