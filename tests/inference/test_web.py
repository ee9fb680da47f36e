"""The web page: a visitor's session without a browser, then the page in headless Chromium with a WAV as microphone."""

import asyncio
import csv
import gc
import json
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
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch
from processes import ForkServer, run_command
from tiny_models import RATE, clip, tiny_config, tiny_model, tiny_processor

from relllm.inference.conversation import Conversation
from relllm.inference.inference_settings import PageSettings, TalkSettings
from relllm.inference.text_conversation import TextConversation
from relllm.inference.web import EMPTY, STOPPED, Page, Session, Starts, Status, recordings_folder

TOKENS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),  # Gradio's, with pandas 3
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # Gradio's probe of a port that is taken
]


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


def test_what_one_system_replied_is_kept_where_the_next_is_stopped(session) -> None:
    for _ in session.talk(None, "Hello."):
        if session.shown["speech only"]:
            session.stop()
    assert [list(turn["replies"]) for turn in session.turns] == [["RE-LLM"]]
    assert len(session.shown["RE-LLM"]) == 2 and session.shown["speech only"] == []


def test_beginning_anew_does_not_wait_for_another_conversation(session) -> None:
    talk(session, None, "Hello.")
    session.lock.acquire()  # would wait for ever
    session.reset()
    assert session.turns == [] and len(session.conversations["RE-LLM"].messages) == 1


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
    heard = str(session.heard[0]).replace("  ", " · ")
    assert session.shown["RE-LLM"][0]["content"] == f"(spoken, 1.5 s)\n{heard}"
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


def test_what_is_too_long_is_not_sent_and_the_limit_is_named(session, tmp_path) -> None:
    talk(session, None, "x" * 40_000)
    assert session.status == Status("error", "Not sent: the text has 40,000 characters, and a turn at most 4,000.")
    soundfile.write(tmp_path / "long.wav", clip(121), RATE)
    talk(session, str(tmp_path / "long.wav"))
    assert "long.wav: the audio lasts 121.0 s, the limit is 120.0 s." in session.status.text
    assert "`" not in session.status.text and session.shown["RE-LLM"] == []


@pytest.mark.parametrize("where", ["waits for another", "reads"])
def test_who_stops_does_not_wait_for_the_model(where: str, session, monkeypatch) -> None:
    goes_on = threading.Event()
    if where == "waits for another":
        session.lock.acquire()
    else:
        generate = session.conversations["RE-LLM"].model.generate
        monkeypatch.setattr(
            session.conversations["RE-LLM"].model,
            "generate",
            lambda **options: goes_on.wait(60) and generate(**options),
        )
    steps = session.talk(None, "Hello.")
    next(steps)
    threading.Timer(0.2, session.stop).start()
    assert [None for _ in steps] and session.status == STOPPED and session.shown["RE-LLM"] == []
    goes_on.set()
    if where == "waits for another":
        session.lock.release()
    talk(session, None, "And you?")
    assert [one["content"] for one in session.shown["RE-LLM"][::2]] == ["And you?"] and session.status == EMPTY
    assert len(session.conversations["RE-LLM"].messages) == 3


def test_older_turns_are_dropped_and_that_is_said(session) -> None:
    for _ in range(2):
        talk(session, None, "a long story " * 60)
    assert session.status.kind == "idle" and "RE-LLM: older turns were dropped (1)." in session.status.text
    assert len(session.shown["RE-LLM"]) == 4 and len(session.conversations["RE-LLM"].messages) == 3


def test_a_conversation_is_saved_as_json_and_csv(systems, session, wav) -> None:
    page = Page(systems)
    talk(session, wav, "Listen.")
    talk(session, None, "Hello, world.")
    *_, as_json, as_csv, _box = page._show(session, {})
    turns = json.loads(Path(as_json.value["path"]).read_text())["turns"]
    assert [(turn["audio"], turn["seconds"], turn["text"]) for turn in turns] == [
        ("question.wav", 1.5, "Listen."),
        (None, None, "Hello, world."),
    ]
    for name in ("RE-LLM", "speech only"):
        said = [turn["replies"][name]["reply"] or "(no words)" for turn in turns]
        assert said == [one["content"] for one in session.shown[name][1::2]]
    assert turns[0]["replies"]["RE-LLM"]["probabilities"] == session.heard[0].probabilities
    assert list(turns[0]["replies"]) == ["RE-LLM", "speech only"]  # nobody wrote the words down
    with open(as_csv.value["path"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["turn"], row["system"]) for row in rows] == [
        ("1", "RE-LLM"),
        ("1", "speech only"),
        ("2", "RE-LLM"),
        ("2", "speech only"),
        ("2", "text only"),
    ]
    heard = session.heard[0]
    assert float(rows[0][f"p_{heard.emotion}"]) == pytest.approx(heard.probabilities[heard.emotion])
    assert float(rows[0]["valence"]) == pytest.approx(heard.dimensions["valence"]) and rows[2]["valence"] == ""
    page.close()


def test_a_page_with_a_password_behind_a_proxy(systems) -> None:
    page = Page(systems)
    url = page.launch(port=0, auth=("ann", "secret"), root_path="/talk/")
    with httpx.Client(base_url=url) as visitor:
        assert visitor.get("config").status_code == 401
        assert visitor.post("gradio_api/upload", files={"files": b"a voice"}).status_code == 401
        assert visitor.post("login", data={"username": "ann", "password": "wrong"}).status_code == 400
        visitor.post("login", data={"username": "ann", "password": "secret"}).raise_for_status()
        assert visitor.get("config").json()["root"].endswith("/talk")
    assert (
        "/talk/gradio_api/file=/a%20b.wav"
        in page._message({"role": "user", "content": "", "clip": "/a b.wav"}, replay=True)["content"][1].value
    )
    page.close()


@pytest.mark.parametrize("auth", ["", "ann", ":secret", "ann:"])
def test_a_user_without_a_password_is_refused(auth: str) -> None:
    with pytest.raises(ValueError, match="expected USER:PASSWORD"):
        PageSettings(model="x", auth=auth)
    assert PageSettings(model="x", auth="ann:a:b").visitor == ("ann", "a:b")


# --- the page --------------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HEIGHTS = {1280: 720, 375: 667}  # of a small laptop and of a small phone
UNPLAYED = (
    "signal is aborted without reason"  # of Gradio's player of an attached clip that is sent before it is loaded
)
NAMES = {1280: "desktop", 375: "phone"}
no_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: `apt-get install chromium`")


@pytest.fixture(scope="module")
def url(systems, wav) -> Iterator[str]:
    page = Page(systems, max_new_tokens=TOKENS)
    yield page.launch(port=0)
    page.close()


@pytest.fixture(scope="module")
def driver() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(driver, wav) -> Iterator:
    microphone = ("--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={wav}")
    chromium = driver.chromium.launch(
        executable_path=CHROMIUM, args=[*FLAGS, "--use-fake-device-for-media-stream", *microphone]
    )
    yield chromium
    chromium.close()


class Visitor:
    """A page in a browser context of its own, with what it asked the network for."""

    def __init__(self, browser, url: str, width: int, permissions: tuple[str, ...] = ("microphone",)):
        size = {"width": width, "height": HEIGHTS[width]}
        self.context = browser.new_context(viewport=size, permissions=list(permissions))
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: str(error) != UNPLAYED and self.errors.append(str(error)))
        self.page.goto(url)
        self.sees(EMPTY.text)

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def reaches(self, *locators) -> None:
        """Without scrolling the page, sideways or down."""
        size = self.page.viewport_size
        assert self.page.evaluate("[scrollX, scrollY, document.documentElement.scrollWidth]") == [0, 0, size["width"]]
        for locator in locators:
            box = locator.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
            assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"], (locator, box)

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True).first

    def attach(self, path: Path | str) -> None:
        self.page.locator("input[type=file]").first.set_input_files(str(path))
        self.button("Remove file").wait_for()

    def press(self, name: str) -> None:
        self.button(name).click()

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
    form = r"\(spoken, [\d.]+ s\)\s+([a-z]+ \d+%) · arousal (\S+) · dominance (\S+) · valence (\S+)\s*"
    readings = re.fullmatch(form, spoken)
    assert readings
    assert "no words to read" in visitor.said("bot", 2)[0]
    most, *others = visitor.page.get_by_test_id("label-output-value").all_inner_texts()
    assert most in spoken and others == []
    assert len(visitor.page.get_by_text(re.compile(r"^\d+%$")).all()) == 5  # one an emotion
    assert visitor.page.locator(".trail td").all_inner_texts() == list(readings.groups())
    player = visitor.page.locator(".chat audio")
    assert player.count() == 1
    assert player.evaluate("async (clip) => { clip.muted = true; await clip.play(); return clip.duration; }") > 1
    assert visitor.page.evaluate("indexedDB.databases()") == []  # nothing is kept in the browser


@pytest.mark.slow
@pytest.mark.browser
@no_browser
def test_bad_audio_shows_an_error_and_the_conversation_goes_on(visit, tmp_path) -> None:
    visitor = visit()
    visitor.type("Hello.")
    visitor.waits_for_reply(1)
    bad = tmp_path / "bad.wav"
    bad.write_text("this is no audio")
    visitor.attach(bad)
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
    for _ in range(4):  # nothing can be saved yet
        page.keyboard.press("Tab")
        names.append(page.evaluate("(e => e.ariaLabel || e.innerText || e.placeholder)(document.activeElement)"))
    assert names == ["Type, record or upload", "Record audio", "Submit", "Reset"]
    page.get_by_placeholder("Type, record or upload").focus()
    page.keyboard.type("Hello.")
    page.keyboard.press("Enter")
    visitor.waits_for_reply(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.slow
@pytest.mark.browser
@no_browser
@pytest.mark.parametrize(
    ("flags", "host", "expected"),
    [
        (("--use-fake-ui-for-media-stream",), "127.0.0.1", "No microphone: there is none here."),
        (("--host-resolver-rules=MAP phone.test 127.0.0.1",), "phone.test", "browsers give it to https and localhost"),
        (("--use-fake-device-for-media-stream",), "127.0.0.1", "this browser does not allow it to this page."),
    ],
    ids=["none", "insecure", "denied"],
)
def test_where_there_is_no_microphone_the_page_says_why(
    flags: tuple[str, ...], host: str, expected: str, driver, url, pictures
) -> None:
    with driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags]) as browser:
        for width, name in NAMES.items():
            visitor = Visitor(browser, url.replace("127.0.0.1", host), width, permissions=())
            visitor.press("Record audio")
            visitor.sees(expected)
            visitor.reaches(visitor.page.locator("#microphone"), visitor.button("Submit"), visitor.button("Reset"))
            visitor.page.screenshot(path=pictures / f"web-{name}-no-microphone.png")
            visitor.type("Hello.")
            visitor.waits_for_reply(1)
            visitor.context.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Where pictures of the page go: those of docs/ are copied from there."""
    return Path(os.environ.get("RELLLM_PICTURES") or tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory, model, processor) -> Path:
    """What `make demo` leaves, in the folder `RELLLM_DEMO`, or the like of it with tiny models."""
    if "RELLLM_DEMO" in os.environ:
        return Path(os.environ["RELLLM_DEMO"])
    folder = tmp_path_factory.mktemp("demo")
    bare = tiny_config(fusion="none")
    models = {"re-llm": (model, processor), "speech-only": (tiny_model(bare), tiny_processor(bare))}
    for name, parts in models.items():
        for part in parts:
            part.save_pretrained(folder / name)
    (folder / "corpus" / "audio").mkdir(parents=True)
    for number in (1, 2, 3):
        soundfile.write(folder / "corpus" / "audio" / f"test-0000{number}.wav", clip(1 + number / 5), RATE)
    return folder


@pytest.mark.slow
@pytest.mark.browser
@no_browser
@pytest.mark.parametrize("width", HEIGHTS)
def test_what_is_needed_is_in_sight_in_every_state(width: int, browser, demo, pictures) -> None:
    from relllm.cli.talking import load_systems

    settings = TalkSettings(model=str(demo / "re-llm"), baseline=str(demo / "speech-only"), device="cpu")
    page = Page(load_systems(settings), max_new_tokens=48)
    visitor = Visitor(browser, page.launch(port=0), width)

    def reaches_all(state: str, *buttons: str) -> None:
        visitor.reaches(*map(visitor.button, (*buttons, "Reset", "Save JSON", "Save CSV")))
        visitor.page.wait_for_timeout(300)  # until what slides has come
        visitor.page.screenshot(path=pictures / f"web-{NAMES[width]}{state}.png")

    reaches_all("-empty", "Record audio", "Submit")
    clips = sorted((demo / "corpus" / "audio").glob("test-*.wav"))
    for number, path in enumerate(reversed(clips[1:4] if len(clips) > 3 else clips), start=1):
        visitor.attach(path)
        if number == 1:
            visitor.reaches(visitor.button("Submit"))
            visitor.page.screenshot(path=pictures / f"web-{NAMES[width]}-attached.png")
        visitor.press("Submit")
        visitor.waits_for_reply(number)
    reaches_all("", "Record audio", "Submit")
    first = visitor.page.locator(".chat").first  # scrolled to its end
    heard = first.get_by_text(re.compile(r"[a-z]+ \d+% · arousal")).last
    visitor.reaches(heard, first.locator("audio").last, first.get_by_test_id("bot").last)
    visitor.page.screenshot(path=pictures / f"web-{NAMES[width]}-whole.png", full_page=True)
    with visitor.page.expect_download() as saved:
        visitor.press("Save CSV")
    assert saved.value.suggested_filename == "conversation.csv"
    with open(saved.value.path(), encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 2

    page.lock.acquire()  # as while another visitor is answered
    visitor.type("Are you there?")
    visitor.sees("Waiting for another conversation.")
    reaches_all("-waiting", "Stop")
    visitor.press("Stop")
    visitor.sees(STOPPED.text)
    page.lock.release()
    visitor.page.wait_for_timeout(1000)  # Gradio takes the next turn when the last one's event has ended
    visitor.type("x" * 5_000)
    visitor.page.get_by_role("alert").get_by_text("5,000 characters").wait_for()
    reaches_all("-refused", "Submit")
    visitor.page.get_by_placeholder("Type, record or upload").fill("")
    visitor.press("Record audio")
    visitor.press("Start recording")
    reaches_all("-recording", "Stop recording")
    assert visitor.errors == []
    visitor.context.close()
    page.close()


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
    *columns, status, emotion, trail, _json, _csv, _box = page._show(session, {})
    assert not any("<script>" in message["content"][0] for column in columns for message in column)
    assert 'role="alert"' in status and "<b>" not in status
    confidences = {each["label"]: each["confidence"] for each in emotion.value["confidences"]}
    assert confidences == pytest.approx(session.heard[-1].probabilities)
    drawn = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", trail)
    expected = ["turn", "emotion", "arousal", "dominance", "valence"]
    for number, heard in ((2, session.heard[1]), (1, session.heard[0])):
        share = f"{heard.emotion} {heard.probabilities[heard.emotion]:.0%}"
        expected += [str(number), share, *(f"{value:.2f}" for value in heard.dimensions.values())]
    assert drawn == expected
    page.close()


def test_a_page_whose_conversation_is_gone_says_so(systems) -> None:
    page = Page(systems)
    for outputs in (next(page._talk(None, {"text": "Hello.", "files": []})), page._reset(None)):
        assert len(outputs) == len(systems) + 6
        assert "Reload it" in outputs[len(systems)]
    page.close()


def test_a_turn_that_repeats_another_is_one_of_its_own(systems) -> None:
    one = Session({"RE-LLM": systems["RE-LLM"]}, threading.Lock(), max_new_tokens=TOKENS)
    for _ in range(2):
        one.conversations["RE-LLM"].reset()
        talk(one, text="Hello.")
    assert [turn["text"] for turn in one.turns] == ["Hello.", "Hello."]


def test_a_stop_after_the_last_token_keeps_what_the_conversation_has(session) -> None:
    steps = session.talk(None, "Hello.")
    next(steps)
    next(steps)
    while session.lock.locked():
        time.sleep(0.01)
    session.stop()
    assert [None for _ in steps] and session.status == EMPTY
    name = next(iter(session.shown))
    assert len(session.shown[name]) == len(session.conversations[name].messages) - 1 == 2


def test_the_command_says_why_it_cannot_serve(tmp_path, model, processor, url) -> None:
    from typer.testing import CliRunner

    from relllm.cli import app

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    taken = url.rsplit(":", 1)[1].strip("/")
    result = CliRunner().invoke(app, ["web", str(tmp_path), "--port", taken, "--device", "cpu"])
    assert result.exit_code == 1 and f"Port {taken} of 127.0.0.1 is not free" in result.output
    assert "()" not in result.output  # no call of Python
    elsewhere = CliRunner().invoke(app, ["web", str(tmp_path), "--host", "no-such-host.invalid", "--device", "cpu"])
    assert "no address of this machine" in elsewhere.output and "not free" not in elsewhere.output
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
