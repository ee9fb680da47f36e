"""Fine-tuning of an emotion tower to dimensions or to categories, and its command `relllm train-emotion`.

The defaults are audEERING's, of the tower that RE-LLM freezes (Wagner et al., "Dawn of the transformer era in speech
emotion recognition", arXiv 2203.07378), with the best checkpoint on the development split.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    EvalPrediction,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    set_seed,
)

from relllm.data.clips import clip_duration
from relllm.data.loading import load_corpus
from relllm.data.survey import emotions_of, survey_rows
from relllm.labels import DIMENSIONS
from relllm.metrics import concordances, recognition_metrics
from relllm.modeling.configuration_relllm import ReLLMEmotionConfig
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.processing.audio_relllm import MAX_DURATION_S, MIN_DURATION_S, load_audio
from relllm.processing.feature_extraction_relllm import shortest_clip
from relllm.setting import check_limits, check_settings, setting

from .augmentation import Augmentation, AugmentationMixin, AugmentationSettings, EpochCallback
from .checkpoints import LastStepMixin, begin_run, complete_run, describe_origin
from .config import OfThisMachine, RowsSettings, check_places, check_selection
from .lengths import GroupByLengthMixin, check_clip_limits
from .losses import IGNORE_INDEX, ccc_loss
from .objective import class_weights
from .settings import SettingsParser, check_metric, check_trainer

logger = logging.getLogger(__name__)

DECISIVE = ("gradient_accumulation_steps", "max_steps", "weight_decay", "warmup_steps", "seed", "bf16", "fp16")
RECOGNITION = ("ua", "wa", "macro_f1")


@dataclass
class EmotionScriptArguments(RowsSettings):
    """What `relllm train-emotion` takes beside [`EmotionTrainingConfig`]."""

    model_name_or_path: str | None = setting(None, "A wav2vec2, HuBERT or WavLM encoder, or a tower: path or Hub id.")
    num_layers: int | None = setting(None, "Keep so many Transformer layers from the bottom (audEERING: 12 of 24).")
    targets: Literal["dimensions", "emotions"] = setting("dimensions", "What is taught: dimensions, or emotions.")
    train_feature_encoder: bool = setting(False, "Also train the convolutions.")
    final_dropout: float = setting(0.1, "In a fresh head (audEERING: 0.1).")
    eval_split: str = setting("validation", "Development split; empty for none, which keeps the last checkpoint.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        if self.model_name_or_path is None or self.data is None:
            raise ValueError("model_name_or_path and data are needed: what to fine-tune, and on which rows.")
        check_limits(self, {"num_layers": "[1, inf)", "final_dropout": "[0, 1)"})


@dataclass
class EmotionTrainingConfig(AugmentationSettings, OfThisMachine, TrainingArguments):
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
    metric_for_best_model: str | None = setting("ccc", "Mean CCC of the labelled dimensions; of emotions it is ua.")
    greater_is_better: bool | None = setting(True, "A CCC, or UA, is better when it is greater.")
    report_to: str = setting("none", "trackio, tensorboard, wandb, …")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_augmentation()


parse_emotion_arguments = SettingsParser.of("relllm train-emotion", EmotionScriptArguments, EmotionTrainingConfig)


@dataclass
class EmotionCollator:
    """Rows with `audio` and dimensions, or an `emotion`, -> normalised, padded waveforms and targets."""

    feature_extractor: Wav2Vec2FeatureExtractor
    augmentation: Augmentation | None = None
    min_duration_s: float = MIN_DURATION_S  # of a clip: what the tower needs for a frame
    dimensions: Sequence[str] = DIMENSIONS  # those that count
    emotions: Sequence[str] = ()  # the classes, where these are taught

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Return `input_values` and its mask `(clips, samples)`; `labels` are `(clips, 3)`, of emotions `(clips,)`."""
        rate = self.feature_extractor.sampling_rate
        waveforms = [load_audio(row["audio"], sampling_rate=rate, min_duration_s=self.min_duration_s) for row in rows]
        if self.augmentation is not None:
            pairs = zip(rows, waveforms, strict=True)
            waveforms = [self.augmentation(waveform, row_id=row.get("id")) for row, waveform in pairs]
        batch = self.feature_extractor(waveforms, sampling_rate=rate, padding=True, return_tensors="pt")
        if self.emotions:
            place = {name: index for index, name in enumerate(self.emotions)} | {None: IGNORE_INDEX}
            labels = torch.tensor([place[row.get("emotion")] for row in rows])
        else:
            values = [[row.get(name) if name in self.dimensions else None for name in DIMENSIONS] for row in rows]
            labels = torch.from_numpy(np.array(values, dtype=np.float32))  # None becomes NaN
        return {"input_values": batch["input_values"], "input_values_mask": batch["attention_mask"], "labels": labels}


class EmotionTowerTrainer(GroupByLengthMixin, AugmentationMixin, LastStepMixin):
    """Trains a [`ReLLMEmotionModel`] on rows with `audio` and dimensions, with 1 - CCC, averaged over these.

    One whose configuration names emotions learns these by cross-entropy, each class with the same weight in all.
    """

    def __init__(
        self, model: ReLLMEmotionModel, args: TrainingArguments, train_dataset: Dataset | None = None, **kwargs: object
    ) -> None:
        args.remove_unused_columns, args.label_names = False, ["labels"]
        # Whatever the encoder was pretrained on: ReLLM normalises what its emotion tower reads.
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        shortest = shortest_clip(model.config.encoder_config)
        emotions = model.config.emotion_labels
        self._class_weights: Tensor | None = None
        if emotions:
            splits = [rows for rows in (train_dataset, kwargs.get("eval_dataset")) if isinstance(rows, Dataset)]
            counts = [survey_rows(rows).emotions for rows in splits]
            if unknown := sorted(set().union(*counts) - set(emotions)):
                raise ValueError(f"Rows have the emotions {unknown}, which the tower does not know: {emotions}.")
            if isinstance(train_dataset, Dataset):
                if not counts[0]:
                    raise ValueError("No training row has an emotion. Nothing would learn.")
                self._class_weights = torch.tensor(class_weights(["balanced"], emotions, counts[0]))
        elif isinstance(train_dataset, Dataset):  # of a stream nobody has counted the labels
            if not (labelled := _find_labelled(train_dataset)):
                raise ValueError(f"No two training rows are labelled with one of {DIMENSIONS}. Nothing would learn.")
            model.config.trained_dimensions = labelled
        dimensions = model.config.trained_dimensions or DIMENSIONS
        collator = EmotionCollator(extractor, min_duration_s=shortest, dimensions=dimensions, emotions=emotions)
        kwargs |= {"train_dataset": train_dataset, "data_collator": collator, "processing_class": extractor}
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(args, AugmentationSettings) and args.augments:
            limits = {"sampling_rate": extractor.sampling_rate, "min_duration_s": shortest}
            self._augmentation = Augmentation(args, seed=self.args.seed, **limits)
            self.add_callback(EpochCallback)
        self.model_accepts_loss_kwargs = False  # a CCC is averaged over accumulated steps, not divided by a count

    def measure_rows(self, rows: Dataset) -> list[int]:
        """Return the samples of each clip."""
        rate = self.processing_class.sampling_rate
        return [round(rate * clip_duration(row["audio"], rate)) for row in rows.select_columns("audio")]

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: object
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return one minus the concordance correlation coefficient, or the cross-entropy, and what the head read."""
        labels = inputs.pop("labels")
        output = model(**inputs)
        if (read := output.dimensions) is not None:
            loss = ccc_loss(read, labels)
        elif (labels == IGNORE_INDEX).all():
            loss = 0 * (read := output.emotion_logits.float()).sum()
        else:
            read = output.emotion_logits.float()
            weights = None if self._class_weights is None else self._class_weights.to(read.device)
            loss = torch.nn.functional.cross_entropy(read, labels, weights)  # over those that have a label
        return (loss, {"read": read}) if return_outputs else loss


def run_emotion_training(script: EmotionScriptArguments, args: EmotionTrainingConfig) -> EmotionTowerTrainer:
    """Train as [`~relllm.training.run.run_training`] does; tower and feature extractor are in `args.output_dir`."""
    check_places(script)
    check_trainer(args)
    by_emotion = script.targets == "emotions"
    if by_emotion and args.metric_for_best_model == "ccc":  # the default
        args.metric_for_best_model = "ua"
    check_metric(args, ("loss", *(RECOGNITION if by_emotion else ("ccc", *(f"ccc_{name}" for name in DIMENSIONS)))))
    assert script.model_name_or_path is not None
    if not isinstance(script.data, str):
        raise ValueError(f"data is {script.data!r}; an emotion tower is trained on one data set. Name one.")
    selection = check_selection(script, args)
    names: Sequence[str] = ("emotion",) if by_emotion else DIMENSIONS
    train_rows = _load_labelled(script.data, script.train_split or "all", script.held_out, names)
    eval_rows = None
    if script.eval_split:
        names = _find_labelled(train_rows, names)
        eval_rows = _load_labelled(script.data, script.eval_split, script.held_out, names)
        measured = RECOGNITION if by_emotion else ["ccc", *(f"ccc_{name}" for name in _find_labelled(eval_rows))]
        check_metric(args, ("loss", *measured))
    else:
        args.eval_strategy, args.load_best_model_at_end, args.metric_for_best_model = "no", False, None
    check_clip_limits([train_rows, eval_rows], MIN_DURATION_S, MAX_DURATION_S)
    with args.main_process_first(desc="looking at the folder"):
        identity = _training_record(script, args) | selection
        evaluated = {} if eval_rows is None else {"": eval_rows}
        identity |= describe_origin(script, train_rows, evaluated, {"model_name_or_path": script.model_name_or_path})
        checkpoint = args.resume_from_checkpoint or begin_run(Path(args.output_dir), identity, script.resume)
    set_seed(args.seed)  # what is drawn for the head
    labels = emotions_of(survey_rows(train_rows)) if by_emotion else DIMENSIONS
    model = build_emotion_tower(
        script.model_name_or_path, num_layers=script.num_layers, final_dropout=script.final_dropout, labels=labels
    )
    if not script.train_feature_encoder:
        model.encoder.feature_extractor._freeze_parameters()
    measure = recognition_shares if by_emotion else concordance_metrics
    trainer = EmotionTowerTrainer(model, args, train_rows, eval_dataset=eval_rows, compute_metrics=measure)
    complete_run(trainer, identity, checkpoint)
    return trainer


def _training_record(script: EmotionScriptArguments, args: EmotionTrainingConfig) -> dict[str, object]:
    """Return the settings that decide what comes out of a run."""
    names = {*EmotionTrainingConfig.__annotations__, *AugmentationSettings.__annotations__, *DECISIVE}
    names -= {"report_to", "save_total_limit", "per_device_eval_batch_size"}
    record = {name: getattr(script, name) for name in ("num_layers", "train_feature_encoder", "final_dropout")}
    record |= {"targets": script.targets} if script.targets == "emotions" else {}  # older runs taught dimensions
    record |= {field.name: getattr(args, field.name) for field in fields(args) if field.name in names}
    return {name: getattr(value, "value", value) for name, value in record.items()}


def build_emotion_tower(
    name: str, *, num_layers: int | None = None, final_dropout: float = 0.1, labels: Sequence[str] = DIMENSIONS
) -> ReLLMEmotionModel:
    """Return an emotion tower to train: the one at a directory or Hub id that has a head for these `labels`, or the
    encoder there with a fresh head. Of more layers than `num_layers` the lowest are kept.
    """
    config = AutoConfig.from_pretrained(name)
    layers = getattr(config, "encoder_config", config).num_hidden_layers
    if num_layers is not None and num_layers > layers:
        raise ValueError(f"num_layers={num_layers}, and the encoder has {layers}.")
    is_tower = config.model_type == ReLLMEmotionConfig.model_type
    has_head = set((config.to_dict().get("id2label") or {}).values()) == set(labels)
    if is_tower or has_head:
        tower: Any = ReLLMEmotionModel.from_pretrained(name, dtype=torch.float32)
        encoder = tower.encoder
    else:
        ReLLMEmotionConfig(encoder_config=config)  # refuses what is no waveform encoder before its weights are read
        encoder = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    if num_layers is not None:
        del encoder.encoder.layers[num_layers:]
        encoder.config.num_hidden_layers = num_layers
    if has_head:
        return tower
    fresh = {"final_dropout": final_dropout, "id2label": dict(enumerate(labels))}
    model = ReLLMEmotionModel(ReLLMEmotionConfig(encoder_config=encoder.config, **fresh))
    model.encoder.load_state_dict(encoder.state_dict())
    return model


def concordance_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `ccc_arousal`, `ccc_dominance`, `ccc_valence` over a whole split, where labelled; their mean is `ccc`."""
    metrics = concordances(prediction.label_ids, prediction.predictions)
    return metrics | {"ccc": sum(metrics.values()) / len(metrics)}


def recognition_shares(prediction: EvalPrediction) -> dict[str, float]:
    """Return `ua`, `wa` and `macro_f1` over the clips of a split that have an emotion."""
    labels, logits = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    classes, known = [str(place) for place in range(logits.shape[1])], labels != IGNORE_INDEX
    scores = recognition_metrics(labels[known].tolist(), logits[known].argmax(1).tolist(), classes)
    return {"ua": scores["ua"], "wa": scores["wa"], "macro_f1": scores["macro_f1"]}


def _find_labelled(rows: Dataset, among: Sequence[str] = DIMENSIONS) -> list[str]:
    """Return the dimensions, or the `among` others, that two rows or more are labelled with, which a CCC needs."""
    there = [name for name in among if name in rows.column_names]
    return [name for name in there if sum(value is not None for value in rows[name]) >= 2]


def _load_labelled(data: str, split: str, held_out: str | None, among: Sequence[str] = DIMENSIONS) -> Dataset:
    """Return the rows with at least one of the labels, of which one or more must be there."""
    rows = load_corpus(data, split, held_out=held_out)
    labelled = _find_labelled(rows, among)
    if not labelled:
        has_emotions = _find_labelled(rows, ["emotion"])
        remedy = "teach its emotions (--targets emotions), or " if has_emotions else ""
        raise ValueError(
            f"The split {split!r} has fewer than two rows with {' or '.join(among)}. Choose a corpus with such "
            f"labels, or {remedy}write pseudo-labels with `relllm annotate`."
        )
    if silent := [name for name in among if name not in labelled]:
        names = ", ".join(silent)
        logger.warning("%r has fewer than two labels of %s: neither trained nor evaluated on it.", split, names)
    columns = [rows[name] for name in labelled]
    kept = [index for index, values in enumerate(zip(*columns, strict=True)) if any(v is not None for v in values)]
    if len(kept) < len(rows):
        what = " or ".join(labelled)
        logger.warning("%d of %d rows of %r have no %s: left out.", len(rows) - len(kept), len(rows), split, what)
    return rows.select(kept)
