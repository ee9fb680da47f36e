"""`relllm train`: a training run from a YAML file and flags, and the record that a model card has of it."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import AutoConfig, EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from relllm.data.loading import load_corpus
from relllm.data.mixing import mix_rows, name_sources
from relllm.data.survey import TASKS, TRAINING, RowSurvey, check_surveys, draw_survey, emotions_of, survey_splits
from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.setting import METHODS

from .augmentation import Augmentation, AugmentationSettings
from .building import build_model, check_model, starting_points
from .checkpoints import begin_run, complete_run, describe_origin
from .config import (
    OWN_SETTINGS,
    ReLLMScriptArguments,
    ReLLMSettings,
    ReLLMSFTConfig,
    SplitSettings,
    check_places,
    check_selection,
)
from .lengths import check_clip_limits
from .objective import class_weights
from .settings import SettingsParser, check_metric, check_tokens, check_trainer
from .trainer import ReLLMSFTTrainer, ReLLMTrainerMixin

Rows: TypeAlias = Dataset | IterableDataset
RowsByName: TypeAlias = dict[str, Rows]  # by the short name of a data set; `""` where there is one
PLACES = ("model_name_or_path", "audio_tower", "emotion_tower", "text_model")
MODEL_SETTINGS = (
    *PLACES,
    *("revision", "emotion_fusion"),
    *("emotion_labels", "projector_inner_dim", "lora_r", "lora_alpha", "lora_dropout", "lora_scope"),
    *("lora_target_modules", "dtype", "load_in_4bit", "full_window", "max_duration_s", "early_stopping_patience"),
)
TRAINER_SETTINGS = (
    *("optim", "lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_kwargs", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "data_seed"),
    *("max_steps", "world_size", "bf16", "fp16", "gradient_checkpointing", "seed"),
    *("load_best_model_at_end", "metric_for_best_model"),
)
EVALUATION = "evaluation"  # what `survey_splits` calls those rows, before a data set's name
FULLY_LABELLED = RowSurvey(  # what rows may be that nobody has read
    1, [], 1, 1, Counter(EMOTIONS), dict.fromkeys(DIMENSIONS, 1), fed=Counter([tuple(TASKS)])
)


def parse_arguments(
    arguments: Sequence[str], kind: type[ReLLMSettings] = ReLLMSFTConfig
) -> tuple[ReLLMScriptArguments, Any]:
    """Read settings as [`~relllm.training.settings.SettingsParser.parse_settings`] does, the second of a `kind`."""
    script, args = SettingsParser.of("relllm train", ReLLMScriptArguments, kind)(arguments)
    return script, args


def run_training(
    script: ReLLMScriptArguments,
    args: ReLLMSettings,
    kind: type[ReLLMTrainerMixin] = ReLLMSFTTrainer,
    own: Sequence[str] = OWN_SETTINGS,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> ReLLMTrainerMixin:
    """Build, train by a `kind` of trainer, evaluate and save, as the settings say; model and processor are in
    `args.output_dir`. Of the settings, `own` decide the result beside Transformers', and so do `facts`.

    What that folder holds is as of [`~relllm.training.checkpoints.begin_run`].
    """
    check_places(script)
    check_trainer(args)
    several = len(script.sources) > 1 and not script.eval_data
    names = name_sources(script.sources) if several else [""]
    check_metric(args, evaluation_metrics(args, dict.fromkeys(names, FULLY_LABELLED)))
    selection = check_selection(script, args)
    with args.main_process_first(desc="reading the rows"):
        train_rows, eval_rows, parts = load_rows(script, args, streaming=script.streaming)
        for rows in (*parts.values(), *eval_rows.values()):
            kind.check_rows(rows, args)
        _survey(script, args, train_rows, eval_rows, parts)
        identity = training_record(script, args, own) | selection | dict(facts)
        identity |= describe_origin(script, train_rows, eval_rows, starting_points(script), script.revision)
        checkpoint = args.resume_from_checkpoint or begin_run(Path(args.output_dir), identity, script.resume)
    callbacks = _callbacks(script, args)
    set_seed(args.seed)  # what is drawn for the projector, the heads and the LoRA
    model, processor = build_model(script)
    to_evaluate = eval_rows.get("", eval_rows) or None
    data = {"train_dataset": train_rows, "eval_dataset": to_evaluate, "processing_class": processor}
    trainer = kind(model=model, args=args, **data, callbacks=callbacks)
    complete_run(trainer, identity, checkpoint)
    return trainer


def _survey(
    script: ReLLMScriptArguments, args: ReLLMSettings, train_rows: Rows, eval_rows: RowsByName, parts: RowsByName
) -> None:
    """Print what the rows teach, choose a new model's classes, and check all that before a model is loaded."""
    surveys = survey_splits(train_rows, eval_rows.get("", eval_rows), parts if len(parts) > 1 else None)
    if surveys and args.process_index == 0 and not args.disable_tqdm:
        Console(stderr=True, markup=False).print(draw_survey(surveys, list(getattr(args, "tasks", None) or ())))
    if script.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(script.model_name_or_path, revision=script.revision)
        labels = getattr(config, "emotion_labels", EMOTIONS)  # what is no ReLLM is refused when it is loaded
    else:
        labels = script.emotion_labels = script.emotion_labels or emotions_of(surveys.get(TRAINING))
    check_surveys(surveys, labels, args.own_loss_weights, list(args.task_shares))
    measured = {name[len(EVALUATION) + 1 :]: one for name, one in surveys.items() if name.startswith(EVALUATION)}
    check_metric(args, evaluation_metrics(args, measured))
    if args.emotion_class_weights is not None:
        class_weights(args.emotion_class_weights, labels, surveys[TRAINING].emotions if TRAINING in surveys else None)
    if args.augments:
        Augmentation(args, seed=args.seed)  # whether its recordings and codecs are there
    if args.tower_cache_dir is not None:
        folder = Path(args.tower_cache_dir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"tower_cache_dir must be a folder, and {folder} cannot become one: {error}.") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"tower_cache_dir is {folder}, which this user may not write into. Name another folder.")
    check_tokens(args, str(script.model_name_or_path or script.text_model), script.revision)
    check_clip_limits([*parts.values(), *eval_rows.values()], *check_model(script, args.unfreeze))


def evaluation_metrics(args: ReLLMSettings, surveys: Mapping[str, RowSurvey]) -> list[str]:
    """Name what an evaluation gives, without `eval_`, of one set of rows, or of several by name and of all."""
    found = {name: _metrics_of(args, survey) for name, survey in surveys.items()}
    names = list(dict.fromkeys(metric for metrics in found.values() for metric in metrics))
    if "" not in found:
        return [*names, *(f"{name}_{metric}" for name, metrics in found.items() for metric in metrics)]
    return [*names, *(args.reply_metrics[1:] if args.response_loss_weight > 0 else ())]


def _metrics_of(args: ReLLMSettings, survey: RowSurvey) -> list[str]:
    labelled = [name for name, count in survey.dimensions.items() if count]
    tasks = [task for task in getattr(args, "tasks", None) or () if survey.feeding(task)]
    heard = ("emotion_loss", "emotion_accuracy", "ua", "wa", "macro_f1")
    given = {
        (args.reply_metrics[0], *(f"{task}_loss" for task in tasks)): args.response_loss_weight,
        ("recognition_accuracy",): args.response_loss_weight * ("recognition" in tasks),
        heard: args.emotion_loss_weight * survey.emotions.total(),
        ("dimension_loss", *(f"ccc_{name}" for name in labelled)): args.dimension_loss_weight * len(labelled),
        ("response_kl",): args.own_loss_weights["response_kl_weight"] * survey.transcripts,
    }
    return ["loss", *(name for names, weight in given.items() if weight > 0 for name in names)]


def training_record(
    script: ReLLMScriptArguments, args: ReLLMSettings, own: Sequence[str] = OWN_SETTINGS
) -> dict[str, object]:
    """Return the settings that a reader needs to repeat a run, without a path of this machine or a token."""
    named = {*own, *(AugmentationSettings.__annotations__ if args.augments else ()), *TRAINER_SETTINGS}
    names = [field.name for field in fields(args) if field.name in named]
    record: dict[str, object] = {} if script.method == METHODS[0] else {"method": script.method}
    record |= {name: getattr(script, name) for name in MODEL_SETTINGS}
    record |= {name: getattr(args, name) for name in names}
    record["world_size"] = args.world_size
    for name in (*PLACES, "augment_noise_dir", "scorers"):
        place = record.get(name)
        if isinstance(place, str) and (os.path.isabs(place) or os.path.exists(place)):
            record[name] = "a local folder"
    plain = (bool, int, float, str, list, dict)
    return {
        name: value if type(value) in plain else str(getattr(value, "value", value))
        for name, value in record.items()
        if value not in (None, [])
    }


def load_rows(
    script: SplitSettings, args: TrainingArguments, *, streaming: bool = False
) -> tuple[Rows, RowsByName, RowsByName]:
    """Return the rows to train on, those to evaluate on, and the parts of the first."""
    if streaming and args.max_steps <= 0:
        raise ValueError("streaming=True needs max_steps: the number of rows is not known beforehand.")
    if script.eval_split is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_split (or eval_data as well).")
    parts: RowsByName = {}
    held_back: RowsByName = {}
    names = name_sources(script.sources) if len(script.sources) > 1 else [""]
    for name, source in zip(names, script.sources, strict=True):
        own = script.held_out if source.held_out is None else source.held_out
        taught = script.train_split if source.train_split is None else source.train_split
        parts[name] = load_corpus(source.name, taught or "all", held_out=own, streaming=streaming)
        if streaming:
            parts[name] = parts[name].shuffle(seed=args.seed, buffer_size=1000)
        split = script.eval_split if source.eval_split is None else source.eval_split
        if split and not script.eval_data:
            held_back[name] = load_corpus(source.name, split, held_out=own)
    if script.eval_data and script.eval_split:
        held_back[""] = load_corpus(script.eval_data, script.eval_split)
    if len(parts) == 1:
        return parts[""], held_back, parts
    return mix_rows(parts, [source.weight for source in script.sources], seed=args.seed), held_back, parts


def _callbacks(script: ReLLMScriptArguments, args: ReLLMSettings) -> list[TrainerCallback]:
    if script.early_stopping_patience is None:
        return []
    args.restore_callback_states_from_checkpoint = True  # a resumed run has the patience that was left
    if not args.load_best_model_at_end or args.metric_for_best_model is None:
        raise ValueError(
            "early_stopping_patience needs load_best_model_at_end: true and metric_for_best_model (for example "
            "eval_loss), with eval_strategy and save_strategy alike."
        )
    return [EarlyStoppingCallback(early_stopping_patience=script.early_stopping_patience)]
