"""The queue and the one thread that owns the model. Nothing of the web is here.

Between the steps of the replies that are written, clips are heard and new replies begun: a request waits for a step of
those before it, and not for their end. Groups of replies (`writing.py`) take turns.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings
from ..replies import Heard, read_heard
from .decoding import BatchRow, Event, Job, Prompt
from .errors import ApiError, stopping
from .writing import Group

logger = logging.get_logger(__name__)
MOST_GROUPS = 4  # a step of each is a pass through the LLM; one more makes one group of all
TURN_TOKENS = 8  # that a group writes before the next one's turn
PROBE_EVERY_S = 5.0  # of a model that failed, while nobody asks


class Engine:
    """Answers requests in a thread of its own: from `start` on, nobody else may run the model."""

    def __init__(
        self, model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, settings: BatchSettings
    ) -> None:
        self._model, self._extractor = model, processor.feature_extractor
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # other threads encode with theirs, which locks it
        self._settings = settings
        self._queue: deque[Job] = deque()
        self._open: list[Job] = []  # in the queue or worked on
        self._groups: list[Group] = []
        self._parked: list[BatchRow] = []  # of groups that failed, until the others are written
        self._reserved = 0  # accepted, but still being read
        self._draining = self._aborted = self._failing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="relllm-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that are accepted and not yet worked on."""
        return self._reserved + len(self._queue)

    @property
    def status(self) -> str:
        """Return `"ok"`, `"stopping"`, or `"failing"` where the model fails on silence as well."""
        if self._draining or not self._thread.is_alive():
            return "stopping"
        return "failing" if self._failing else "ok"

    def check_room(self) -> None:
        """Raise an [`ApiError`]: 429 if the queue is full, 503 if the server is stopping."""
        if self.status == "stopping":
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
            self._open = [job for job in (*self._open, job) if not job.finished]
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
            for job in self._open:
                job.failure = job.failure or stopping()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, after [`~Engine.drain`]; return `False` if it has not in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._wait_for_work():
            if batch := self._take():
                self._begin(batch)
            elif self._failing and not self._groups:
                self._probe()
            for group in list(self._groups):
                if group in self._groups:
                    self._write(group)
            if self._parked and not self._groups:
                self._groups, self._parked = [Group(self._parked)], []

    def _wait_for_work(self) -> bool:
        """Return whether there is any; `False` when draining and nothing is left."""
        with self._changed:
            if self._groups:
                return True
            longest_s = PROBE_EVERY_S if self._failing else None
            self._changed.wait_for(lambda: self._queue or (self._draining and not self._reserved), longest_s)
            if self._queue:  # the first one waits for company
                self._changed.wait_for(lambda: self._is_full() or self._draining, self._settings.batch_wait_ms / 1000)
            return bool(self._queue) or not self._draining or self._reserved > 0

    def _is_full(self) -> bool:
        """Return whether more requests would not get into the next batch."""
        windows = sum(job.prompt.num_windows for job in self._queue)
        return len(self._queue) >= self._settings.max_batch_size or windows >= self._settings.max_batch_windows

    def _free_rows(self) -> int:
        writing = sum(len(group.rows) for group in self._groups)
        return 0 if self._parked else self._settings.max_batch_size - writing

    def _has_others(self, num_written: int) -> bool:
        """Return whether a group that has written so many tokens in its turn gives way."""
        if self._queue:
            with self._changed:
                free = self._free_rows() > 0
                if any(free or job.prompt.sampling is None for job in self._queue):
                    return True
        return num_written >= TURN_TOKENS and len(self._groups) > 1

    def _take(self) -> list[Job]:
        """Take from the queue what can be heard now: chats only as far as there are rows for their replies."""
        batch: list[Job] = []
        with self._changed:
            free, windows, most = self._free_rows(), 0, self._settings.max_batch_size
            for job in list(self._queue):
                replies = job.prompt.sampling is not None
                if not job.is_wanted:
                    self._queue.remove(job)
                    job.end()
                elif free > 0 or not replies:
                    windows += job.prompt.num_windows
                    if batch and (windows > self._settings.max_batch_windows or len(batch) >= most):
                        break
                    self._queue.remove(job)
                    batch.append(job)
                    free -= replies
        return batch

    def _begin(self, batch: list[Job]) -> None:
        """Tell every request what was heard, and begin the replies of those that want one."""
        todo, rows = [batch], []
        while todo:
            jobs = todo.pop(0)
            try:
                rows += self._hear_jobs(jobs)
            except Exception as error:  # whatever the model or the device throws: these fail, the server goes on
                self._log_failure("hearing", len(jobs), error)
            else:
                self._failing = False
                continue
            if len(jobs) == 1:
                self._give_up(jobs[0])
            else:
                todo[:0] = _halves(jobs)
        if rows and len(self._groups) >= MOST_GROUPS:
            rows = [row for group in self._groups for row in group.rows] + rows
            self._groups = []
        if rows:
            self._groups.append(Group(rows))

    @torch.no_grad()
    def _hear_jobs(self, jobs: list[Job]) -> list[BatchRow]:
        """Return the rows of the replies."""
        waveforms = [waveform for job in jobs for waveform in job.prompt.waveforms]
        positions, told = self._hear(waveforms) if waveforms else ((), [])
        clips, heard = iter(positions), iter(told)
        rows = []
        for job in jobs:
            own = list(islice(clips, len(job.prompt.waveforms)))
            job.send(list(islice(heard, len(own))))
            if job.prompt.sampling is None:
                job.end()
            else:
                rows.append(BatchRow(job, own, self._model, self._tokenizer))
        return rows

    def _hear(self, waveforms: Sequence[np.ndarray]) -> tuple[tuple[Tensor, ...], list[Heard]]:
        """Return the positions `(tokens, d)` of each clip, and what was heard in it."""
        features = self._extractor.extract(waveforms)
        counts = [int(count) for count in features.pop("num_audio_tokens")]
        encoded = self._model.get_audio_features(**features.to(self._model.device), return_dict=True)
        return encoded.pooler_output.split(counts), read_heard(self._model.config, encoded)

    def _write(self, group: Group) -> None:
        """Have a group write until it gives way; if that fails, its halves begin again, one after the other."""
        try:
            group.write(self._model, self._has_others)
        except Exception as error:
            self._log_failure("writing", len(group.rows), error)
        else:
            self._failing = False
            if not group.rows:
                self._groups.remove(group)
            return
        self._groups.remove(group)
        rows = [row for row in group.rows if not row.done]
        if len(rows) == 1:
            self._give_up(rows[0].job)
        elif rows:
            first, second = _halves(rows)
            self._groups.append(Group(first))
            self._parked += second

    def _log_failure(self, what: str, number: int, error: Exception) -> None:
        logger.error("The model failed in %s %d requests.", what, number, exc_info=error)

    def _give_up(self, job: Job) -> None:
        message = "The model failed on this request; the server's log says why."
        job.end(error=ApiError(500, message, "model_failed"))
        self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        """Ask the model for something that it cannot fail on."""
        try:
            self._hear([np.zeros(self._extractor.sampling_rate, np.float32)])
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device))
            self._failing = False
        except Exception as error:
            if not self._failing:
                logger.error("The model fails on silence as well: /health is 503.", exc_info=error)
            self._failing = True


def _halves(items: list) -> tuple[list, list]:
    return items[: len(items) // 2], items[len(items) // 2 :]
