"""Checkpoints on disk whose LoRA and audio change every reply, conversations, and our own answers to them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tiny_models import RATE, audio_part, clip, tiny_emotion_tower, tiny_speech_tower, tiny_tokenizer, user_turn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor

NEW_TOKENS = 24
SYSTEM = {"role": "system", "content": "You are an empathetic listener."}


@dataclass
class Answer:
    """Our own greedy answer to a conversation: tokens, their log-probabilities, and the bare LLM's tokens."""

    prompt: list[int]  # with one placeholder a clip
    clips: list[np.ndarray]
    tokens: list[int]
    logprobs: list[float]
    bare: list[int]


def conversations(long_s: float = 5.0) -> list[list[dict]]:
    """Ragged clips, several in a turn and over turns, text alone, a clip of several windows, the same clip again."""
    long = clip(long_s, seed=9)
    return [
        [SYSTEM, user_turn("Continue: ", clip(0.9))],
        [user_turn(clip(0.31, seed=1))],
        [SYSTEM, user_turn(clip(0.7, seed=2), " and then ", clip(1.4, seed=3), " what do I feel?")],
        [SYSTEM, user_turn("What happened? tell me more about it!")],
        [user_turn("long ", long)],
        [
            *[SYSTEM, user_turn(clip(0.5, seed=4)), {"role": "assistant", "content": "That sounds hard."}],
            user_turn("yes ", clip(0.6, seed=5), clip(0.8, seed=6), clip(0.27, seed=7)),
        ],
        [SYSTEM, user_turn("Continue: ", clip(0.9))],
        [SYSTEM, user_turn(audio_part(clip(1.1, seed=8)), audio_part(clip(1.1, seed=8)))],
    ]


def save_llm(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A causal LM with heads of 32, which vLLM's attention on a CPU wants, and its tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "vocab_size": 320}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    if family == "phi3":
        sizes.pop("head_dim")
    options = {"tie_word_embeddings": family != "qwen2", "initializer_range": 0.15, **sizes, **ends}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:  # biases
                parameter.normal_(0, 0.1)
    llm.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    speech: str = "whisper",
    light: bool = False,
    full_window: bool = False,
    dtype: torch.dtype = torch.float32,
    lora: dict | None = None,
    lora_std: float = 0.1,
    **options: object,
) -> Path:
    """Towers saved in a precision, a model built of them from disk, and its checkpoint."""
    llm = save_llm(folder / "llm", family, dtype)
    tiny_speech_tower(speech).to(dtype).save_pretrained(folder / "speech")
    emotion = None if options.get("emotion_fusion") == "none" else folder / "emotion"
    if emotion is not None:
        tiny_emotion_tower().to(dtype).save_pretrained(emotion)
    lora = lora or {"r": 4, "lora_alpha": 8}
    model = ReLLMForConditionalGeneration.from_towers(
        folder / "speech", llm, emotion, lora=lora, projector_inner_dim=16, **options
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, lora_std)
            if name.startswith("model.multi_modal_projector.conv"):
                parameter.normal_(0, 0.25)
        model.model.emotion_head.weight.normal_(0, 0.3)
        model.model.dimension_head.weight.normal_(0, 0.05)
    processor = ReLLMProcessor.from_config(model.config, llm, full_window=full_window)
    place = folder / "re-llm"
    model.save_pretrained(place, light=light)
    processor.save_pretrained(place)
    return place


@cache
def load(place: Path, dtype: str = "auto") -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    return AutoModel.from_pretrained(place, dtype=dtype).eval(), AutoProcessor.from_pretrained(place)


@torch.no_grad()
def answer(place: Path, messages: list[dict]) -> Answer:
    """What the checkpoint's model generates to a conversation alone, with and without its LoRA."""
    model, processor = load(place)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    clips = [
        part["audio"]
        for turn in messages
        if not isinstance(turn["content"], str)
        for part in turn["content"]
        if part["type"] == "audio"
    ]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    found = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    tokens = found.sequences[0, length:].tolist()
    logprobs = [float(s[0].float().log_softmax(-1)[t]) for s, t in zip(found.scores, tokens, strict=True)]
    weights = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    kept = {name: p.detach().clone() for name, p in weights.items()}
    for parameter in weights.values():
        parameter.zero_()
    bare = model.generate(**inputs, **options)[0, length:].tolist()
    for name, parameter in weights.items():
        parameter.copy_(kept[name])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(prompt, clips, tokens, logprobs, bare)


@torch.no_grad()
def hear_alone(place: Path, waveform: np.ndarray) -> tuple[list[float], list[float]]:
    """Probabilities and dimensions of a clip."""
    model, processor = load(place)
    features = processor.feature_extractor([waveform], RATE)
    features.pop("num_audio_tokens")
    heard = model.get_audio_features(**features, return_dict=True)
    return heard.emotion_logits.float().softmax(-1)[0].tolist(), heard.dimensions[0].tolist()


@torch.no_grad()
def score(place: Path, messages: list[dict], tokens: list[int], dtype: str = "auto") -> list[float]:
    """The log-probability of each token of an answer, in one pass over all of them."""
    model, processor = load(place, dtype)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    inputs.pop("attention_mask")
    logprobs = model(**inputs).logits[0, length - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
