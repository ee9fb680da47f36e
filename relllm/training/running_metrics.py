"""Numbers of a run as it goes: means of the losses between two logs, and recognition metrics of an evaluation.

The metrics are those of `relllm.evaluation`, here on tensors and with nothing to install; the tests compare the two.
"""

import torch
from torch import Tensor

from relllm.labels import DIMENSIONS

from .losses import IGNORE_INDEX, concordance


class RunningMeans:
    """Sums and counts by name, for training and evaluation apart; reduced over the processes only when read.

    Args:
        names (`list[str]`): All that may come: every process reduces the same ones.
        device (`torch.device`): Where the sums are.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self._sums = {mode: torch.zeros(2, len(names), device=device) for mode in ("train", "eval")}

    def add(self, mode: str, name: str, total: Tensor, count: Tensor) -> None:
        """`total` is the sum over `count` items of this process."""
        pair = torch.stack([total.detach().float(), count.to(total.device).float()])
        self._sums[mode][:, self.names.index(name)] += pair.to(self._sums[mode].device)

    def take(self, mode: str) -> Tensor:
        """`(2, names)`: the sums and the counts of this process; they start again from zero."""
        sums = self._sums[mode]
        self._sums[mode] = torch.zeros_like(sums)
        return sums

    def means(self, sums: Tensor) -> dict[str, float]:
        """By name, of what was counted at least once."""
        totals, counts = sums.tolist()
        return {name: totals[i] / counts[i] for i, name in enumerate(self.names) if counts[i] > 0}


def recognition(labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """UA (mean recall), WA (accuracy) and macro-F1 over the classes that occur in the labels.

    Args:
        labels (`torch.LongTensor` of shape `(clips,)`): Class indices; -100 where unlabelled, and left out.
        predictions (`torch.LongTensor` of shape `(clips,)`): Class indices.

    Returns:
        `dict`: `ua`, `wa` and `macro_f1` in [0, 1]; empty if no clip is labelled.
    """
    counted = labels != IGNORE_INDEX
    labels, predictions = labels[counted], predictions[counted]
    if len(labels) == 0:
        return {}
    recalls, f1_scores = [], []
    for index in labels.unique():
        actual, predicted = labels == index, predictions == index
        hits = (actual & predicted).sum().item()
        recalls.append(hits / actual.sum().item())
        f1_scores.append(2 * hits / (actual.sum() + predicted.sum()).item())
    return {
        "ua": sum(recalls) / len(recalls),
        "wa": (labels == predictions).float().mean().item(),
        "macro_f1": sum(f1_scores) / len(f1_scores),
    }


def concordances(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """CCC of each dimension that has two labelled clips or more.

    Args:
        predicted, target (`torch.Tensor` of shape `(clips, 3)`): In the order of `DIMENSIONS`; NaN where unlabelled.

    Returns:
        `dict`: `ccc_arousal`, `ccc_dominance`, `ccc_valence` in [-1, 1].
    """
    values = {}
    for name, x, y in zip(DIMENSIONS, predicted.double().unbind(1), target.double().unbind(1), strict=True):
        labelled = ~y.isnan()
        if labelled.sum() >= 2:
            values[f"ccc_{name}"] = concordance(x[labelled], y[labelled]).item()
    return values


__all__ = ["RunningMeans", "concordances", "recognition"]
