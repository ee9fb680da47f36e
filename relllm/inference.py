"""Using a trained model: replies to spoken turns, and emotions of many clips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from .audio import AudioSource
from .labels import DIMENSIONS
from .modeling.modeling_relllm import ReLLMAudioOutput, ReLLMForConditionalGeneration
from .processing.processing_relllm import ReLLMProcessor


@dataclass
class Hearing:
    """What the model hears in one clip.

    Args:
        probabilities (`dict[str, float]`): Of each emotion, by the auxiliary head.
        dimensions (`dict[str, float]`): Arousal, dominance, valence, about 0 to 1, by the auxiliary head.
    """

    probabilities: dict[str, float]
    dimensions: dict[str, float]

    @property
    def emotion(self) -> str:
        """The most probable one."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


@dataclass
class Reply:
    """An answer to one spoken turn: its text, and what the model heard."""

    text: str
    hearing: Hearing


@torch.no_grad()
def reply(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    audio: AudioSource,
    *,
    streamer: BaseStreamer | None = None,
    max_new_tokens: int = 128,
    **request: str,
) -> Reply:
    """Answer one spoken turn. The audio is encoded once, for the reply and for the emotion.

    Args:
        model ([`ReLLMForConditionalGeneration`]), processor ([`ReLLMProcessor`]): Of one checkpoint.
        audio: A path, URL, bytes, array or tensor.
        streamer (`BaseStreamer`, *optional*): Gets the reply token by token.
        max_new_tokens (`int`, *optional*, defaults to 128): Longest reply.
        request: `instruction` and `system_prompt`, as in [`~ReLLMProcessor.build_conversation`].

    Raises:
        ValueError: On bad audio; the message names it.
    """
    inputs = processor.apply_request(audio, **request).to(model.device)
    text_inputs = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    heard = model.get_audio_features(**inputs, return_dict=True)
    generated = model.generate(
        **text_inputs,
        mm_encoder_outputs={"audio": heard},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    prompt_length = text_inputs["input_ids"].shape[1]
    text = processor.tokenizer.decode(generated[0, prompt_length:], skip_special_tokens=True).strip()
    return Reply(text, _hearings(model, heard)[0])


@torch.no_grad()
def hear(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    clips: Sequence[AudioSource],
    *,
    batch_size: int = 16,
) -> Iterator[Hearing]:
    """Emotion and dimensions of many clips, in order. The LLM does not run.

    Args:
        model ([`ReLLMForConditionalGeneration`]), processor ([`ReLLMProcessor`]): Of one checkpoint.
        clips: Paths, URLs, bytes, arrays or tensors.
        batch_size (`int`, *optional*, defaults to 16): Clips encoded at once.
    """
    for start in range(0, len(clips), batch_size):
        inputs = processor.feature_extractor(list(clips[start : start + batch_size]))
        inputs.pop("num_audio_tokens", None)
        yield from _hearings(model, model.get_audio_features(**inputs.to(model.device), return_dict=True))


def _hearings(model: ReLLMForConditionalGeneration, heard: ReLLMAudioOutput) -> list[Hearing]:
    assert heard.emotion_logits is not None and heard.dimensions is not None  # the heads always run
    labels = model.config.emotion_labels
    probabilities = heard.emotion_logits.float().softmax(-1).tolist()
    return [
        Hearing(dict(zip(labels, row, strict=True)), dict(zip(DIMENSIONS, values, strict=True)))
        for row, values in zip(probabilities, heard.dimensions.float().tolist(), strict=True)
    ]


__all__ = ["Hearing", "Reply", "hear", "reply"]
