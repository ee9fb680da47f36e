"""One request while it is answered: every row of a batch has settings and random numbers of its own."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from ..replies import Heard
from .schema import ApiError, ReplyOptions

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
