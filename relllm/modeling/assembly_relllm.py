"""Helpers of [`ReLLMForConditionalGeneration.from_towers`]: pretrained towers, their sources, tokenizer and names."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.utils import logging

from .emotion_tower_relllm import ReLLMEmotionModel
from .lora_scope_relllm import is_lora_parameter

AUDIO_TOKEN = "<|audio|>"
TOWERS = ("audio_tower", "emotion_tower", "text_model")


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Every model made in the `with` block comes whole into this process, in a run with DeepSpeed's ZeRO 3 as well.

    There Transformers spreads a model over the processes as it makes it. But a ReLLM is put together from whole
    weights, and the process that saves a light checkpoint reads its sources alone. DeepSpeed spreads it afterwards.
    """
    running = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = running


def load_tower(
    kind: str, source: str | os.PathLike | PreTrainedModel, *, dtype: torch.dtype | None = None, **options: Any
) -> PreTrainedModel:
    """A model as it is, an id or a path loaded from safetensors; of Whisper its encoder.

    Args:
        kind (`str`): One of `TOWERS`.
        source (`str`, `os.PathLike` or `PreTrainedModel`): The tower or where it is.
        dtype (`torch.dtype`, *optional*): Of a tower that is loaded; by default its own.
        options: As of `from_pretrained`.
    """
    if not isinstance(source, PreTrainedModel):
        loaders = {"audio_tower": AutoModel, "emotion_tower": ReLLMEmotionModel, "text_model": AutoModelForCausalLM}
        options |= {"use_safetensors": True, **({"dtype": dtype} if dtype else {})}
        source = loaders[kind].from_pretrained(source, **options)
    return source.get_encoder() if kind == "audio_tower" and source.config.is_encoder_decoder else source


def tower_source(source: str | os.PathLike | PreTrainedModel, tower: PreTrainedModel) -> dict[str, str | None] | None:
    """Where a tower came from, for `config.towers`: `None` for a model that was never loaded from anywhere."""
    name = tower.config.name_or_path if isinstance(source, PreTrainedModel) else source
    return {"name": place_of(name), "revision": find_commit(name)} if name else None


def find_commit(name: str | os.PathLike, revision: str | None = None) -> str | None:
    """The commit in this machine's Hub cache that a Hub id stands for; `None` for a directory, or if it is not there.

    Transformers no longer tells of what it loaded which commit it was.
    """
    if os.path.isdir(name):
        return None
    try:
        path = try_to_load_from_cache(str(name), "config.json", revision=revision)
    except HFValidationError:  # no Hub id: a folder that is gone
        return None
    return os.path.basename(os.path.dirname(path)) if isinstance(path, str) else None


def place_of(name: str | os.PathLike) -> str:
    """A Hub id as it is, a directory by its absolute path."""
    return os.path.abspath(name) if os.path.isdir(name) else str(name)


def name_tower_weights(names: Iterable[str], towers: Mapping[str, PreTrainedModel | None]) -> dict[str, Tensor]:
    """The towers' weights by their names in [`ReLLMModel`], where a LoRA moves a layer's weight to `base_layer`.

    Args:
        names (`Iterable` of `str`): Of all weights of the [`ReLLMModel`].
        towers (`dict` of `str` to `PreTrainedModel`): By the names of `TOWERS`.

    Raises:
        ValueError: If a tower has a weight that the model has no place for.
    """
    renamed = {name.replace(".base_layer.", "."): name for name in names}
    weights: dict[str, Tensor] = {}
    for kind, tower in towers.items():
        own = {f"{kind}.{name}": weight for name, weight in tower.state_dict().items()} if tower is not None else {}
        if extra := sorted(own.keys() - renamed.keys()):
            raise ValueError(f"{kind} has {len(extra)} weights that do not fit its configuration: {extra[:4]}.")
        weights |= {renamed[name]: weight for name, weight in own.items()}
    return weights


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


__all__ = [
    "TOWERS",
    "find_commit",
    "find_audio_token",
    "load_parts",
    "load_tower",
    "name_tower_weights",
    "place_of",
    "tower_source",
    "whole_weights",
]
