"""The queue and the one thread that owns the model. Nothing of the web is here.

Between the steps of the replies that are written, clips are heard and new replies begun: a request waits for a step of
those before it, and not for their end. Groups of replies (`writing.py`) take turns.
"""

import copy
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings
from ..replies import Heard, read_heard
from .schema import ApiError, stopping
from .writing import Ended, Event, Group, Job, Prompt

logger = logging.get_logger(__name__)
MOST_GROUPS = 4  # a step of each is a pass through the LLM; one more makes one group of all
TURN_TOKENS = 8  # that a group writes before the next one's turn
PROBE_EVERY_S = 30.0  # of a model that failed, while nobody asks


class Engine(threading.Thread):
    """Answers requests in a thread of its own: from `start` on, nobody else may run the model."""

    def __init__(
        self, model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, settings: BatchSettings
    ) -> None:
        super().__init__(name="relllm-model", daemon=True)
        self._model, self._extractor, self._settings = model, processor.feature_extractor, settings
        self._tokenizer = copy.deepcopy(processor.tokenizer)  # other threads encode with theirs, which locks it
        self.queue: list[Job] = []  # accepted and not yet worked on
        self.being_read: set[object] = set()  # whoever makes a prompt of a request, to be submitted then
        self._groups: list[Group] = []
        self._parked: list[Job] = []  # of groups that failed, until the others are written
        self._held = 0  # steps since a group was begun
        self._stopping = self._aborted = self._failing = False
        self._changed = threading.Condition()

    @property
    def status(self) -> str:
        """Return `"ok"`, `"stopping"`, or `"failing"` where the model fails on silence as well."""
        if self._stopping or not self.is_alive():
            return "stopping"
        return "failing" if self._failing else "ok"

    def check_room(self) -> None:
        """Raise an [`ApiError`]: 429 if the queue is full, 503 if the server is stopping."""
        if self.status == "stopping":
            raise stopping()
        if (waiting := len(self.queue) + len(self.being_read)) >= self._settings.max_queue:
            message = f"{waiting} requests wait, which is as many as this server lets wait. Try again later."
            raise ApiError(message, "queue_full", status=429, headers={"Retry-After": "1"})

    def submit(self, prompt: Prompt, emit: Callable[[Event], object]) -> Job:
        """Put a request into the queue, if there is room; `emit` gets its events and must not block."""
        job = Job(prompt, emit)
        with self._changed:
            self.check_room()
            self.queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Give a request up: it leaves the queue, or its row ends at the next token."""
        with self._changed:
            job.cancelled = True
            if job in self.queue:
                self.queue.remove(job)

    def stop(self, *, now: bool = False) -> None:
        """Accept nothing more, and finish what is accepted; with `now`, end it with an error at the next token."""
        with self._changed:
            self._stopping, self._aborted = True, self._aborted or now
            self._changed.notify_all()

    def run(self) -> None:
        """Answer requests until it is stopped."""
        while self._wait_for_work():
            with self._changed:
                batch = self._ready()
                self.queue = [job for job in self.queue if job not in batch]
            if batch:
                self._begin(batch)
            elif self._failing and not self._groups:
                self._probe()
            for index in range(len(self._groups)):
                self._write(self._groups[index])  # no name keeps the last cache while nobody asks
            self._groups = [group for group in self._groups if group.rows]
            if self._parked and not self._groups:
                self._groups, self._parked = [Group(self._parked)], []
        for job in (*self.queue, *self._parked, *(row for group in self._groups for row in group.rows)):
            job.end(stopping())

    def _wait_for_work(self) -> bool:
        """Return whether there is any; `False` when stopping and nothing is left to finish."""
        with self._changed:
            if not self._groups:
                longest_s = PROBE_EVERY_S if self._failing else None
                self._changed.wait_for(lambda: self.queue or self._stopping, longest_s)
                if self.queue:  # the first one waits for company
                    most, wait_s = self._settings.max_batch_size, self._settings.batch_wait_ms / 1000
                    self._changed.wait_for(lambda: len(self.queue) >= most or self._stopping, wait_s)
            return not self._aborted and bool(self._groups or self.queue or not self._stopping)

    def _ready(self) -> list[Job]:
        """Return what of the queue can be worked on now: chats only as far as there are rows for their replies."""
        most, writing = self._settings.max_batch_size, sum(len(group.rows) for group in self._groups)
        free = 0 if self._parked else max(0, most - writing)
        chats = [job for job in self.queue if job.prompt.options is not None]
        held = free < min(most // 4, len(chats)) and self._held < MOST_GROUPS * TURN_TOKENS  # or they are many groups
        begun = [] if held else chats[:free]
        return [job for job in self.queue if job.prompt.options is None or job in begun][:most]

    def _has_others(self, num_written: int) -> bool:
        """Return whether a group that has written so many tokens in its turn gives way."""
        self._held += 1
        with self._changed:
            return self._aborted or bool(self._ready()) or (num_written >= TURN_TOKENS and len(self._groups) > 1)

    def _begin(self, batch: list[Job]) -> None:
        """Hear the clips of each request, and begin a group of those that want a reply."""
        for job in batch:
            if not self._attempt("hearing a request", functools.partial(self._hear_job, job)):
                self._give_up(job)
        rows = [job for job in batch if not job.ended]
        if rows and len(self._groups) >= MOST_GROUPS:
            rows, self._groups = [row for group in self._groups for row in group.rows] + rows, []
        if rows:
            self._groups.append(Group(rows))
            self._held = 0

    def _hear_job(self, job: Job) -> None:
        job.positions, heard = self._hear(job.prompt.waveforms) if job.prompt.waveforms else (None, [])
        job.send(heard)
        if job.prompt.options is None:
            job.end(Ended(None, 0))
        else:
            job.begin(self._model, self._tokenizer)

    @torch.no_grad()
    def _hear(self, waveforms: Sequence[np.ndarray]) -> tuple[Tensor, list[Heard]]:
        """Return the positions `(tokens, d)` of clips, one after the other, and what was heard in each."""
        features = self._extractor.extract(waveforms)
        features.pop("num_audio_tokens")
        encoded = self._model.get_audio_features(**features.to(self._model.device), return_dict=True)
        return encoded.pooler_output, read_heard(self._model.config, encoded)

    def _write(self, group: Group) -> None:
        """Have a group write until it gives way; if that fails, its halves begin again, one after the other."""
        write = functools.partial(group.write, self._model, self._has_others)
        if not self._attempt(f"writing {len(group.rows)} replies", write):
            rows, group.rows = [row for row in group.rows if not row.ended], []
            if half := len(rows) // 2:
                self._groups.append(Group(rows[:half]))
                self._parked += rows[half:]
            elif rows:
                self._give_up(rows[0])

    def _attempt(self, what: str, work: Callable[[], object], level: int = logging.ERROR) -> bool:
        """Return whether `work` succeeds; whatever the model or the device throws, the server goes on."""
        try:
            work()
        except Exception:
            logger.log(level, "The model failed in %s.", what, exc_info=True)
            return False
        self._failing = False
        return True

    def _give_up(self, job: Job) -> None:
        job.end(ApiError("The model failed on this request; the server's log says why.", "model_failed", status=500))
        self._probe()

    def _probe(self) -> None:
        level = logging.DEBUG if self._failing else logging.ERROR  # or the log is full of the same
        self._failing = not self._attempt("reading silence; /health is 503", self._read_silence, level)

    @torch.no_grad()
    def _read_silence(self) -> None:
        self._hear([np.zeros(self._extractor.sampling_rate, np.float32)])
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._model.device))
