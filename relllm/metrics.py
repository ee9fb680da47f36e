"""Metrics of speech emotion recognition (SER), as the field and the paper name them, on scikit-learn and audmetric,
which are imported on use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

import numpy as np

from .labels import DIMENSIONS

NUM_BINS = 15
_SUM_TOLERANCE = 1e-3  # half-precision softmaxes sum to one only about


class RecognitionMetrics(TypedDict):
    """What [`recognition_metrics`] gives: plain numbers, ready for JSON."""

    ua: float  # unweighted accuracy (UAR): mean of the recalls of the classes that occur in the labels
    wa: float  # weighted accuracy: the share of clips that are right
    macro_f1: float  # mean F1 of the classes that occur in the labels; 0 for one that is never predicted
    recall: dict[str, float | None]  # None for a class that does not occur in the labels
    confusion_matrix: list[list[int]]  # clips, true class by row; clips without a prediction are in no column
    class_names: list[str]  # the order of rows and columns
    num_clips: int
    num_unparsed: int  # clips without a prediction, which is a wrong one


class DimensionMetrics(TypedDict):
    """What [`dimension_metrics`] gives for one dimension; `None` where the data do not define a number."""

    ccc: float | None  # concordance correlation (Lin, 1989) in [-1, 1]; needs two clips that are not all equal
    pearson: float | None  # in [-1, 1]; needs labels and predictions that vary
    rmse: float | None  # needs one clip
    num_clips: int  # the labelled ones, which are those counted


class CalibrationBin(TypedDict):
    """The clips whose confidence lies in (lower, upper]; 0 belongs to the first bin."""

    lower: float
    upper: float
    num_clips: int
    confidence: float | None  # mean; None without clips
    accuracy: float | None  # share that is right; None without clips


class CalibrationMetrics(TypedDict):
    """What [`calibration_metrics`] gives: plain numbers, ready for JSON."""

    ece: float  # mean over the clips of |accuracy - confidence| of their bin, in [0, 1]; 0 is perfect
    bins: list[CalibrationBin]  # the reliability curve, from confidence 0 to 1
    num_clips: int


class VoteMetrics(TypedDict):
    """What [`vote_metrics`] gives: plain numbers, ready for JSON."""

    any_rater_macro_f1: float  # a prediction that any rater gave is right
    jensen_shannon: float | None  # mean divergence of votes and probabilities in bits, in [0, 1]; 0 is equal
    ece: float | None  # as of `CalibrationMetrics`, the share of votes in the place of right or wrong
    num_clips: int  # those with a vote for one of the classes


def recognition_metrics(
    labels: Sequence[str] | Sequence[int],
    predictions: Sequence[str | None] | Sequence[int | None],
    class_names: Sequence[str],
) -> RecognitionMetrics:
    """Return UA, WA, macro-F1, the recall of each class and the confusion matrix.

    Classes are names of `class_names` or indices into them; a prediction of `None`, where an answer names no class, is
    wrong. A class that does not occur in the labels has no recall and is left out of UA and macro-F1, as in
    scikit-learn's balanced accuracy; predicting it is still wrong. Compare runs on the same labels only.
    """
    with _installing():
        from sklearn.metrics import confusion_matrix, f1_score

    _check_clips(labels, predictions, "predictions")
    names = list(class_names)
    true = np.array([_index(value, names, "label", at) for at, value in enumerate(labels)])
    # One index further stands for no prediction.
    numbered = enumerate(predictions)
    predicted = np.array([len(names) if one is None else _index(one, names, "prediction", at) for at, one in numbered])
    matrix = confusion_matrix(true, predicted, labels=range(len(names)))  # leaves out the unparsed
    support = np.bincount(true, minlength=len(names))
    present = np.flatnonzero(support)
    recalls = np.diag(matrix) / np.maximum(support, 1)
    return RecognitionMetrics(
        ua=float(recalls[present].mean()),
        wa=float(np.trace(matrix) / len(true)),
        macro_f1=float(f1_score(true, predicted, labels=present, average="macro", zero_division=0.0)),
        recall={name: float(recalls[at]) if support[at] else None for at, name in enumerate(names)},
        confusion_matrix=matrix.tolist(),
        class_names=names,
        num_clips=len(true),
        num_unparsed=int(np.sum(predicted == len(names))),
    )


def dimension_metrics(
    labels: Mapping[str, Sequence[float | None]], predictions: Mapping[str, Sequence[float]]
) -> dict[str, DimensionMetrics]:
    """Return CCC, Pearson's correlation and RMSE of each dimension, in the order of `DIMENSIONS`.

    Both arguments have the same dimensions and clips. A label of `None` or NaN leaves its clip out of that dimension;
    a prediction that is not finite is a `ValueError`.
    """
    if set(labels) != set(predictions) or not set(labels) <= set(DIMENSIONS) or not labels:
        raise ValueError(
            f"Got labels for {sorted(labels)} and predictions for {sorted(predictions)}; expected the same names, out "
            f"of {', '.join(DIMENSIONS)}."
        )
    return {name: _dimension(name, labels[name], predictions[name]) for name in DIMENSIONS if name in labels}


def concordances(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return `ccc_arousal`, `ccc_dominance` and `ccc_valence`, of each dimension with two labelled clips or more.

    Labels and predictions are `(clips, 3)`, in the order of `DIMENSIONS`; labels are NaN where unlabelled. NaN among
    the predictions gives NaN, and two constants give 0, so that training goes on.
    """
    with _installing():
        from audmetric import concordance_cc

    values = {}
    for name, truth, predicted in zip(DIMENSIONS, np.transpose(labels), np.transpose(predictions), strict=True):
        labelled = ~np.isnan(truth)
        truth, predicted = truth[labelled].astype(float), predicted[labelled].astype(float)
        if len(truth) >= 2:
            constant = np.ptp(truth) == 0 and np.ptp(predicted) == 0
            values[f"ccc_{name}"] = 0.0 if constant else concordance_cc(truth, predicted)
    return values


def calibration_metrics(
    labels: Sequence[str], probabilities: Sequence[Mapping[str, float]], class_names: Sequence[str]
) -> CalibrationMetrics:
    """Return the expected calibration error, over bins of equal width, and the bins.

    Each clip has the probability of every class. Its confidence is the highest one; its prediction is the class that
    has it, the first one of `class_names` among equals.
    """
    _check_clips(labels, probabilities, "rows of probabilities")
    table = _table(probabilities, class_names)
    true = [_index(label, list(class_names), "label", at) for at, label in enumerate(labels)]
    ece, bins = _calibrate(table.max(axis=1), table.argmax(axis=1) == true)
    return CalibrationMetrics(ece=ece, bins=bins, num_clips=len(labels))


def vote_metrics(
    votes: Sequence[Sequence[str]],
    predictions: Sequence[str | None],
    class_names: Sequence[str],
    *,
    labels: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float]] | None = None,
) -> VoteMetrics:
    """Return how predictions agree with all raters rather than with their majority.

    `votes` has the names that the raters of each clip gave; those outside the classes count for nothing, and every
    clip needs one of the classes. A prediction that any rater gave is right; for another one the truth is the clip's
    label (`labels`) or, where that is no class, the most frequent vote, the first one of `class_names` among equals.
    """
    _check_clips(votes, predictions, "predictions")
    names = list(class_names)
    shares = np.array([[list(row).count(name) for name in names] for row in votes], dtype=float)  # (clips, classes)
    if (empty := np.flatnonzero(shares.sum(axis=1) == 0)).size:
        raise ValueError(f"The votes at position {empty[0]} have none of {names}. Leave out clips without one.")
    shares /= shares.sum(axis=1, keepdims=True)
    likeliest = [names[at] for at in shares.argmax(axis=1)]
    majority = [label if label in names else name for label, name in zip(labels, likeliest, strict=True)]
    credited = [
        said if said is not None and said in row else truth
        for said, row, truth in zip(predictions, votes, majority, strict=True)
    ]
    found = VoteMetrics(
        any_rater_macro_f1=recognition_metrics(credited, predictions, names)["macro_f1"],
        jensen_shannon=None,
        ece=None,
        num_clips=len(votes),
    )
    if probabilities is not None:
        with _installing():
            from scipy.special import rel_entr

        table = _table(probabilities, names)
        said_shares = table / table.sum(axis=1, keepdims=True)
        middle = (shares + said_shares) / 2
        divergence = (rel_entr(shares, middle) + rel_entr(said_shares, middle)).sum(axis=1) / 2
        found["jensen_shannon"] = float(divergence.mean() / np.log(2))  # in bits
        credit = shares[np.arange(len(shares)), table.argmax(axis=1)]
        found["ece"], _ = _calibrate(table.max(axis=1), credit)
    return found


@contextmanager
def _installing() -> Iterator[None]:
    """Say of a package that is not there how it is installed."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"Metrics: {error}. `pip install relllm[eval]`, or `relllm[train]`, has it.") from error


def _check_clips(labels: Sequence, given: Sequence, what: str) -> None:
    if len(labels) != len(given):
        raise ValueError(f"Got {len(labels)} labels and {len(given)} {what}; expected one of each for a clip.")
    if len(labels) == 0:
        raise ValueError("There are no clips to measure. Check the split, and that its rows have an emotion.")


def _index(value: object, names: list[str], what: str, position: int) -> int:
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(names):
        return int(value)
    raise ValueError(
        f"The {what} at position {position} is {value!r}, expected one of {names} or an index into them. "
        "Leave out clips without a label."
    )


def _dimension(name: str, labels: Sequence[float | None], predictions: Sequence[float]) -> DimensionMetrics:
    with _installing():
        from audmetric import concordance_cc, pearson_cc
        from sklearn.metrics import root_mean_squared_error

    if len(labels) != len(predictions):
        raise ValueError(f"{name}: got {len(labels)} labels and {len(predictions)} predictions; expected one a clip.")
    truth, predicted = np.array(labels, dtype=float), np.array(predictions, dtype=float)  # None becomes NaN
    bad = np.flatnonzero(~np.isfinite(predicted))
    if len(bad):
        raise ValueError(f"{name}: the prediction for clip {bad[0]} is {predicted[bad[0]]}: the model is broken.")
    if np.isinf(truth).any():
        raise ValueError(f"{name}: the label of clip {np.flatnonzero(np.isinf(truth))[0]} is infinite; use None, NaN.")
    labelled = ~np.isnan(truth)
    truth, predicted = truth[labelled], predicted[labelled]
    # Compared exactly: the mean of equal floats may differ from them by rounding.
    varies = len(truth) > 1 and np.ptp(truth) > 0, len(truth) > 1 and np.ptp(predicted) > 0
    has_ccc = len(truth) > 1 and (any(varies) or truth[0] != predicted[0])
    return DimensionMetrics(
        ccc=_finite(concordance_cc, truth, predicted) if has_ccc else None,
        pearson=_finite(pearson_cc, truth, predicted) if all(varies) else None,
        rmse=_finite(root_mean_squared_error, truth, predicted) if len(truth) else None,
        num_clips=len(truth),
    )


def _finite(measure: Callable[..., float], truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """`None` where the values differ by so little (or so much) that float arithmetic has no answer."""
    with np.errstate(all="ignore"):
        value = float(measure(truth, predicted))
    return value if np.isfinite(value) else None


def _table(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """Return probabilities as `(clips, classes)`; what is none is a `ValueError`."""
    for position, row in enumerate(rows):
        if set(row) != set(names):
            raise ValueError(
                f"Clip {position} has probabilities for {sorted(row)}, expected those of {sorted(names)}."
            )
        in_range = all(0 <= value <= 1 + _SUM_TOLERANCE for value in row.values())  # false for NaN too
        if not in_range or abs(sum(row.values()) - 1) > _SUM_TOLERANCE:
            raise ValueError(
                f"The probabilities of clip {position} are {dict(row)}; expected values in [0, 1] that sum to 1. The "
                "model's output is broken."
            )
    return np.array([[row[name] for name in names] for row in rows], dtype=float)


def _calibrate(confidence: np.ndarray, credit: np.ndarray) -> tuple[float, list[CalibrationBin]]:
    """Return the calibration error and the bins; `credit` of a clip is 1 where it is right, or a share."""
    edges = np.linspace(0, 1, NUM_BINS + 1)
    confidence = confidence.clip(max=1)  # a sum of 1.0004 may hold one
    indices = np.searchsorted(edges[1:-1], confidence, side="left")  # (lower, upper]
    counts = np.bincount(indices, minlength=NUM_BINS)
    means = [np.bincount(indices, values, NUM_BINS) / np.maximum(counts, 1) for values in (confidence, credit)]
    bins = [
        CalibrationBin(
            lower=float(edges[at]),
            upper=float(edges[at + 1]),
            num_clips=int(count),
            confidence=float(means[0][at]) if count else None,
            accuracy=float(means[1][at]) if count else None,
        )
        for at, count in enumerate(counts)
    ]
    return float(counts @ np.abs(means[1] - means[0]) / len(confidence)), bins
