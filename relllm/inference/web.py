"""The page of `relllm web`: a visitor's conversation with one or more systems, and what Gradio shows of it.

A turn runs in a thread of its own that holds the model's lock: a visitor who goes away leaves nothing locked. Nothing
leaves the machine that serves the page.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from relllm.processing.audio_relllm import SAMPLING_RATE, load_audio

from .conversation import Conversation
from .replies import Heard, Reply
from .text_conversation import NoWordsError, TextConversation

if TYPE_CHECKING:
    import gradio

ABOUT = (
    "Speak or type. The model hears how something is said and replies to it. For research: it does not diagnose, and "
    "what it reads in a voice may be wrong."
)
CSS = """
.error { border-left: 4px solid #c0362c; padding-left: 8px; font-weight: 600; }
@media (max-width: 640px) { .chat { height: 250px !important; } }
:is(button, textarea, input):focus-visible { outline: 3px solid var(--color-accent) !important; }
"""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
COLUMN: dict[str, Any] = {
    **{"height": 340, "min_width": 260, "elem_classes": "chat", "buttons": [], "feedback_options": None},
    **{"placeholder": "Nothing has been said yet.", "render_markdown": False},  # what was said, letter by letter
}
AUDIO: dict[str, Any] = {"sources": ["microphone", "upload"], "file_types": ["audio"]}
LARGEST_UPLOAD = "64mb"
RECORDINGS = "relllm-web-"  # before the number of the process, in the name of its folder
DELETE_RECORDINGS_S = (600, 3600)  # looks every ten minutes for uploads and recordings that are an hour old
MOST_SESSIONS = 32  # each keeps a key-value cache; beyond them the one that was idle longest is dropped
MOST_TURNS = 16  # at once: the lock lets one through, the others see that they wait

Starts: TypeAlias = Mapping[str, Callable[[], Conversation | TextConversation]]


@dataclass(frozen=True)
class Status:
    """One line about what happens: `kind` is `"idle"`, `"busy"` or `"error"`."""

    kind: str
    text: str


EMPTY = Status("idle", "Record, upload or type something, then send it.")
GONE = Status("error", "This page has no conversation any more. Reload it to begin one.")


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
    """A visitor's conversation with each system, and what the page shows: `shown`, `heard` and `status`.

    The hearing of the first system is drawn. Sessions that share a model share the `lock`.
    """

    def __init__(self, systems: Starts, lock: threading.Lock, *, max_new_tokens: int, channel: str = "mix"):
        self.lock = lock
        self.channel = channel
        self.max_new_tokens = max_new_tokens
        self.conversations = {name: start() for name, start in systems.items()}
        self._stop = threading.Event()
        self._clear()

    def _clear(self) -> None:
        self.shown: dict[str, list[dict[str, str]]] = {name: [] for name in self.conversations}
        self.heard: list[Heard] = []  # in every spoken turn that was answered
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
        """Say an audio file, a text, or both to every system. Look at the attributes after each step."""
        text = (text or "").strip()
        audio, label = None, text
        try:
            if path is not None:
                audio = {"waveform": load_audio(path, channel=self.channel, name=Path(path).name)}
            elif not text:
                raise ValueError("there is nothing to send yet. Record, upload or type something.")
        except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
            self.status = Status("error", f"Not sent: {error}")
            yield
            return
        if audio is not None:
            label = f"{text}\n\n" * bool(text) + f"(spoken, {len(audio['waveform']) / SAMPLING_RATE:.1f} s)"
        stop = self._stop = threading.Event()
        failures = []
        for name in self.conversations:
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
        try:
            reply = yield from self._write(name, audio, text, stop)
        except _Stopped:
            del shown[length:]
            self.status = Status("idle", "Stopped: that turn is forgotten.")
        except NoWordsError as error:  # a text-only system: not a failure of the page
            shown[-1]["content"] = f"({error})"
        except (ImportError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory and the like
            del shown[length:]
            self.status = Status("error", f"{name} did not answer: {error}")
        else:
            shown[-1]["content"] = reply.text or "(no words)"
            if reply.heard is not None:
                shown[-2]["content"] += f"\n{reply.heard}"
                if name == next(iter(self.shown)):
                    self.heard.append(reply.heard)
        yield

    def _write(
        self, name: str, audio: dict | None, text: str | None, stop: threading.Event
    ) -> Generator[None, None, Reply]:
        """Show a reply piece by piece while a thread writes it, and return it; what failed is raised."""
        conversation = self.conversations[name]
        streamer = _StoppableStreamer(conversation.tokenizer, stop)

        def say() -> Reply:
            with self.lock:
                if stop.is_set():
                    raise _Stopped
                return conversation.say(audio, text, streamer=streamer, max_new_tokens=self.max_new_tokens)

        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(say)
            future.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
            written = ""
            try:
                for piece in filter(None, streamer):
                    written += piece
                    self.shown[name][-1]["content"] = written
                    self.status = Status("busy", f"{name} is replying.")
                    yield
            except GeneratorExit:  # nobody listens any more
                stop.set()
                raise
            return future.result()


@contextmanager
def recordings_folder() -> Iterator[Path]:
    """Keep what visitors send in a folder that goes with this process; remove those that killed ones left behind.

    It lies in `GRADIO_TEMP_DIR`, or with other temporary files, and can be read by this user only.
    """
    given = os.environ.get("GRADIO_TEMP_DIR")
    place = Path(given or tempfile.gettempdir())
    folder = place / f"{RECORDINGS}{os.getpid()}"
    for left in place.glob(f"{RECORDINGS}*"):
        process = left.name.removeprefix(RECORDINGS)
        if process.isdecimal() and (left == folder or not Path("/proc", process).exists()):  # ours, and it has ended
            shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("GRADIO_TEMP_DIR")
        if given is not None:
            os.environ["GRADIO_TEMP_DIR"] = given


class Page:
    """The page for some systems, as of [`Session`]; without Gradio an `ImportError` says what to install."""

    def __init__(self, systems: Starts, *, max_new_tokens: int = 128, channel: str = "mix"):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio
        except ImportError as error:
            raise ImportError(f"The web page needs Gradio ({error}): `pip install relllm[web]`.") from error
        self.gradio = gradio
        self.systems = systems
        self.told: dict[str, Any] = {"max_new_tokens": max_new_tokens, "channel": channel}
        self.lock = threading.Lock()  # one model for all visitors
        self.blocks = self._build()

    def launch(self, *, host: str = "127.0.0.1", port: int | None = 7860, block: bool = True) -> str:
        """Serve the page, on a free port if it is `None`, and return its URL; a port that is taken is an `OSError`."""
        theme = self.gradio.themes.Base(
            primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
        )
        where: dict[str, Any] = {"server_name": host, "server_port": port, "prevent_thread_lock": not block}
        shut: dict[str, Any] = {"share": False, "ssr_mode": False, "quiet": True, "footer_links": []}
        limits: dict[str, Any] = {"max_file_size": LARGEST_UPLOAD, "state_session_capacity": MOST_SESSIONS}
        _, url, _ = self.blocks.launch(**where, **shut, **limits, theme=theme, css=CSS)
        return url

    def close(self) -> None:
        """Stop serving."""
        self.blocks.close()

    def _build(self) -> gradio.Blocks:
        gr = self.gradio
        with gr.Blocks(title="RE-LLM", analytics_enabled=False, delete_cache=DELETE_RECORDINGS_S) as blocks:
            session = gr.State(None)
            gr.Markdown(f"# RE-LLM\n{ABOUT}")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    with gr.Row():
                        columns = [gr.Chatbot(label=name, **COLUMN) for name in self.systems]
                    status = gr.HTML()
                    box = gr.MultimodalTextbox(label="Say something", placeholder="Type, record or upload", **AUDIO)
                    reset = gr.Button("Reset")
                with gr.Column(scale=1, min_width=280):
                    emotion = gr.Label(label="Emotion in the last spoken turn")
                    dimensions = gr.ScatterPlot(
                        x="spoken turn", y="value", color="dimension", title="Dimensions, about 0 to 1", buttons=[]
                    )
            shown = [*columns, status, emotion, dimensions, box]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            at_once = {**quiet, "queue": False}
            blocks.load(self._start, None, [session, *shown], **at_once)
            box.submit(self._talk, [session, box], shown, concurrency_limit=MOST_TURNS, **quiet)
            box.stop(_stop, session, None, **at_once)
            clears = [column.clear for column in columns]  # the bin in the corner of a column
            gr.on([reset.click, *clears], self._reset, session, shown, **at_once)
        return blocks

    def _start(self) -> list:
        session = Session(self.systems, self.lock, **self.told)
        return [session, *self._show(session, {"value": None})]

    def _talk(self, session: Session | None, said: dict) -> Iterator[list]:
        if session is None:
            yield self._gone()
            return
        files, text = said["files"], said["text"]
        steps = session.talk(files[0] if files else None, text)
        next(steps)
        # a bad clip is not to be sent again, the words beside it may be
        yield self._show(session, {"value": {"text": "" if session.status.kind == "busy" else text, "files": []}})
        for _ in steps:
            yield self._show(session, {})
        yield self._show(session, {})

    def _reset(self, session: Session | None) -> list:
        if session is None:
            return self._gone()
        session.reset()
        return self._show(session, {"value": None})

    def _gone(self) -> list:
        skips = [self.gradio.skip()] * (len(self.systems) + 4)
        skips[len(self.systems)] = _as_html(GONE)
        return skips

    def _show(self, session: Session, box: dict[str, Any]) -> list:
        gr = self.gradio
        busy = session.status.kind == "busy"
        shown = session.shown.values()
        probabilities = session.heard[-1].probabilities if session.heard else {}
        columns = ([{**turn, "content": escape(turn["content"])} for turn in turns] for turns in shown)
        return [
            *columns,
            _as_html(session.status),
            gr.Label(probabilities or None, visible=bool(probabilities)),
            self._plot(session.heard),
            gr.MultimodalTextbox(submit_btn=not busy, stop_btn=busy, **box),
        ]

    def _plot(self, heard: Sequence[Heard]) -> gradio.ScatterPlot:
        import pandas

        rows = [
            {"spoken turn": str(turn), "dimension": name, "value": value}
            for turn, clip in enumerate(heard, start=1)
            for name, value in clip.dimensions.items()
        ]
        values = [0.0, 1.0, *(value for clip in heard for value in clip.dimensions.values())]
        turns = [str(turn + 1) for turn in range(len(heard))]
        limits: list[float | None] = [min(values) - 0.1, max(values) + 0.1]
        return self.gradio.ScatterPlot(pandas.DataFrame(rows), y_lim=limits, sort=turns, visible=bool(rows))


def _stop(session: Session | None) -> None:
    if session is not None:
        session.stop()


def _as_html(status: Status) -> str:
    """Return one line; an error is announced at once by a screen reader."""
    role = "alert" if status.kind == "error" else "status"
    return f'<p class="{status.kind}" role="{role}">{escape(status.text)}</p>'
