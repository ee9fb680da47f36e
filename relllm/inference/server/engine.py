"""The queue and the one thread that owns the model. Nothing of the web is here.

What waits is taken together, up to `max_batch_size` requests, encoded once, padded on the left and generated together;
the next batch starts when the last reply of this one has ended. Rows do not influence each other (`decoding.py`).
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMAudioOutput, ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..replies import GREEDY, Hearing, read_hearings
from .counters import Metrics
from .decoding import FinishReason, Row, RowChoices, RowEnds, Sampling
from .errors import ApiError, stopping

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """How requests are batched.

    Args:
        max_batch_size (`int`, *optional*, defaults to 16): Requests worked on together.
        max_batch_windows (`int`, *optional*, defaults to 64): Windows of audio in a batch (30 s each for Whisper):
            bounds memory where clips are many or long. A single request may have more.
        batch_wait_s (`float`, *optional*, defaults to 0.01): How long the first request waits for company, in seconds.
        max_queue (`int`, *optional*, defaults to 64): Requests that may wait; more are refused.
    """

    max_batch_size: int = 16
    max_batch_windows: int = 64
    batch_wait_s: float = 0.01
    max_queue: int = 64


@dataclass
class Prompt:
    """A request that has been read and checked.

    Args:
        waveforms (`list[np.ndarray]`): Clips at the extractor's rate, in order.
        num_windows (`int`): That they are cut into.
        audio_seconds (`float`): Of all of them.
        token_ids (`list[int]`): The conversation, with the placeholders of the clips; empty to hear only.
        sampling ([`Sampling`], *optional*): Of the reply; `None` to hear only.
        clip_messages (`list[int]`): Index of the message that each clip is in.
    """

    waveforms: list[np.ndarray]
    num_windows: int
    audio_seconds: float
    token_ids: list[int] = field(default_factory=list)
    sampling: Sampling | None = None
    clip_messages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Heard:
    """First event of every request: what the model heard in each clip."""

    hearings: list[Hearing]


@dataclass(frozen=True)
class Text:
    """A piece of the reply."""

    text: str


@dataclass(frozen=True)
class Ended:
    """Last event of a request that was answered: why the reply ended (`None` to hear only) and its length."""

    reason: FinishReason | None
    num_tokens: int


@dataclass(frozen=True)
class Failed:
    """Last event of a request that was not."""

    error: ApiError


Event: TypeAlias = Heard | Text | Ended | Failed


class Job:
    """A request in the engine. Its events arrive at `emit`, which is called from the worker's thread."""

    def __init__(self, prompt: Prompt, emit: Callable[[Event], object], metrics: Metrics) -> None:
        self.prompt = prompt
        self.cancelled = False
        self.failure: ApiError | None = None  # set from outside to end it
        self.finished = False
        self._emit = emit
        self._metrics = metrics
        self._submitted = time.perf_counter()
        self._has_text = False

    @property
    def is_wanted(self) -> bool:
        return not self.cancelled and self.failure is None

    def begin(self) -> None:
        self._metrics.queue_seconds.observe(time.perf_counter() - self._submitted)

    def write(self, text: str) -> None:
        if not self._has_text:
            self._has_text = True
            self._metrics.first_text_seconds.observe(time.perf_counter() - self._submitted)
        self._send(Text(text))

    def heard(self, hearings: list[Hearing]) -> None:
        self._metrics.audio_seconds.inc(self.prompt.audio_seconds)
        self._metrics.tokens_in.inc(len(self.prompt.token_ids))
        self._send(Heard(hearings))

    def end(self, reason: FinishReason | None, num_tokens: int) -> None:
        """Sends the last event, once: of a failure or a cancellation instead, if there was one."""
        if self.finished:
            return
        self.finished = True
        self._metrics.tokens_out.inc(num_tokens)
        if self.failure is not None:
            self._send(Failed(self.failure))
        elif self.cancelled:
            self._metrics.dropped.inc()
        else:
            self._send(Ended(reason, num_tokens))

    def fail(self, error: ApiError) -> None:
        self.failure = self.failure or error
        self.end(None, 0)

    def _send(self, event: Event) -> None:
        if self.cancelled:
            return
        try:
            self._emit(event)
        except RuntimeError:  # the event loop that waited for it is closed
            self.cancelled = True


class Engine:
    """Batches requests and answers them, in a thread of its own.

    Args:
        model ([`ReLLMForConditionalGeneration`]), processor ([`ReLLMProcessor`]): Of one checkpoint, in eval mode.
            From `start` on, nobody else may run the model.
        settings ([`EngineSettings`]): How requests are batched.
        metrics ([`Metrics`]): What is counted.
    """

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        processor: ReLLMProcessor,
        settings: EngineSettings,
        metrics: Metrics,
    ) -> None:
        self._model, self._extractor = model, processor.feature_extractor
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # other threads encode with theirs, which locks it
        self._settings, self._metrics = settings, metrics
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._reserved = 0  # accepted, but still being read
        self._draining = self._aborted = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="relllm-model", daemon=True)
        metrics.watch_queue(lambda: self.num_waiting)
        generation = model.generation_config
        end = generation.eos_token_id
        self._end_tokens = frozenset([end] if isinstance(end, int) else end or [])
        self._repetition_penalty = generation.repetition_penalty or 1.0

    def start(self) -> None:
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are accepted and not yet worked on."""
        return self._reserved + len(self._queue)

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted."""
        return self._thread.is_alive() and not self._draining

    def check_room(self) -> None:
        """Refuses early what [`~Engine.reserve`] would refuse.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is stopping.
        """
        if not self.is_ready:
            raise stopping()
        if self.num_waiting >= self._settings.max_queue:
            raise ApiError(
                429,
                f"{self.num_waiting} requests wait, which is as many as this server lets wait. Try again later.",
                "queue_full",
                headers={"Retry-After": "1"},
            )

    def reserve(self) -> None:
        """Takes a place in the queue, to be filled by [`~Engine.submit`] or given back by [`~Engine.release`]."""
        with self._changed:
            self.check_room()
            self._reserved += 1

    def release(self) -> None:
        """Gives the place back."""
        with self._changed:
            self._reserved -= 1
            self._changed.notify_all()

    def submit(self, prompt: Prompt, emit: Callable[[Event], object]) -> Job:
        """Puts a request into the place that was reserved for it.

        Args:
            prompt ([`Prompt`]): What to answer.
            emit (`Callable[[Event], object]`): Gets [`Heard`], then any number of [`Text`], then [`Ended`]; or
                [`Failed`] at any time. Called from the worker's thread; it must not block.
        """
        job = Job(prompt, emit, self._metrics)
        with self._changed:
            self._reserved -= 1
            if self._aborted:
                job.failure = stopping()
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more: it leaves the queue, or its row ends at the next token."""
        with self._changed:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                job.end(None, 0)

    def drain(self) -> None:
        """Accept nothing more; finish what is accepted."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def abort(self) -> None:
        """End what is waiting or running with an error, at the next token."""
        self.drain()
        with self._changed:
            self._aborted = True
            for job in (*self._queue, *self._running):
                job.failure = job.failure or stopping()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread to end, after [`~Engine.drain`]; `False` if it has not in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if not batch:
                continue
            self._metrics.batch_size.observe(len(batch))
            try:
                self._answer(batch)
            except Exception:  # whatever the model or the device throws: these requests fail, the server goes on
                logger.exception("A batch of %d requests failed.", len(batch))
                message = "The model failed on this batch of requests; the server's log says why."
                for job in batch:
                    job.fail(ApiError(500, message, "model_failed"))  # does nothing to those that have ended
            with self._changed:
                self._running = []

    def _next_batch(self) -> list[Job] | None:
        """Waits for requests and takes the first ones; `None` when draining and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or (self._draining and not self._reserved))
            if not self._queue:
                return None
            self._changed.wait_for(lambda: self._is_full() or self._draining, self._settings.batch_wait_s)
            batch: list[Job] = []
            windows = 0
            while self._queue and len(batch) < self._settings.max_batch_size:
                job = self._queue[0]
                windows += job.prompt.num_windows
                if batch and windows > self._settings.max_batch_windows:
                    break
                self._queue.popleft()
                if job.is_wanted:
                    batch.append(job)
                else:
                    windows -= job.prompt.num_windows
                    job.end(None, 0)
            self._running = batch
            return batch

    def _is_full(self) -> bool:
        """Whether more requests would not get into the next batch."""
        windows = sum(job.prompt.num_windows for job in self._queue)
        return len(self._queue) >= self._settings.max_batch_size or windows >= self._settings.max_batch_windows

    @torch.no_grad()
    def _answer(self, batch: list[Job]) -> None:
        for job in batch:
            job.begin()
        clips = self._hear(batch)
        writing = []
        for job in batch:
            if job.prompt.sampling is None:
                job.end(None, 0)
            else:
                writing.append(job)
        if writing:
            heard = [clip for job, own in zip(batch, clips, strict=True) if job in writing for clip in own]
            self._generate(writing, torch.cat(heard) if heard else None)

    def _hear(self, batch: list[Job]) -> list[list[Tensor]]:
        """Tells every request what was heard; returns the positions `(tokens, d)` of each clip of each request."""
        waveforms = [waveform for job in batch for waveform in job.prompt.waveforms]
        clips: list[Tensor] = []
        hearings: list[Hearing] = []
        if waveforms:
            features = self._extractor.extract(waveforms)
            counts = [int(count) for count in features.pop("num_audio_tokens")]
            heard = self._model.get_audio_features(**features.to(self._model.device), return_dict=True)
            clips, hearings = list(heard.pooler_output.split(counts)), read_hearings(self._model, heard)
        by_job = []
        start = 0
        for job in batch:
            end = start + len(job.prompt.waveforms)
            job.heard(hearings[start:end])
            by_job.append(clips[start:end])
            start = end
        return by_job

    def _generate(self, batch: list[Job], positions: Tensor | None) -> None:
        """Writes the replies of requests whose clips make `positions` `(tokens, d)`, in order."""
        device = self._model.device
        prompts = [torch.tensor(job.prompt.token_ids) for job in batch]
        pad_token = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad_token, padding_side="left")
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        rows = [self._row(job, int(input_ids.shape[1]) - len(ids)) for job, ids in zip(batch, prompts, strict=True)]
        heard: dict[str, object] = {}
        if positions is not None:
            heard["mm_encoder_outputs"] = {"audio": ReLLMAudioOutput(pooler_output=positions)}
        self._model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            **heard,
            **GREEDY,
            max_new_tokens=max(job.prompt.sampling.max_tokens for job in batch if job.prompt.sampling is not None),
            pad_token_id=pad_token,
            logits_processor=LogitsProcessorList([RowChoices(rows, self._repetition_penalty)]),
            stopping_criteria=StoppingCriteriaList([RowEnds(rows)]),
        )
        for row in rows:
            row.end("length")  # where a limit of the checkpoint's own came first

    def _row(self, job: Job, padding: int) -> Row:
        assert job.prompt.sampling is not None  # those that hear only are answered before
        return Row(
            job.prompt.sampling,
            tokenizer=self._tokenizer,
            end_tokens=self._end_tokens,
            padding=padding,
            device=self._model.device,
            write=job.write,
            finish=job.end,
            is_wanted=lambda: job.is_wanted,
        )


__all__ = ["Ended", "Engine", "EngineSettings", "Event", "Failed", "Heard", "Job", "Prompt", "Text"]
