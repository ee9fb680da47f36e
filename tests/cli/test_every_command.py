"""Every command and whatever is wrong with what it is given: one line on stderr, the right status, nothing lost."""

import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import typer
from processes import ForkServer, run_command
from target_rows import make_rows, write_lines
from tiny_models import RATE, clip, tiny_emotion_tower, tiny_llm, tiny_model, tiny_processor, tiny_tokenizer
from typer.testing import CliRunner

from relllm.cli import app, options

X = "{what is wrong}"
MODEL = ["--model_name_or_path", "re-llm"]
COMMANDS = {  # each as it is typed, for each place in which something may be wrong
    "reply": ["reply", X, "a.wav"],
    "hear": ["hear", X, "a.wav"],
    "hear, clips": ["hear", "re-llm", X],
    "chat": ["chat", X],
    "chat, baseline": ["chat", "re-llm", "--baseline", X],
    "web": ["web", X],
    "serve": ["serve", X, "--port", "0"],
    "evaluate": ["evaluate", X, "data/ours", "--out", "o"],
    "evaluate, data": ["evaluate", "re-llm", X, "--out", "o"],
    "merge": ["merge", X, "--out", "o"],
    "card": ["card", X, "--model", "re-llm", "--repo-id", "org/m"],
    "card, model": ["card", "--model", X, "--repo-id", "org/m"],
    "push": ["push", X, "org/m", "--dry-run"],
    "inspect": ["inspect", X],
    "annotate": ["annotate", "data/ours", "--emotion-model", X, "--out", "o.jsonl"],
    "annotate, data": ["annotate", X, "--emotion-model", "towers/emotion", "--out", "o.jsonl"],
    "write-targets": ["write-targets", "data/ours", "--text-model", X, "--out", "o.jsonl"],
    "write-targets, data": ["write-targets", X, "--text-model", "towers/llm", "--out", "o.jsonl"],
    "train": ["train", *MODEL, "--data", X, "--use_cpu", "true", "--out", "o"],
    "train, recipe": ["train", "--config", X],
    "train, model": ["train", "--model_name_or_path", X, "--data", "data/ours", "--use_cpu", "true", "--out", "o"],
    "train-emotion": ["train-emotion", "--model_name_or_path", X, "--data", "data/ours", "--out", "o"],
    "plan": ["plan", "--config", X],
    "compare": ["compare", X, X, "--baseline", "text-only", "--out", "o"],
    "empathy train": ["empathy", "train", "--data", X, "--mechanism", "ER", "--encoder", "towers/llm", "--out", "o"],
    "empathy score": ["empathy", "score", "notes.txt", "--scorers", X],
    **{f"prepare {name}": ["prepare", name, X, "--out", "o"] for name in ("iemocap", "esd", "msp-podcast", "folder")},
    "prepare ravdess": ["prepare", "ravdess", X, "--out", "o"],
}
WRONG = {"nothing": "gone/far/away", "an empty folder": "empty", "an empty file": "empty.csv", "a file": "notes.txt"}
WRONG |= {"no permission": "secret", "a file without permission": "secret.csv"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as a user has it, and what may be wrong."""
    folder = tmp_path_factory.mktemp("here")
    tiny_model().save_pretrained(folder / "re-llm")
    tiny_processor().save_pretrained(folder / "re-llm")
    tiny_emotion_tower().save_pretrained(folder / "towers" / "emotion")
    tiny_llm().save_pretrained(folder / "towers" / "llm")
    tiny_tokenizer(audio_token=False).save_pretrained(folder / "towers" / "llm")
    (folder / "data" / "ours").mkdir(parents=True)
    soundfile.write(folder / "a.wav", clip(0.6), RATE)
    write_lines(folder / "data" / "ours" / "metadata.jsonl", make_rows(3))
    (folder / "empty").mkdir()
    (folder / "empty.csv").touch()
    (folder / "notes.txt").write_text("Nothing of this kind.\n")
    (folder / "secret").mkdir(mode=0o000)
    (folder / "secret.csv").touch(mode=0o000)
    yield folder
    (folder / "secret").chmod(0o700)


def command_names(command: object, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from command_names(inner, (*before, name)) if hasattr(inner, "commands") else ((*before, name),)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_wrong_is_one_line_and_a_status(here: Path, monkeypatch, command: str, wrong: str) -> None:
    if "permission" in wrong and os.access(here / WRONG[wrong], os.R_OK):
        pytest.skip("this user may read everything, as root may")
    monkeypatch.chdir(here)
    for console in (options.console, options.messages):
        monkeypatch.setattr(console, "_width", 40)
    before = sorted(path for path in here.rglob("*") if path.is_file())
    arguments = [WRONG[wrong] if word == X else word for word in COMMANDS[command]]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "40", "NO_COLOR": "1"})  # and no terminal
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2) and len(result.stderr.splitlines()) == 1, result.stderr
    assert "\x1b" not in result.stderr
    assert WRONG[wrong] in result.stderr or wrong in ("a file", "an empty folder"), result.stderr
    assert sorted(path for path in here.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("names", list(command_names(typer.main.get_command(app))), ids=" ".join)
@pytest.mark.parametrize(
    ("ended_by", "status", "said"),
    [(KeyboardInterrupt(), 130, "stopped by Ctrl-C.\n"), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "")],
    ids=["Ctrl-C", "a closed pipe"],
)
def test_what_ends_a_command_is_at_most_a_line(
    monkeypatch, names: tuple[str, ...], ended_by: BaseException, status: int, said: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise ended_by

    root = command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    monkeypatch.setattr(command, "callback", interrupted)
    monkeypatch.setattr(command, "params", [])
    monkeypatch.setattr("typer.testing._get_command", lambda _: root)
    result = CliRunner().invoke(app, list(names))
    assert result.exit_code == status and result.stderr == said


@pytest.mark.parametrize("names", list(command_names(typer.main.get_command(app))), ids=" ".join)
def test_a_help_page_has_every_text_letter_by_letter(names: tuple[str, ...]) -> None:
    command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    if not command.get_help_option_names(command.make_context(names[-1], [], resilient_parsing=True)):
        return  # a page of another kind, which TRL's parser makes
    page = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "500", "TERMINAL_WIDTH": "500"}).output
    shown = " ".join(page.replace("│", " ").split())
    for text in (command.help, *(one.help for one in command.params if not getattr(one, "hidden", False))):
        assert " ".join((text or "").replace("\\[", "[").split()) in shown


def run_into_closed_pipe(*arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = os.fdopen(writing, "w")
    run_command(*arguments)


@pytest.mark.parametrize("command", ["inspect data/ours --no-audio", "hear re-llm a.wav", "reply re-llm a.wav --json"])
def test_a_closed_pipe_ends_a_command_without_a_word(here: Path, fork_server: ForkServer, command: str) -> None:
    done = fork_server.start(run_into_closed_pipe, *command.split(), folder=here)
    assert done.wait() == 1 and "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_an_error_is_one_line_in_40_columns_and_without_colour(here: Path, fork_server: ForkServer) -> None:
    variables = {"COLUMNS": "40", "NO_COLOR": "1"}
    done = fork_server.start(run_command, "inspect", "data/a-very-long-name/of-a/data-set", folder=here, **variables)
    assert done.wait() == 2 and len(done.stderr.splitlines()) == 1 and "\x1b" not in done.stderr


@pytest.mark.parametrize("command", ["reply", "hear", "chat", "merge", "annotate"])
def test_an_id_that_the_hub_does_not_answer_for_is_named(here: Path, monkeypatch, command: str) -> None:
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, ["gone/away" if word == X else word for word in COMMANDS[command]])
    assert result.exit_code == 1 and "gone/away: no folder here, and of the Hub" in result.stderr
