"""A conversation of many turns with one model: no clip is encoded twice, and the LLM reads only what is new.

Every turn renders the whole conversation and keeps of the key-value cache what agrees with it from the start, so a
reply is the one that a fresh pass gives. A clip behind the cut is read again from its stored positions.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.processing_relllm import ReLLMProcessor

from .replies import Heard, Reply, count_steps, read_heard, static_length
from .typed_text import encode_conversation

# Options of `generate` that the conversation sets itself, or whose output is more than one reply.
RESERVED_OPTIONS = {
    *("input_ids", "attention_mask", "mm_encoder_outputs", "generation_config", "num_return_sequences"),
    *("past_key_values", "cache", "use_cache", "cache_implementation", "return_dict_in_generate"),
}


class TurnTaking:
    """What every conversation is made of: the turns so far, and how one more is said.

    `messages` are for [`~ReLLMProcessor.apply_chat_template`]; audio parts hold waveforms.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # of the replies
    system_prompt: str
    generation_options: dict[str, object]
    reserved: Set[str] = frozenset()  # options that it sets itself

    def reset(self) -> None:
        """Begin anew: no turn, and nothing in a cache."""
        self.messages: list[dict] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

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
        if audio is None and not (text or "").strip():
            raise ValueError("A turn needs audio or text that is not blank, got neither.")
        if reserved := sorted(self.reserved & (options.keys() | self.generation_options.keys())):
            raise ValueError(f"A conversation sets {', '.join(reserved)} itself. Leave it out.")
        content, heard = self._listen(audio, text)
        turns = [*self.messages, {"role": "user", "content": content}]
        turns, ids, dropped = self._fit(turns, max_new_tokens, drop_oldest)
        told = {"do_sample": False, "max_new_tokens": max_new_tokens, "streamer": streamer}
        said = self._generate(ids, turns, {**told, **self.generation_options, **options})
        reply_ids = said[ids.shape[1] :]
        reply = self.tokenizer.decode(reply_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.messages = [*turns, {"role": "assistant", "content": reply}]
        return Reply(reply.strip(), heard, dropped)

    def _listen(self, audio: AudioSource | None, text: str | None) -> tuple[object, Heard | None]:
        """Return a turn's content, and what was heard in it."""
        raise NotImplementedError

    def _render(self, messages: list[dict]) -> list[int]:
        """Return token ids with the assistant's header at the end."""
        raise NotImplementedError

    def _fit(self, messages: list[dict], max_new_tokens: int, drop_oldest: bool) -> tuple[list[dict], Tensor, int]:
        """Return the turns that the LLM reads, their token ids `(1, sequence)`, and how many older ones were dropped.

        A turn and its reply go at a time; the system turn and the last one stay.
        """
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        first = int(messages[0]["role"] == "system")
        for dropped in range((len(messages) - first) // 2 + 1 if drop_oldest else 1):
            kept = messages[:first] + messages[first + 2 * dropped :]
            ids = torch.tensor([self._render(kept)])
            if limit is None or ids.shape[1] + max_new_tokens <= limit:  # None: its positions are relative
                return kept, ids, dropped
        what, remedy = ("This turn", "Say") if len(kept) == first + 1 else ("The conversation", "Begin anew, say")
        raise ValueError(
            f"{what} has {ids.shape[1]} positions and the reply may take {max_new_tokens} more; the LLM reads {limit}."
            f" {remedy} less at once, or allow a shorter reply."
        )

    def _generate(self, ids: Tensor, turns: list[dict], options: dict) -> Tensor:
        """Return the token ids with those of the reply, `(sequence,)`."""
        ids = ids.to(self.model.device)
        return self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].cpu()


class Conversation(TurnTaking):
    """A conversation with one model that remembers its earlier turns and does not compute them again.

    Several conversations may share a model if their turns do not overlap. `instruction` stands before the clip of a
    spoken turn that comes without text of its own; it and `system_prompt` are by default the processor's, and may be
    empty for none. `generation_options` are what each turn takes unless it is told otherwise.
    """

    model: ReLLMForConditionalGeneration
    reserved = RESERVED_OPTIONS

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
        self.tokenizer = processor.tokenizer
        self.system_prompt = processor.system_prompt if system_prompt is None else system_prompt
        self.instruction = processor.instruction if instruction is None else instruction
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._cache: Cache | None = None
        self._cached_ids = torch.zeros(0, dtype=torch.long)

    def _listen(self, audio: AudioSource | None, text: str | None) -> tuple[object, Heard | None]:
        """Encode a clip: the only place where the towers run. Its positions `(positions, d)` stay beside it."""
        if audio is None:
            return [{"type": "text", "text": text}], None
        extractor = self.processor.feature_extractor
        waveform = extractor.read_clip(audio)
        inputs = extractor.extract([waveform])
        inputs.pop("num_audio_tokens", None)
        encoded = self.model.get_audio_features(**inputs.to(self.model.device), return_dict=True)
        before = text or self.instruction
        content: list[dict[str, object]] = [{"type": "text", "text": before}] if before else []
        content.append({"type": "audio", "waveform": waveform, "positions": encoded.pooler_output})
        return content, read_heard(self.model.config, encoded)[0]

    def _render(self, messages: list[dict]) -> list[int]:
        processor = self.processor
        clips = (processor.audio_token, [len(clip) for clip in _positions_in(messages)])
        return encode_conversation(self.tokenizer, messages, processor.chat_template, *clips)

    def _generate(self, ids: Tensor, turns: list[dict], options: dict) -> Tensor:
        """Read what is new; the cache then holds everything but the reply's last token."""
        if len(turns) <= len(self.messages):  # some were dropped: a cut compares ids, and all clips have the same
            self._cache = None
        cache, start = self._take_cache(ids)
        config = self.model.config.get_text_config(decoder=True)
        written: Cache | None = cache
        if (options.get("num_beams", self.model.generation_config.num_beams) or 1) > 1:
            written, start = None, 0  # a beam search leaves a cache of its beams, and not of the reply
        else:  # whatever a checkpoint's generation settings say of caches
            length = static_length(self.model, ids, options)
            if length and {type(layer) for layer in cache.layers} <= {DynamicLayer}:
                written = _copy(cache, StaticCache(config=config, max_cache_len=length))
            options |= {CACHE: written, "use_cache": True, "cache_implementation": None}
        read = int((ids[0, :start] == self.model.config.audio_token_id).sum())  # positions of clips before the cut
        if (positions := _positions_in(turns)) and len(behind := torch.cat(positions)[read:]):
            options["mm_encoder_outputs"] = {"audio": ReLLMAudioOutput(pooler_output=behind)}
        said = super()._generate(ids, turns, options)
        count_steps(self.model, len(said) - ids.shape[1])
        if written is not None:
            count = int(written.get_seq_length())
            if written is not cache:  # a static one cannot be cut back
                cache = _copy(written, DynamicCache(config=config), count)
            self._cache, self._cached_ids = cache, said[:count]
        return said

    def _take_cache(self, ids: Tensor) -> tuple[Cache, int]:
        """Take the cache out of the conversation (a turn may fail); return it and how many of its positions hold."""
        cache, cached = self._cache, self._cached_ids
        self._cache, self._cached_ids = None, cached[:0]
        start = _cut(ids[0], cached, self.model.config.audio_token_id)
        if cache is not None and start and _crop(cache, start):
            return cache, start
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)), 0


def _copy(cache: Cache, into: Cache, count: int | None = None) -> Cache:
    """Put what a cache holds, or its first `count` positions, into an empty one."""
    for index, layer in enumerate(cache.layers):
        if layer.is_initialized:
            into.update(layer.keys[:, :, :count], layer.values[:, :, :count], index)
    return into


def _positions_in(messages: list[dict]) -> list[Tensor]:
    """Return the positions of each clip, in order."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["positions"] for part in parts if part["type"] == "audio"]


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
