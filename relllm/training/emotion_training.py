"""Fine-tuning of an emotion tower to arousal, dominance and valence, and its command `relllm train-emotion`.

The defaults are audEERING's, of the tower that RE-LLM freezes (Wagner et al., "Dawn of the transformer era in speech
emotion recognition", arXiv 2203.07378): Adam at a fixed 1e-4, batch 32, 5 epochs, a CCC loss, the convolutions frozen,
the best checkpoint on the development split.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    set_seed,
)

from relllm.data.loading import load_corpus
from relllm.labels import DIMENSIONS
from relllm.metrics import concordances
from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.processing.audio_relllm import MAX_DURATION_S, MIN_DURATION_S, load_audio
from relllm.processing.feature_extraction_relllm import shortest_clip
from relllm.setting import setting

from .augmentation import Augmentation, AugmentationMixin, AugmentationSettings
from .checkpoints import LastStepMixin, begin_run, complete_run, describe_origin
from .config import RowsSettings, check_places, check_selection
from .lengths import GroupByLengthMixin, check_clip_limits, clip_duration
from .losses import ccc_loss
from .settings import SettingsParser, check_metric, check_trainer

logger = logging.getLogger(__name__)

DECISIVE = ("gradient_accumulation_steps", "max_steps", "weight_decay", "warmup_steps", "seed", "bf16", "fp16")


@dataclass
class EmotionScriptArguments(RowsSettings):
    """What `relllm train-emotion` takes beside [`EmotionTrainingConfig`]."""

    model_name_or_path: str | None = setting(None, "A wav2vec2, HuBERT or WavLM encoder, or a tower: path or Hub id.")
    num_layers: int | None = setting(None, "Keep so many Transformer layers from the bottom (audEERING: 12 of 24).")
    train_feature_encoder: bool = setting(False, "Also train the convolutions.")
    final_dropout: float = setting(0.1, "In a fresh head (audEERING: 0.1).")
    eval_split: str = setting("validation", "Development split; empty for none, which keeps the last checkpoint.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_name_or_path is None or self.data is None:
            raise ValueError("model_name_or_path and data are needed: what to fine-tune, and on which rows.")
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}.")
        if not 0 <= self.final_dropout < 1:
            raise ValueError(f"final_dropout must be in [0, 1), got {self.final_dropout}.")


@dataclass
class EmotionTrainingConfig(AugmentationSettings, TrainingArguments):
    """`transformers.TrainingArguments` with audEERING's recipe as the defaults, and augmentation, which is off."""

    learning_rate: float = setting(1e-4, "Fixed (audEERING: 1e-4).")
    lr_scheduler_type: str = setting("constant", "audEERING: a fixed learning rate.")
    num_train_epochs: float = setting(5.0, "Epochs (audEERING: 5).")
    per_device_train_batch_size: int = setting(32, "Clips a step (audEERING: 32): a CCC needs a batch.")
    per_device_eval_batch_size: int = setting(32, "Clips a step in evaluation.")
    eval_strategy: str = setting("epoch", "When to evaluate: no, steps, epoch.")
    save_strategy: str = setting("epoch", "When to save: no, steps, epoch, best.")
    save_total_limit: int | None = setting(2, "Checkpoints to keep.")
    load_best_model_at_end: bool = setting(True, "Keep the best of the development split.")
    metric_for_best_model: str | None = setting("ccc", "Mean CCC of the dimensions that have labels.")
    greater_is_better: bool | None = setting(True, "A CCC is better when it is greater.")
    report_to: str = setting("none", "trackio, tensorboard, wandb, …")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_augmentation()

    def __getstate__(self) -> dict[str, object]:
        """Without the token: the trainer pickles its settings to `training_args.bin`, which a push sends along."""
        return {**self.__dict__, "hub_token": None}


def parse_emotion_arguments(arguments: Sequence[str]) -> tuple[EmotionScriptArguments, EmotionTrainingConfig]:
    """Read settings as [`~relllm.training.settings.SettingsParser.parse_settings`] does."""
    parser = SettingsParser((EmotionScriptArguments, EmotionTrainingConfig), command="relllm train-emotion")
    script, args = parser.parse_settings(arguments)
    return script, args


@dataclass
class EmotionCollator:
    """Rows with `audio` and dimensions -> normalised, padded waveforms and targets."""

    feature_extractor: Wav2Vec2FeatureExtractor
    augmentation: Augmentation | None = None
    min_duration_s: float = MIN_DURATION_S  # of a clip: what the tower needs for a frame
    dimensions: Sequence[str] = DIMENSIONS  # those that count

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Return `input_values` and `input_values_mask` `(clips, samples)`; `labels` `(clips, 3)`, NaN for none."""
        rate = self.feature_extractor.sampling_rate
        waveforms = [load_audio(row["audio"], sampling_rate=rate, min_duration_s=self.min_duration_s) for row in rows]
        if self.augmentation is not None:
            pairs = zip(rows, waveforms, strict=True)
            waveforms = [self.augmentation(waveform, row_id=row.get("id")) for row, waveform in pairs]
        batch = self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt")
        targets = [[self._target(row, name) for name in DIMENSIONS] for row in rows]
        return {
            "input_values": batch["input_values"],
            "input_values_mask": batch["attention_mask"],
            "labels": torch.tensor(targets, dtype=torch.float32),
        }

    def _target(self, row: Mapping, name: str) -> float:
        value = row.get(name) if name in self.dimensions else None
        return torch.nan if value is None else float(value)


class EmotionTowerTrainer(GroupByLengthMixin, AugmentationMixin, LastStepMixin):
    """Trains a [`ReLLMEmotionModel`] on rows with `audio` and dimensions, with 1 - CCC, averaged over these.

    A dimension that fewer than two training rows are labelled with is not trained: the model's `trained_dimensions`
    leave it out, and so does an evaluation. A CCC is a statistic of a batch: prefer 16 clips or more, of many
    emotions, to gradient accumulation.
    """

    def __init__(
        self, model: ReLLMEmotionModel, args: TrainingArguments, train_dataset: Dataset | None = None, **kwargs: object
    ) -> None:
        args.remove_unused_columns, args.label_names = False, ["labels"]
        # Whatever the encoder was pretrained on: ReLLM normalises what its emotion tower reads.
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        shortest = shortest_clip(model.config.encoder_config)
        if isinstance(train_dataset, Dataset):  # of a stream nobody has counted the labels
            if not (labelled := _find_labelled(train_dataset)):
                raise ValueError(f"No two training rows are labelled with one of {DIMENSIONS}. Nothing would learn.")
            model.config.trained_dimensions = labelled
        dimensions = model.config.trained_dimensions or DIMENSIONS
        collator = EmotionCollator(extractor, min_duration_s=shortest, dimensions=dimensions)
        kwargs |= {"train_dataset": train_dataset, "data_collator": collator, "processing_class": extractor}
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(args, AugmentationSettings) and args.augments:
            limits = {"sampling_rate": extractor.sampling_rate, "min_duration_s": shortest}
            self.augment(Augmentation(args, seed=self.args.seed, **limits))
        self.model_accepts_loss_kwargs = False  # a CCC is averaged over accumulated steps, not divided by a count

    def measure_rows(self, rows: Dataset) -> list[int]:
        """Return the samples of each clip."""
        rate = self.processing_class.sampling_rate
        return [round(rate * clip_duration(row["audio"], rate)) for row in rows.select_columns("audio")]

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: object
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return one minus the concordance correlation coefficient, and the dimensions as outputs."""
        labels = inputs.pop("labels")
        dimensions = model(**inputs).dimensions
        loss = ccc_loss(dimensions, labels)
        return (loss, {"dimensions": dimensions}) if return_outputs else loss


def run_emotion_training(script: EmotionScriptArguments, args: EmotionTrainingConfig) -> EmotionTowerTrainer:
    """Build, train, evaluate and save, as the settings say; tower and feature extractor are in `args.output_dir`.

    It goes on from what is in that folder as [`~relllm.training.run.run_training`] does.
    """
    check_places(script)
    check_trainer(args)
    check_metric(args, ("loss", "ccc", *(f"ccc_{name}" for name in DIMENSIONS)))
    assert script.model_name_or_path is not None
    if not isinstance(script.data, str):
        raise ValueError(f"data is {script.data!r}; an emotion tower is trained on one data set. Name one.")
    selection = check_selection(script, args)
    train_rows = _load_labelled(script.data, script.train_split or "all", script.held_out)
    eval_rows = None
    if script.eval_split:
        eval_rows = _load_labelled(script.data, script.eval_split, script.held_out, _find_labelled(train_rows))
        check_metric(args, ("loss", "ccc", *(f"ccc_{name}" for name in _find_labelled(eval_rows))))
    check_clip_limits([train_rows, eval_rows], MIN_DURATION_S, MAX_DURATION_S)
    if eval_rows is None:
        args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None
    with args.main_process_first(desc="looking at the folder"):
        identity = _training_record(script, args) | selection
        identity |= describe_origin(script, train_rows, eval_rows, {"model_name_or_path": script.model_name_or_path})
        checkpoint = args.resume_from_checkpoint or begin_run(Path(args.output_dir), identity, script.resume)
    set_seed(args.seed)  # what is drawn for the head
    name, num_layers = script.model_name_or_path, script.num_layers
    model = build_emotion_tower(name, num_layers=num_layers, final_dropout=script.final_dropout)
    if not script.train_feature_encoder:
        model.encoder.feature_extractor._freeze_parameters()
    data = {"train_dataset": train_rows, "eval_dataset": eval_rows}
    trainer = EmotionTowerTrainer(model, args, **data, compute_metrics=concordance_metrics)
    complete_run(trainer, identity, checkpoint)
    return trainer


def _training_record(script: EmotionScriptArguments, args: EmotionTrainingConfig) -> dict[str, object]:
    """Return the settings that decide what comes out of a run."""
    names = {*EmotionTrainingConfig.__annotations__, *AugmentationSettings.__annotations__, *DECISIVE}
    names -= {"report_to", "save_total_limit", "per_device_eval_batch_size"}
    record = {name: getattr(script, name) for name in ("num_layers", "train_feature_encoder", "final_dropout")}
    record |= {field.name: getattr(args, field.name) for field in fields(args) if field.name in names}
    return {name: getattr(value, "value", value) for name, value in record.items()}


def build_emotion_tower(name: str, *, num_layers: int | None = None, final_dropout: float = 0.1) -> ReLLMEmotionModel:
    """Return an emotion tower to train: one that has its head, or an encoder with a fresh one.

    `name`, a directory or Hub id, counts as a tower if it is a [`ReLLMEmotionModel`] or labels its outputs arousal,
    dominance and valence. Of more layers than `num_layers` the lowest are kept.
    """
    config = AutoConfig.from_pretrained(name)
    layers = getattr(config, "encoder_config", config).num_hidden_layers
    if num_layers is not None and num_layers > layers:
        raise ValueError(f"num_layers={num_layers}, and the encoder has {layers}.")
    labels = set((config.to_dict().get("id2label") or {}).values())
    if config.model_type == ReLLMEmotionConfig.model_type or labels == set(DIMENSIONS):
        model = ReLLMEmotionModel.from_pretrained(name, dtype=torch.float32)
        assert isinstance(model, ReLLMEmotionModel)  # without the loading report
        _keep_layers(model.encoder, num_layers)
        return model
    ReLLMEmotionConfig(encoder_config=config)  # refuses what is no waveform encoder before its weights are read
    encoder = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    _keep_layers(encoder, num_layers)
    model = ReLLMEmotionModel(ReLLMEmotionConfig(encoder_config=encoder.config, final_dropout=final_dropout))
    model.encoder.load_state_dict(encoder.state_dict())
    return model


def concordance_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `ccc_arousal`, `ccc_dominance`, `ccc_valence` over a whole split, where labelled; their mean is `ccc`."""
    metrics = concordances(prediction.label_ids, prediction.predictions)
    return metrics | {"ccc": sum(metrics.values()) / len(metrics)}


def _keep_layers(encoder: PreTrainedModel, num_layers: int | None) -> None:
    if num_layers is not None:
        del encoder.encoder.layers[num_layers:]
        encoder.config.num_hidden_layers = num_layers


def _find_labelled(rows: Dataset) -> list[str]:
    """Return the dimensions that two rows or more are labelled with, which a CCC needs."""
    there = [name for name in DIMENSIONS if name in rows.column_names]
    return [name for name in there if sum(value is not None for value in rows[name]) >= 2]


def _load_labelled(data: str, split: str, held_out: str | None, among: Sequence[str] = DIMENSIONS) -> Dataset:
    """Return the rows with at least one of the dimensions, of which one or more must have labels."""
    rows = load_corpus(data, split, held_out=held_out)
    labelled = [name for name in _find_labelled(rows) if name in among]
    if not labelled:
        raise ValueError(
            f"The split {split!r} has fewer than two rows with {' or '.join(among)}. Choose a corpus with such "
            "labels, or write pseudo-labels with `relllm annotate`."
        )
    if silent := [name for name in among if name not in labelled]:
        names = ", ".join(silent)
        logger.warning("%r has fewer than two labels of %s: neither trained nor evaluated on it.", split, names)
    columns = [rows[name] for name in labelled]
    kept = [index for index, values in enumerate(zip(*columns, strict=True)) if any(v is not None for v in values)]
    if len(kept) < len(rows):
        logger.warning("%d of %d rows of %r have no dimension: left out.", len(rows) - len(kept), len(rows), split)
        rows = rows.select(kept)
    return rows
