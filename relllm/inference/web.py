"""The page of `relllm web`: a visitor's conversation with one or more systems, and what Gradio shows of it.

A turn runs in a thread of its own that holds the model's lock: a visitor who goes away leaves nothing locked. Nothing
leaves the machine that serves the page.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from relllm.processing.audio_relllm import SAMPLING_RATE, load_audio

from .conversation import TurnTaking
from .replies import Heard, Reply
from .text_conversation import NoWordsError

if TYPE_CHECKING:
    import gradio

ABOUT = "It hears how something is said. For research: it does not diagnose, and what it hears may be wrong."
CSS = """
.about :is(h1, p) { display: inline; margin-right: .5em; } .about h1 { font-size: 1.25rem; }
:is(.error, #microphone:not(:empty)) { border-left: 4px solid #c0362c; padding-left: 8px; font-weight: 600; }
.talk { height: calc(100dvh - 5rem); min-height: 24rem; } .systems { flex: 1 1 0 !important; min-height: 10rem; }
.chat { height: 100% !important; }
.microphone:has(#microphone:empty) { display: none; }
.chat audio { width: 100%; height: 2rem; }
.dark audio { color-scheme: dark; }
.trail { --bar: color-mix(in srgb, var(--color-accent) 35%, transparent); width: 100%; font-size: .8rem; }
.trail caption { text-align: left; }
.trail, .trail tr { border: 0 !important; }
.trail :is(td, th) { border: 0 !important; padding: 3px 4px !important; font-weight: 400; text-align: left; }
.trail td { background: linear-gradient(90deg, var(--bar) var(--share), var(--background-fill-secondary) 0); }
@media (max-width: 640px) {
  .talk { height: calc(100dvh - 8rem); }
  .systems { flex-wrap: nowrap !important; overflow-x: auto; }
  .systems > :not(:only-child) { min-width: 85% !important; }
}
:is(button, textarea, input):focus-visible { outline: 3px solid var(--color-accent) !important; }
"""
# Gradio's recorder says nothing where there is no microphone.
MICROPHONE = """async () => {
  const devices = navigator.mediaDevices;
  const say = (text) => { document.getElementById("microphone").textContent = text; };
  const reasons = {NotAllowedError: "this browser does not allow it to this page.", NotFoundError: "there is none."};
  const none = (why) => say(`No microphone: ${why} Type or upload instead.`);
  if (!devices) return none("browsers give it to https and localhost only.");
  const ask = devices.getUserMedia.bind(devices);
  devices.getUserMedia = (what) => ask(what).then((stream) => { say(""); return stream; }, (error) => {
    none(reasons[error.name] ?? `${error.message}.`);
    throw error;
  });
  if (!(await devices.enumerateDevices()).some((device) => device.kind === "audioinput")) none(reasons.NotFoundError);
}"""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
FONTS_MONO = ["ui-monospace", "monospace"]
COLUMN: dict[str, Any] = {
    **{"min_width": 220, "elem_classes": "chat", "buttons": [], "feedback_options": None},
    **{"placeholder": "Nothing has been said yet.", "render_markdown": False},  # what was said, letter by letter
}
BOX: dict[str, Any] = {
    **{"sources": ["microphone", "upload"], "file_types": ["audio"], "placeholder": "Type, record or upload"},
    **{"label": "Say something", "show_label": False, "max_lines": 4},
    "max_plain_text_length": 10**9,  # else Gradio makes a file of a long text
}
SERVED: dict[str, Any] = {
    **{"prevent_thread_lock": True, "share": False, "ssr_mode": False, "quiet": True, "footer_links": []},
    **{"max_file_size": "64mb", "state_session_capacity": 32},  # each session keeps a key-value cache
}
MOST_CHARACTERS = 4_000  # and seconds, of one turn: everybody waits for it
LONGEST_S = 120.0
RECORDINGS = "relllm-web-"  # before the number of the process, in the name of its folder
DELETE_RECORDINGS_S = (600, 3600)  # looks every ten minutes for uploads and recordings that are an hour old
MOST_TURNS = 16  # at once: the lock lets one through, the others see that they wait

Writing: TypeAlias = Generator[None, None, Reply]
Starts: TypeAlias = Mapping[str, Callable[[], TurnTaking]]


@dataclass(frozen=True)
class Status:
    """One line about what happens: `kind` is `"idle"`, `"busy"` or `"error"`."""

    kind: str
    text: str


EMPTY = Status("idle", "Record, upload or type, then send.")
STOPPED = Status("idle", "Stopped: that turn is forgotten.")
GONE = Status("error", "This page has no conversation any more. Reload it to begin one.")


class _Stopped(Exception):
    """The visitor stopped the reply."""


class _StoppableStreamer(TextIteratorStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = False
        self._decided = threading.Lock()  # taken once: by a stop, or by the reply's end, after which it is too late

    def stop(self) -> None:
        """Stop the reply, unless the conversation has it whole, and end the pieces whatever the model does."""
        self.stopped |= self._decided.acquire(blocking=False)
        self.text_queue.put(self.stop_signal)

    def check(self) -> None:
        if self.stopped:
            raise _Stopped

    def put(self, value: torch.Tensor) -> None:
        self.check()
        super().put(value)

    def end(self) -> None:
        if not self._decided.acquire(blocking=False):
            raise _Stopped
        super().end()


class Session:
    """A visitor's conversation with each system, and what the page shows: `shown`, `heard` and `status`.

    The hearing of the first system is drawn. Sessions that share a model share the `lock`.
    """

    def __init__(self, systems: Starts, lock: threading.Lock, *, max_new_tokens: int, channel: str = "mix"):
        self.systems = systems
        self.lock = lock
        self.channel = channel
        self.max_new_tokens = max_new_tokens
        self._stop = threading.Event()
        self._streamer: _StoppableStreamer | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew; a reply that is being written stops."""
        self.stop()
        # the thread of that reply has the old ones until the model's next token
        self.conversations = {name: start() for name, start in self.systems.items()}
        self.shown: dict[str, list[dict[str, Any]]] = {name: [] for name in self.systems}
        self.heard: list[Heard] = []  # in every spoken turn that was answered
        self.turns: list[dict[str, Any]] = []  # that were answered: `audio`, `seconds`, `text`, `replies` by system
        self.status = EMPTY

    def stop(self) -> None:
        """Stop the reply that is being written: its turn is forgotten, also while the model has not begun or reads."""
        self._stop.set()
        if self._streamer is not None:
            self._streamer.stop()

    def talk(self, path: str | None, text: str | None) -> Iterator[None]:
        """Say an audio file, a text, or both to every system. Look at the attributes after each step."""
        text = (text or "").strip()
        file = path and Path(path).name
        turn: dict[str, Any] = {"audio": file, "seconds": None, "text": text or None, "replies": {}}
        audio, label = None, text
        try:
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"the text has {len(text):,} characters, and a turn at most {MOST_CHARACTERS:,}.")
            if path is not None:
                audio = {"waveform": load_audio(path, channel=self.channel, max_duration_s=LONGEST_S, name=file)}
            elif not text:
                raise ValueError("there is nothing to send yet. Record, upload or type something.")
        except (ImportError, OSError, ValueError) as error:  # ImportError: what a container or a rate needs
            self.status = Status("error", f"Not sent: {error}")
            yield
            return
        if audio is not None:
            turn["seconds"] = round(len(audio["waveform"]) / SAMPLING_RATE, 3)
            label = f"{text}\n\n" * bool(text) + f"(spoken, {turn['seconds']:.1f} s)"
        said = {"role": "user", "content": label, "clip": path}
        stop = self._stop = threading.Event()
        failures = []
        for name in self.conversations:
            yield from self._ask(name, audio, turn, said, stop)
            if stop.is_set():
                if self.status.kind == "busy":  # the reply was there already
                    self.status = EMPTY
                return
            if self.status.kind == "error":
                failures.append(self.status.text)
        lost = {name: one.dropped for name, one in turn["replies"].items() if one.dropped}
        notes = failures + [f"{name}: older turns were dropped ({count})." for name, count in lost.items()]
        self.status = Status("error" if failures else "idle", " ".join(notes)) if notes else EMPTY

    def _ask(self, name: str, audio: dict | None, turn: dict, said: dict, stop: threading.Event) -> Iterator[None]:
        shown = self.shown[name]
        length = len(shown)
        shown += [dict(said), {"role": "assistant", "content": "…"}]
        waiting = self.lock.locked()
        self.status = Status("busy", "Waiting for another conversation." if waiting else f"{name} is thinking.")
        yield
        try:
            reply = yield from self._write(name, audio, turn["text"], stop)
        except _Stopped:
            del shown[length:]
            if shown is self.shown[name]:  # and not begun anew
                self.status = STOPPED
        except NoWordsError as error:  # a text-only system: not a failure of the page
            shown[-1]["content"] = f"({error})"
        except (ImportError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory and the like
            del shown[length:]
            self.status = Status("error", f"{name} did not answer: {error}")
        else:
            if not turn["replies"] and shown is self.shown[name]:
                self.turns.append(turn)
            turn["replies"][name] = reply
            shown[-1]["content"] = reply.text or "(no words)"
            if reply.heard is not None:
                shown[-2]["content"] += f"\n{reply.heard}".replace("  ", " · ")
                if shown is next(iter(self.shown.values())):
                    self.heard.append(reply.heard)
        yield

    def _write(self, name: str, audio: dict | None, text: str | None, stop: threading.Event) -> Writing:
        """Show a reply piece by piece while a thread writes it, and return it; what failed is raised."""
        conversation, shown = self.conversations[name], self.shown[name]
        streamer = self._streamer = _StoppableStreamer(conversation.tokenizer)
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "drop_oldest": True, "streamer": streamer}
        if stop.is_set():
            raise _Stopped

        def say() -> Reply:
            with self.lock:
                streamer.check()
                return conversation.say(audio, text, **how)

        executor = ThreadPoolExecutor(1)
        future = executor.submit(say)
        executor.shutdown(wait=False)  # who stops does not wait for the model
        future.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))  # also where it failed
        written = ""
        try:
            for piece in filter(None, streamer):
                streamer.check()
                written += piece
                shown[-1]["content"] = written
                self.status = Status("busy", f"{name} is replying.")
                yield
        except GeneratorExit:  # nobody listens any more
            stop.set()
            streamer.stop()
            raise
        streamer.check()
        return future.result()


@contextmanager
def recordings_folder() -> Iterator[Path]:
    """Keep what visitors send in a folder that goes with this process; remove those that killed ones left behind.

    It lies in `GRADIO_TEMP_DIR`, or with other temporary files, and can be read by this user only.
    """
    place = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
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
        os.environ["GRADIO_TEMP_DIR"] = str(place)


class Page:
    """The page for some systems, as of [`Session`]; without Gradio an `ImportError` says what to install."""

    def __init__(self, systems: Starts, *, max_new_tokens: int = 128, channel: str = "mix"):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio
        except ImportError as error:
            raise ImportError(f"The web page needs Gradio ({error}): `pip install relllm[web]`.") from error
        self.gradio = gradio
        self.lock = threading.Lock()  # one model for all visitors
        self.begin = partial(Session, systems, self.lock, max_new_tokens=max_new_tokens, channel=channel)
        self.root_path = ""
        self.blocks = self._build(systems)

    def launch(
        self, *, host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None, root_path: str = ""
    ) -> str:
        """Serve the page in threads, on a free port if it is 0, and return its URL; a taken port is an `OSError`.

        `auth` is a user and a password to ask for, `root_path` the path under which a proxy serves the page.
        """
        self.root_path = root_path.rstrip("/")
        try:  # Gradio takes any failure for a port that is taken
            family, kind, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.bind(address)
        except OSError as error:
            raise OSError(f"--host {host}: no address of this machine ({error.strerror}).") from error
        theme = self.gradio.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=FONTS_MONO)
        where: dict[str, Any] = {"server_name": host, "server_port": port or None, "root_path": self.root_path}
        try:
            return self.blocks.launch(**where, **SERVED, auth=auth, theme=theme, css=CSS)[1]
        except OSError as error:
            raise OSError(f"Port {port} of {host} is not free. Give another one, or 0 for any that is.") from error

    def close(self) -> None:
        """Stop serving."""
        self.blocks.close()

    def _build(self, systems: Starts) -> gradio.Blocks:
        gr = self.gradio
        with gr.Blocks(title="RE-LLM", analytics_enabled=False, delete_cache=DELETE_RECORDINGS_S) as blocks:
            session = gr.State(None)
            gr.Markdown(f"# RE-LLM\n{ABOUT}", elem_classes="about")
            with gr.Row():
                with gr.Column(scale=5, min_width=300, elem_classes="talk"):
                    with gr.Row(elem_classes="systems"):
                        columns = [gr.Chatbot(label=name, **COLUMN) for name in systems]
                    status = gr.HTML()
                    gr.HTML('<p id="microphone" role="alert"></p>', elem_classes="microphone")
                    box = gr.MultimodalTextbox(**BOX)
                    with gr.Row():
                        reset = gr.Button("Reset", size="sm", min_width=80)
                        files = [
                            gr.DownloadButton(f"Save {kind}", size="sm", min_width=80) for kind in ("JSON", "CSV")
                        ]
                with gr.Column(scale=2, min_width=280):
                    emotion = gr.Label(label="Emotion in the last spoken turn")
                    trail = gr.HTML()
            self.shown = shown = [*columns, status, emotion, trail, *files, box]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            at_once = {**quiet, "queue": False}
            blocks.load(self._start, None, [session, *shown], **at_once)
            blocks.load(None, js=MICROPHONE, **quiet)
            box.submit(self._talk, [session, box], shown, concurrency_limit=MOST_TURNS, **quiet)
            box.stop(lambda session: session and session.stop(), session, None, **at_once)
            clears = [column.clear for column in columns]  # the bin in the corner of a column
            gr.on([reset.click, *clears], self._reset, session, shown, **at_once)
        return blocks

    def _start(self) -> list:
        session = self.begin()
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
        """Return what says so, in the place of the status, and leaves the rest as it is."""
        skips = [self.gradio.skip()] * len(self.shown)
        skips[-6] = _as_html(GONE)
        return skips

    def _show(self, session: Session, box: dict[str, Any]) -> list:
        gr = self.gradio
        busy = session.status.kind == "busy"
        probabilities = session.heard[-1].probabilities if session.heard else {}
        files = [None, None] if busy or not session.turns else self._save(session.turns)
        return [
            *([self._message(turn, replay=not n) for turn in turns] for n, turns in enumerate(session.shown.values())),
            _as_html(session.status),
            gr.Label(probabilities or None, visible=bool(probabilities)),
            _draw_trail(session.heard),
            *(gr.DownloadButton(value=file, interactive=file is not None) for file in files),
            gr.MultimodalTextbox(submit_btn=not busy, stop_btn=busy, **box),
        ]

    def _message(self, turn: Mapping[str, Any], *, replay: bool) -> dict[str, Any]:
        """Return a turn as Gradio shows it: its text, and its clip to hear again."""
        content: list[Any] = [escape(turn["content"])]
        if turn.get("clip") and replay:  # Gradio's own player comes with its Share button
            address = f"{self.root_path}/gradio_api/file={quote(turn['clip'])}"
            content.append(self.gradio.HTML(f'<audio controls preload="none" src="{address}"></audio>', padding=False))
        return {"role": turn["role"], "content": content}

    def _save(self, turns: Sequence[Mapping[str, Any]]) -> list[str]:
        """Write a conversation as JSON and as CSV among the recordings, and return the paths."""
        import pandas

        folder = Path(tempfile.mkdtemp(dir=self.blocks.GRADIO_CACHE))
        talk, rows = [], []
        for number, turn in enumerate(turns, start=1):
            replies = turn["replies"].items()
            talk.append({**turn, "replies": {name: reply.describe() for name, reply in replies}})
            for name, reply in replies:
                heard = reply.heard.flatten() if reply.heard else {}
                rows.append({"turn": number, **turn, "system": name, "reply": reply.text, **heard})
        files = [folder / "conversation.json", folder / "conversation.csv"]
        files[0].write_text(json.dumps({"turns": talk}, indent=2, ensure_ascii=False), encoding="utf-8")
        pandas.DataFrame(rows).drop(columns="replies").to_csv(files[1], index=False)
        return [str(file) for file in files]


def _as_html(status: Status) -> str:
    """Return one line; an error is announced at once by a screen reader."""
    role = "alert" if status.kind == "error" else "status"
    return f'<p class="{status.kind}" role="{role}">{escape(status.text)}</p>'


def _draw_trail(heard: Sequence[Heard]) -> str:
    """Return a table of what was heard, each number also as a bar: two that are alike hide nothing."""
    if not heard:
        return "<p>What is heard in a spoken turn stands here.</p>"
    names = [*["emotion"] * (heard[-1].emotion is not None), *heard[-1].dimensions]
    lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in ('turn', *names))}</tr>"]
    for number, clip in reversed(list(enumerate(heard, start=1))):
        cells = {name: (f"{value:.2f}", value) for name, value in clip.dimensions.items()}
        if clip.emotion is not None:
            share = clip.probabilities[clip.emotion]
            cells["emotion"] = (f"{escape(clip.emotion)} {share:.0%}", share)
        drawn = (f'<td style="--share: {100 * cells[name][1]:.0f}%">{cells[name][0]}</td>' for name in names)
        lines.append(f"<tr><th>{number}</th>{''.join(drawn)}</tr>")
    caption = "Spoken turns, the last one first; dimensions about 0 to 1"
    return f'<table class="trail"><caption>{caption}</caption>{"".join(lines)}</table>'
