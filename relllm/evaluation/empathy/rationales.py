"""How well rationales are found: token F1 and IOU-F1, after ERASER (DeYoung et al. 2020, github.com/jayded/
eraserbenchmark).

What lives here: numbers from token labels. What does not: which token is in a rationale (`empathy_data.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from .scorer import IGNORED

MATCH = 0.5  # intersection over union from which a predicted span counts as found


class RationaleMetrics(TypedDict):
    """Plain numbers, ready for JSON; `None` where nothing is there to be measured.

    Attributes:
        token_f1 (`float | None`): Mean over pairs of the F1 of tokens in a rationale. A pair with neither a rationale
            nor a prediction is left out, as there is nothing to find; with one of the two only, its F1 is 0.
        iou_f1 (`float | None`): F1 of mean precision and mean recall of spans. A predicted span is right if it and a
            true one share at least half of the tokens of both together. Precision is over the pairs with a prediction,
            recall over those with a rationale.
        num_pairs (`int`): Pairs whose rationale is known.
        num_with_rationale (`int`): Pairs among them that have one.
        num_predicted (`int`): Pairs among them that are given one.
    """

    token_f1: float | None
    iou_f1: float | None
    num_pairs: int
    num_with_rationale: int
    num_predicted: int


def rationale_metrics(labels: Sequence[Sequence[int]], predictions: Sequence[Sequence[int]]) -> RationaleMetrics:
    """Token F1 and IOU-F1.

    Args:
        labels (`Sequence[Sequence[int]]`): Of each token of each pair: 1 in a rationale, 0 outside, -100 if it has no
            label (special tokens, padding, a rationale that is not known).
        predictions (`Sequence[Sequence[int]]`): 1 or 0, of the same shape.

    Raises:
        ValueError: If a pair has other numbers of labels and predictions.
    """
    truths, guesses = [], []
    for true, predicted in zip(labels, predictions, strict=True):
        kept = [(label, guess) for label, guess in zip(true, predicted, strict=True) if label != IGNORED]
        if kept:
            truths.append([label for label, _ in kept])
            guesses.append([guess for _, guess in kept])
    scored = [(true, guess) for true, guess in zip(truths, guesses, strict=True) if any(true) or any(guess)]
    precisions, recalls = [], []
    for true, guess in scored:
        spans, found = find_spans(true), find_spans(guess)
        matches = sum(max((_iou(one, span) for span in spans), default=0.0) >= MATCH for one in found)
        if found:
            precisions.append(matches / len(found))
        if spans:
            recalls.append(matches / len(spans))
    return RationaleMetrics(
        token_f1=sum(_token_f1(true, guess) for true, guess in scored) / len(scored) if scored else None,
        iou_f1=_f1(_mean(precisions), _mean(recalls)) if scored else None,
        num_pairs=len(truths),
        num_with_rationale=sum(map(any, truths)),
        num_predicted=sum(map(any, guesses)),
    )


def find_spans(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of ones: the first token and one past the last."""
    spans, start = [], None
    for index, token in enumerate([*tokens, 0]):
        if token == 1 and start is None:
            start = index
        elif token != 1 and start is not None:
            spans.append((start, index))
            start = None
    return spans


def _token_f1(true: Sequence[int], guess: Sequence[int]) -> float:
    both = sum(label == one == 1 for label, one in zip(true, guess, strict=True))
    return 2 * both / (sum(true) + sum(guess))


def _iou(one: tuple[int, int], other: tuple[int, int]) -> float:
    shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


__all__ = ["RationaleMetrics", "find_spans", "rationale_metrics"]
