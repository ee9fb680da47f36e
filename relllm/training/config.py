"""Settings of a training run. Architecture is `ReLLMConfig`; nothing is in both."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from trl import SFTConfig

from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

from .augmentation import AugmentationSettings
from .tower_cache import TowerCacheSettings

TOWERS = ("audio_tower", "emotion_tower", "text_model")
LOSS_WEIGHTS = (
    "response_loss_weight",
    "emotion_loss_weight",
    "dimension_loss_weight",
    "response_kl_weight",
)


@dataclass
class ReLLMSFTConfig(TowerCacheSettings, AugmentationSettings, SFTConfig):
    """`trl.SFTConfig` with RE-LLM's losses; the defaults that differ from TRL's are the paper's recipe.

    The settings of augmentation are those of [`~relllm.training.augmentation.AugmentationSettings`], and those of the
    cache of tower outputs those of [`~relllm.training.tower_cache.TowerCacheSettings`]; all are off.

    Args:
        emotion_loss_weight (`float`, *optional*, defaults to 1.0): Of the emotion cross-entropy. As with every weight
            here, 0 switches the loss off, and it is not computed.
        dimension_loss_weight (`float`, *optional*, defaults to 1.0): Of the arousal-dominance-valence loss.
        dimension_loss (`str`, *optional*, defaults to `"mse"`): `"mse"` (the paper) or `"ccc"`, one minus the
            concordance correlation over the micro-batch, which therefore depends on the batch size.
        emotion_class_weights (`list[float]`, *optional*): One for each of `config.emotion_labels`.
        response_loss_weight (`float`, *optional*, defaults to 1.0): Of the reply's cross-entropy.
        response_kl_weight (`float`, *optional*, defaults to 0.0): Of KL(text ‖ speech) over the reply, where the same
            LLM without its LoRA reads the row's transcript (`text`); an alignment loss of BLSP-Emo, off in RE-LLM.
        kl_temperature (`float`, *optional*, defaults to 2.0): Divides the logits of both branches (BLSP-Emo: 2).
        kl_shifted (`bool`, *optional*, defaults to `True`): Compare the positions that predict the reply; `False`
            compares those that hold it, as the original code does.
        light_checkpoints (`bool`, *optional*, defaults to `True`): Save what was trained and the towers' names, not
            the frozen towers themselves.
        instruction (`str`, *optional*): Text before the audio in a row without `messages`.
        system_prompt (`str`, *optional*): System turn of a row without `messages`; empty for none.
        unfreeze (`list[str]`, *optional*): What trains beyond the projector, the heads and the LoRA: any of
            `"audio_tower"`, `"emotion_tower"`, `"text_model"`.

    Raises:
        ValueError: On a negative weight, a temperature of 0 or less, an unknown tower, a TRL option that would cut
            through audio, or a setting with which the towers' outputs change from step to step, and a cache of them.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate (paper: 2e-5)."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's weight decay (paper: 0.05)."})
    warmup_steps: float = field(default=200, metadata={"help": "Warm-up steps (paper: 200)."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs (paper: 3)."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Rows a device and step (paper: 2)."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Steps an update (paper: 8)."})
    max_length: int | None = field(default=None, metadata={"help": "Must stay unset: a cut would go through audio."})
    loss_type: str = field(default="nll", metadata={"help": "Of the response; TRL before 1.16 defaults to another."})
    emotion_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the emotion cross-entropy."})
    dimension_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the dimension loss."})
    dimension_loss: Literal["mse", "ccc"] = field(default="mse", metadata={"help": "'mse' (paper) or 'ccc'."})
    emotion_class_weights: list[float] | None = field(default=None, metadata={"help": "One for each emotion class."})
    response_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the reply's cross-entropy."})
    response_kl_weight: float = field(default=0.0, metadata={"help": "Weight of KL(text || speech) over the reply."})
    kl_temperature: float = field(default=2.0, metadata={"help": "Divides the logits of both branches of a KL."})
    kl_shifted: bool = field(default=True, metadata={"help": "False: the positions of the original code, one late."})
    light_checkpoints: bool = field(default=True, metadata={"help": "Save what trains, and the towers by name."})
    instruction: str = field(default=SPEECH_PROMPT, metadata={"help": "Text before the audio."})
    system_prompt: str = field(default=SYSTEM_PROMPT, metadata={"help": "System turn; empty for none."})
    unfreeze: list[str] = field(
        default_factory=list, metadata={"help": "Of audio_tower, emotion_tower, text_model: what trains as well."}
    )

    def __post_init__(self) -> None:
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL's default is True, which on a CPU is several times slower than float32
        super().__post_init__()
        for name in LOSS_WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}.")
        if self.kl_temperature <= 0:
            raise ValueError(f"kl_temperature must be > 0, got {self.kl_temperature}.")
        if self.label_smoothing_factor > 0 and self.response_kl_weight > 0:
            raise ValueError("label_smoothing_factor > 0 and a KL loss exclude each other. Set one of them to 0.")
        if self.dimension_loss not in ("mse", "ccc"):
            raise ValueError(f"dimension_loss must be 'mse' or 'ccc', got {self.dimension_loss!r}.")
        if unknown := sorted(set(self.unfreeze) - set(TOWERS)):
            raise ValueError(f"unfreeze has {unknown}; it takes any of {TOWERS}.")
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"{name}=True would join rows, and audio belongs to its row. Leave it off.")
        if self.max_length is not None:
            raise ValueError(f"max_length={self.max_length} would cut through audio. Leave it unset; shorten clips.")
        self.check_augmentation()
        if self.tower_cache_dir is not None:
            self._check_tower_cache()
        # Our collator makes the labels from the chat template's `{% generation %}` marks.
        self.remove_unused_columns = False
        dataset_kwargs: dict | None = self.dataset_kwargs  # type: ignore[has-type]
        self.dataset_kwargs = {**(dataset_kwargs or {}), "skip_prepare_dataset": True}

    def _check_tower_cache(self) -> None:
        if towers := sorted(set(self.unfreeze) & {"audio_tower", "emotion_tower"}):
            raise ValueError(
                f"tower_cache_dir is for frozen towers, and unfreeze has {towers}. Leave out one of the two."
            )
        if self.augments:
            raise ValueError(
                "tower_cache_dir is set, and augmented clips are never heard twice. Leave it out, or the augment_… "
                "settings."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"tower_cache_dir is set, and {name} gives the towers another precision in evaluation. Leave out "
                    "one of the two."
                )

    def __getstate__(self) -> dict[str, object]:
        """Without the token: the trainer pickles its settings to `training_args.bin`, which a push sends along."""
        return {**self.__dict__, "hub_token": None}


__all__ = ["ReLLMSFTConfig"]
