"""Calibration: whether a probability of 0.8 is right in 80 of 100 clips.

What lives here: the expected calibration error (ECE) and the bins of the reliability curve, from labels and
probabilities. What does not: making probabilities, the picture (`plots.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

NUM_BINS = 15
_SUM_TOLERANCE = 1e-3  # half-precision softmaxes sum to one only about


class CalibrationBin(TypedDict):
    """The clips whose confidence lies in one bin.

    Attributes:
        lower (`float`): Exclusive, but 0 belongs to the first bin. upper (`float`): Inclusive.
        num_clips (`int`): How many there are.
        confidence (`float` or `None`): Their mean confidence; `None` without clips.
        accuracy (`float` or `None`): The share of them that is right; `None` without clips.
    """

    lower: float
    upper: float
    num_clips: int
    confidence: float | None
    accuracy: float | None


class CalibrationMetrics(TypedDict):
    """Plain numbers, ready for JSON.

    Attributes:
        ece (`float`): Mean over the clips of |accuracy - confidence| of their bin, in [0, 1]. 0 is perfect.
        bins (`list[CalibrationBin]`): The reliability curve, from confidence 0 to 1.
        num_clips (`int`): How many clips were counted.
    """

    ece: float
    bins: list[CalibrationBin]
    num_clips: int


def calibration_metrics(
    labels: Sequence[str],
    probabilities: Sequence[Mapping[str, float]],
    class_names: Sequence[str],
    *,
    num_bins: int = NUM_BINS,
) -> CalibrationMetrics:
    """Expected calibration error with bins of equal width.

    A clip's confidence is its highest probability; its prediction is the class that has it, the first one of
    `class_names` among equals.

    Args:
        labels (`Sequence[str]`): True class of each clip, one of `class_names`.
        probabilities (`Sequence[Mapping[str, float]]`): For each clip the probability of every class, sum 1.
        class_names (`Sequence[str]`): All classes.
        num_bins (`int`, *optional*, defaults to 15): At least 1.

    Returns:
        `CalibrationMetrics`: Plain numbers.

    Raises:
        ValueError: No clips, different lengths, an unknown label, a class without probability, or probabilities that
            are not finite, lie outside [0, 1] or do not sum to 1.
    """
    if num_bins < 1:
        raise ValueError(f"Expected at least one bin, got {num_bins}.")
    if len(labels) != len(probabilities):
        raise ValueError(
            f"Got {len(labels)} labels and {len(probabilities)} rows of probabilities; expected one of each for a "
            "clip."
        )
    if not labels:
        raise ValueError("There are no clips to measure. Check the split, and that its rows have an emotion.")
    names = list(class_names)
    table = np.array([_row(position, row, names) for position, row in enumerate(probabilities)])  # (clips, classes)
    for position, label in enumerate(labels):
        if label not in names:
            raise ValueError(
                f"The label at position {position} is {label!r}, expected one of {names}. Leave out clips without a "
                "label."
            )
    confidence = table.max(axis=1).clip(max=1)  # a sum of 1.0004 may hold one
    right = np.array([names.index(label) for label in labels]) == table.argmax(axis=1)
    bins = _bins(confidence, right, num_bins)
    gaps = [
        one["num_clips"] * abs(one["accuracy"] - one["confidence"])
        for one in bins
        if one["accuracy"] is not None and one["confidence"] is not None
    ]
    return CalibrationMetrics(ece=float(sum(gaps) / len(labels)), bins=bins, num_clips=len(labels))


def _row(position: int, row: Mapping[str, float], names: Sequence[str]) -> list[float]:
    if set(row) != set(names):
        raise ValueError(
            f"Clip {position} has probabilities for {sorted(row)}, expected one for each of {sorted(names)}."
        )
    values = [float(row[name]) for name in names]
    in_range = all(0 <= value <= 1 + _SUM_TOLERANCE for value in values)  # false for NaN too
    if not in_range or abs(sum(values) - 1) > _SUM_TOLERANCE:
        raise ValueError(
            f"The probabilities of clip {position} are {dict(row)}; expected values in [0, 1] that sum to 1. The "
            "model's output is broken."
        )
    return values


def _bins(confidence: np.ndarray, right: np.ndarray, num_bins: int) -> list[CalibrationBin]:
    edges = np.linspace(0, 1, num_bins + 1)
    indices = np.searchsorted(edges[1:-1], confidence, side="left")  # (lower, upper]
    counts = np.bincount(indices, minlength=num_bins)
    confidences = np.bincount(indices, weights=confidence, minlength=num_bins)
    rights = np.bincount(indices, weights=right, minlength=num_bins)
    return [
        CalibrationBin(
            lower=float(edges[index]),
            upper=float(edges[index + 1]),
            num_clips=int(count),
            confidence=float(confidences[index] / count) if count else None,
            accuracy=float(rights[index] / count) if count else None,
        )
        for index, count in enumerate(counts)
    ]


__all__ = ["NUM_BINS", "CalibrationBin", "CalibrationMetrics", "calibration_metrics"]
