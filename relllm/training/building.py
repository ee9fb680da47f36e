"""The model and the processor that a run trains: from a checkpoint, or new from towers."""

import copy
import importlib.util
import json

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import cached_file

from relllm.modeling.checkpoint_relllm import find_audio_token, whole_weights
from relllm.modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from .config import ReLLMScriptArguments


@whole_weights()
def build_model(script: ReLLMScriptArguments) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """Return the model and its processor; a checkpoint of another architecture than the settings say is a
    `ValueError`.
    """
    options: dict = {"dtype": getattr(torch, script.dtype)} if script.dtype else {}
    four_bit = four_bit_config() if script.load_in_4bit else None
    if script.model_name_or_path is not None:
        name, revision = script.model_name_or_path, script.revision
        config = AutoConfig.from_pretrained(name, revision=revision)
        _check_architecture(script, config)
        if config.lora_config is None and script.lora is not None:
            options |= {"lora_config": script.lora, "lora_scope": script.lora_scope}
        model = ReLLMForConditionalGeneration.from_pretrained(name, revision=revision, **options)
        processor = ReLLMProcessor.from_pretrained(name, revision=revision)
    else:
        model = ReLLMForConditionalGeneration.from_towers(
            audio=script.audio_tower,
            text=script.text_model,
            emotion=None if script.emotion_fusion == "none" else script.emotion_tower,
            lora=script.lora,
            **_architecture(script),
            **options,
        )
        processor = ReLLMProcessor.from_config(
            model.config,
            script.text_model,
            full_window=script.full_window,
            speech_do_normalize=_reads_normalized(script.audio_tower),
            max_duration_s=script.max_duration_s,
        )
    if four_bit is not None:
        model = quantize_llm(model, four_bit)
    if script.attn_implementation is not None:
        model.set_attn_implementation(script.attn_implementation)
    return model, processor


def build_config(script: ReLLMScriptArguments) -> ReLLMConfig:
    """Return the configuration of the model that [`build_model`] gives, from configurations alone."""
    if script.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(script.model_name_or_path, revision=script.revision)
        _check_architecture(script, config)
        config.lora_config = config.lora_config or script.lora
        config.lora_scope = script.lora_scope
        return config
    emotion = None
    if script.emotion_fusion != "none":
        emotion = AutoConfig.from_pretrained(script.emotion_tower)
        if emotion.model_type != ReLLMEmotionConfig.model_type:
            emotion = ReLLMEmotionConfig.from_encoder_config(emotion)
    return ReLLMConfig(
        audio_config=AutoConfig.from_pretrained(script.audio_tower),
        text_config=AutoConfig.from_pretrained(script.text_model),
        emotion_config=emotion,
        audio_token_id=find_audio_token(AutoTokenizer.from_pretrained(script.text_model)),
        lora_config=script.lora,
        **_architecture(script),
    )


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """Return QLoRA's settings (NF4, double quantisation); `ImportError` without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs bitsandbytes. Install it with `pip install bitsandbytes`.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantize_llm(model: ReLLMForConditionalGeneration, config: BitsAndBytesConfig) -> ReLLMForConditionalGeneration:
    """Return the model, not to be used afterwards, with its LLM quantised on bitsandbytes' device."""
    whole = {"config": model.config, "state_dict": model.state_dict(), "dtype": model.dtype}
    quantized = type(model).from_pretrained(None, **whole, quantization_config=config)
    quantized.generation_config = copy.deepcopy(model.generation_config)
    return quantized


def _architecture(script: ReLLMScriptArguments) -> dict:
    """Return the fields of [`ReLLMConfig`] that a run chooses."""
    names = ["emotion_fusion", "projector_inner_dim", "lora_scope"]
    names += ["emotion_labels"] if script.emotion_labels is not None else []
    return {name: getattr(script, name) for name in names}


def _check_architecture(script: ReLLMScriptArguments, config: PreTrainedConfig) -> None:
    """Refuse a setting that a checkpoint cannot follow, rather than pass it over."""
    if config.model_type != ReLLMConfig.model_type:
        raise ValueError(
            f"{script.model_name_or_path} is a {config.model_type}, not a ReLLM. Give towers as audio_tower, "
            "emotion_tower and text_model."
        )
    asked = _architecture(script)
    found = {name: getattr(config, name) for name in asked}
    if config.lora_config is None:
        asked.pop("lora_scope")
    else:
        given = script.lora or {"r": 0}
        asked |= {f"lora_{name.removeprefix('lora_')}": value for name, value in given.items()}
        lora = {"lora_alpha": 8, "lora_dropout": 0.0, "r": 8} | config.lora_config  # PEFT's own defaults
        found |= {f"lora_{name.removeprefix('lora_')}": value for name, value in lora.items()}
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
    if path is None:
        return True
    with open(path, encoding="utf-8") as file:
        return bool(json.load(file).get("do_normalize", True))
