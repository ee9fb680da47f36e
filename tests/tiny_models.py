"""Tiny models, tokenizers and clips for the tests: random weights, every width different, built in milliseconds.

Not here: trained weights, reference tensors. Weights are drawn wide (0.2), so that audio, LoRA and text each
change the reply and a mistake in one shows.
"""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from relllm import (
    ReLLMConfig,
    ReLLMEmotionConfig,
    ReLLMEmotionModel,
    ReLLMFeatureExtractor,
    ReLLMForConditionalGeneration,
    ReLLMProcessor,
)

RATE = 16_000
LLM_FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gpt2")
MOE_FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
WAVEFORM_TOWERS = ("wav2vec2", "wav2vec2-group", "hubert", "hubert-group", "wavlm", "wavlm-group")
SPEECH_TOWERS = ("whisper", *WAVEFORM_TOWERS)
LORA = {"r": 4, "lora_alpha": 8}
SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>", "<|audio|>")
VOCAB_SIZE = 300
BOS = "<|begin_of_text|>"  # of a tokenizer that adds one
_SENTENCES = (
    "I am so sorry to hear that, what happened?",
    "That is wonderful news, tell me more about it!",
    "You sound upset. Do you want to talk about it?",
    "system user assistant You are an empathetic listener.",
)


Build = TypeVar("Build", bound=Callable)


def built_once(build: Build) -> Build:
    """Build once for the same arguments, and return a copy: PyTorch's random numbers go on as after the building."""

    @functools.wraps(build)
    def copied(*args, **kwargs):
        made, state = _built(
            build, pickle.dumps((args, kwargs)), torch.get_default_dtype(), torch.get_default_device()
        )
        if isinstance(made, nn.Module):  # a configuration draws none
            torch.set_rng_state(state)
        return copy.deepcopy(made)

    return copied


@functools.lru_cache(maxsize=32)
def _built(build: Callable, arguments: bytes, *_: object) -> tuple[object, torch.Tensor]:
    args, kwargs = pickle.loads(arguments)
    return build(*args, **kwargs), torch.get_rng_state()


@functools.cache
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS[:-1]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 8, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, audio_token: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens with ChatML's: any text survives encoding and decoding.

    With `adds_bos` it puts `BOS` before every text, as those of Llama 3, Gemma, Mistral and DeepSeek do.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    if audio_token:
        tokenizer.add_tokens(["<|audio|>"], special_tokens=True)
    return add_bos(tokenizer) if adds_bos else tokenizer


def add_bos(tokenizer: PreTrainedTokenizerFast, bos: str = BOS) -> PreTrainedTokenizerFast:
    """Have a tokenizer put a token before every text, by the post-processor that Llama 3's `tokenizer.json` has."""
    tokenizer.add_special_tokens({"bos_token": bos})
    pieces = {"single": f"{bos} $A", "pair": f"{bos} $A {bos}:1 $B:1"}
    first = processors.TemplateProcessing(**pieces, special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


def tiny_audio_config(kind: str = "whisper", *, window_s: float = 2.0, layers: int = 1) -> PreTrainedConfig:
    """A speech tower's configuration.

    Args:
        kind (`str`, *optional*, defaults to `"whisper"`): One of `SPEECH_TOWERS`; `-group` has the group norm of the
            base checkpoints, whose statistics run over time.
        window_s (`float`, *optional*, defaults to 2.0): Whisper's window in seconds.
    """
    if kind == "whisper":
        return AutoConfig.for_model(
            "whisper",
            d_model=32,
            encoder_layers=layers,
            encoder_attention_heads=2,
            encoder_ffn_dim=40,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=40,
            num_mel_bins=16,
            max_source_positions=round(50 * window_s),
            max_target_positions=16,
            vocab_size=50,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            init_std=0.2,
        )
    kind, _, norm = kind.partition("-")
    return AutoConfig.for_model(
        kind,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=36,
        conv_dim=(12, 12, 12),
        conv_kernel=(10, 3, 2),
        conv_stride=(40, 4, 2),  # 320 samples a frame, 400 for the first, as in the real ones
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm or "layer",
        do_stable_layer_norm=not norm,
        vocab_size=32,
        initializer_range=0.2,
    )


def tiny_emotion_config(kind: str = "wav2vec2", *, layers: int = 1) -> ReLLMEmotionConfig:
    """An emotion tower's configuration over one of `WAVEFORM_TOWERS`."""
    return ReLLMEmotionConfig(encoder_config=tiny_audio_config(kind, layers=layers), initializer_range=0.2)


def tiny_text_config(
    family: str = "llama", *, tied: bool = False, vocab_size: int = 320, layers: int = 1
) -> PreTrainedConfig:
    """A causal LM's configuration, of one of `LLM_FAMILIES` or `MOE_FAMILIES`."""
    common = {
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_embd=40, n_layer=layers, n_head=4, n_positions=1024, **common)
    if family in MOE_FAMILIES:
        experts = "num_local_experts" if family == "mixtral" else "num_experts"
        common |= {experts: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return AutoConfig.for_model(
        family,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=1024,
        **common,
    )


@built_once
def tiny_config(
    *,
    audio: str = "whisper",
    text: str = "llama",
    emotion: str = "wav2vec2",
    fusion: str = "concat",
    tied: bool = False,
    lora: dict | None = LORA,
    window_s: float = 2.0,
    heads: int = 2,
    layers: int = 1,
    **config_kwargs,
) -> ReLLMConfig:
    """A whole ReLLM's configuration; `<|audio|>` has the id that [`tiny_tokenizer`] gives it."""
    return ReLLMConfig(
        audio_config=tiny_audio_config(audio, window_s=window_s),
        emotion_config=None if fusion == "none" else tiny_emotion_config(emotion),
        text_config=tiny_text_config(text, tied=tied, layers=layers),
        audio_token_id=tiny_tokenizer().convert_tokens_to_ids("<|audio|>"),
        emotion_fusion=fusion,
        projector_inner_dim=16,
        projector_heads=heads,
        lora_config=dict(lora) if lora is not None else None,
        initializer_range=0.2,
        **config_kwargs,
    )


@built_once
def tiny_model(config: ReLLMConfig | None = None, **config_kwargs) -> ReLLMForConditionalGeneration:
    """A random ReLLM in eval mode whose LoRA acts (a fresh one would be zero).

    Args:
        config ([`ReLLMConfig`], *optional*): By default `tiny_config(**config_kwargs)`.
    """
    torch.manual_seed(0)
    model = ReLLMForConditionalGeneration(config or tiny_config(**config_kwargs)).eval()
    fill_lora(model)
    return model


def fill_lora(model: nn.Module, std: float = 0.2) -> None:
    """Give every `lora_B` random values, in place."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def tiny_processor(config: ReLLMConfig | None = None, *, adds_bos: bool = False, **options) -> ReLLMProcessor:
    """The processor of [`tiny_model`]; `options` are those of [`ReLLMProcessor.from_config`]."""
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    return ReLLMProcessor.from_config(config or tiny_config(), tokenizer, **{"full_window": False, **options})


def tiny_extractor(config: ReLLMConfig | None = None, **options) -> ReLLMFeatureExtractor:
    return tiny_processor(config, **options).feature_extractor


@built_once
def tiny_speech_tower(kind: str, **config_kwargs) -> PreTrainedModel:
    """A bare speech tower of Transformers, random; Whisper with its decoder."""
    torch.manual_seed(2)
    return AutoModel.from_config(tiny_audio_config(kind, **config_kwargs)).eval()


@built_once
def tiny_emotion_tower(kind: str = "wav2vec2", **config_kwargs) -> ReLLMEmotionModel:
    torch.manual_seed(3)
    return ReLLMEmotionModel(tiny_emotion_config(kind, **config_kwargs)).eval()


@built_once
def tiny_llm(family: str = "llama", **config_kwargs) -> PreTrainedModel:
    """A bare causal LM of Transformers, random."""
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(tiny_text_config(family, **config_kwargs)).eval()


def clip(duration_s: float = 0.5, *, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Noise under a moving envelope: `(samples,)`, float32, no two clips alike."""
    rng = np.random.default_rng([seed, round(1000 * duration_s)])
    time_s = np.arange(round(duration_s * rate)) / rate
    envelope = 0.1 + 0.1 * np.sin(2 * np.pi * (1 + seed) * time_s)
    return (envelope * rng.standard_normal(len(time_s))).astype(np.float32)


def audio_part(source: object, **keys: object) -> dict[str, object]:
    return {"type": "audio", "audio": source, **keys}


def text_part(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


def user_turn(*parts: object) -> dict[str, object]:
    """A user's turn: a string becomes a text part, a dict is a part already, anything else an audio part."""
    content = [
        part if isinstance(part, dict) else text_part(part) if isinstance(part, str) else audio_part(part)
        for part in parts
    ]
    return {"role": "user", "content": content}


def conversation_inputs(processor: ReLLMProcessor, conversation: list, **kwargs):
    """Model inputs with the assistant's header at the end."""
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, **kwargs}
    return processor.apply_chat_template(conversation, **options)


def audio_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a processor's outputs that `get_audio_features` takes."""
    return {name: inputs[name] for name in inputs if name.startswith(("input_f", "input_v", "audio"))}
