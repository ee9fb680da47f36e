"""Leave-one-out evaluation: one run for each fold with the model that did not train on it, and the pooled numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from accelerate import PartialState

from relllm.data.journal import write_json
from relllm.data.loading import column_values

from .evaluating import PATIENCE, PLOTS, Score, evaluate, read_predictions, write_predictions
from .evaluation_settings import METRICS, EvaluationSettings
from .fingerprints import combine_fingerprints
from .summary import MEASURES, count_clips, draw_plots, mean_over_folds, summarize_clips

PLACE = "{fold}"


def evaluate_folds(
    settings: EvaluationSettings, folds: str, *, score: Score | None = None, progress: bool = True
) -> dict:
    """Measure every fold and pool them: the predictions of all folds make the main numbers, beside the mean.

    Each fold is a run of its own in `folds/<value>`, so a killed evaluation goes on in the fold it was in. Every
    process returns the content of `metrics.json`.

    Args:
        settings ([`EvaluationSettings`]): With `{fold}` in `model`, in the place of the column's value, unless the
            system is text-only. `held_out` is made from the folds.
        folds (`str`): A column, `"session"`, for all of its values; or `"session=Ses01,Ses02"`.
        score (`Callable`, *optional*): See [`evaluate`].
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
        by_fold[value] = evaluate(fold, score=score, progress=progress), fold.output_dir
    state = PartialState(cpu=settings.device == "cpu", timeout=PATIENCE)
    predicted = [read_predictions(out) for _, out in by_fold.values()]
    lines = _pool_lines([own for _, own in predicted])
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
    runs = list(by_fold.values())
    first = runs[0]
    for key in ("system", "label_set", "prompts"):
        if any(run[key] != first[key] for run in runs):
            raise ValueError(f"The folds differ in {key!r}, so they cannot be pooled: {[run[key] for run in runs]}.")
    parts = [{task: run[task] for task in MEASURES if task in run} for run in runs]
    summary = summarize_clips(lines, first["label_set"])
    for key in ("scorers", "held_out_scorers"):
        if key in first.get("empathy", {}):
            summary["empathy"][key] = first["empathy"][key]
    shared_towers = {
        kind: place
        for kind, place in first["model"]["towers"].items()
        if all(run["model"]["towers"].get(kind) == place for run in runs)
    }
    return {
        **first,
        "name": name,
        "model": {
            **first["model"],
            "id": settings.model,
            "revision": None,
            "fingerprint": combine_fingerprints([run["model"]["fingerprint"] for run in runs]),
            "towers": shared_towers,
        },
        "data": {
            **first["data"],
            "held_out": column,
            "fingerprint": combine_fingerprints([run["data"]["fingerprint"] for run in runs]),
            **count_clips(lines, first["label_set"]),
        },
        **summary,
        "training": _pool_seen(runs),
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


def _pool_seen(runs: Sequence[Mapping]) -> dict[str, object]:
    """Return what the trainings of all folds have read of their own held-out rows; older runs do not say."""
    seen = [run["training"] for run in runs if "training" in run]
    return {
        **{name: sum(one[name] for one in seen) for name in ("trained_on", "validated_on")},
        "recorded": len(seen) == len(runs) and all(one["recorded"] for one in seen),
        "chosen_by": any(one["chosen_by"] for one in seen),
        "corpora": sorted({name for one in seen for name in one["corpora"]}),
    }


def _pool_lines(folds: Sequence[Sequence[dict]]) -> list[dict]:
    lines = [line for fold in folds for line in fold]
    again = [row_id for row_id, count in Counter(line["id"] for line in lines).items() if count > 1]
    if again:
        raise ValueError(f"The clip {again[0]!r} is in two folds, so the folds cannot be pooled. Make its id unique.")
    return lines
