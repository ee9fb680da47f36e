"""A metric of one system, in the three forms that a comparison needs: the value, summands, and values to pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from relllm.metrics import dimension_metrics, recognition_metrics

from .evaluation_settings import LEVELS

# From sums over clips, `(resamples, values)`, to the metric of each resample; not finite where it is not defined.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One number of the tables."""

    table: str  # "empathy", "recognition" or "dimensions"
    part: str  # the mechanism, the way of recognition, or the dimension
    name: str  # "mean_level", "ua", "wa", "macro_f1" or "ccc"


@dataclass(frozen=True)
class Measured:
    """A system's metric."""

    value: float | None  # in the metric's own unit; None where it is not defined
    summands: np.ndarray  # (clips, values): what `statistic` needs the sums of
    statistic: Statistic  # the metric from these sums
    paired: np.ndarray | None  # (clips,): values whose mean is the metric; None where it is none


def measure_part(
    clips: Sequence[dict], table: str, part: str, class_names: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Metric, Measured]]:
    """Yield the metrics of one part of one table, from lines of predictions.jsonl that have it and its label."""
    if table == "empathy":
        yield Metric(table, part, "mean_level"), _levels_measured(clips, part)
    elif table == "dimensions":
        yield Metric(table, part, "ccc"), _concordance(clips, part)
    else:
        for name, one in _recognition_measured(clips, part, list(class_names[part])).items():
            yield Metric(table, part, name), one


def _levels_measured(clips: Sequence[dict], mechanism: str) -> Measured:
    for clip in clips:
        level = clip["empathy"][mechanism]["level"]
        if level not in range(LEVELS):
            raise ValueError(
                f"Clip {clip['id']!r}: the level of {mechanism} is {level!r}, expected 0 to {LEVELS - 1}. "
                "Evaluate again."
            )
    levels = np.array([clip["empathy"][mechanism]["level"] for clip in clips], dtype=float)
    summands = np.stack([levels, np.ones(len(levels))], axis=1)
    return Measured(float(levels.mean()), summands, lambda sums: sums[:, 0] / sums[:, 1], levels)


def _recognition_measured(clips: Sequence[dict], way: str, names: list[str]) -> dict[str, Measured]:
    truth = [clip["emotion"] for clip in clips]
    answers = [clip["recognition"][way] for clip in clips]
    if way == "generated":
        predictions = [answer["emotion"] for answer in answers]
    else:
        predictions = [max(names, key=answer.__getitem__) for answer in answers]
    values = recognition_metrics(truth, predictions, names)
    true = np.array([names.index(name) for name in truth])[:, None] == np.arange(len(names))  # (clips, classes)
    predicted = np.array([[name == prediction for name in names] for prediction in predictions])
    right = (true & predicted).any(axis=1).astype(float)
    # Weighted so that the mean over all clips is UA.
    support = true.sum(axis=0)
    weights = (len(clips) / (np.count_nonzero(support) * np.maximum(support, 1)))[true.argmax(axis=1)]
    summands = np.concatenate([true & predicted, true, predicted], axis=1).astype(float)
    paired = {"ua": right * weights, "wa": right, "macro_f1": None}
    statistics: dict[str, Statistic] = {"ua": _ua, "wa": _wa, "macro_f1": _macro_f1}
    found = {"ua": values["ua"], "wa": values["wa"], "macro_f1": values["macro_f1"]}
    return {name: Measured(found[name], summands, statistics[name], paired[name]) for name in found}


def _ua(sums: np.ndarray) -> np.ndarray:
    hits, true, _ = np.split(sums, 3, axis=1)
    return (hits / np.maximum(true, 1)).sum(axis=1) / (true > 0).sum(axis=1)


def _wa(sums: np.ndarray) -> np.ndarray:
    hits, true, _ = np.split(sums, 3, axis=1)
    return hits.sum(axis=1) / true.sum(axis=1)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    hits, true, predicted = np.split(sums, 3, axis=1)
    scores = np.where(true > 0, 2 * hits / np.maximum(true + predicted, 1), 0)
    return scores.sum(axis=1) / (true > 0).sum(axis=1)


def _concordance(clips: Sequence[dict], dimension: str) -> Measured:
    truth = [float(clip[dimension]) for clip in clips]
    predicted = [float(clip["dimensions"][dimension]) for clip in clips]
    value = dimension_metrics({dimension: truth}, {dimension: predicted})[dimension]["ccc"]
    x, y = np.array(truth) - np.mean(truth), np.array(predicted) - np.mean(truth)  # small sums of squares
    return Measured(value, np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1), _ccc, None)


def _ccc(sums: np.ndarray) -> np.ndarray:
    count, x, y, xx, yy, xy = sums.T
    spread = xx + yy - 2 * x * y / count  # n (var x + var y + (mean x - mean y)^2)
    with np.errstate(all="ignore"):
        return np.where(spread > 1e-12, 2 * (xy - x * y / count) / spread, np.nan)
