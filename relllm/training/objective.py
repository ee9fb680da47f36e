"""The objective: which losses a run has, over how many items each is normalised, and how they add up.

loss = w · response CE (TRL's) + w · emotion CE + w · dimension loss + w · response KL; none of weight 0 is computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .alignment import Alignment, check_head
from .config import ReLLMSettings, ReLLMSFTConfig
from .losses import IGNORE_INDEX, ccc_loss, dimension_loss, emotion_loss, soft_emotion_loss

TARGETS = ("emotion_labels", "emotion_votes", "dimension_labels", "clips_per_row", "row_tasks")
NO_LABEL_OF_A_ROW = {"labels": IGNORE_INDEX, "teacher_labels": IGNORE_INDEX}
NO_LABEL_OF_A_CLIP = {"emotion_labels": IGNORE_INDEX, "emotion_votes": 0.0, "dimension_labels": float("nan")}


@dataclass
class Term:
    """A loss on a micro-batch; the tensors are of shape `()`."""

    name: str  # as it is logged
    weight: float  # in the objective
    value: Tensor  # the sum over the items of this micro-batch, over `num_items`
    total: Tensor  # that sum itself, for the log
    count: Tensor  # items of this micro-batch
    is_share: bool = True  # whether the values of micro-batches add up to the mean over them; a CCC's do not


class Objective:
    """The losses of a run beside the response's cross-entropy; `emotions` counts the clips of each in the rows."""

    def __init__(self, args: ReLLMSettings, model: PreTrainedModel, emotions: Mapping[str, int] | None = None) -> None:
        given = args.own_loss_weights
        self.weights = {name: given[f"{name}_weight"] for name in ("emotion_loss", "dimension_loss", "response_kl")}
        self.active = [name for name, weight in self.weights.items() if weight > 0]
        self.dimension_loss = args.dimension_loss
        self.class_weights: Tensor | None = None
        if args.emotion_class_weights is not None:
            weights = class_weights(args.emotion_class_weights, model.config.emotion_labels, emotions)
            self.class_weights = torch.tensor(weights, device=args.device)
        self.alignment: Alignment | None = None
        if args.response_loss_weight > 0 or "response_kl" in self.active:
            check_head(model.base_model.text_model)
        if "response_kl" in self.active:
            assert isinstance(args, ReLLMSFTConfig)
            self.alignment = Alignment(temperature=args.kl_temperature, shifted=args.kl_shifted)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return `(3,)`: items that each loss counts in a batch, in the order of `weights`; 0 for one that is off."""
        counts = {}
        if "emotion_labels" in batch:
            counts["emotion_loss"] = self._class_weight(batch).sum()
            counts["dimension_loss"] = batch["dimension_labels"].isfinite().sum()
        if self.alignment is not None and "teacher_labels" in batch:
            counts["response_kl"] = self.alignment.positions(batch["teacher_labels"]).sum()
        nothing = torch.zeros((), device=next(value for value in batch.values() if isinstance(value, Tensor)).device)
        values = [counts.get(name, nothing) if name in self.active else nothing for name in self.weights]
        return torch.stack([value.float() for value in values])

    def terms(
        self, output: ModelOutput, batch: Mapping[str, Tensor], local_counts: Tensor, num_items: Tensor
    ) -> Iterator[Term]:
        """Yield each loss that is on and that this micro-batch, with the `TARGETS`, has the inputs of.

        Both counts are as of [`~Objective.count`]: of this micro-batch, and of all that the sums are divided by.
        """
        items, local = (dict(zip(self.weights, one.unbind(), strict=True)) for one in (num_items, local_counts))
        sums: dict[str, Tensor] = {}
        if "emotion_labels" in batch and output.emotion_logits is not None:
            if "emotion_loss" in self.active:
                is_soft = "emotion_votes" in batch
                loss, targets = (soft_emotion_loss, "emotion_votes") if is_soft else (emotion_loss, "emotion_labels")
                sums["emotion_loss"] = loss(output.emotion_logits, batch[targets], self.class_weights)
            if "dimension_loss" in self.active and self.dimension_loss == "mse":
                sums["dimension_loss"] = dimension_loss(output.dimensions, batch["dimension_labels"])
            elif "dimension_loss" in self.active:
                value, weight = ccc_loss(output.dimensions, batch["dimension_labels"]), self.weights["dimension_loss"]
                count = local["dimension_loss"].to(value.device)
                yield Term("dimension_loss", weight, value, value.detach() * count, count, is_share=False)
        if "response_kl" in self.active and (total := output.get("response_kl")) is not None:
            sums["response_kl"] = total
        for name, total in sums.items():
            count = items[name].to(total.device)
            value = total / torch.where(count == 0, 1, count)  # the sum over nothing is zero
            yield Term(name, self.weights[name], value, total.detach(), local[name].to(total.device))

    def _class_weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the weight of each clip: 1, or that of its class, or of its votes' classes; 0 where unlabelled."""
        labels, weights = batch["emotion_labels"], self.class_weights
        if "emotion_votes" in batch:
            return batch["emotion_votes"] * (1.0 if weights is None else weights.to(labels.device))
        labelled = (labels != IGNORE_INDEX).float()
        return labelled if weights is None else labelled * weights.to(labels.device)[labels.clamp(min=0)]


def class_weights(given: Sequence[str | float], classes: Sequence[str], emotions: Mapping[str, int] | None) -> list:
    """Return a weight for each class; `balanced` ones are clips / (classes that have some * clips of the class)."""
    if list(given) == ["balanced"]:
        if emotions is None:
            raise ValueError("emotion_class_weights: balanced counts the training rows, and a stream has no count.")
        counts = [emotions.get(name, 0) for name in classes]
        return [sum(counts) / (sum(map(bool, counts)) * count) if count else 0.0 for count in counts]
    if len(given) != len(classes):
        raise ValueError(f"emotion_class_weights has {len(given)} values, expected one for each of {list(classes)}.")
    return [float(weight) for weight in given]


class RunningMeans:
    """Sums and counts by name, all of which every process has, for training and evaluation apart."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self._sums = {mode: torch.zeros(2, len(names), device=device) for mode in ("train", "eval")}

    def add(self, mode: str, name: str, total: Tensor, count: Tensor) -> None:
        """Add a `total`, which is the sum over `count` items of this process."""
        pair = torch.stack([total.detach().float(), count.to(total.device).float()])
        self._sums[mode][:, self.names.index(name)] += pair.to(self._sums[mode].device)

    def take(self, mode: str) -> Tensor:
        """Return `(2, names)`, the sums and the counts of this process; they start again from zero."""
        sums = self._sums[mode]
        self._sums[mode] = torch.zeros_like(sums)
        return sums

    def means(self, sums: Tensor) -> dict[str, float]:
        """Return the mean by name, of what was counted at least once."""
        totals, counts = sums.tolist()
        return {name: totals[i] / counts[i] for i, name in enumerate(self.names) if counts[i] > 0}


def keep_labels(batch: Mapping[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Return a batch in which only the first rows are labelled: the others count in no loss and in no metric."""
    num_clips = int(batch["clips_per_row"][:num_rows].sum()) if "clips_per_row" in batch else num_rows
    kept = dict(batch)
    for nothing, start in ((NO_LABEL_OF_A_ROW, num_rows), (NO_LABEL_OF_A_CLIP, num_clips)):
        for name in nothing.keys() & batch.keys():
            kept[name] = batch[name].clone()
            kept[name][start:] = nothing[name]
    return kept
