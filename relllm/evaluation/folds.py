"""Leave-one-out evaluation: one run for each fold with the model that did not train on it, and the pooled numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from accelerate import PartialState

from relllm.data.journal import write_json
from relllm.data.loading import column_values

from .evaluating import PATIENCE, PLOTS, evaluate, read_predictions, write_predictions
from .evaluation_settings import METRICS, EvaluationSettings
from .fingerprints import combine_fingerprints
from .summary import MEASURES, count_clips, draw_plots, mean_over_folds, summarize_clips

PLACE = "{fold}"


def evaluate_folds(settings: EvaluationSettings, folds: str, *, progress: bool = True) -> dict:
    """Measure every fold and pool them: the predictions of all folds make the main numbers, beside the mean.

    `settings.model` has `{fold}` in the place of the column's value, unless the system is text-only; `folds` is a
    column, `"session"`, for all of its values, or `"session=Ses01,Ses02"`. Each fold is a run of its own in
    `folds/<value>`. Every process returns the content of `metrics.json`.
    """
    if settings.held_out is not None:
        raise ValueError(f"--folds {folds} makes the held-out rows itself; leave --held-out {settings.held_out} out.")
    if PLACE not in settings.model and settings.system != "text-only":
        raise ValueError(
            f"--folds needs {PLACE} in the model's path, because each fold needs the model that did not train on it; "
            f"got {settings.model!r}. Write it like runs/iemocap-{PLACE}, or leave --folds out for one model."
        )
    column, values = fold_values(settings.data, folds)
    name = settings.name or settings.output_dir.name
    by_fold = {}
    for value in values:
        fold = replace(
            settings,
            model=settings.model.replace(PLACE, value),
            held_out=f"{column}={value}",
            output_dir=settings.output_dir / "folds" / value.replace("/", "_"),
            name=f"{name}, {value}",
        )
        by_fold[value] = evaluate(fold, progress=progress), fold.output_dir
    state = PartialState(cpu=settings.device == "cpu", timeout=PATIENCE)
    predicted = [read_predictions(out) for _, out in by_fold.values()]
    lines = [line for _, own in predicted for line in own]
    [(clip_id, count)] = Counter(line["id"] for line in lines).most_common(1)
    if count > 1:
        raise ValueError(f"The clip {clip_id!r} is in two folds, so they cannot be pooled. Make its id unique.")
    metrics = _pool(settings, name, column, {value: run for value, (run, _) in by_fold.items()}, lines)
    if state.is_main_process:
        identity = {"task": "evaluate-folds", "folds": [own for own, _ in predicted]}
        write_predictions(settings.output_dir, identity, lines)
        draw_plots(lines, metrics, settings.output_dir / PLOTS, title=name)
        write_json(metrics, settings.output_dir / METRICS)
    state.wait_for_everyone()
    return metrics


def fold_values(data: str, folds: str) -> tuple[str, list[str]]:
    """Return column and values of `--folds`, at least two; in sorted order where the data give them."""
    column, named, given = folds.partition("=")
    listed = [value.strip() for value in given.split(",") if value.strip()]
    values = listed if named else column_values(data, column)
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"--folds {folds}: expected at least two different values of {column!r}, got {values}.")
    return column, values


def _pool(
    settings: EvaluationSettings, name: str, column: str, by_fold: Mapping[str, dict], lines: Sequence[Mapping]
) -> dict:
    """Return the content of `metrics.json`, from the metrics of each fold and the lines of all."""
    first, *_ = runs = list(by_fold.values())
    seen = [run["training"] for run in runs]  # of the rows that a fold holds out
    for key in ("system", "label_set", "prompts"):
        if any(run[key] != first[key] for run in runs):
            raise ValueError(f"The folds differ in {key!r}, so they cannot be pooled: {[run[key] for run in runs]}.")
    parts = [{task: run[task] for task in MEASURES if task in run} for run in runs]
    summary = summarize_clips(lines, first["label_set"])
    for key in ("scorers", "held_out_scorers"):
        if key in first.get("empathy", {}):
            summary["empathy"][key] = first["empathy"][key]
    shared_towers = set.intersection(*(set(run["model"]["towers"].items()) for run in runs))
    return {
        **first,
        "name": name,
        "model": {
            **first["model"],
            "id": settings.model,
            "revision": None,
            "fingerprint": combine_fingerprints([run["model"]["fingerprint"] for run in runs]),
            "towers": dict(sorted(shared_towers)),
        },
        "data": {
            **first["data"],
            "held_out": column,
            "fingerprint": combine_fingerprints([run["data"]["fingerprint"] for run in runs]),
            **count_clips(lines, first["label_set"]),
        },
        **summary,
        "training": {
            **{name: sum(one[name] for one in seen) for name in ("trained_on", "validated_on")},
            "recorded": all(one["recorded"] for one in seen),
            "chosen_by": any(one["chosen_by"] for one in seen),
            "corpora": sorted({name for one in seen for name in one["corpora"]}),
        },
        "folds": {
            "column": column,
            "values": list(by_fold),
            "models": {value: run["model"]["fingerprint"] for value, run in by_fold.items()},
            "by_fold": dict(zip(by_fold, parts, strict=True)),
            "mean": mean_over_folds(parts),
            "mean_is": "the unweighted mean over folds",
            "pooled": "the numbers above are pooled over all folds",
        },
    }
