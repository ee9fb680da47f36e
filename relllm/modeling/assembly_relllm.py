"""Helpers of [`ReLLMForConditionalGeneration.from_towers`]: pretrained towers, their tokenizer, one state dict."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .emotion_tower_relllm import ReLLMEmotionModel
from .lora_scope_relllm import is_lora_parameter

AUDIO_TOKEN = "<|audio|>"


def load_towers(
    audio: str | os.PathLike | PreTrainedModel,
    text: str | os.PathLike | PreTrainedModel,
    emotion: str | os.PathLike | PreTrainedModel | None,
    dtype: torch.dtype | None,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel | None]:
    """Models as they are, ids and paths loaded from safetensors; of Whisper its encoder."""
    options: dict[str, Any] = {"use_safetensors": True, **({"dtype": dtype} if dtype else {})}
    if not isinstance(audio, PreTrainedModel):
        audio = AutoModel.from_pretrained(audio, **options)
    if not isinstance(text, PreTrainedModel):
        text = AutoModelForCausalLM.from_pretrained(text, **options)
    if emotion is not None and not isinstance(emotion, PreTrainedModel):
        emotion = ReLLMEmotionModel.from_pretrained(emotion, **options)
    return audio.get_encoder() if audio.config.is_encoder_decoder else audio, text, emotion


def load_parts(
    cls: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """A model with these tower weights and fresh ones elsewhere. Transformers would warn of the fresh ones."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    towers = ("model.audio_tower.", "model.emotion_tower.", "model.text_model.")
    missing = [name for name in info["missing_keys"] if name.startswith(towers) and not is_lora_parameter(name)]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"The towers do not fit their configurations: {info | {'missing_keys': missing}}.")
    return model


def find_audio_token(tokenizer: str | os.PathLike | PreTrainedTokenizerBase | PreTrainedModel) -> int:
    if isinstance(tokenizer, PreTrainedModel):
        raise ValueError("`text` is a loaded model, so its tokenizer is not known. Pass tokenizer=… as well.")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer.get_vocab().get(AUDIO_TOKEN, len(tokenizer))


__all__ = ["find_audio_token", "load_parts", "load_towers"]
