"""The web page: a visitor's session without a browser, then the page in headless Chromium with a WAV as microphone."""

import asyncio
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import httpx
import numpy as np
import pytest
import soundfile
import torch
from processes import ForkServer, run_command
from tiny_models import RATE, clip, tiny_config, tiny_model, tiny_processor

from relllm.inference.conversation import Conversation
from relllm.inference.text_conversation import TextConversation
from relllm.inference.web import EMPTY, Page, Session, Starts, Status, recordings_folder

TOKENS = 6


@pytest.fixture(scope="module", autouse=True)
def no_loops_left_open() -> Iterator[None]:
    """Gradio makes an event loop for each of its locks, outside of one, and closes none."""
    pytest.importorskip("gradio", reason="the page needs Gradio (relllm[web])")  # here: its import takes seconds
    with pytest.MonkeyPatch.context() as patch:
        for module in ("utils", "queueing", "routes"):
            patch.setattr(f"gradio.{module}.safe_get_lock", asyncio.Lock, raising=False)
            patch.setattr(f"gradio.{module}.safe_get_stop_event", asyncio.Event, raising=False)
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def systems(model, processor) -> Starts:
    bare = tiny_config(fusion="none")
    second, its_processor = tiny_model(bare), tiny_processor(bare)
    return {
        "RE-LLM": partial(Conversation, model, processor),
        "speech only": partial(Conversation, second, its_processor),
        "text only": partial(TextConversation.inside, model, processor),
    }


@pytest.fixture
def session(systems) -> Session:
    return Session(systems, threading.Lock(), max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("audio") / "question.wav"
    soundfile.write(path, clip(1.5), RATE)
    return str(path)


def talk(session: Session, path: str | None = None, text: str | None = None) -> list[Status]:
    return [session.status for _ in session.talk(path, text)]


# --- a session -------------------------------------------------------------------------------------------------------


def test_every_system_replies_as_it_does_alone(session, systems, wav) -> None:
    alone = {name: start() for name, start in systems.items()}
    for path, text in ((None, "Hello."), (wav, None), (wav, "What is it?"), (None, "And you?")):
        talk(session, path, text)
        for name in ("RE-LLM", "speech only"):
            assert session.shown[name][-1]["content"] == alone[name].say(path, text, max_new_tokens=TOKENS).text
    assert len(session.shown["RE-LLM"]) == 8 and len(session.heard) == 2
    assert session.status == EMPTY


def test_a_reply_is_shown_piece_by_piece(session, processor, monkeypatch) -> None:
    conversation = session.conversations["RE-LLM"]
    tokens = processor.tokenizer.encode("You sound upset today.") + [processor.tokenizer.eos_token_id]
    prompt: list[int] = []

    def allowed(_row: int, ids: torch.Tensor) -> list[int]:
        prompt.append(len(ids))
        return [tokens[len(ids) - prompt[0]]]

    session.max_new_tokens = len(tokens)
    monkeypatch.setattr(conversation, "say", partial(conversation.say, prefix_allowed_tokens_fn=allowed))
    seen = []
    for _ in session.talk(None, "Hello."):
        if session.shown["speech only"] == []:
            seen.append(session.shown["RE-LLM"][-1]["content"].strip())
    pieces = seen[1:]  # words, or from Transformers 5.24 on tokens
    assert seen[0] == "…" and seen[-1] == "You sound upset today." and len(pieces) >= 5
    assert all(after.startswith(before) for before, after in zip(pieces, pieces[1:], strict=False))


def test_a_turn_is_thinking_then_replying_then_over(session, wav) -> None:
    kinds = [status.kind for status in talk(session, wav)]
    assert kinds[0] == "busy" and session.status.kind == "idle"


def test_a_text_only_system_without_words_says_so_in_its_column(session, wav) -> None:
    talk(session, wav)
    assert "no words to read" in session.shown["text only"][-1]["content"]
    assert session.status == EMPTY
    talk(session, None, "Hello.")
    assert len(session.conversations["text only"].messages) == 3  # system, the typed turn, its reply


def test_bad_audio_is_an_error_and_the_conversation_stays(session, tmp_path) -> None:
    talk(session, None, "Hello.")
    before = {name: list(shown) for name, shown in session.shown.items()}
    (tmp_path / "bad.wav").write_text("this is no audio")
    for path in ("bad.wav", "gone.wav"):
        talk(session, str(tmp_path / path))
        assert session.status.kind == "error" and path in session.status.text
    talk(session, None, "  ")
    assert session.status.kind == "error" and "there is nothing to send" in session.status.text
    assert session.shown == before
    talk(session, None, "And you?")
    assert session.status == EMPTY and len(session.shown["RE-LLM"]) == 4


def test_a_model_that_fails_is_an_error_and_the_conversation_stays(session, monkeypatch) -> None:
    talk(session, None, "Hello.")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.conversations["RE-LLM"], "say", fail)
    talk(session, None, "And you?")
    monkeypatch.undo()
    assert session.status == Status("error", "RE-LLM did not answer: out of memory")
    assert len(session.shown["RE-LLM"]) == 2 and len(session.shown["speech only"]) == 4
    assert not session.lock.locked()


def test_a_stopped_reply_is_forgotten(session) -> None:
    talk(session, None, "Hello.")
    messages = session.conversations["RE-LLM"].messages
    for number, _ in enumerate(session.talk(None, "And you?")):
        if number == 0:
            session.stop()
    assert "forgotten" in session.status.text
    assert len(session.shown["RE-LLM"]) == len(session.shown["speech only"]) == 2
    assert session.conversations["RE-LLM"].messages == messages
    talk(session, None, "And you?")
    assert len(session.shown["RE-LLM"]) == 4


def test_a_visitor_who_leaves_in_the_middle_locks_nothing(session) -> None:
    steps = session.talk(None, "Hello.")
    next(steps)
    next(steps)
    steps.close()
    assert session.lock.acquire(timeout=30)
    session.lock.release()


def test_a_reset_in_the_middle_of_a_reply_empties_everything(session) -> None:
    for number, _ in enumerate(session.talk(None, "Hello.")):
        if number == 1:
            session.reset()
    assert session.shown == {name: [] for name in session.conversations} and session.heard == []
    assert all(len(conversation.messages) == 1 for conversation in session.conversations.values())


def test_sessions_at_the_same_time_do_not_mix(systems, wav) -> None:
    lock = threading.Lock()
    sessions = [Session(systems, lock, max_new_tokens=TOKENS) for _ in range(3)]
    said = [[(None, f"I am number {number}.")] * 2 + [(wav, None)] for number in range(3)]

    def run(number: int) -> None:
        for path, text in said[number]:
            talk(sessions[number], path, text)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, session in enumerate(sessions):
        alone = Session(systems, threading.Lock(), max_new_tokens=TOKENS)
        for path, text in said[number]:
            talk(alone, path, text)
        assert session.shown == alone.shown and session.heard == alone.heard


def test_what_was_heard_stands_beside_a_spoken_turn(session, wav) -> None:
    talk(session, wav)
    talk(session, None, "Hello.")
    assert session.shown["RE-LLM"][0]["content"] == f"(spoken, 1.5 s)\n{session.heard[0]}"
    assert session.shown["text only"][0]["content"] == "(spoken, 1.5 s)"
    assert session.shown["RE-LLM"][2]["content"] == "Hello."


def test_a_channel_of_a_recording_is_heard(model, processor, tmp_path) -> None:
    call = np.stack([clip(0.6), clip(0.6, seed=1)], axis=1)
    soundfile.write(tmp_path / "call.wav", call, RATE, subtype="FLOAT")
    page = Page({"RE-LLM": partial(Conversation, model, processor)}, max_new_tokens=1, channel="right")
    session, *_ = page._start()
    talk(session, str(tmp_path / "call.wav"))
    assert str(session.heard[0]) == str(Conversation(model, processor).say(call[:, 1], max_new_tokens=1).heard)


def test_one_who_has_to_wait_is_told(session) -> None:
    session.lock.acquire()
    steps = session.talk(None, "Hello.")
    next(steps)
    assert "Waiting" in session.status.text
    session.lock.release()
    assert [None for _ in steps] and session.status == EMPTY


# --- the page --------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)
no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: `apt-get install chromium`")


@pytest.fixture(scope="module")
def url(systems, wav) -> Iterator[str]:
    page = Page(systems, max_new_tokens=TOKENS)
    yield page.launch(port=None, block=False)
    page.close()


@pytest.fixture(scope="module")
def browser(wav) -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-audio-capture={wav}"]
        )
        yield chromium
        chromium.close()


class Visitor:
    """A page in a browser context of its own, with what it asked the network for."""

    def __init__(self, browser, url: str, width: int):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, permissions=["microphone"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.sees(EMPTY.text)

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def type(self, text: str) -> None:
        self.page.get_by_placeholder("Type, record or upload").fill(text)
        self.page.keyboard.press("Enter")

    def waits_for_reply(self, number: int) -> None:
        """Of the last column: then all have replied."""
        self.page.locator(".chat").last.get_by_test_id("bot").nth(number - 1).wait_for()
        self.page.get_by_role("button", name="Submit").wait_for()
        self.sees(EMPTY.text)

    def said(self, by: str, column: int = 0) -> list[str]:
        """What stands in a column, by `"user"` or `"bot"`."""
        return self.page.locator(".chat").nth(column).get_by_test_id(by).all_inner_texts()


@pytest.fixture
def visit(browser, url) -> Iterator:
    visitors: list[Visitor] = []

    def open_page(width: int = 1280) -> Visitor:
        visitors.append(Visitor(browser, url, width))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        elsewhere = [address for address in visitor.requests if not address.startswith((url, "data:", "blob:"))]
        assert elsewhere == [] and visitor.errors == []
        assert visitor.page.get_by_role("button", name=re.compile("share", re.IGNORECASE)).count() == 0
        visitor.context.close()


def squeezed(text: str) -> str:
    """As a browser shows it, whatever white space and control characters a random model writes."""
    return re.sub(r"[\s\x00-\x1f]+", "", text)


@pytest.mark.slow
@pytest.mark.browser
@no_browser
def test_typed_turns_are_answered_and_tabs_do_not_mix(visit, systems) -> None:
    first, second = visit(), visit()
    alone = {name: start() for name, start in systems.items()}
    first.type("Hello <b>you</b>.")
    second.type("Somebody else.")
    first.waits_for_reply(1)
    second.waits_for_reply(1)
    first.type("And you?")
    first.waits_for_reply(2)
    assert first.said("user") == ["Hello <b>you</b>.", "And you?"] and second.said("user") == ["Somebody else."]
    for column, conversation in enumerate(alone.values()):
        expected = [conversation.say(text=text, max_new_tokens=TOKENS).text for text in first.said("user")]
        assert [squeezed(text) for text in first.said("bot", column)] == [squeezed(text) for text in expected]
    second.press("Reset")
    second.sees("Nothing has been said yet.")
    assert second.said("user") == [] and len(first.said("user")) == 2


@pytest.mark.slow
@pytest.mark.browser
@no_browser
def test_a_recording_is_heard_and_drawn(visit) -> None:
    visitor = visit()
    visitor.press("Record audio")
    visitor.press("Start recording")
    visitor.page.wait_for_timeout(1500)
    visitor.press("Stop recording")
    visitor.press("Attach audio")
    visitor.page.get_by_role("button", name="Remove file").wait_for()
    visitor.press("Submit")
    visitor.waits_for_reply(1)
    spoken = visitor.said("user")[0]
    assert re.fullmatch(r"\(spoken, [\d.]+ s\)\s+[a-z]+ \d+% +arousal \S+ +dominance \S+ +valence \S+", spoken)
    assert "no words to read" in visitor.said("bot", 2)[0]
    most, *others = visitor.page.get_by_test_id("label-output-value").all_inner_texts()
    assert most in spoken and others == []
    assert len(visitor.page.get_by_text(re.compile(r"^\d+%$")).all()) == 5  # one an emotion
    visitor.page.get_by_text("Dimensions, about 0 to 1").wait_for()
    assert visitor.page.locator(".plot_marks path").count() == 3  # one a dimension


@pytest.mark.slow
@pytest.mark.browser
@no_browser
def test_bad_audio_shows_an_error_and_the_conversation_goes_on(visit, tmp_path) -> None:
    visitor = visit()
    visitor.type("Hello.")
    visitor.waits_for_reply(1)
    bad = tmp_path / "bad.wav"
    bad.write_text("this is no audio")
    visitor.page.locator("input[type=file]").first.set_input_files(str(bad))
    visitor.page.get_by_role("button", name="Remove file").wait_for()
    visitor.press("Submit")
    visitor.page.get_by_role("alert").get_by_text("bad.wav").wait_for()
    assert visitor.said("user") == ["Hello."]
    visitor.type("And you?")
    visitor.waits_for_reply(2)
    assert visitor.said("user") == ["Hello.", "And you?"]


@pytest.mark.slow
@pytest.mark.browser
@no_browser
def test_on_a_phone_everything_fits_and_the_keyboard_reaches_it(visit) -> None:
    visitor = visit(width=375)
    page = visitor.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 375)
    page.get_by_role("button", name="Upload a file").focus()
    names = []
    for _ in range(4):
        page.keyboard.press("Tab")
        names.append(page.evaluate("(e => e.ariaLabel || e.innerText || e.placeholder)(document.activeElement)"))
    assert names == ["Type, record or upload", "Record audio", "Submit", "Reset"]
    page.get_by_placeholder("Type, record or upload").focus()
    page.keyboard.type("Hello.")
    page.keyboard.press("Enter")
    visitor.waits_for_reply(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_without_gradio_the_page_says_what_to_install(systems, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"relllm\[web\]"):
        Page(systems)


def test_what_is_shown_is_what_was_heard_and_becomes_no_markup(systems, session, wav) -> None:
    page = Page(systems)
    talk(session, wav)
    talk(session, wav, "<script>alert(1)</script>")
    session.status = Status("error", "<b>no</b>")
    *columns, status, emotion, dimensions, _ = page._show(session, {})
    assert not any("<script>" in message["content"] for column in columns for message in column)
    assert 'role="alert"' in status and "<b>" not in status
    confidences = {each["label"]: each["confidence"] for each in emotion.value["confidences"]}
    assert confidences == pytest.approx(session.heard[-1].probabilities)
    drawn = {(row[0], row[1]): row[2] for row in dimensions.value["data"]}
    expected = {
        (turn, name): value
        for turn, heard in zip("12", session.heard, strict=True)
        for name, value in heard.dimensions.items()
    }
    assert drawn == pytest.approx(expected)
    page.close()


def test_a_page_whose_conversation_is_gone_says_so(systems) -> None:
    page = Page(systems)
    for outputs in (next(page._talk(None, {"text": "Hello.", "files": []})), page._reset(None)):
        assert len(outputs) == len(systems) + 4
        assert "Reload it" in outputs[len(systems)]
    page.close()


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # Gradio's probe of a port that is taken
def test_the_command_says_why_it_cannot_serve(tmp_path, model, processor, url) -> None:
    from typer.testing import CliRunner

    from relllm.cli import app

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    taken = url.rsplit(":", 1)[1].strip("/")
    result = CliRunner().invoke(app, ["web", str(tmp_path), "--port", taken, "--device", "cpu"])
    assert result.exit_code == 1 and taken in result.output
    del result  # its traceback holds the socket
    gc.collect()


def test_recordings_go_with_the_process_and_those_of_a_killed_one_when_the_next_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"relllm-web-{ended.pid}" / "deep").mkdir(parents=True)
    (tmp_path / f"relllm-web-{os.getppid()}").mkdir()  # of one that runs
    (tmp_path / "other").mkdir()
    (tmp_path / "relllm-web-notes").mkdir()  # a person's own
    with recordings_folder() as folder:
        (folder / "clip.wav").write_bytes(b"a voice")
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and folder.stat().st_mode & 0o077 == 0
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {folder.name, f"relllm-web-{os.getppid()}", "other", "relllm-web-notes"}
    assert not folder.exists() and os.environ["GRADIO_TEMP_DIR"] == str(tmp_path)


@pytest.mark.slow
def test_a_signal_ends_the_command_and_deletes_what_was_uploaded(
    fork_server: ForkServer, tmp_path, model, processor, wav
) -> None:
    model.save_pretrained(tmp_path / "re-llm")
    processor.save_pretrained(tmp_path / "re-llm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "temporary").mkdir()
    command = ["web", str(tmp_path / "re-llm"), "--port", str(port), "--device", "cpu"]
    process = fork_server.start(run_command, *command, GRADIO_TEMP_DIR=str(tmp_path / "temporary"))
    try:
        for _ in range(300):
            with suppress(httpx.TransportError), open(wav, "rb") as file:
                address = f"http://127.0.0.1:{port}/gradio_api/upload"
                httpx.post(address, files={"files": ("a.wav", file)}, timeout=30).raise_for_status()
                break
            time.sleep(0.2)
        assert [path.name for path in (tmp_path / "temporary").rglob("*.wav")] == ["a.wav"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and list((tmp_path / "temporary").iterdir()) == []
    finally:
        process.kill()
        process.wait(30)
