"""What a model card says of a training run: `training_settings.json`, without a path or a token of the machine.

The trainer's own `training_args.bin` is a pickle, and has both.
"""

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from transformers import TrainerState

from .augmentation import AugmentationSettings
from .config import ReLLMSFTConfig

if TYPE_CHECKING:
    from .run import ReLLMScriptArguments

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


def training_record(script: "ReLLMScriptArguments", args: ReLLMSFTConfig, state: TrainerState) -> dict[str, object]:
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


__all__ = ["RECORD_NAME", "training_record"]
