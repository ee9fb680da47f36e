"""The model that the benchmarks measure, at the sizes of `reference_sizes.json`, and the original's way of running it.

Weights are random: speed does not depend on them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, BatchFeature, PreTrainedTokenizerFast

from relllm import (
    ReLLMConfig,
    ReLLMEmotionConfig,
    ReLLMEmotionModel,
    ReLLMForConditionalGeneration,
    ReLLMProcessor,
)
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

SIZES = json.loads((Path(__file__).parent / "reference_sizes.json").read_text(encoding="utf-8"))
QUICK_SIZES = {  # for tests of the benchmarks themselves
    "audio": {"d_model": 16, "encoder_layers": 1, "encoder_ffn_dim": 16, "num_mel_bins": 80},
    "emotion": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "conv_dim": 4},
    "text": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 1024},
}
QUICK_SIZES = {name: SIZES[name] | sizes for name, sizes in QUICK_SIZES.items()} | {"projector_inner_dim": 16}
RATE = 16_000
REPLY = (
    "I am so sorry to hear that. It sounds as if the day was hard on you. What happened then, and who was with you?"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on what it will read, so that sequences are as long as with a real one."""
    bpe = ByteLevelBPETokenizer()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|audio|>"]
    texts = [SYSTEM_PROMPT, SPEECH_PROMPT, REPLY, "system\nuser\nassistant\n"] * 8
    bpe.train_from_iterator(texts, vocab_size=1000, min_frequency=2, special_tokens=special, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")


def build_model(*, lora_scope: str = "audio", seed: int = 0, quick: bool = False) -> ReLLMForConditionalGeneration:
    """The reference model with random weights, in float32.

    Args:
        lora_scope (`str`, *optional*, defaults to `"audio"`): See `ReLLMConfig`.
        seed (`int`, *optional*, defaults to 0): Of the weights.
        quick (`bool`, *optional*, defaults to `False`): Tiny, for the tests of the benchmarks.
    """
    torch.manual_seed(seed)
    sizes = SIZES | QUICK_SIZES if quick else SIZES
    heads = 1 if quick else sizes["audio"]["encoder_attention_heads"]
    audio = AutoConfig.for_model(
        "whisper",
        decoder_layers=1,
        decoder_attention_heads=heads,
        **sizes["audio"] | {"encoder_attention_heads": heads},
    )
    emotion = dict(sizes["emotion"])
    width = emotion.pop("conv_dim")
    encoder = AutoConfig.for_model(
        "wav2vec2", conv_dim=(width,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True, **emotion
    )
    tokens = tokenizer()
    text = AutoConfig.for_model(
        "llama",
        num_key_value_heads=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        **sizes["text"],
    )
    config = ReLLMConfig(
        audio_config=audio,
        emotion_config=ReLLMEmotionConfig(encoder_config=encoder),
        text_config=text,
        audio_token_id=tokens.convert_tokens_to_ids("<|audio|>"),
        projector_inner_dim=sizes["projector_inner_dim"],
        lora_config=SIZES["lora"],
        lora_scope=lora_scope,
    )
    return ReLLMForConditionalGeneration(config).eval()


def build_processor(model: ReLLMForConditionalGeneration, *, full_window: bool) -> ReLLMProcessor:
    return ReLLMProcessor.from_config(model.config, tokenizer(), full_window=full_window)


def clips(number: int, seconds: float, seed: int = 0) -> list[np.ndarray]:
    """Noise: towers take as long for it as for speech."""
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 0.1, round(seconds * RATE)).astype(np.float32) for _ in range(number)]


def conversations(processor: ReLLMProcessor, waveforms: list[np.ndarray], *, reply: bool) -> BatchFeature:
    """A batch as training has it (with the reply) or generation (without)."""
    turns = []
    for waveform in waveforms:
        turn = processor.build_conversation(waveform)
        turns.append([*turn, {"role": "assistant", "content": REPLY}] if reply else turn)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": not reply}
    return processor.apply_chat_template(turns, **options)


def text_only(inputs: BatchFeature) -> dict[str, Tensor]:
    """The inputs without the audio, for a pass that is given what the towers made of it."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def audio_only(inputs: BatchFeature) -> dict[str, Tensor]:
    """The inputs of `get_audio_features`."""
    return {name: value for name, value in inputs.items() if name.startswith(("input_f", "input_v", "audio_"))}


def original_emotion(tower: ReLLMEmotionModel, values: Tensor) -> tuple[Tensor, Tensor]:
    """Embedding and dimensions by Transformers' own modules with the tower's weights, as the original code runs them.

    Args:
        tower ([`ReLLMEmotionModel`]): Of whose code nothing runs but the head's.
        values (`torch.Tensor` of shape `(clips, samples)`): Of one length.
    """
    embedding = tower.encoder(values).last_hidden_state.mean(1)
    return embedding, tower.classifier(embedding)


@torch.no_grad()
def original_towers(
    model: ReLLMForConditionalGeneration, inputs: BatchFeature, waveforms: list[np.ndarray]
) -> TowerOutputs:
    """What the original code does before the projector: Whisper over 30 s, the emotion tower twice, clip by clip."""
    core = model.model
    device, dtype = inputs["input_features"].device, core.audio_tower.dtype
    frames = core.audio_tower(inputs["input_features"].to(dtype)).last_hidden_state
    embeddings, dimensions = [], []
    for waveform in waveforms:
        values = torch.from_numpy(waveform)[None].to(device, dtype)
        embeddings.append(original_emotion(core.emotion_tower, values)[0])
        dimensions.append(original_emotion(core.emotion_tower, values)[1])
    lengths = (inputs["input_features_mask"].sum(-1) - 1) // 2 + 1
    return TowerOutputs(frames[:, : int(lengths.max())], lengths, torch.cat(embeddings), torch.cat(dimensions))


__all__ = [
    "RATE",
    "REPLY",
    "SIZES",
    "audio_only",
    "build_model",
    "build_processor",
    "clips",
    "conversations",
    "original_emotion",
    "original_towers",
    "text_only",
]
