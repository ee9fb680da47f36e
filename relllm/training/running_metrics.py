"""Means of the losses between two logs."""

import torch
from torch import Tensor


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
