"""The reference of a run: the weights that it started from, without a second model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class StartingWeights:
    """A copy of what trains in a model; all else is the model's own.

    Made before a checkpoint is loaded, it is the start of a run that goes on as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights: list[tuple[nn.Parameter, Tensor]] = [
            (parameter, parameter.detach().clone()) for parameter in model.parameters() if parameter.requires_grad
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model be the reference within a `with` block, in which nothing is to be trained."""
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange the tensors of what trains with the copies; no value is moved."""
        now = [parameter.data for parameter, _ in self.weights]
        for parameter, start in self.weights:
            parameter.data = start.to(parameter.device)
        torch.clear_autocast_cache()  # which knows a parameter by its object, whatever tensor is in it
        self.weights = [(parameter, kept) for (parameter, _), kept in zip(self.weights, now, strict=True)]
