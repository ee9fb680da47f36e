"""Checkpoints of the original RE-LLM code and of BLSP-Emo, converted to ours.

    model = convert_original_checkpoint("original/", emotion_config="wav2vec2/config.json", audio_token_id=151646)
    model.save_pretrained("re-llm/")

The original's LLM is Qwen (the first): Qwen2 with three projections fused into one and two names swapped. Its LoRA is
split along, which computes the same (trained further, A's three copies part, where one A took the sum of gradients).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Wav2Vec2Config, WhisperConfig
from transformers.utils import logging

from .labels import EMOTIONS
from .modeling.checkpoint_relllm import find_ends
from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
from .modeling.lora_relllm import ADAPTER_NAME
from .modeling.modeling_relllm import ReLLMForConditionalGeneration

logger = logging.get_logger(__name__)

# The projector of BLSP-Emo, which reads speech alone, and of RE-LLM, which carries the other one along.
ADAPTERS = ("adapter.", "w2v2cat_adapter.")
PROJECTOR_HEADS = 8  # a constant of the original code
RENAMES = {
    r"^whisper_model\.": "model.audio_tower.",
    r"^w2v2\.": "model.emotion_tower.",
    r"^hidden2emotion\.": "model.emotion_head.",
    r"^hidden2w2v2\.": "model.dimension_head.",
    r"\.multi_modal_projector\.subsampler\.": ".multi_modal_projector.",
    r"\.multi_modal_projector\.hidden_layers\.": ".multi_modal_projector.layers.",
    r"\.multi_modal_projector\.speech_ln\.": ".multi_modal_projector.layer_norm.",
    # The positional convolution of wav2vec2, as PyTorch 2.0 and as it names a weight norm since.
    r"\.conv\.weight_g$": ".conv.parametrizations.weight.original0",
    r"\.conv\.weight_v$": ".conv.parametrizations.weight.original1",
    r"^qwen_model\.(model\.)?": "model.text_model.",
    r"\.transformer\.wte\.": ".model.embed_tokens.",
    r"\.transformer\.ln_f\.": ".model.norm.",
    r"\.transformer\.h\.": ".model.layers.",
    r"(\.lora_[AB])\.default\.": rf"\1.{ADAPTER_NAME}.",
}
QWEN_LAYER = {
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),  # the one behind the SiLU
    "mlp.c_proj": ("mlp.down_proj",),
}
# What ends a turn in the tokenizer of every Qwen of the first generation; `<|endoftext|>` alone ends none.
QWEN_IM_END = 151_645
# Rows of the dimension head: trained on arousal, valence, dominance; ours are arousal, dominance, valence.
DIMENSION_ROWS = [0, 2, 1]


def convert_original_checkpoint(
    checkpoint: str | os.PathLike | Mapping[str, Tensor],
    config: Mapping | str | os.PathLike | None = None,
    *,
    audio_token_id: int,
    emotion_config: Mapping | str | os.PathLike | None = None,
    emotion_labels: Sequence[str] = EMOTIONS,
    projector_masking: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ReLLMForConditionalGeneration:
    """Load a checkpoint of the original code as a model of ours.

    Args:
        checkpoint: A directory with `*.safetensors`, such a file, or the state dict, which the model takes over.
        config (*optional*): The original's `config.json`, as a path or read; by default the one in the directory.
        audio_token_id (`int`): The token that will hold the audio's place. The original has none: take one that no
            text uses, such as `<|extra_0|>` of Qwen's tokenizer (151646).
        emotion_config (*optional*): `config.json` of the wav2vec2 of RE-LLM's emotion tower; without it the checkpoint
            is read as BLSP-Emo's.
        emotion_labels (`Sequence[str]`, *optional*): Class names, in the order of the emotion head's outputs.
        projector_masking (`bool`, *optional*, defaults to `True`): See [`ReLLMConfig`]; `False` is the original.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Whose end of a turn ends the replies; by default Qwen's.

    Raises:
        ValueError: If weights are pickled, missing, unknown or of another shape than configured, or Qwen2 cannot
            compute what the configuration says. Weights that the original never uses are logged instead.
    """
    if not isinstance(checkpoint, Mapping):
        path = Path(checkpoint)
        config = config if config is not None else (path if path.is_dir() else path.parent) / "config.json"
        checkpoint = _load_weights(path)
    if config is None:
        raise ValueError("A state dict has no config.json beside it. Pass it as `config`.")
    relllm_config = convert_config(
        config,
        audio_token_id=audio_token_id,
        emotion_config=emotion_config,
        emotion_labels=emotion_labels,
        projector_masking=projector_masking,
    )
    weights, unused = convert_weights(checkpoint, relllm_config)
    if unused:
        logger.warning("Not used by the original's forward pass, left out: %s.", ", ".join(unused))
    model = ReLLMForConditionalGeneration.from_pretrained(None, config=relllm_config, state_dict=weights)
    settings = model.generation_config
    if tokenizer is not None:
        settings.eos_token_id = find_ends(settings, tokenizer)
    elif relllm_config.get_text_config().vocab_size > QWEN_IM_END:
        settings.eos_token_id = sorted({settings.eos_token_id, QWEN_IM_END} - {None})
    return model


def convert_config(
    original: Mapping | str | os.PathLike,
    *,
    audio_token_id: int,
    emotion_config: Mapping | str | os.PathLike | None = None,
    emotion_labels: Sequence[str] = EMOTIONS,
    projector_masking: bool = True,
) -> ReLLMConfig:
    """Return our configuration of what the original's computes; see [`convert_original_checkpoint`]."""
    original = _read_json(original)
    if (adapter := original.get("adapter_type", "subsampler")) != "subsampler":
        raise ValueError(f"adapter_type is {adapter!r}; only checkpoints with a 'subsampler' can be converted.")
    num_emotions = original.get("num_emotions", len(EMOTIONS))
    if len(emotion_labels) != num_emotions:
        raise ValueError(f"The emotion head has {num_emotions} classes, emotion_labels names {list(emotion_labels)}.")
    whisper = WhisperConfig(**_without_kind(original["whisper_config"]))
    emotion = None
    if emotion_config is not None:
        wav2vec2 = Wav2Vec2Config(**_without_kind(_read_json(emotion_config)))
        emotion = ReLLMEmotionConfig.from_encoder_config(wav2vec2)
    return ReLLMConfig(
        audio_config=whisper,
        emotion_config=emotion,
        text_config=_convert_qwen_config(original["qwen_config"]),
        audio_token_id=audio_token_id,
        emotion_fusion="none" if emotion is None else "concat",
        projector_kernel_sizes=[int(size) for size in original.get("conv_kernel_sizes", "5,5,5").split(",")],
        projector_inner_dim=original.get("adapter_inner_dim", 512),
        projector_layers=original.get("adapter_hidden_layers", 0),
        projector_heads=PROJECTOR_HEADS,
        projector_ffn_dim=whisper.encoder_ffn_dim,
        projector_masking=projector_masking,
        emotion_labels=list(emotion_labels),
        lora_config=_convert_lora_config(original.get("lora_config") or {}),
        lora_scope=original.get("lora_scope", "audio"),
    )


def convert_weights(original: Mapping[str, Tensor], config: ReLLMConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Return the original's state dict under our names, and the names of what its forward pass never reads."""
    has_tower = config.emotion_config is not None
    renames = {f"^{re.escape(ADAPTERS[has_tower])}": "model.multi_modal_projector.", **RENAMES}
    never_read = ("w2v2_adapter.", "w2v2_hidden2emotion.", ADAPTERS[not has_tower])
    unused = sorted(name for name in original if name.startswith(never_read))
    converted: dict[str, Tensor] = {}
    for name, weight in original.items():
        if name not in unused:
            converted |= _convert_weight(name, weight, renames)
    emotion_head = converted.get("model.emotion_head.weight")
    if "model.dimension_head.weight" not in converted and not has_tower and emotion_head is not None:
        logger.warning("BLSP-Emo has no dimension head: ours starts at zero, and predicts 0 until it is trained.")
        size = (len(DIMENSION_ROWS), emotion_head.shape[1])
        converted["model.dimension_head.weight"] = emotion_head.new_zeros(size)
    with torch.device("meta"):
        expected = ReLLMForConditionalGeneration(config).state_dict()
    names = {name.replace(".base_layer.", "."): name for name in expected}  # where the LoRA wraps a layer
    if unknown := sorted(converted.keys() - names.keys()):
        hint = "" if has_tower else " Those of `model.emotion_tower` (`w2v2…`) want an emotion_config."
        raise ValueError(f"{_count_weights(unknown)} (by their new names) have no place in the model.{hint}")
    if missing := sorted(names.keys() - converted.keys()):
        raise ValueError(f"{_count_weights(missing)} are missing in the checkpoint (by their new names).")
    for name, weight in converted.items():
        shape = expected[names[name]].shape
        if weight.shape != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, the configuration makes it {tuple(shape)}.")
    return {names[name]: weight.contiguous() for name, weight in converted.items()}, unused


def _convert_weight(name: str, weight: Tensor, renames: Mapping[str, str]) -> dict[str, Tensor]:
    """Turn one weight of the original into one or three of ours; what is not known keeps its name."""
    for theirs, ours in renames.items():
        name = re.sub(theirs, ours, name)
    if name == "model.dimension_head.weight":
        weight = weight[DIMENSION_ROWS]
    for stem, targets in QWEN_LAYER.items():
        if f".{stem}." in name:
            # LoRA's A reads the same input for all three; B, like weight and bias, has their rows one after another.
            parts = [weight] * len(targets) if ".lora_A." in name else weight.chunk(len(targets))
            named = zip(targets, parts, strict=True)
            return {name.replace(f".{stem}.", f".{target}."): part.clone() for target, part in named}
    return {name: weight}


def _convert_qwen_config(qwen: Mapping) -> Qwen2Config:
    """Make it Qwen2 without grouped heads, up to `seq_length` positions: so far Qwen's NTK and logn do nothing."""
    for name, value in {"no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False}.items():
        if qwen.get(name, value) != value:
            raise ValueError(f"qwen_config has {name}={qwen[name]!r}, and Qwen2 computes {name}={value!r} only.")
    hidden_size, heads = qwen["hidden_size"], qwen["num_attention_heads"]
    if (size := qwen.get("kv_channels", hidden_size // heads)) * heads != hidden_size:
        raise ValueError(f"qwen_config has {heads} heads of {size}, not hidden_size {hidden_size} in all.")
    return Qwen2Config(
        vocab_size=qwen["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=qwen["intermediate_size"] // 2,  # the original counts both halves of the gated layer
        num_hidden_layers=qwen["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=qwen.get("seq_length", qwen.get("max_position_embeddings", 8192)),
        rms_norm_eps=qwen.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(qwen.get("rotary_emb_base", 10_000))},
        attention_dropout=qwen.get("attn_dropout_prob", 0.0),
        initializer_range=qwen.get("initializer_range", 0.02),
        tie_word_embeddings=False,
        bos_token_id=qwen.get("bos_token_id"),
        eos_token_id=qwen.get("eos_token_id"),
        pad_token_id=qwen.get("pad_token_id"),
    )


def _convert_lora_config(lora: Mapping) -> dict | None:
    if not lora:
        return None
    if lora.get("bias", "none") != "none":
        raise ValueError(f"lora_config trains biases ({lora['bias']!r}); a LoRA limited to some positions cannot.")
    trained = [ours for old, ours in QWEN_LAYER.items() if old.rpartition(".")[2] in lora["target_modules"]]
    targets = sorted({name.rpartition(".")[2] for names in trained for name in names})
    sizes = {"r": lora["r"], "lora_alpha": lora["lora_alpha"], "lora_dropout": lora.get("lora_dropout", 0.0)}
    return {**sizes, "target_modules": targets}


def _load_weights(path: Path) -> dict[str, Tensor]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files or not files[0].exists():
        raise FileNotFoundError(f"Expected *.safetensors in {path}, found none.")
    if pickled := [file.name for file in files if file.suffix != ".safetensors"]:
        raise ValueError(
            f"{path} holds pickled weights ({', '.join(pickled)}), and unpickling can run any code. Where you trust "
            "the file, load it with torch.load(…, weights_only=True) and save it with safetensors.torch.save_file."
        )
    return {name: weight for file in files for name, weight in load_file(file).items()}


def _read_json(config: Mapping | str | os.PathLike) -> Mapping:
    return config if isinstance(config, Mapping) else json.loads(Path(config).read_text())


def _without_kind(config: Mapping) -> dict:
    """Return a config's fields, without those that say which class and which release wrote it."""
    return {name: value for name, value in config.items() if name not in ("model_type", "transformers_version")}


def _count_weights(names: list[str]) -> str:
    noun = "weight" if len(names) == 1 else "weights"
    return f"{len(names)} {noun} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
