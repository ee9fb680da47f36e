"""Replies that are written together, by `generate` in turns: between two of them, rows that have ended leave.

Every row has settings and random numbers of its own.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE

from ..replies import GREEDY, Heard
from .schema import ApiError, ReplyOptions

MASKED = 0  # any token: nobody attends to it
NEARLY_GREEDY = 1e-5  # lower temperatures would overflow the scores
_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Prompt:
    """A request that has been read and checked: to hear only, without tokens and options."""

    waveforms: list[np.ndarray] = field(default_factory=list)  # clips at the extractor's rate, in order
    audio_seconds: float = 0.0  # of all of them
    clip_messages: list[int] = field(default_factory=list)  # index of the message that each clip is in
    token_ids: list[int] = field(default_factory=list)  # the conversation, with the placeholders of the clips
    audio_tokens: int = 0  # so many of them
    options: ReplyOptions | None = None


@dataclass(frozen=True)
class Ended:
    """The last event of a request that was answered: why the reply ended (`None` to hear only) and its length."""

    reason: str | None
    num_tokens: int


# First what was heard in each clip, then the reply piece by piece, then its end; an error may come at any time.
Piece: TypeAlias = list[Heard] | str | Ended
Event: TypeAlias = Piece | ApiError


class TextWriter:
    """Tokens in, text out as soon as it is certain: no half characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens before `_read` are written; decoding starts at `_context`

    def write(self, token: int | None) -> str:
        """Return the text that is certain after this token, often none; with `None`, all that was held back."""
        if token is not None:
            self._tokens.append(token)
        # Decoded behind some written tokens: what a token reads as depends on the one before it.
        before = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(before) or (token is not None and text.endswith(_HALF_A_CHARACTER)):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class Job:
    """A request in the engine, and the reply to it. Its events arrive at `emit`, called from the engine's thread."""

    def __init__(self, prompt: Prompt, emit: Callable[[Event], object]) -> None:
        self.prompt = prompt
        self.cancelled = self.ended = False
        self.positions: Tensor | None = None  # (tokens, d) of its clips
        self.tokens = list(prompt.token_ids)  # of the conversation, then of the reply
        self.padding = 0  # positions before them in the group
        self.send = emit  # hands on an event

    def end(self, event: Ended | ApiError) -> None:
        """Send the last event."""
        self.ended = True
        self.send(event)

    def begin(self, model: ReLLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
        """Begin a reply; any end token of the model ends it."""
        options = self.prompt.options
        assert options is not None and options.max_tokens is not None
        self.num_left = options.max_tokens
        end = model.generation_config.eos_token_id
        self._end_tokens = {end} if isinstance(end, int) else set(end or ())
        self._writer = TextWriter(tokenizer)
        self._generator: torch.Generator | None = None
        self._processors = LogitsProcessorList()
        if (penalty := model.generation_config.repetition_penalty or 1.0) != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if options.temperature > NEARLY_GREEDY:
            seed = secrets.randbits(63) if options.seed is None else options.seed
            self._generator = torch.Generator(model.device).manual_seed(seed)
            self._processors.append(TemperatureLogitsWarper(options.temperature))
            if options.top_p < 1:
                self._processors.append(TopPLogitsWarper(options.top_p))

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are written."""
        return len(self.tokens) - len(self.prompt.token_ids)

    def choose(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return scores `(1, vocabulary)` whose arg max is the token to take: drawn, where there is a temperature."""
        scores = self._processors(tokens, scores)
        if self._generator is None:
            return scores
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def take(self, token: int) -> None:
        """Go on by one token; a reply that nobody waits for ends."""
        self.tokens.append(token)
        self.num_left -= 1
        stops = self.cancelled or token in self._end_tokens
        if not stops:
            self._send_text(token)
        if stops or self.num_left <= 0:
            self._send_text(None)  # what was held back
            self.end(Ended("stop" if stops else "length", self.num_tokens))

    def _send_text(self, token: int | None) -> None:
        if text := self._writer.write(token):
            self.send(text)


class Group:
    """Replies with a cache. It begins with a pass over all that they have, so they may have been begun already."""

    def __init__(self, rows: list[Job]) -> None:
        self.rows = rows
        self._ids = self._mask = torch.empty(0)  # (rows, sequence), padded on the left
        self._cache: DynamicCache | None = None

    def write(self, model: ReLLMForConditionalGeneration, has_others: Callable[[int], bool]) -> None:
        """Write until a row ends or `has_others` (of the number of tokens) says so; rows that have ended leave."""
        options = self._begin(model) if self._cache is None else {}
        if written := min(row.num_tokens for row in self.rows):  # what a checkpoint asks of a reply's first tokens
            shortest = model.generation_config.min_new_tokens
            options |= {"begin_suppress_tokens": None, "min_new_tokens": shortest and max(0, shortest - written)}
        self._has_others, self._turn_tokens = has_others, 0
        self._ids = model.generate(
            input_ids=self._ids,
            attention_mask=self._mask,
            **{**GREEDY, **options, CACHE: self._cache, "use_cache": True, "cache_implementation": None},
            max_new_tokens=max(row.num_left for row in self.rows),
            pad_token_id=MASKED,
            logits_processor=[self._choose],
            stopping_criteria=[self._take],
        )
        self._drop_ended()

    def _begin(self, model: ReLLMForConditionalGeneration) -> dict[str, object]:
        """Pad the rows; return their clips, in order, as `generate` takes them."""
        tokens = [torch.tensor(row.tokens, device=model.device) for row in self.rows]
        self._ids = pad_sequence(tokens, batch_first=True, padding_value=MASKED, padding_side="left")
        self._mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True, padding_side="left")
        for row in self.rows:
            row.padding = self._ids.shape[1] - len(row.tokens)
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        clips = [row.positions for row in self.rows if row.positions is not None]
        return {"mm_encoder_outputs": {"audio": ReLLMAudioOutput(pooler_output=torch.cat(clips))}} if clips else {}

    def _drop_ended(self) -> None:
        self._mask = functional.pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=1)
        kept = [index for index, row in enumerate(self.rows) if not row.ended]
        if len(kept) < len(self.rows):
            self.rows = [self.rows[index] for index in kept]
            chosen = torch.tensor(kept, dtype=torch.long, device=self._ids.device)
            self._ids, self._mask = self._ids[chosen], self._mask[chosen]
            if kept and self._cache is not None:
                self._cache.reorder_cache(chosen)

    def _choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Have `generate`, which takes the most probable token, take what each row chooses."""
        own = zip(self.rows, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([row.choose(ids[:, row.padding :], row_scores) for row, ids, row_scores in own])

    def _take(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Hand every row its new token, and end `generate` once a row has ended or the group gives way."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        self._turn_tokens += 1
        pauses = any(row.ended for row in self.rows) or self._has_others(self._turn_tokens)
        return torch.full((len(self.rows),), pauses, device=input_ids.device)
