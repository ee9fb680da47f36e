"""The queue and the one thread that owns the model. Nothing of the web is here.

What waits is encoded and generated together; the next batch starts when the last reply of this one has ended.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings
from ..replies import GREEDY, Heard, read_heard
from .decoding import BatchRow, Event, Job, Prompt, RowChoices, RowEnds
from .errors import ApiError, stopping

logger = logging.get_logger(__name__)


class Engine:
    """Batches requests and answers them, in a thread of its own: from `start` on, nobody else may run the model."""

    def __init__(
        self, model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, settings: BatchSettings
    ) -> None:
        self._model, self._extractor = model, processor.feature_extractor
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # other threads encode with theirs, which locks it
        self._settings = settings
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._reserved = 0  # accepted, but still being read
        self._draining = self._aborted = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="relllm-model", daemon=True)
        end = model.generation_config.eos_token_id
        self._end_tokens = {end} if isinstance(end, int) else set(end or ())
        self._repetition_penalty = model.generation_config.repetition_penalty or 1.0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are accepted and not yet worked on."""
        return self._reserved + len(self._queue)

    @property
    def is_ready(self) -> bool:
        """Tell whether requests are accepted."""
        return self._thread.is_alive() and not self._draining

    def check_room(self) -> None:
        """Raise an [`ApiError`]: 429 if the queue is full, 503 if the server is stopping."""
        if not self.is_ready:
            raise stopping()
        if self.num_waiting >= self._settings.max_queue:
            message = f"{self.num_waiting} requests wait, which is as many as this server lets wait. Try again later."
            raise ApiError(429, message, "queue_full", headers={"Retry-After": "1"})

    def reserve(self) -> None:
        """Take a place in the queue, to be filled by [`~Engine.submit`] or given back by [`~Engine.release`]."""
        with self._changed:
            self.check_room()
            self._reserved += 1

    def release(self) -> None:
        """Give the place back."""
        with self._changed:
            self._reserved -= 1
            self._changed.notify_all()

    def submit(self, prompt: Prompt, emit: Callable[[Event], object]) -> Job:
        """Put a request into the place that was reserved for it; `emit` gets its events and must not block."""
        job = Job(prompt, emit)
        with self._changed:
            self._reserved -= 1
            if self._aborted:
                job.failure = stopping()
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Give a request up: it leaves the queue, or its row ends at the next token."""
        with self._changed:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                job.end()

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
        """Wait for the thread to end, after [`~Engine.drain`]; return `False` if it has not in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if not batch:
                continue
            self._try(batch)
            with self._changed:
                self._running = []

    def _try(self, batch: list[Job]) -> None:
        """Answer a batch; if that fails, those of whom nothing was told yet one by one, so that only the bad fail."""
        try:
            self._answer(batch)
        except Exception:  # whatever the model or the device throws: these requests fail, the server goes on
            logger.exception("A batch of %d requests failed.", len(batch))
            again = [job for job in batch if len(batch) > 1 and not job.begun and not job.finished]
            message = "The model failed on this batch of requests; the server's log says why."
            for job in batch:
                if job not in again:
                    job.end(error=ApiError(500, message, "model_failed"))  # does nothing to those that have ended
            for job in again:
                self._try([job])

    def _next_batch(self) -> list[Job] | None:
        """Wait for requests and take the first ones; return `None` when draining and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or (self._draining and not self._reserved))
            if not self._queue:
                return None
            self._changed.wait_for(lambda: self._is_full() or self._draining, self._settings.batch_wait_ms / 1000)
            batch: list[Job] = []
            windows = 0
            while self._queue and len(batch) < self._settings.max_batch_size:
                job = self._queue[0]
                if not job.is_wanted:
                    self._queue.popleft().end()
                    continue
                windows += job.prompt.num_windows
                if batch and windows > self._settings.max_batch_windows:
                    break
                batch.append(self._queue.popleft())
            self._running = batch
            return batch

    def _is_full(self) -> bool:
        """Return whether more requests would not get into the next batch."""
        windows = sum(job.prompt.num_windows for job in self._queue)
        return len(self._queue) >= self._settings.max_batch_size or windows >= self._settings.max_batch_windows

    @torch.no_grad()
    def _answer(self, batch: list[Job]) -> None:
        """Tell every request what was heard, then write the replies of those that want one."""
        waveforms = [waveform for job in batch for waveform in job.prompt.waveforms]
        clips: Iterator[Tensor] = iter(())  # positions `(tokens, d)` of each
        heard: Iterator[Heard] = iter(())
        if waveforms:
            positions, told = self._hear(waveforms)
            clips, heard = iter(positions), iter(told)
        writing, spoken = [], []
        for job in batch:
            own = list(islice(clips, len(job.prompt.waveforms)))
            job.send(list(islice(heard, len(own))))
            if job.prompt.sampling is None:
                job.end()
            else:
                writing.append(job)
                spoken += own
        if writing:
            self._generate(writing, torch.cat(spoken) if spoken else None)

    def _hear(self, waveforms: list[np.ndarray]) -> tuple[tuple[Tensor, ...], list[Heard]]:
        """Return the positions `(tokens, d)` of each clip, and what was heard in it."""
        features = self._extractor.extract(waveforms)
        counts = [int(count) for count in features.pop("num_audio_tokens")]
        encoded = self._model.get_audio_features(**features.to(self._model.device), return_dict=True)
        return encoded.pooler_output.split(counts), read_heard(self._model, encoded)

    def _generate(self, batch: list[Job], positions: Tensor | None) -> None:
        """Write the replies of requests whose clips make `positions` `(tokens, d)`, in order."""
        device = self._model.device
        prompts = [torch.tensor(job.prompt.token_ids) for job in batch]
        pad_token = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad_token, padding_side="left")
        mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        paddings = [input_ids.shape[1] - len(ids) for ids in prompts]
        rows = [
            BatchRow(job, self._tokenizer, self._end_tokens, padding, device)
            for job, padding in zip(batch, paddings, strict=True)
        ]
        audio = {"audio": ReLLMAudioOutput(pooler_output=positions)} if positions is not None else None
        self._model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            mm_encoder_outputs=audio,
            **GREEDY,
            max_new_tokens=max(job.prompt.sampling.max_tokens for job in batch if job.prompt.sampling is not None),
            pad_token_id=pad_token,
            logits_processor=LogitsProcessorList([RowChoices(rows, self._repetition_penalty)]),
            stopping_criteria=StoppingCriteriaList([RowEnds(rows)]),
        )
        for row in rows:
            row.end("length")  # where a limit of the checkpoint's own came first
