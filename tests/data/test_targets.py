"""The file of replies to learn: what is written and what is dropped, and resuming after a kill."""

import json
import signal
import time
from pathlib import Path

import pytest
from datasets import Dataset
from processes import ForkServer, run_command
from target_rows import TEXTS, make_rows, read_lines, save_chat_model, write_lines, write_targets
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.data_settings import TargetSettings
from relllm.data.journal import Journal, journal_path, report_path
from relllm.data.loading import load_corpus
from relllm.data.replies.targets import make_request
from relllm.data.replies.writers import Written


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat-model"))


class ScriptedWriter:
    """Gives each row the reply of a script, one batch a row; interrupts itself after so many."""

    def __init__(self, replies: dict[str, str], interrupt_after: int | None = None) -> None:
        self.replies, self.interrupt_after, self.asked = replies, interrupt_after, []

    def write(self, requests, done):
        for request in requests:
            if request.id not in done:
                if len(self.asked) == self.interrupt_after:
                    raise KeyboardInterrupt
                self.asked.append(request.id)
                yield [Written(request.id, self.replies[request.id], True)]


def test_good_replies_are_written_and_the_rest_is_named_with_its_reason(tmp_path: Path) -> None:
    rows = make_rows(6)
    rows[1]["text"], rows[2]["emotion"] = "  ", None
    replies = {
        "r0": " That sounds hard. Which bus was it? ",
        "r3": "As an AI language model, I have no feelings.",
        "r4": "<think>Happy.</think>Congratulations! When do you start?",
        "r5": "",
    }
    out = tmp_path / "out.jsonl"
    report = write_targets(Dataset.from_list(rows), out, ScriptedWriter(replies), TargetSettings("m"), progress=False)
    expected = [
        {**rows[0], "response": "That sounds hard. Which bus was it?"},
        {**rows[4], "response": "Congratulations! When do you start?"},
    ]
    assert [{**row, "audio": f"audio/{row['id']}.wav"} for row in read_lines(out)] == expected
    assert {reason: (entry["count"], entry["ids"]) for reason, entry in report["dropped"].items()} == {
        "no_text": (1, ["r1"]),
        "no_emotion": (1, ["r2"]),
        "refusal": (1, ["r3"]),
        "empty": (1, ["r5"]),
    }
    assert report["dropped"]["refusal"]["texts"] == [replies["r3"]]
    assert (report["rows"], report["written"], report["mended"]["thinking_removed"]["ids"]) == (6, 2, ["r4"])
    assert json.loads(report_path(out).read_text()) == report and not journal_path(out).exists()


def test_an_interrupted_run_goes_on_and_a_half_written_line_is_done_again(tmp_path: Path) -> None:
    rows = Dataset.from_list(make_rows(6))
    replies = {f"r{i}": f"That is what you said, number {i}." for i in range(6)}
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_targets(rows, whole, ScriptedWriter(replies), TargetSettings("m"), progress=False)
    with pytest.raises(KeyboardInterrupt):
        write_targets(rows, out, ScriptedWriter(replies, 4), TargetSettings("m"), progress=False)
    assert not out.exists()
    journal = journal_path(out)
    journal.write_bytes(journal.read_bytes()[:-9])  # as if killed in the middle of a line
    second = ScriptedWriter(replies)
    write_targets(rows, out, second, TargetSettings("m"), progress=False)
    assert second.asked == ["r3", "r4", "r5"]
    assert out.read_bytes() == whole.read_bytes()
    assert report_path(out).read_bytes() == report_path(whole).read_bytes()
    third = ScriptedWriter(replies)
    write_targets(rows, out, third, TargetSettings("m"), progress=False)
    assert third.asked == []


@pytest.mark.parametrize(
    "changed",
    [
        {"text_model": "other"},
        {"prompt": "Answer in a {emotion} tone: "},
        {"system_prompt": ""},
        {"temperature": 0.7},
    ],
)
def test_other_settings_are_not_mixed_in(tmp_path: Path, changed: dict) -> None:
    rows, replies = Dataset.from_list(make_rows(3)), {f"r{i}": "That must be hard for you." for i in range(3)}
    out = tmp_path / "out.jsonl"
    other = TargetSettings(**{"text_model": "m", **changed})
    with pytest.raises(KeyboardInterrupt):
        write_targets(rows, out, ScriptedWriter(replies, 1), TargetSettings("m"), progress=False)
    with pytest.raises(ValueError, match=rf"other settings \({next(iter(changed))}: "):
        write_targets(rows, out, ScriptedWriter(replies), other, progress=False)
    write_targets(rows, out, ScriptedWriter(replies), TargetSettings("m"), progress=False)
    with pytest.raises(FileExistsError, match="Choose another --out, or delete it"):
        write_targets(rows, out, ScriptedWriter(replies), other, progress=False)


def test_other_data_is_not_mixed_in(tmp_path: Path) -> None:
    rows, replies = make_rows(3), {f"r{i}": "That must be hard for you." for i in range(3)}
    with pytest.raises(KeyboardInterrupt):
        write_targets(Dataset.from_list(rows), tmp_path / "o.jsonl", ScriptedWriter(replies, 1), TargetSettings("m"))
    rows[2]["emotion"] = "angry"
    with pytest.raises(ValueError, match=r"other settings \(data: "):
        write_targets(Dataset.from_list(rows), tmp_path / "o.jsonl", ScriptedWriter(replies), TargetSettings("m"))


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {}), pytest.raises(BlockingIOError, match="Another process is writing"):
        Journal(tmp_path / "journal", {})


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"settings": {}}\n{"id": "a"\n{"id": "b"}\n')
    with pytest.raises(ValueError, match="journal:2 is no JSON"):
        Journal(path, {})


def test_parquet_keeps_audio_bytes_and_json_lines_refuse_them(tmp_path: Path) -> None:
    rows = Dataset.from_list([row | {"audio": {"bytes": b"RIFF", "path": None}} for row in make_rows(3)])
    writer = ScriptedWriter({f"r{i}": "That must be hard for you." for i in range(3)})
    with pytest.raises(ValueError, match=r"as bytes, which JSON cannot. Use --out out\.parquet"):
        write_targets(rows, tmp_path / "out.jsonl", writer, TargetSettings("m"), progress=False)
    write_targets(rows, tmp_path / "out.parquet", writer, TargetSettings("m"), progress=False)
    written = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert written[2]["audio"]["bytes"] == b"RIFF" and written[2]["response"] == "That must be hard for you."


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "audio": "a.wav", "text": "Hi."}], r"lacks the columns \['emotion'\]"),
        ([*make_rows(1), *make_rows(1)], r"got 'r0' \(again\)"),
    ],
)
def test_data_that_cannot_be_written_is_an_error_before_the_work(tmp_path, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        write_targets(Dataset.from_list(rows), tmp_path / "o.jsonl", ScriptedWriter({}), TargetSettings("m"))


@pytest.mark.parametrize("prompt", ["Answer {mood}: ", "Answer {emotion", "{emotion} {text}", "{}"])
def test_a_prompt_has_no_field_but_the_emotion(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"may hold \{emotion\} and no other field"):
        TargetSettings("m", prompt=prompt)


def test_a_prompt_without_the_emotion_needs_none(tmp_path: Path) -> None:
    rows = Dataset.from_list([{name: row[name] for name in ("id", "audio", "text")} for row in make_rows(3)])
    settings = TargetSettings("m", prompt="Continue the following sentence in a coherent style: ")
    assert make_request(rows[0], settings).user == f"{settings.prompt}{TEXTS[0]} 0"
    writer = ScriptedWriter({f"r{i}": "And then it left again." for i in range(3)})
    assert write_targets(rows, tmp_path / "out.jsonl", writer, settings, progress=False)["written"] == 3


@pytest.mark.slow
def test_killed_and_resumed_the_command_writes_what_an_uninterrupted_one_writes(
    chat_model: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "metadata.jsonl", make_rows(24))
    options = ["--text-model", str(chat_model), "--batch-size", "2", "--max-new-tokens", "24", "--min-words", "1"]
    options += ["--device", "cpu"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["write-targets", str(data), "--out", str(whole), *options])
    assert result.exit_code == 0, result.output
    assert "in the data" in result.output and "24" in result.output
    process = fork_server.start(run_command, "write-targets", str(data), "--out", str(out), *options)
    deadline = time.monotonic() + 120
    while not (journal_path(out).exists() and journal_path(out).read_bytes().count(b"\n") > 4):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    result = CliRunner().invoke(app, ["write-targets", str(data), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == whole.read_bytes() and out.stat().st_size > 0
    assert report_path(out).read_bytes() == report_path(whole).read_bytes()
    rows = load_corpus(str(out))
    assert set(rows["id"]) <= {f"r{i}" for i in range(24)} and all(rows["response"])
