"""The emotion tower: arousal, dominance and valence of a waveform, and the utterance embedding that RE-LLM fuses.

audEERING's `wav2vec2-large-robust-12-ft-emotion-msp-dim` loads as it is: `wav2vec2.…`, `classifier.…`.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .audio_tower_relllm import build_tower, encode_audio, masked_mean
from .configuration_relllm import DIMENSIONS, ReLLMEmotionConfig, config_fields
from .devices_relllm import SpreadModel


@dataclass
class EmotionTowerOutput(ModelOutput):
    """
    Args:
        embedding (`torch.Tensor` of shape `(clips, d_e)`): Mean over the clip's own frames.
        dimensions (`torch.Tensor` of shape `(clips, 3)`): Arousal, dominance, valence, about 0 to 1; NaN for one that
            is not among the configuration's `trained_dimensions`. `None` of a tower that was taught by categories.
        last_hidden_state (`torch.Tensor` of shape `(clips, T, d_e)`): Frames; past a clip's own count, padding.
        hidden_states (`tuple` of `torch.Tensor` of shape `(clips, T, d_e)`, *optional*): Before and after each layer.
        attentions (`tuple` of `torch.Tensor` of shape `(clips, heads, T, T)`, *optional*): Of each layer.
        emotion_logits (`torch.Tensor` of shape `(clips, classes)`, *optional*): Of the categories that it was taught
            by, the configuration's `emotion_labels`.
    """

    embedding: Tensor | None = None
    dimensions: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    emotion_logits: Tensor | None = None


def only_trained(dimensions: Tensor, trained: Collection[str]) -> Tensor:
    """Return dimensions `(clips, 3)` with NaN for those that no training has taught."""
    pairs = zip(DIMENSIONS, dimensions.unbind(-1), strict=True)
    columns = [column if name in trained else torch.full_like(column, torch.nan) for name, column in pairs]
    return torch.stack(columns, dim=-1)


class EmotionHead(nn.Module):
    """Dense, tanh, projection to the three dimensions, or to categories; dropout before both linear layers."""

    def __init__(self, config: ReLLMEmotionConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.final_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, embedding: Tensor) -> Tensor:
        hidden = torch.tanh(self.dense(self.dropout(embedding)))
        return self.out_proj(self.dropout(hidden))


class ReLLMEmotionModel(SpreadModel):
    """A waveform encoder, the mean over its valid frames, and a head for arousal, dominance and valence, or for
    categories where it was taught by these.
    """

    config: ReLLMEmotionConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ReLLMEmotionConfig):
        super().__init__(config)
        encoder = build_tower(config.encoder_config)
        self.encoder_name = encoder.base_model_prefix  # "wav2vec2", "hubert", "wavlm": the names in their checkpoints
        self.add_module(self.encoder_name, encoder)
        self.classifier = EmotionHead(config)
        self.post_init()

    @property
    def encoder(self) -> PreTrainedModel:
        """Return the waveform encoder."""
        return getattr(self, self.encoder_name)

    def forward(
        self,
        input_values: Tensor,
        input_values_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EmotionTowerOutput | tuple:
        """
        Args:
            input_values (`torch.Tensor` of shape `(clips, samples)`): 16 kHz, zero mean and unit variance each.
            input_values_mask (`torch.Tensor` of shape `(clips, samples)`, *optional*): 1 on the clip; by default all.
        """
        encoded, lengths = encode_audio(self.encoder, input_values, input_values_mask, **kwargs)
        hidden = encoded.last_hidden_state
        embedding = masked_mean(hidden, lengths)
        read, dimensions, emotion_logits = self.classifier(embedding), None, None
        if self.config.emotion_labels:
            emotion_logits = read
        else:
            dimensions = only_trained(read, self.config.trained_dimensions or DIMENSIONS)
        states = (hidden, encoded.hidden_states, encoded.attentions)
        output = EmotionTowerOutput(embedding, dimensions, *states, emotion_logits)
        return output if return_dict is not False else output.to_tuple()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: of custom code, Transformers draws wav2vec2's parts at random, and they come out NaN."""
        return False

    def save_pretrained(self, save_directory: str | os.PathLike, *args: object, **kwargs: Any) -> None:
        """Save as in Transformers; with the code files if [`relllm.register_for_auto_class`] has been called."""
        fields = {} if self._auto_class is None else {"auto_map": dict(getattr(self.config, "auto_map", None) or {})}
        with config_fields(self.config, fields):  # a later save without the code files must not point at them
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: object,
        config: ReLLMEmotionConfig | None = None,
        **kwargs: Any,
    ) -> "ReLLMEmotionModel | tuple[ReLLMEmotionModel, dict]":
        """Load a tower saved by this class, or any checkpoint of the audEERING layout, from safetensors only.

        A missing weight is a `ValueError`: an emotion tower with random parts gives numbers that look right.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False would unpickle the checkpoint. Convert it to safetensors first.")
        if config is None:
            names = ("cache_dir", "revision", "token", "local_files_only", "subfolder")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            recorded, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            ours = recorded.get("model_type") == cls.config_class.model_type  # AutoConfig may not know it
            config = (cls.config_class if ours else AutoConfig).from_pretrained(pretrained_model_name_or_path, **hub)
        if config.model_type != cls.config_class.model_type:
            config = cls.config_class.from_encoder_config(config)
        kwargs |= {"config": config, "use_safetensors": True, "output_loading_info": True}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the emotion tower: "
                f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. It needs an encoder and a head "
                "(classifier.dense, classifier.out_proj) for arousal, dominance and valence, or for categories."
            )
        return (model, info) if wants_info else model
