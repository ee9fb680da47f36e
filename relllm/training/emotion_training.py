"""Training of the emotion tower on arousal, dominance and valence, with a CCC loss as audEERING trained theirs.

The tower is a wav2vec2, HuBERT or WavLM encoder with a head; see `modeling/emotion_tower_relllm.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import Trainer, TrainingArguments, Wav2Vec2FeatureExtractor

from relllm.labels import DIMENSIONS
from relllm.modeling.emotion_tower_relllm import EmotionTowerOutput, ReLLMEmotionModel
from relllm.processing.audio_relllm import load_audio

from .augmentation import Augmentation, AugmentationMixin, AugmentationSettings
from .losses import ccc_loss


@dataclass
class EmotionCollator:
    """Rows with `audio` and the three dimensions -> normalised, padded waveforms and targets.

    Args:
        feature_extractor (`Wav2Vec2FeatureExtractor`): With `return_attention_mask=True`.
        augmentation ([`Augmentation`], *optional*): Of every clip; for training rows only.
    """

    feature_extractor: Wav2Vec2FeatureExtractor
    augmentation: Augmentation | None = None

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """
        Returns:
            `dict`: `input_values` and `input_values_mask` `(clips, samples)`; `labels` `(clips, 3)`, NaN for none.
        """
        rate = self.feature_extractor.sampling_rate
        waveforms = [load_audio(row["audio"], sampling_rate=rate) for row in rows]
        if self.augmentation is not None:
            waveforms = [
                self.augmentation(waveform, row_id=row.get("id"))
                for row, waveform in zip(rows, waveforms, strict=True)
            ]
        batch = self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt")
        targets = [[float("nan") if row[name] is None else float(row[name]) for name in DIMENSIONS] for row in rows]
        return {
            "input_values": batch["input_values"],
            "input_values_mask": batch["attention_mask"],
            "labels": torch.tensor(targets, dtype=torch.float32),
        }


class EmotionTowerTrainer(AugmentationMixin, Trainer):
    """Trains a [`ReLLMEmotionModel`] with 1 - CCC, averaged over the dimensions.

    A CCC is a statistic of a batch: use a batch that holds a spread of emotions (16 clips or more), rather than
    gradient accumulation.

    Args:
        model ([`ReLLMEmotionModel`]): The tower.
        args (`TrainingArguments`): Of Transformers, perhaps with [`AugmentationSettings`]; `remove_unused_columns` is
            switched off.
        train_dataset, eval_dataset (`datasets.Dataset`): Rows with `audio`, `arousal`, `dominance`, `valence`.
        feature_extractor (`Wav2Vec2FeatureExtractor`, *optional*): Saved with the tower.
        kwargs: As in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: ReLLMEmotionModel,
        args: TrainingArguments,
        train_dataset: Dataset | IterableDataset,
        eval_dataset: Dataset | None = None,
        feature_extractor: Wav2Vec2FeatureExtractor | None = None,
        **kwargs: object,
    ) -> None:
        if feature_extractor is None:
            feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=EmotionCollator(feature_extractor),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=feature_extractor,
            **kwargs,
        )
        if isinstance(args, AugmentationSettings) and args.augments:
            self.augment(Augmentation(args, seed=self.args.seed, sampling_rate=feature_extractor.sampling_rate))
        self.model_accepts_loss_kwargs = False  # a CCC is averaged over accumulated steps, not divided by a count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, EmotionTowerOutput]:
        """One minus the concordance correlation coefficient."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = ccc_loss(outputs.dimensions.float(), labels)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Loss, predicted dimensions and targets, both `(clips, 3)`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, None if prediction_loss_only else outputs.dimensions, labels


__all__ = ["EmotionCollator", "EmotionTowerTrainer"]
