"""A conversation of many turns with one model: no clip is encoded twice, and the LLM reads only what is new.

Every turn renders the whole conversation and keeps of the key-value cache what agrees with it from the start, so a
reply is the one that a fresh pass gives. A clip behind the cut is read again from its stored positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.processing_relllm import ReLLMProcessor

from .replies import Heard, Reply, read_heard
from .typed_text import encode_conversation

# Options of `generate` that the conversation sets itself, or whose output is more than one reply.
RESERVED_OPTIONS = {
    *("input_ids", "attention_mask", "mm_encoder_outputs", "generation_config", "num_return_sequences"),
    *("past_key_values", "cache", "use_cache", "cache_implementation", "return_dict_in_generate"),
}


class Conversation:
    """A conversation with one model that remembers its earlier turns and does not compute them again.

    Several conversations may share a model if their turns do not overlap. `instruction` stands before the clip of a
    spoken turn that comes without text of its own; it and `system_prompt` are by default the processor's, and may be
    empty for none. `generation_options` are what each turn takes unless it is told otherwise.
    """

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        processor: ReLLMProcessor,
        *,
        system_prompt: str | None = None,
        instruction: str | None = None,
        **generation_options: object,
    ):
        self.generation_options = generation_options
        self.model = model
        self.processor = processor
        self.system_prompt = processor.system_prompt if system_prompt is None else system_prompt
        self.instruction = processor.instruction if instruction is None else instruction
        self.reset()

    def reset(self) -> None:
        """Begin anew: no turn, and nothing in the cache."""
        self._messages = first_messages(self.system_prompt)
        self._positions: list[Tensor] = []  # of each clip, `(positions, d)`
        self._cache: Cache | None = None
        self._cached_ids = torch.zeros(0, dtype=torch.long)

    @property
    def messages(self) -> list[dict]:
        """Return the turns so far, for [`~ReLLMProcessor.apply_chat_template`]; audio parts hold waveforms."""
        return list(self._messages)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the replies."""
        return self.processor.tokenizer

    @torch.no_grad()
    def say(
        self,
        audio: AudioSource | None = None,
        text: str | None = None,
        *,
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 128,
        drop_oldest: bool = False,
        **options: object,
    ) -> Reply:
        """Say something and get the reply. A turn that fails or is interrupted has not been said.

        A text beside a clip stands before it, in the instruction's place. `options` are those of `generate`, greedy by
        default. With beams every turn reads the whole conversation (and encodes no clip twice). What cannot be said
        is a `ValueError`, also a conversation that is longer than the LLM reads; with `drop_oldest`, its oldest turns
        are forgotten until the rest fits, and the reply counts them.
        """
        check_turn(audio, text)
        if reserved := sorted(RESERVED_OPTIONS & (options.keys() | self.generation_options.keys())):
            raise ValueError(f"A conversation sets {', '.join(reserved)} itself. Leave it out.")
        positions, heard = self._positions, None
        content: list[dict[str, object]] = [{"type": "text", "text": text}]
        if audio is not None:
            waveform, new, heard = self._encode(audio)
            positions = [*positions, new]
            before = text or self.instruction
            content = [{"type": "text", "text": before}] if before else []
            content.append({"type": "audio", "waveform": waveform})
        messages = [*self._messages, {"role": "user", "content": content}]
        room = (read_limit(self.model.config.text_config), max_new_tokens)
        render = partial(self._render, positions=positions)
        turns, ids, dropped = fit_turns(messages, render, *room, drop_oldest=drop_oldest)
        positions = _of_clips_in(turns, positions)
        if dropped:  # a cut compares ids, and all clips have the same
            self._cache = None
        told = {"max_new_tokens": max_new_tokens, "streamer": streamer, **self.generation_options, **options}
        options = {"do_sample": False, **told}
        reply_ids = self._generate(ids, positions, options)
        reply = self.tokenizer.decode(reply_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._messages = [*turns, {"role": "assistant", "content": reply}]
        self._positions = positions
        return Reply(reply.strip(), heard, dropped)

    def _encode(self, audio: AudioSource) -> tuple[np.ndarray, Tensor, Heard]:
        """Return a clip's samples, its positions and what was heard: the only place where the towers run."""
        extractor = self.processor.feature_extractor
        waveform = extractor.read_clip(audio)
        inputs = extractor.extract([waveform])
        inputs.pop("num_audio_tokens", None)
        encoded = self.model.get_audio_features(**inputs.to(self.model.device), return_dict=True)
        return waveform, encoded.pooler_output, read_heard(self.model.config, encoded)[0]

    def _render(self, messages: list[dict], positions: list[Tensor]) -> Tensor:
        """Return token ids `(1, sequence)` with the assistant's header at the end; a typed <|audio|> is text."""
        processor = self.processor
        clips = (processor.audio_token, [clip.shape[0] for clip in _of_clips_in(messages, positions)])
        return torch.tensor([encode_conversation(self.tokenizer, messages, processor.chat_template, *clips)])

    def _generate(self, ids: Tensor, positions: list[Tensor], options: dict) -> Tensor:
        """Return the reply's token ids `(tokens,)`; the cache then holds everything but the last of them."""
        num_beams = options.get("num_beams", self.model.generation_config.num_beams) or 1
        cache, start = self._take_cache(ids)
        if num_beams > 1:  # a beam search leaves a cache of its beams, and not of the reply
            cache, start = None, 0
        else:
            # whatever a checkpoint's generation settings say of caches
            options |= {CACHE: cache, "use_cache": True, "cache_implementation": None}
        is_audio = ids[0] == self.model.config.audio_token_id
        read = int(is_audio[:start].sum())  # positions of clips before the cut
        if positions and (behind := torch.cat(positions)[read:]).shape[0]:
            options["mm_encoder_outputs"] = {"audio": ReLLMAudioOutput(pooler_output=behind)}
        device_ids = ids.to(self.model.device)
        said = self.model.generate(input_ids=device_ids, attention_mask=torch.ones_like(device_ids), **options)[0]
        if cache is not None:
            self._cache, self._cached_ids = cache, said[: cache.get_seq_length()].cpu()
        return said[ids.shape[1] :].cpu()

    def _take_cache(self, ids: Tensor) -> tuple[Cache, int]:
        """Take the cache out of the conversation (a turn may fail); return it and how many of its positions hold."""
        cache, cached = self._cache, self._cached_ids
        self._cache, self._cached_ids = None, cached[:0]
        start = _cut(ids[0], cached, self.model.config.audio_token_id)
        if cache is not None and start and _crop(cache, start):
            return cache, start
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)), 0


def first_messages(system_prompt: str) -> list[dict]:
    """Return what a conversation begins with: the system turn, or nothing."""
    return [{"role": "system", "content": system_prompt}] if system_prompt else []


def check_turn(audio: AudioSource | None, text: str | None) -> None:
    """Raise a `ValueError` if a turn has neither audio nor text."""
    if audio is None and not (text or "").strip():
        raise ValueError("A turn needs audio or text that is not blank, got neither.")


def read_limit(config: PreTrainedConfig) -> int | None:
    """Return how many positions an LLM reads; `None` where they are relative."""
    return getattr(config, "max_position_embeddings", None)


def fit_turns(
    messages: list[dict],
    encode: Callable[[list[dict]], Tensor],
    limit: int | None,
    max_new_tokens: int,
    *,
    drop_oldest: bool,
) -> tuple[list[dict], Tensor, int]:
    """Return the turns that an LLM reads, their token ids `(1, sequence)`, and how many older ones were dropped.

    With `drop_oldest`, a turn and its reply go at a time until the rest fits; the system turn and the last one stay.
    What does not fit is a `ValueError`.
    """
    first = int(messages[0]["role"] == "system")
    for dropped in range((len(messages) - first) // 2 + 1 if drop_oldest else 1):
        kept = messages[:first] + messages[first + 2 * dropped :]
        ids = encode(kept)
        if limit is None or ids.shape[1] + max_new_tokens <= limit:
            return kept, ids, dropped
    what, remedy = ("This turn", "Say") if len(kept) == first + 1 else ("The conversation", "Begin anew, say")
    raise ValueError(
        f"{what} has {ids.shape[1]} positions and the reply may take {max_new_tokens} more; the LLM reads {limit}. "
        f"{remedy} less at once, or allow a shorter reply."
    )


def _of_clips_in(messages: list[dict], positions: list[Tensor]) -> list[Tensor]:
    """Return the positions of the clips in the last turns."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return positions[len(positions) - sum(part["type"] == "audio" for part in parts) :]


def _cut(ids: Tensor, cached: Tensor, audio_token_id: int) -> int:
    """Return where the new ids leave the cached: before the last position, which has to be read, and in no clip."""
    length = min(len(cached), len(ids) - 1)
    differs = (ids[:length] != cached[:length]).nonzero()
    start = int(differs[0]) if len(differs) else length
    inside = any(start < len(row) and row[start] == audio_token_id for row in (ids, cached))
    while inside and start > 0 and ids[start - 1] == audio_token_id:
        start -= 1
    return start


def _crop(cache: Cache, length: int) -> bool:
    """Cut the cache to a length; return `False` if it has to be made anew."""
    # a sliding window has forgotten what a cut would bring back, but may go on where it is; a recurrent state may not
    surplus = cache.get_seq_length() - length
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= ({DynamicLayer} if surplus else {DynamicLayer, DynamicSlidingWindowLayer}):
        return False
    if surplus:
        cache.crop(-surplus)
    return True
