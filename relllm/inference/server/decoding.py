"""One request while it is answered: every row of a batch has settings and random numbers of its own."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from ..replies import Heard
from .errors import ApiError

FinishReason: TypeAlias = Literal["stop", "length"]
NEARLY_GREEDY = 1e-5  # lower temperatures would overflow the scores
_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ReplySampling:
    """How a reply is written."""

    max_tokens: int
    temperature: float = 0.0  # 0 takes the most probable token
    top_p: float = 1.0  # draw from the fewest tokens that have this probability together
    seed: int | None = None  # of the draws; by default another one each time
    stop: tuple[str, ...] = ()  # the reply ends before the first of these


@dataclass
class Prompt:
    """A request that has been read and checked: to hear only, without tokens and sampling."""

    waveforms: list[np.ndarray]  # clips at the extractor's rate, in order
    num_windows: int  # of all of them
    audio_seconds: float  # of all of them
    token_ids: list[int] = field(default_factory=list)  # the conversation, with the placeholders of the clips
    sampling: ReplySampling | None = None
    clip_messages: list[int] = field(default_factory=list)  # index of the message that each clip is in


@dataclass(frozen=True)
class Ended:
    """The last event of a request that was answered: why the reply ended (`None` to hear only) and its length."""

    reason: FinishReason | None
    num_tokens: int


# First what was heard in each clip, then the reply piece by piece, then its end; an error may come at any time.
Event: TypeAlias = list[Heard] | str | Ended | ApiError


class Job:
    """A request in the engine. Its events arrive at `emit`, which is called from the engine's thread."""

    def __init__(self, prompt: Prompt, emit: Callable[[Event], object]) -> None:
        self.prompt = prompt
        self.cancelled = False
        self.failure: ApiError | None = None  # set from outside to end it
        self.finished = False  # the last event was sent
        self._emit = emit

    @property
    def is_wanted(self) -> bool:
        """Tell whether somebody waits for more of it."""
        return not self.cancelled and self.failure is None

    def send(self, event: Event) -> None:
        """Hand on an event, if somebody waits for it."""
        try:
            if not self.cancelled:
                self._emit(event)
        except RuntimeError:  # the event loop that waited for it is closed
            self.cancelled = True

    def end(self, reason: FinishReason | None = None, num_tokens: int = 0, error: ApiError | None = None) -> None:
        """Send the last event, once: of a failure instead, if there was one."""
        self.failure = self.failure or error
        if not self.finished:
            self.finished = True
            self.send(self.failure or Ended(reason, num_tokens))


class TextWriter:
    """Tokens in, text out as soon as it is certain: no half characters, nothing that may begin a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens before `_read` are written; decoding starts at `_context`
        self._held = ""

    def add(self, token: int) -> str:
        """Return the text that is certain after this token; often empty."""
        self._tokens.append(token)
        return self._release(self._decode_new(whole=False), last=False)

    def finish(self) -> str:
        """Return what was held back."""
        return self._release(self._decode_new(whole=True), last=True)

    def _decode_new(self, *, whole: bool) -> str:
        """Decode behind some written tokens: what a token reads as depends on the one before it."""
        before = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(_HALF_A_CHARACTER) and not whole):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, new: str, *, last: bool) -> str:
        text, self._held = self._held + new, ""
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)[1]]  # before the one that was complete first
        split = len(text) if last else len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[split:]
        return text[:split]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class BatchRow:
    """The reply of a job while it is written, with `padding` positions before its prompt; any end token ends it."""

    def __init__(
        self, job: Job, clips: list[Tensor], model: ReLLMForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        sampling = job.prompt.sampling
        assert sampling is not None  # those that hear only are answered before
        self.job, self.clips = job, clips  # positions (tokens, d) of each
        self.tokens = list(job.prompt.token_ids)  # of the conversation, then of the reply
        self.padding = 0
        self.pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        end = model.generation_config.eos_token_id
        self._end_tokens = {end} if isinstance(end, int) else set(end or ())
        self._max_tokens = sampling.max_tokens
        self._writer = TextWriter(tokenizer, sampling.stop)
        self._generator: torch.Generator | None = None
        if sampling.temperature > NEARLY_GREEDY:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator = torch.Generator(model.device).manual_seed(seed)
            self._warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def done(self) -> bool:
        """Tell whether the reply has ended."""
        return self.job.finished

    @property
    def num_tokens(self) -> int:
        """Return how many tokens are written."""
        return len(self.tokens) - len(self.job.prompt.token_ids)

    @property
    def num_left(self) -> int:
        """Return how many tokens may still be written."""
        return self._max_tokens - self.num_tokens

    def choose(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return scores `(1, vocabulary)` whose arg max is the token to take: drawn, where there is a temperature."""
        if self._generator is None:
            return scores
        probabilities = self._warpers(tokens, scores).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def take(self, token: int) -> None:
        """Go on by one token; a row that nobody waits for ends."""
        if not self.job.is_wanted:
            self.job.end(None, self.num_tokens)
            return
        self.tokens.append(token)
        if token in self._end_tokens:
            self.end("stop")
        else:
            self._write(self._writer.add(token))
            if self._writer.stopped:
                self.job.end("stop", self.num_tokens)
            elif self.num_left <= 0:
                self.end("length")

    def end(self, reason: FinishReason) -> None:
        """Write what was held back; a stop string in it is what ended the reply."""
        if not self.done:
            self._write(self._writer.finish())
            self.job.end("stop" if self._writer.stopped else reason, self.num_tokens)

    def _write(self, text: str) -> None:
        if text:
            self.job.send(text)
