"""One visitor's conversation with one or more systems: what was said, what is shown, what went wrong.

What lives here: [`Session`], without any Gradio. What does not: the page (`page.py`), pictures (`drawing.py`).

The model is shared by all visitors, so a turn runs in a thread of its own that holds the lock, and never the other way
round: a visitor who goes away in the middle of a reply leaves nothing locked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from relllm.processing.audio_relllm import SAMPLING_RATE, load_audio

from ..conversation import Conversation
from ..replies import Heard, Reply
from ..text_conversation import NoWordsError, TextConversation

Start: TypeAlias = Callable[[], Conversation | TextConversation]


@dataclass(frozen=True)
class Status:
    """One line about what happens: `kind` is `"idle"`, `"busy"` or `"error"`."""

    kind: str
    text: str


EMPTY = Status("idle", "Record, upload or type something, then send it.")


class _Stopped(Exception):
    """The visitor stopped the reply."""


class _StoppableStreamer(TextIteratorStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: threading.Event):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = stop

    def put(self, value: torch.Tensor) -> None:
        if self.stop.is_set():
            raise _Stopped
        super().put(value)


class Session:
    """A conversation with each system, and what the page shows of them.

    Args:
        systems (`Mapping` of `str` to [`System`]): By name; the first is the one whose hearing is shown.
        lock (`threading.Lock`): One for all sessions that share a model.
        max_new_tokens (`int`): Longest reply.

    Attributes:
        shown (`dict` of `str` to `list`): Messages of each system's column, `{"role", "content"}`.
        heard (`list` of [`Heard`]): Of every spoken turn that was answered.
        status ([`Status`]): What happens.
    """

    def __init__(self, systems: Mapping[str, Start], lock: threading.Lock, *, max_new_tokens: int):
        self.systems = systems
        self.lock = lock
        self.max_new_tokens = max_new_tokens
        self.conversations = {name: start() for name, start in systems.items()}
        self._stop = threading.Event()
        self._clear()

    def _clear(self) -> None:
        self.shown: dict[str, list[dict[str, str]]] = {name: [] for name in self.systems}
        self.heard: list[Heard] = []
        self.status = EMPTY

    def reset(self) -> None:
        """Begin anew; a reply that is being written stops."""
        self._stop.set()
        with self.lock:  # the thread of that reply has it until its next token
            for conversation in self.conversations.values():
                conversation.reset()
            self._clear()

    def stop(self) -> None:
        """Stop the reply that is being written: its turn is forgotten."""
        self._stop.set()

    def talk(self, path: str | None, text: str | None) -> Iterator[None]:
        """Say something to every system, one after the other. Look at the attributes after each step.

        Args:
            path (`str`, *optional*): Of an audio file.
            text (`str`, *optional*): What was typed.
        """
        text = (text or "").strip()
        if path is None and not text:
            self.status = Status("error", "There is nothing to send yet: record, upload or type something.")
            yield
            return
        audio, label = None, text
        if path is not None:
            try:
                waveform = load_audio(path, name=Path(path).name)
            except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
                self.status = Status("error", f"Not sent: {error}")
                yield
                return
            audio = {"waveform": waveform}
            label = f"{text}\n\n" * bool(text) + f"(spoken, {len(waveform) / SAMPLING_RATE:.1f} s)"
        stop = self._stop = threading.Event()
        failures = []
        for name in self.systems:
            yield from self._ask(name, audio, text or None, label, stop)
            if stop.is_set():
                return
            if self.status.kind == "error":
                failures.append(self.status.text)
        self.status = Status("error", " ".join(failures)) if failures else EMPTY

    def _ask(
        self, name: str, audio: dict | None, text: str | None, label: str, stop: threading.Event
    ) -> Iterator[None]:
        shown = self.shown[name]
        length = len(shown)
        shown += [{"role": "user", "content": label}, {"role": "assistant", "content": "…"}]
        waiting = self.lock.locked()
        self.status = Status("busy", "Waiting for another conversation." if waiting else f"{name} is thinking.")
        yield
        reply = ""
        try:
            for piece in (pieces := _Pieces(self, name, audio, text, stop)):
                reply += piece
                shown[-1]["content"] = reply or "…"
                self.status = Status("busy", f"{name} is replying.")
                yield
            turn = pieces.turn
        except _Stopped:
            del shown[length:]
            self.status = Status("idle", "Stopped: that turn is forgotten.")
        except NoWordsError as error:  # a text-only system: not a failure of the page
            shown[-1]["content"] = f"({error})"
        except (ImportError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory and the like
            del shown[length:]
            self.status = Status("error", f"{name} did not answer: {error}")
        else:
            shown[-1]["content"] = turn.text or "(no words)"
            if turn.heard is not None and name == next(iter(self.systems)):
                self.heard.append(turn.heard)
        yield


class _Pieces:
    """A reply piece by piece while a thread writes it; `turn` is there afterwards, what failed is raised."""

    def __init__(self, session: Session, name: str, audio: dict | None, text: str | None, stop: threading.Event):
        self.stop = stop
        self.streamer = _StoppableStreamer(session.conversations[name].tokenizer, stop)
        self.run = partial(self._say, session, name, audio, text)

    def _say(self, session: Session, name: str, audio: dict | None, text: str | None) -> Reply:
        with session.lock:
            if self.stop.is_set():
                raise _Stopped
            conversation = session.conversations[name]
            return conversation.say(audio, text, streamer=self.streamer, max_new_tokens=session.max_new_tokens)

    def __iter__(self) -> Iterator[str]:
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(self.run)
            future.add_done_callback(lambda _: self.streamer.text_queue.put(self.streamer.stop_signal))
            finished = False
            try:
                yield from (piece for piece in self.streamer if piece)
                finished = True
            finally:
                if not finished:  # nobody listens any more
                    self.stop.set()
            self.turn = future.result()


__all__ = ["EMPTY", "Session", "Start", "Status"]
