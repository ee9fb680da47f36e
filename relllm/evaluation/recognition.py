"""Speech emotion recognition (SER) metrics, as the field and the paper name them.

What lives here: numbers from labels and predictions. What does not: making predictions, plots (`plots.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np


class RecognitionMetrics(TypedDict):
    """Plain numbers, ready for JSON.

    Attributes:
        ua (`float`): Unweighted accuracy (UAR): the mean of the recalls of the classes that occur in the labels.
        wa (`float`): Weighted accuracy: the share of clips that are right.
        macro_f1 (`float`): Mean F1 over the classes that occur in the labels; F1 is 0 for one that is never predicted.
        recall (`dict[str, float | None]`): Recall of each class; `None` for a class that does not occur in the labels.
        confusion_matrix (`list[list[int]]`): Clips, true class by row, predicted class by column, in the order of
        `class_names`; clips without a prediction are in no column. class_names (`list[str]`): The classes.
        num_clips (`int`): How many clips were counted.
        num_unparsed (`int`): How many of them have no prediction, which is a wrong one.
    """

    ua: float
    wa: float
    macro_f1: float
    recall: dict[str, float | None]
    confusion_matrix: list[list[int]]
    class_names: list[str]
    num_clips: int
    num_unparsed: int


def recognition_metrics(
    labels: Sequence[str] | Sequence[int],
    predictions: Sequence[str | None] | Sequence[int | None],
    class_names: Sequence[str],
) -> RecognitionMetrics:
    """UA, WA, macro-F1, recall of each class and the confusion matrix.

    A class that does not occur in the labels has no recall and is left out of UA and macro-F1, as in scikit-learn's
    balanced accuracy; predicting it is still wrong. Compare runs on the same labels only.

    Args:
        labels (`Sequence[str]` or `Sequence[int]`): True class of each clip, as name or index.
        predictions (`Sequence[str | None]` or `Sequence[int | None]`): Predicted class of each clip, as name or index;
            `None` where an answer names no class, which counts as wrong.
        class_names (`Sequence[str]`): All classes, in the order of the indices.

    Returns:
        `RecognitionMetrics`: Plain numbers.

    Raises:
        ValueError: No clips, different lengths, or a class that is not in `class_names`.
        ImportError: scikit-learn is missing (`pip install relllm[eval]`).
    """
    try:
        from sklearn.metrics import confusion_matrix, f1_score
    except ImportError as error:
        raise ImportError("Recognition metrics need scikit-learn: `pip install relllm[eval]`.") from error

    if len(labels) != len(predictions):
        raise ValueError(
            f"Got {len(labels)} labels and {len(predictions)} predictions; expected one of each for a clip."
        )
    if len(labels) == 0:
        raise ValueError("There are no clips to measure. Check the split, and that its rows have an emotion.")
    true = np.array([_index(value, class_names, "label", position) for position, value in enumerate(labels)])
    unparsed = len(class_names)  # one index further: the class of no prediction
    predicted = np.array(
        [
            unparsed if value is None else _index(value, class_names, "prediction", position)
            for position, value in enumerate(predictions)
        ]
    )
    matrix = confusion_matrix(true, predicted, labels=range(len(class_names)))  # leaves out the unparsed
    support = np.bincount(true, minlength=len(class_names))
    recall = {
        name: float(matrix[index, index] / support[index]) if support[index] else None
        for index, name in enumerate(class_names)
    }
    present = np.flatnonzero(support)
    return RecognitionMetrics(
        ua=float(np.mean([value for value in recall.values() if value is not None])),
        wa=float(np.trace(matrix) / len(true)),
        macro_f1=float(f1_score(true, predicted, labels=present, average="macro", zero_division=0.0)),
        recall=recall,
        confusion_matrix=matrix.tolist(),
        class_names=list(class_names),
        num_clips=len(true),
        num_unparsed=int(np.sum(predicted == unparsed)),
    )


def _index(value: object, class_names: Sequence[str], what: str, position: int) -> int:
    names = list(class_names)
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(names):
        return int(value)
    raise ValueError(
        f"The {what} at position {position} is {value!r}, expected one of {names} or an index into them. "
        "Leave out clips without a label."
    )
