"""`relllm train`: a training run from a YAML file and flags.

What lives here: the settings of a run that are not the trainer's, and the order of its steps. What does not: building
the model (`building.py`), the trainer and its settings (`trainer.py`, `config.py`), reading rows (`data/loading.py`).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from datasets import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from relllm.data.journal import write_json
from relllm.data.loading import load_corpus

from .augmentation import AugmentationSettings
from .building import build_model
from .checkpoints import checkpoint_to_resume
from .config import ReLLMSFTConfig
from .settings import SettingsParser
from .tower_cache import TowerCacheSettings
from .trainer import ReLLMSFTTrainer

logger = logging.getLogger(__name__)

RECORD_NAME = "training_settings.json"
PLACES = ("model_name_or_path", "audio_tower", "emotion_tower", "text_model")
MODEL_SETTINGS = (
    *PLACES,
    *("revision", "emotion_fusion"),
    *("projector_inner_dim", "lora_r", "lora_alpha", "lora_dropout", "lora_scope"),
    *("dtype", "load_in_4bit", "full_window", "max_duration_s", "train_split"),
)
OF_A_NEW_MODEL = ("full_window", "max_duration_s")  # a checkpoint's processor has its own
TRAINER_SETTINGS = (
    *("optim", "lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("max_steps", "world_size", "bf16", "fp16", "gradient_checkpointing", "seed"),
)
DESCRIPTION = """\
Train a ReLLM on rows with audio, replies and emotions.

Every setting is a line of a YAML file and a flag; a flag wins:
  relllm train --config recipes/stage2_emotion.yaml --learning_rate 1e-5
  accelerate launch --config_file recipes/accelerate/ddp.yaml -m relllm.cli train --config recipes/stage2_emotion.yaml

You must say where the rows are (--data), what to start from (--model_name_or_path for a ReLLM, or --audio_tower and
--text_model for a new one) and where the run goes (--output_dir). Everything else has the paper's value; see
docs/training.md for the sentence behind each. Interrupted, the same command goes on from the last complete checkpoint.
"""


@dataclass
class ReLLMScriptArguments:
    """What `relllm train` takes beside [`ReLLMSFTConfig`]: the model to start from, its LoRA, and the data.

    The architecture is either that of a ReLLM checkpoint (`model_name_or_path`), or built from towers. A checkpoint
    without a LoRA (of the first stage) is given one where `lora_r` asks for it; otherwise the settings below must be
    the checkpoint's.

    Args:
        model_name_or_path (`str`, *optional*): A ReLLM to go on with, full or light: a directory or a Hub id. It wins
            over the towers, so that a recipe made of towers can start from a checkpoint with this one flag.
        revision (`str`, *optional*, defaults to `"main"`): Of that checkpoint on the Hub.
        audio_tower, emotion_tower, text_model (`str`, *optional*): Directories or Hub ids of the towers.
        emotion_fusion (`str`, *optional*, defaults to `"concat"`): `"concat"`, `"token"` or `"none"`; see
            [`ReLLMConfig`]. With `"none"` the emotion tower is left out.
        projector_inner_dim (`int`, *optional*, defaults to 512): Width of the projector's bottleneck.
        lora_r, lora_alpha, lora_dropout (*optional*, default to 16, 16, 0.05): Of the LLM's LoRA; `lora_r=0` for none.
        lora_scope (`str`, *optional*, defaults to `"audio"`): Where it acts: `"audio"`, `"text"` or `"global"`.
        lora_target_modules (`list[str]`, *optional*): Layers by name; by default every linear layer of the LLM.
        dtype (`str`, *optional*): Of the frozen weights: `"float32"`, `"bfloat16"` or `"float16"`; by default the
            LLM's own. What trains is held in float32.
        attn_implementation (`str`, *optional*): `"sdpa"`, `"flash_attention_2"` or `"eager"`.
        load_in_4bit (`bool`, *optional*, defaults to `False`): QLoRA: the LLM alone in 4 bit (NF4). Needs
            bitsandbytes.
        full_window (`bool`, *optional*, defaults to `True`): See [`ReLLMFeatureExtractor`]. Of a new model only.
        max_duration_s (`float`, *optional*, defaults to 600): Longest clip accepted, in seconds. Of a new model only.
        data (`str`): Where the rows are, as [`~relllm.data.loading.load_corpus`] takes it.
        train_split (`str`, *optional*, defaults to `"train"`): Split to train on; empty for all rows.
        eval_split (`str`, *optional*): Split to evaluate on, at the end and as `eval_strategy` says.
        eval_data (`str`, *optional*): Where that split is, if not in `data`.
        held_out (`str`, *optional*): Makes the splits of `data` from columns, as
            [`~relllm.data.loading.load_corpus`] does: `"session=Ses05;validation:session=Ses04"`.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed; `max_steps` must be set.
        early_stopping_patience (`int`, *optional*): Stop after so many evaluations without a better
            `metric_for_best_model`.
        resume (`str`, *optional*, defaults to `"auto"`): `"auto"` goes on from the last complete checkpoint in
            `output_dir` if there is one, `"true"` demands one, `"false"` refuses a folder that holds one.

    Raises:
        ValueError: On a value outside the stated ones; the message names the setting.
    """

    _argument_group_name = "model and data"

    model_name_or_path: str | None = field(default=None, metadata={"help": "A ReLLM to go on with; wins over towers."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of that checkpoint on the Hub."})
    audio_tower: str | None = field(default=None, metadata={"help": "Whisper, wav2vec2, HuBERT, WavLM: id or path."})
    emotion_tower: str | None = field(default=None, metadata={"help": "Arousal, dominance, valence: id or path."})
    text_model: str | None = field(default=None, metadata={"help": "Any causal LM: id or path."})
    emotion_fusion: Literal["concat", "token", "none"] = field(
        default="concat", metadata={"help": "How emotion joins speech: concat (paper), token, none (the baseline)."}
    )
    projector_inner_dim: int = field(default=512, metadata={"help": "Width of the bottleneck (original: 512)."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LLM's LoRA (paper: 16); 0 for no LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's alpha (paper: 16)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA's dropout (paper: 0.05)."})
    lora_scope: Literal["audio", "text", "global"] = field(
        default="audio", metadata={"help": "Positions where the LoRA acts: audio (paper), text, global."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers by name; by default all linear ones, which are the paper's."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Of the frozen weights; by default the LLM's own."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2 or eager."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: the LLM alone in 4 bit (bitsandbytes)."})
    full_window: bool = field(default=True, metadata={"help": "Whisper over its whole 30 s, as it was trained."})
    max_duration_s: float = field(default=600.0, metadata={"help": "Longest clip accepted, in seconds."})
    data: str | None = field(
        default=None, metadata={"help": "Prepared corpus, .jsonl/.csv/.parquet, save_to_disk folder or Hub id."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; empty for all rows."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; never the test split."})
    eval_data: str | None = field(default=None, metadata={"help": "Where eval_split is, if not in data."})
    held_out: str | None = field(
        default=None, metadata={"help": "Splits from columns: session=Ses05;validation:session=Ses04."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed; needs max_steps."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    resume: str = field(
        default="auto", metadata={"help": "auto: from the last complete checkpoint if any; true: demand one; false."}
    )

    def __post_init__(self) -> None:
        self.resume = str(self.resume).lower()  # YAML reads `true` as a bool
        choices = {
            "emotion_fusion": ("concat", "token", "none"),
            "lora_scope": ("audio", "text", "global"),
            "dtype": (None, "float32", "bfloat16", "float16"),
            "resume": ("auto", "true", "false"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.data is None:
            raise ValueError("data is missing: where the rows are. Give --data, or a line `data: …` in the recipe.")
        if self.model_name_or_path is None and (self.audio_tower is None or self.text_model is None):
            raise ValueError(
                "Nothing to start from. Give model_name_or_path (a ReLLM), or audio_tower and text_model (a new one)."
            )
        if self.model_name_or_path is None and self.emotion_fusion != "none" and self.emotion_tower is None:
            raise ValueError(
                f"emotion_fusion={self.emotion_fusion!r} needs an emotion_tower. Give one, or emotion_fusion='none' "
                "for the speech-LLM baseline."
            )
        if self.lora_r < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"Expected lora_r >= 0 and lora_dropout in [0, 1), got {self.lora_r}, {self.lora_dropout}."
            )
        if self.max_duration_s <= 0:
            raise ValueError(f"max_duration_s must be positive, got {self.max_duration_s}.")

    @property
    def lora(self) -> dict | None:
        """Arguments of `peft.LoraConfig`, or `None`."""
        if self.lora_r == 0:
            return None
        lora = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return lora if self.lora_target_modules is None else lora | {"target_modules": self.lora_target_modules}


def parse_arguments(arguments: Sequence[str]) -> tuple[ReLLMScriptArguments, ReLLMSFTConfig]:
    """Settings from `--config file.yaml` and flags.

    Args:
        arguments (`Sequence[str]`): As on the command line, after `relllm train`.

    Raises:
        SystemExit: After `--help` (0), or on a setting that is unknown or wrong (2), which is printed.
    """
    sections = {
        "model and data": [setting.name for setting in fields(ReLLMScriptArguments)],
        "losses, and where the paper's recipe differs from TRL": list(ReLLMSFTConfig.__annotations__),
        "augmentation of the training clips (off by default)": list(AugmentationSettings.__annotations__),
        "cache of the frozen towers' outputs (off by default)": list(TowerCacheSettings.__annotations__),
    }
    parser = SettingsParser(
        (ReLLMScriptArguments, ReLLMSFTConfig), command="relllm train", description=DESCRIPTION, sections=sections
    )
    script, args = parser.parse_settings(arguments)
    return script, args


def run_training(script: ReLLMScriptArguments, args: ReLLMSFTConfig) -> ReLLMSFTTrainer:
    """Build, train, evaluate and save, as the settings say.

    Args:
        script ([`ReLLMScriptArguments`]): Model and data.
        args ([`ReLLMSFTConfig`]): The trainer's settings.

    Returns:
        [`ReLLMSFTTrainer`]: After training; model and processor are saved in `args.output_dir`.

    Raises:
        ValueError: If settings contradict each other, the data or the checkpoint.
        FileNotFoundError: If the data or the checkpoint to resume from is not there.
        ImportError: If bitsandbytes is asked for and missing.
    """
    checkpoint = args.resume_from_checkpoint or checkpoint_to_resume(Path(args.output_dir), script.resume)
    set_seed(args.seed)  # what is drawn for the projector, the heads and the LoRA
    with args.main_process_first(desc="reading the rows"):
        train_rows, eval_rows = _load_data(script, args)
    model, processor = build_model(script)
    trainer = ReLLMSFTTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=_callbacks(script, args),
    )
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_json(training_record(script, args, trainer.state), Path(args.output_dir) / RECORD_NAME)
    if eval_rows is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if script.load_in_4bit:  # Transformers loads such a checkpoint as it is stored, so let it be stored in one dtype
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(model.dtype)
    if args.push_to_hub:
        trainer.push_to_hub()  # saves as well
    else:
        trainer.save_model()  # and the processor
    return trainer


def training_record(script: ReLLMScriptArguments, args: ReLLMSFTConfig, state: TrainerState) -> dict[str, object]:
    """The settings that a reader needs to repeat a run, and how far it went.

    Args:
        script ([`ReLLMScriptArguments`]): Model and data.
        args ([`ReLLMSFTConfig`]): The trainer's settings.
        state (`TrainerState`): At the end.

    Returns:
        `dict`: Values that JSON can hold. A setting that is a folder of this machine is `"a local folder"`.
    """
    own = {*ReLLMSFTConfig.__annotations__, *(AugmentationSettings.__annotations__ if args.augments else ())}
    of_model = [name for name in MODEL_SETTINGS if script.model_name_or_path is None or name not in OF_A_NEW_MODEL]
    names = [field.name for field in fields(args) if field.name in own or field.name in TRAINER_SETTINGS]
    record: dict[str, object] = {name: getattr(script, name) for name in of_model} | {
        name: getattr(args, name) for name in names
    }
    record["world_size"] = args.world_size
    for name in (*PLACES, "augment_noise_dir"):
        place = record.get(name)
        if isinstance(place, str) and (os.path.isabs(place) or os.path.exists(place)):
            record[name] = "a local folder"
    public = {name: _plain(value) for name, value in record.items() if value not in (None, [])}
    return {**public, "steps_done": state.global_step, "epochs_done": state.epoch}


def _plain(value: object) -> object:
    return value if type(value) in (bool, int, float, str, list) else str(getattr(value, "value", value))


def _load_data(
    script: ReLLMScriptArguments, args: ReLLMSFTConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    if script.streaming and args.max_steps <= 0:
        raise ValueError("streaming=True needs max_steps: the number of rows is not known beforehand.")
    if script.eval_split is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy.value!r} needs an eval_split (and eval_data if elsewhere)."
        )
    assert script.data is not None
    train_rows = load_corpus(
        script.data, script.train_split or "all", held_out=script.held_out, streaming=script.streaming
    )
    if script.streaming:
        train_rows = train_rows.shuffle(seed=args.seed, buffer_size=1000)
    eval_rows = None
    if script.eval_split:
        held_out = None if script.eval_data else script.held_out  # which is of `data`
        eval_rows = load_corpus(script.eval_data or script.data, script.eval_split, held_out=held_out)
    return train_rows, eval_rows


def _callbacks(script: ReLLMScriptArguments, args: ReLLMSFTConfig) -> list[TrainerCallback]:
    if script.early_stopping_patience is None:
        return []
    if not args.load_best_model_at_end or args.metric_for_best_model is None:
        raise ValueError(
            "early_stopping_patience needs load_best_model_at_end: true and metric_for_best_model (for example "
            "eval_loss), with eval_strategy and save_strategy alike."
        )
    return [EarlyStoppingCallback(early_stopping_patience=script.early_stopping_patience)]

