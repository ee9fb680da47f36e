"""The Gradio page: layout and which event does what. What is said and shown is in `session.py`.

Nothing leaves the machine that serves it: no analytics, no fonts or scripts from elsewhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from .drawing import CSS, draw_hearing, draw_status, draw_trail
from .session import Session, Start, Status

if TYPE_CHECKING:
    import gradio

ABOUT = (
    "Speak or type. The model hears how something is said and replies to it. For research: it does not diagnose, and "
    "what it reads in a voice may be wrong."
)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
LARGEST_UPLOAD = "64mb"
DELETE_RECORDINGS_S = (600, 3600)  # looks every ten minutes for uploads and recordings that are an hour old
MOST_SESSIONS = 32  # each keeps a key-value cache; beyond them the one that was idle longest is dropped
GONE = Status("error", "This page has no conversation any more. Reload it to begin one.")


class Page:
    """The page for some systems.

    Args:
        systems (`Mapping` of `str` to [`System`]): By name; the first is the one whose hearing is shown.
        max_new_tokens (`int`, *optional*, defaults to 128): Longest reply.

    Raises:
        ImportError: If Gradio is missing (`pip install relllm[web]`).
    """

    def __init__(self, systems: Mapping[str, Start], *, max_new_tokens: int = 128):
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio
        except ImportError as error:
            raise ImportError(f"The web page needs Gradio ({error}): `pip install relllm[web]`.") from error
        self.gradio = gradio
        self.systems = systems
        self.max_new_tokens = max_new_tokens
        self.lock = threading.Lock()  # one model for all visitors
        self.blocks = self._build()

    def launch(self, *, host: str = "127.0.0.1", port: int | None = 7860, block: bool = True) -> str:
        """Serve the page.

        Args:
            host (`str`, *optional*, defaults to `"127.0.0.1"`): Address; the default is seen from this machine only.
            port (`int`, *optional*, defaults to 7860): `None` for a free one.
            block (`bool`, *optional*, defaults to `True`): Return only when it ends.

        Returns:
            `str`: Its local URL.

        Raises:
            OSError: If the port is taken.
        """
        theme = self.gradio.themes.Base(
            primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
        ).set(  # dark enough for white letters on it
            color_accent="*primary_700",
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
        )
        _, url, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=not block,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            state_session_capacity=MOST_SESSIONS,
            theme=theme,
            css=CSS,
        )
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
                        self.columns = [self._chatbot(name) for name in self.systems]
                    self.status = gr.HTML(draw_status(Status("idle", "Loading.")))
                    self.text = gr.Textbox(label="Type", placeholder="How was your day?", lines=1, max_lines=4)
                    self.audio = gr.Audio(
                        label="Speak or upload", sources=["microphone", "upload"], type="filepath", editable=False
                    )
                    with gr.Row():
                        self.send = gr.Button("Send", variant="primary", min_width=90, interactive=False)
                        self.stop = gr.Button("Cancel", min_width=90, interactive=False)
                        self.reset = gr.Button("Reset", min_width=90)
                with gr.Column(scale=1, min_width=280):
                    gr.Markdown("## What was heard")
                    self.hearing = gr.HTML(draw_hearing([]))
                    self.trail = gr.HTML(draw_trail([]))
            self._wire(blocks, session)
        return blocks

    def _chatbot(self, name: str) -> gradio.Chatbot:
        return self.gradio.Chatbot(
            label=name,
            height=340,
            min_width=260,
            elem_classes="chat",
            buttons=[],
            placeholder="Nothing has been said yet.",
            feedback_options=None,
            render_markdown=False,  # what was said, letter by letter
        )

    def _wire(self, blocks: gradio.Blocks, session: gradio.State) -> None:
        shown = [*self.columns, self.status, self.hearing, self.trail, self.send, self.stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = {**quiet, "queue": False}
        blocks.load(self._start, None, [session, *shown], **at_once)
        self.gradio.on(
            [self.send.click, self.text.submit],
            self._talk,
            [session, self.audio, self.text],
            [*shown, self.audio, self.text],
            concurrency_limit=16,  # the lock lets one through; the others see that they wait
            **quiet,
        )
        self.stop.click(_stop, session, None, **at_once)
        clears = [column.clear for column in self.columns]  # the bin in the corner of a column
        self.gradio.on([self.reset.click, *clears], self._reset, session, [*shown, self.audio, self.text], **at_once)
        for event, kind, words in (
            (self.audio.start_recording, "busy", "Recording. Stop it when you have finished."),
            (self.audio.stop_recording, "idle", "Recorded. Send it, or record again."),
            (self.audio.upload, "idle", "Uploaded. Send it."),
        ):
            line = draw_status(Status(kind, words))
            event(lambda line=line: line, None, self.status, **at_once)

    def _start(self) -> list:
        session = Session(self.systems, self.lock, max_new_tokens=self.max_new_tokens)
        return [session, *self._show(session)]

    def _talk(self, session: Session | None, path: str | None, text: str | None) -> Iterator[list]:
        gr = self.gradio
        if session is None:
            yield self._gone()
            return
        steps = session.talk(path, text)
        for number, _ in enumerate(steps):
            sent = number == 0 and session.status.kind == "busy"
            failed = session.status.kind == "error" and number == 0
            audio = None if sent or (failed and path) else gr.skip()  # a bad clip is not to be sent again
            yield [*self._show(session), audio, "" if sent else gr.skip()]
        yield [*self._show(session), gr.skip(), gr.skip()]

    def _gone(self) -> list:
        skips = [self.gradio.skip()] * (len(self.systems) + 7)
        skips[len(self.systems)] = draw_status(GONE)
        return skips

    def _reset(self, session: Session | None) -> list:
        if session is None:
            return self._gone()
        session.reset()
        return [*self._show(session), None, ""]

    def _show(self, session: Session) -> list:
        gr = self.gradio
        busy = session.status.kind == "busy"
        return [
            *(
                [{**message, "content": escape(message["content"])} for message in session.shown[name]]
                for name in self.systems
            ),
            draw_status(session.status),
            draw_hearing(session.heard),
            draw_trail(session.heard),
            gr.Button(interactive=not busy),
            gr.Button(interactive=busy),
        ]


def _stop(session: Session | None) -> None:
    if session is not None:
        session.stop()


__all__ = ["Page"]
