"""The model and the processor that a run trains: from a checkpoint, or new from towers."""

import copy
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import cached_file

from relllm.modeling.checkpoint_relllm import find_audio_token, load_parts, load_tower, tower_source, whole_weights
from relllm.modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.feature_extraction_relllm import extractor_settings
from relllm.processing.processing_relllm import ReLLMProcessor

from .config import ReLLMScriptArguments
from .freezing import prepare_trainable


@whole_weights()
def build_model(script: ReLLMScriptArguments) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """Return model and processor; a checkpoint of another architecture than the settings say is a `ValueError`."""
    options: dict = {"dtype": getattr(torch, script.dtype)} if script.dtype else {}
    if script.model_name_or_path is not None:
        name, revision = script.model_name_or_path, script.revision
        config = AutoConfig.from_pretrained(name, revision=revision)
        _check_architecture(script, config)
        if config.lora_config is None and script.lora is not None:
            options |= {"lora_config": script.lora, "lora_scope": script.lora_scope or config.lora_scope}
        model = ReLLMForConditionalGeneration.from_pretrained(name, revision=revision, **options)
        processor = ReLLMProcessor.from_pretrained(name, revision=revision)
        if gets_emotion_tower(script, config):
            model = add_emotion_tower(model, str(script.emotion_tower), script.emotion_fusion or "concat")
    else:
        model = ReLLMForConditionalGeneration.from_towers(
            audio=script.audio_tower,
            text=script.text_model,
            emotion=None if script.emotion_fusion == "none" else script.emotion_tower,
            lora=script.lora,
            **_architecture(script),
            **options,
        )
        normal = _reads_normalized(script.audio_tower)
        processor = ReLLMProcessor.from_config(model.config, script.text_model, speech_do_normalize=normal)
    extractor = processor.feature_extractor  # of a checkpoint's processor: its model may have grown
    for name, value in extractor_settings(model.config, extractor.speech_do_normalize).items():
        setattr(extractor, name, value)
    for name in ("full_window", "max_duration_s"):
        if getattr(script, name) is not None:
            setattr(extractor, name, getattr(script, name))
    if script.load_in_4bit:
        model = quantize_llm(model, four_bit_config())
    if script.attn_implementation is not None:
        model.set_attn_implementation(script.attn_implementation)
    return model, processor


def build_config(script: ReLLMScriptArguments) -> ReLLMConfig:
    """Return the configuration of the model that [`build_model`] gives, from configurations alone."""
    if script.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(script.model_name_or_path, revision=script.revision)
        _check_architecture(script, config)
        if config.lora_config is None and script.lora is not None:
            config.lora_config, config.lora_scope = script.lora, script.lora_scope or config.lora_scope
        if gets_emotion_tower(script, config):
            config.emotion_config = _emotion_config(script.emotion_tower)
            config.emotion_fusion = script.emotion_fusion or "concat"
        return config
    emotion = _emotion_config(script.emotion_tower) if script.emotion_fusion != "none" else None
    return ReLLMConfig(
        audio_config=AutoConfig.from_pretrained(script.audio_tower),
        text_config=AutoConfig.from_pretrained(script.text_model),
        emotion_config=emotion,
        audio_token_id=find_audio_token(AutoTokenizer.from_pretrained(script.text_model)),
        lora_config=script.lora,
        **_architecture(script),
    )


def check_model(script: ReLLMScriptArguments, unfreeze: Sequence[str] = ()) -> tuple[float, float]:
    """Raise what [`build_model`] and `unfreeze` would raise, without weights.

    Return the seconds of the shortest and of the longest clip that the model takes.
    """
    with torch.device("meta"):
        model = ReLLMForConditionalGeneration(build_config(script))
    prepare_trainable(model, unfreeze)
    if script.attn_implementation is not None:
        model.set_attn_implementation(script.attn_implementation)
    if script.load_in_4bit:
        four_bit_config()
    longest_s = script.max_duration_s
    if longest_s is None:  # a checkpoint's own
        extractor = AutoFeatureExtractor.from_pretrained(script.model_name_or_path, revision=script.revision)
        longest_s = extractor.max_duration_s
    return extractor_settings(model.config)["min_duration_s"], longest_s


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Return QLoRA's settings (NF4, double quantisation); `ImportError` without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs bitsandbytes. Install it with `pip install bitsandbytes`.")
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, **kind)


def quantize_llm(model: ReLLMForConditionalGeneration, config: BitsAndBytesConfig) -> ReLLMForConditionalGeneration:
    """Return the model, not to be used afterwards, with its LLM quantised on bitsandbytes' device."""
    whole = {"config": model.config, "state_dict": model.state_dict(), "dtype": model.dtype}
    quantized = type(model).from_pretrained(None, **whole, quantization_config=config)
    quantized.generation_config = copy.deepcopy(model.generation_config)
    return quantized


def starting_points(script: ReLLMScriptArguments) -> dict[str, str]:
    """Return the checkpoints that a run starts from, by their settings."""
    names = ["audio_tower", "text_model", *(["emotion_tower"] if script.emotion_fusion != "none" else [])]
    if script.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(script.model_name_or_path, revision=script.revision)
        names = ["model_name_or_path", *(["emotion_tower"] if gets_emotion_tower(script, config) else [])]
    return {name: getattr(script, name) for name in names}


def gets_emotion_tower(script: ReLLMScriptArguments, config: PreTrainedConfig) -> bool:
    """Tell whether a run sets an emotion tower beside the speech of a checkpoint (`config`) that has none."""
    wanted = script.emotion_fusion in ("concat", "token") and script.emotion_tower is not None
    return wanted and getattr(config, "emotion_fusion", None) == "none"


def add_emotion_tower(
    model: ReLLMForConditionalGeneration, tower: str | os.PathLike, fusion: str = "concat"
) -> ReLLMForConditionalGeneration:
    """Return the model, not to be used afterwards, with an emotion tower beside its speech.

    With `"concat"` it hears as before until it is trained: what the projector's convolutions read of the embedding
    starts at zero. With `"token"` a position of the embedding stands before the speech.
    """
    emotion = load_tower("emotion_tower", tower, dtype=model.dtype)
    config = copy.deepcopy(model.config)
    config.update({"emotion_config": emotion.config, "emotion_fusion": fusion})
    if config.towers is not None and (source := tower_source(tower)) is not None:
        config.towers = {**config.towers, "emotion_tower": source}
    convolutions = "model.multi_modal_projector.conv_layers."
    anew = convolutions if fusion == "concat" else ()
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith(anew)}
    state |= {f"model.emotion_tower.{name}": weight for name, weight in emotion.state_dict().items()}
    grown = load_parts(type(model), config, state, model.dtype)
    if fusion == "concat":
        layers = (one.base_model.multi_modal_projector.conv_layers for one in (model, grown))
        for narrow, wide in zip(*layers, strict=True):
            _widen(narrow, wide)
    grown.generation_config = copy.deepcopy(model.generation_config)
    return grown


@torch.no_grad()
def _widen(narrow: nn.Conv1d, wide: nn.Conv1d) -> None:
    """Compute what the narrow convolution does in the first channels of the wide one, whatever the further inputs are.

    Behind it is a gated linear unit: the first half of the outputs is gated by the second.
    """
    channels, half = narrow.in_channels, narrow.out_channels // 2
    for start, end in ((0, wide.out_channels // 2), (half, wide.out_channels)):
        to = slice(end - wide.out_channels // 2, end - wide.out_channels // 2 + half)
        wide.weight[to, :channels] = narrow.weight[start : start + half]
        wide.weight[to, channels:] = 0
        assert wide.bias is not None and narrow.bias is not None
        wide.bias[to] = narrow.bias[start : start + half]


def _emotion_config(tower: str | None) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(tower)
    is_tower = config.model_type == ReLLMEmotionConfig.model_type
    return config if is_tower else ReLLMEmotionConfig.from_encoder_config(config)


def _architecture(script: ReLLMScriptArguments) -> dict:
    """Return the fields of [`ReLLMConfig`] that a run sets."""
    names = ("emotion_fusion", "projector_inner_dim", "lora_scope", "emotion_labels")
    return {name: getattr(script, name) for name in names if getattr(script, name) is not None}


def _check_architecture(script: ReLLMScriptArguments, config: PreTrainedConfig) -> None:
    """Refuse a setting that a checkpoint cannot follow, rather than pass it over."""
    if config.model_type != ReLLMConfig.model_type:
        raise ValueError(
            f"{script.model_name_or_path} is a {config.model_type}, not a ReLLM. Give towers as audio_tower, "
            "emotion_tower and text_model."
        )
    asked = _architecture(script)
    if gets_emotion_tower(script, config):
        asked.pop("emotion_fusion")
    found = {name: getattr(config, name) for name in asked}
    if config.lora_config is None:
        asked.pop("lora_scope", None)
    else:
        lora = {"lora_alpha": 8, "lora_dropout": 0.0, "r": 8, "target_modules": None} | config.lora_config  # PEFT's
        names = {"lora_r": "r", "lora_target_modules": "target_modules"}
        for name in ("lora_r", "lora_alpha", "lora_dropout", *(["lora_target_modules"] if script.lora else [])):
            if (value := getattr(script, name)) is not None:
                found[name] = lora[names.get(name, name)]
                asked[name] = (script.lora or {}).get(names.get(name, name), value)
    differ = {name: found.get(name) for name, value in asked.items() if found.get(name) != value}
    if differ:
        settings = ", ".join(f"{name}: {value}" for name, value in differ.items())
        raise ValueError(
            f"The checkpoint {script.model_name_or_path} has {settings}; the run asks for "
            f"{', '.join(f'{name}: {asked[name]}' for name in differ)}. Set the checkpoint's values, or start from "
            "another."
        )


def _reads_normalized(audio_tower: str | None) -> bool:
    """Return whether a speech tower that reads waveforms was trained on normalised ones, as its own settings say."""
    path = cached_file(audio_tower, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    return path is None or bool(json.loads(Path(path).read_text(encoding="utf-8")).get("do_normalize", True))
