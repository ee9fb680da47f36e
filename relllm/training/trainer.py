"""`ReLLMSFTTrainer`: TRL's supervised fine-tuning with RE-LLM's auxiliary losses (section "Auxiliary learning").

    loss = response cross-entropy + w_emotion · emotion cross-entropy + w_dimension · dimension loss

Each is normalised over the whole accumulated batch of all processes, so 8 x 1, 4 x 2 and 2 x 4 rows give the same
gradients, unlabelled rows included. What lives elsewhere: the losses, the collator, the settings.
"""

from collections.abc import Iterator

import torch
from datasets import Audio, Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import SFTTrainer

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from .collator import IGNORE_INDEX, ReLLMCollator
from .config import ReLLMSFTConfig
from .fused_head import return_heads
from .losses import ccc_loss, dimension_loss, emotion_loss


class ReLLMSFTTrainer(SFTTrainer):
    """Trains the projector, the heads and the LoRA of a [`ReLLMForConditionalGeneration`].

    Args:
        model ([`ReLLMForConditionalGeneration`]): An instance, with its own LoRA in it.
        args ([`ReLLMSFTConfig`], *optional*): Settings; by default the paper's.
        train_dataset (`datasets.Dataset` or `IterableDataset`): Rows as [`ReLLMCollator`] takes them.
        eval_dataset (`Dataset`, `IterableDataset` or `dict` of them, *optional*): Likewise.
        processing_class ([`ReLLMProcessor`]): The model's processor.
        kwargs: As in `trl.SFTTrainer`, but for `peft_config`.

    Raises:
        TypeError: If `model` is not an instance, or `processing_class` not a `ReLLMProcessor`.
        ValueError: If `peft_config` is given: the model carries its LoRA, and a second one would deactivate it.
    """

    _tag_names = ["relllm", "trl", "sft"]

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        args: ReLLMSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ReLLMProcessor | None = None,
        **kwargs: object,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a loaded ReLLMForConditionalGeneration, got {type(model).__name__}.")
        if not isinstance(processing_class, ReLLMProcessor):
            raise TypeError(f"processing_class must be a ReLLMProcessor, got {type(processing_class).__name__}.")
        if kwargs.pop("peft_config", None) is not None:
            raise ValueError("A ReLLM carries its own LoRA: set lora_config in its configuration, not peft_config.")
        args = args if args is not None else ReLLMSFTConfig()
        prepare_trainable(model, args.unfreeze)
        emotion_labels = model.config.emotion_labels
        if "data_collator" not in kwargs:
            kwargs["data_collator"] = ReLLMCollator(
                processing_class, emotion_labels, args.instruction, args.system_prompt
            )
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: _leave_encoded(dataset) for name, dataset in eval_dataset.items()}
        super().__init__(
            model=model,
            args=args,
            train_dataset=_leave_encoded(train_dataset),
            eval_dataset=eval_dataset if isinstance(eval_dataset, dict) else _leave_encoded(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        weights = args.emotion_class_weights
        if weights is not None and len(weights) != len(emotion_labels):
            raise ValueError(f"emotion_class_weights has {len(weights)} values for the classes {emotion_labels}.")
        self._class_weights = None if weights is None else torch.tensor(weights, device=self.args.device)
        self._label_counts = torch.zeros(2)
        return_heads(self.model)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Counts the labelled clips of the whole accumulated batch, as Transformers counts its tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [_count_labels(batch, self._class_weights) for batch in batches if "emotion_labels" in batch]
        local = torch.stack(counts).sum(0) if counts else torch.zeros(2)
        self._label_counts = self.accelerator.reduce(local.to(self.args.device), reduction="sum")
        return batches, num_items

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """TRL's loss of the response, and the auxiliary losses on the outputs of the same forward pass."""
        emotion_labels = inputs.pop("emotion_labels", None)
        dimension_labels = inputs.pop("dimension_labels", None)
        recorder = _Recorder(model)
        result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        output = recorder.outputs[0]  # the training pass's; TRL may run another for metrics
        self._log_response(loss, inputs["labels"], num_items_in_batch)
        if emotion_labels is not None and dimension_labels is not None and output.emotion_logits is not None:
            training = self.model.training and num_items_in_batch is not None
            loss = loss + self._auxiliary_loss(output, emotion_labels, dimension_labels, training)
        return (loss, outputs) if return_outputs else loss

    def _log_response(self, loss: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> None:
        """Mean over the reply's tokens. In training TRL's loss is this micro-batch's share of the batch's mean."""
        tokens = (labels[..., 1:] != IGNORE_INDEX).sum()
        divisor = tokens
        if num_items_in_batch is not None:
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            divisor = torch.as_tensor(num_items_in_batch, device=loss.device) / processes
        self._log_mean("response_loss", loss * divisor, tokens)

    def _auxiliary_loss(
        self, output: ModelOutput, emotion_labels: Tensor, dimension_labels: Tensor, training: bool
    ) -> Tensor:
        """Weighted sum; in training each loss is this micro-batch's share of the accumulated batch's mean."""
        logits, dimensions = output.emotion_logits.float(), output.dimensions.float()
        labels = {"emotion_labels": emotion_labels, "dimension_labels": dimension_labels}
        local = _count_labels(labels, self._class_weights).to(logits.device)
        emotion_count, dimension_count = self._label_counts if training else local
        # DDP averages gradients over processes, and these counts are over all of them.
        processes = self.accelerator.num_processes if training else 1
        emotion = emotion_loss(logits, emotion_labels, class_weights=self._class_weights, num_items=emotion_count)
        self._log_mean("emotion_loss", emotion.detach() * emotion_count, local[0])
        correct = (logits.argmax(-1) == emotion_labels).sum()
        self._log_mean("emotion_accuracy", correct, (emotion_labels != IGNORE_INDEX).sum())
        total = self.args.emotion_loss_weight * processes * emotion
        if self.args.dimension_loss == "mse":
            dimension = dimension_loss(dimensions, dimension_labels, num_items=dimension_count)
            self._log_mean("dimension_loss", dimension.detach() * dimension_count, local[1])
            return total + self.args.dimension_loss_weight * processes * dimension
        dimension = ccc_loss(dimensions, dimension_labels)  # a statistic of the micro-batch: averaged, not summed
        self._log_mean("dimension_loss", dimension.detach() * local[1], local[1])
        steps = self.current_gradient_accumulation_steps if training else 1
        return total + self.args.dimension_loss_weight * dimension / steps

    def _log_mean(self, name: str, total: Tensor, count: Tensor) -> None:
        """Log a mean over what is labelled in the micro-batches of all processes; nothing where nothing is."""
        pair = torch.stack([total.detach().float(), count.to(total.device).float()])
        total, count = self.accelerator.reduce(pair, reduction="sum").tolist()
        if count > 0:
            self._metrics["train" if self.model.training else "eval"][name].append(total / count)


def prepare_trainable(model: ReLLMForConditionalGeneration, unfreeze: list[str]) -> None:
    """Freeze what the paper freezes, unfreeze what is asked for, and hold what trains in float32.

    Args:
        model ([`ReLLMForConditionalGeneration`]): Changed in place.
        unfreeze (`list[str]`): Any of `"audio_tower"`, `"emotion_tower"`, `"text_model"`.
    """
    base = model.base_model
    base.freeze()
    for name in unfreeze:
        tower = getattr(base, name)
        if tower is None:
            raise ValueError(f"unfreeze has {name!r}, and this model has none (emotion_fusion='none').")
        tower.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


class _Recorder:
    """Stands in for the model in TRL's `compute_loss`, and keeps its outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.outputs: list[ModelOutput] = []

    def __call__(self, **inputs: Tensor) -> ModelOutput:
        self.outputs.append(self.model(**inputs))
        return self.outputs[-1]


def _count_labels(batch: dict[str, Tensor], class_weights: Tensor | None) -> Tensor:
    """`(2,)`: labelled clips (their class weights, where there are some), and labelled dimensions of clips."""
    labels = batch["emotion_labels"]
    labelled = labels[labels != IGNORE_INDEX]
    if class_weights is None:
        weights = torch.ones_like(labelled, dtype=torch.float)
    else:
        weights = class_weights.to(labels.device)[labelled]
    return torch.stack([weights.sum(), batch["dimension_labels"].isfinite().sum().to(weights)])


def _leave_encoded(dataset: Dataset | IterableDataset | None) -> Dataset | IterableDataset | None:
    """Audio columns as paths and bytes: the processor decodes each clip once, where it is needed."""
    if dataset is None:
        return None
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Audio) and feature.decode:
            dataset = dataset.cast_column(name, Audio(decode=False))
    return dataset


__all__ = ["ReLLMSFTTrainer", "prepare_trainable"]
