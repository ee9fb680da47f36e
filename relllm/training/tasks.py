"""Tasks: what a clip is taught as. In training each row is one task an epoch, drawn by the weights among those that it
can feed; an evaluation goes through every row as every task.

A draw follows from the seed, the epoch and the row's id (without one: its words) alone. From epoch to epoch a row's
number moves by the golden ratio, which spreads the tasks over a row's epochs as the weights say.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import ModelOutput

from relllm.data.survey import fed_tasks

from .augmentation import SharedEpoch
from .losses import IGNORE_INDEX
from .objective import RunningMeans

GIVEN_TASK = "relllm_task"  # of a row: its task, and whether its clip has come as another one before
_GOLDEN = (5**0.5 - 1) / 2


class TaskMix(SharedEpoch):
    """Draws the task of each row; `weights` are by name."""

    def __init__(self, weights: Mapping[str, float], *, seed: int, draws_options: bool = False) -> None:
        super().__init__()
        self.weights, self.names = dict(weights), tuple(weights)
        self.seed, self.draws_options = seed, draws_options

    def draw(self, row: Mapping) -> str:
        """Return the task that a row is taught as in this epoch."""
        able = [name for name in fed_tasks(row) if name in self.weights]
        if not able:
            present = sorted(name for name, value in row.items() if value is not None)
            names = ", ".join(self.names)
            raise ValueError(f"Row {row.get('id')!r} has nothing for any of the tasks {names}; it has {present}.")
        place = (self._uniform(row, "task") + self.epoch * _GOLDEN) % 1
        bounds = np.cumsum([self.weights[name] for name in able])
        return able[min(int(np.searchsorted(bounds, place * bounds[-1], side="right")), len(able) - 1)]

    def longest(self, row: Mapping) -> str:
        """Return the task whose conversation is likely the longest of those that a row can feed."""
        by_length = ("reply", "transcription", "recognition")
        return next(name for name in by_length if name in self.weights and name in fed_tasks(row))

    def order(self, row: Mapping, labels: Sequence[str]) -> list[str]:
        """Return the options of a question about a row's emotion: as they are, or in an order drawn each epoch."""
        if not self.draws_options:
            return list(labels)
        return sorted(labels, key=lambda label: self._uniform(row, f"{self.epoch} {label}"))

    def _uniform(self, row: Mapping, what: str) -> float:
        words = [row.get(name) for name in ("text", "response", "emotion", "messages")]
        key = row["id"] if row.get("id") is not None else words
        return int.from_bytes(hashlib.sha256(repr((self.seed, key, what)).encode()).digest()[:7], "big") / 2**56


class TaskRows(TorchDataset):
    """Rows as every task that each can feed, one after the other."""

    def __init__(self, rows: Dataset, tasks: Sequence[str]) -> None:
        self.rows = rows
        self.places: list[tuple[int, str, bool]] = []
        names = [name for name in ("messages", "response", "emotion", "text") if name in rows.column_names]
        for place, row in enumerate(rows.select_columns(names)):
            able = [task for task in fed_tasks(row) if task in tasks]
            self.places += [(place, task, index > 0) for index, task in enumerate(able)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        place, task, again = self.places[index]
        return {**self.rows[place], GIVEN_TASK: (task, again)}


@torch.no_grad()
def log_tasks(
    means: RunningMeans, mode: str, mix: TaskMix, output: ModelOutput, labels: Tensor, tasks: Tensor
) -> None:
    """Add the cross-entropy of each task, over its tokens, and how many emotions are named right, token by token.

    `output` is TRL's fused one or one with logits; `tasks` are `(batch,)`, by the order of the mix's names.
    """
    scored = labels[:, 1:] != IGNORE_INDEX
    if (log_probs := output.get("log_probs")) is not None:
        losses, right = -log_probs[output.label_mask.bool()], output.is_top1[output.label_mask.bool()].bool()
    else:
        logits, targets = output.logits[:, :-1][scored].float(), labels[:, 1:][scored]
        losses, right = functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
    row_of = scored.nonzero()[:, 0]
    for index, name in enumerate(mix.names):
        own = tasks[row_of] == index
        means.add(mode, f"{name}_loss", (losses * own).sum(), own.sum())
        if name == "recognition":
            asked = (tasks == index) & scored.any(1)
            wrong = torch.zeros(len(labels), device=labels.device).index_add(0, row_of, (~right).float())
            means.add(mode, "recognition_accuracy", (asked & (wrong == 0)).sum(), asked.sum())
