"""Metrics of arousal, dominance and valence: CCC (the paper's), Pearson's correlation and the root mean square error.

What lives here: numbers from named dimensions. What does not: an order of three floats; everything goes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from relllm.labels import DIMENSIONS


class DimensionMetrics(TypedDict):
    """Plain numbers for one dimension; `None` where the data do not define them.

    Attributes:
        ccc (`float` or `None`): Concordance correlation (Lin, 1989), in [-1, 1]; needs two clips that are not all
        equal. pearson (`float` or `None`): Correlation, in [-1, 1]; needs labels and predictions that vary.
        rmse (`float` or `None`): Root mean square error; needs one clip.
        num_clips (`int`): The labelled clips, which are the ones counted.
    """

    ccc: float | None
    pearson: float | None
    rmse: float | None
    num_clips: int


def dimension_metrics(
    labels: Mapping[str, Sequence[float | None]], predictions: Mapping[str, Sequence[float]]
) -> dict[str, DimensionMetrics]:
    """CCC, Pearson's correlation and RMSE of each dimension.

    Args:
        labels (`Mapping[str, Sequence[float | None]]`): For each dimension (of `DIMENSIONS`) one value a clip; `None`
        or NaN where
            a clip is unlabelled, which leaves it out of that dimension.
        predictions (`Mapping[str, Sequence[float]]`): The same dimensions and clips; every value finite.

    Returns:
        `dict[str, DimensionMetrics]`: By dimension, in the order of `DIMENSIONS`.

    Raises:
        ValueError: Other dimensions in one than in the other, different lengths, or a prediction that is not finite.
        ImportError: audmetric is missing (`pip install relllm[eval]`).
    """
    if set(labels) != set(predictions) or not set(labels) <= set(DIMENSIONS) or not labels:
        raise ValueError(
            f"Got labels for {sorted(labels)} and predictions for {sorted(predictions)}; expected the same names, out "
            f"of {', '.join(DIMENSIONS)}."
        )
    return {name: _metrics(name, labels[name], predictions[name]) for name in DIMENSIONS if name in labels}


def _metrics(name: str, labels: Sequence[float | None], predictions: Sequence[float]) -> DimensionMetrics:
    try:
        import audmetric
    except ImportError as error:
        raise ImportError("Dimension metrics need audmetric: `pip install relllm[eval]`.") from error

    if len(labels) != len(predictions):
        raise ValueError(
            f"{name}: got {len(labels)} labels and {len(predictions)} predictions; expected one for each clip."
        )
    truth = np.array([np.nan if value is None else value for value in labels], dtype=float)
    predicted = np.array(predictions, dtype=float)
    bad = np.flatnonzero(~np.isfinite(predicted))
    if len(bad):
        raise ValueError(
            f"{name}: the prediction for clip {bad[0]} is {predicted[bad[0]]}; the model's output is broken."
        )
    if np.isinf(truth).any():
        raise ValueError(
            f"{name}: the label of clip {np.flatnonzero(np.isinf(truth))[0]} is infinite; use None or NaN."
        )
    labelled = ~np.isnan(truth)
    truth, predicted = truth[labelled], predicted[labelled]
    varies = len(truth) > 1 and np.ptp(truth) > 0, len(truth) > 1 and np.ptp(predicted) > 0
    has_ccc = len(truth) > 1 and (any(varies) or truth[0] != predicted[0])
    return DimensionMetrics(
        ccc=_finite(audmetric.concordance_cc, truth, predicted) if has_ccc else None,
        pearson=_finite(audmetric.pearson_cc, truth, predicted) if all(varies) else None,
        rmse=_finite(_root_mean_square, truth, predicted) if len(truth) else None,
        num_clips=len(truth),
    )


def _root_mean_square(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((truth - predicted) ** 2)))


def _finite(
    measure: Callable[[np.ndarray, np.ndarray], float], truth: np.ndarray, predicted: np.ndarray
) -> float | None:
    """`None` where the values differ by so little (or so much) that float arithmetic has no answer."""
    with np.errstate(all="ignore"):
        value = float(measure(truth, predicted))
    return value if np.isfinite(value) else None
