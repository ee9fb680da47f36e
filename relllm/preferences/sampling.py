"""Several replies to each of a batch of clips, each clip's drawn with random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from relllm.inference.replies import GREEDY, Heard, read_heard
from relllm.modeling.checkpoint_relllm import find_ends
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.processing_relllm import ReLLMProcessor


@dataclass(frozen=True)
class SampledReply:
    """A reply that was drawn."""

    text: str
    finished: bool  # by the model, rather than by the token limit


def row_seed(row_id: str, seed: int) -> int:
    """Return the seed of a row's draws, which depends on neither its place nor its company."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row_id}".encode()).digest()[:7], "big")


@torch.no_grad()
def sample_replies(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    clips: Sequence[AudioSource],
    seeds: Sequence[int],
    *,
    samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
) -> list[tuple[Heard, list[SampledReply]]]:
    """Return what is heard in each clip, and `samples` replies to it. The towers run once a clip.

    The replies to a clip are those that `generate(num_return_sequences=samples)` draws for it alone after
    `torch.manual_seed` of its seed, in whatever batch it is, but for what padding does to the last digits.
    """
    inputs = processor.apply_request(list(clips)).to(model.device)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    encoded = model.get_audio_features(**inputs, return_dict=True)
    ends = find_ends(model.generation_config, processor.tokenizer, processor.chat_template)
    draws = _ClipDraws(seeds, samples, temperature, top_p, model.device)
    options = {**GREEDY, "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}  # `draws` chooses
    output = model.generate(
        **text,
        mm_encoder_outputs={"audio": encoded},
        **options,
        num_return_sequences=samples,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=processor.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([draws]),
    )
    tokens = output[:, text["input_ids"].shape[1] :].tolist()
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    last = {ends} if isinstance(ends, int) else set(ends or ())
    replies = [SampledReply(one.strip(), not last.isdisjoint(row)) for one, row in zip(texts, tokens, strict=True)]
    heard = read_heard(model.config, encoded)
    return [(one, replies[at * samples : (at + 1) * samples]) for at, one in enumerate(heard)]


class _ClipDraws(LogitsProcessor):
    """Leaves one token to each row: the one that its clip's random numbers draw."""

    def __init__(
        self, seeds: Sequence[int], samples: int, temperature: float, top_p: float, device: torch.device
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.samples = samples
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = self.warpers(input_ids, scores).softmax(-1).split(self.samples)
        pairs = zip(probabilities, self.generators, strict=True)
        drawn = torch.cat([torch.multinomial(own, 1, generator=generator) for own, generator in pairs])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
