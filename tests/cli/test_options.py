"""Commands made of dataclasses: each field is a flag with its help, its default and its limits."""

import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from relllm.cli.options import from_settings, same_flag


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": "The model.", "argument": True})
    output_dir: Path = field(metadata={"help": "Where it goes."})
    batch_size: int = field(default=16, metadata={"help": "Clips at once.", "min": 1})
    tasks: tuple[str, ...] | None = field(default=None, metadata={"help": "With commas."})
    kind: Literal["mean_pool", "last"] = field(default="last", metadata={"help": "Which."})
    progress: bool = field(default=True, metadata={"help": "Show it."})
    dry_run: bool = field(default=False, metadata={"help": "Do nothing."})


seen: list = []
app = typer.Typer(context_settings={"token_normalize_func": same_flag})


@app.command()
@from_settings
def measure(settings: Settings, folds: Annotated[str | None, typer.Option(help="Which folds.")] = None) -> None:
    """Measure it."""
    seen.append((settings, folds))


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir", "--out"])
def test_every_field_is_a_flag_in_both_spellings(flag):
    result = CliRunner().invoke(app, ["m", flag, "o", "--batch_size", "3", "--tasks", "a, b", "--kind", "mean_pool"])
    assert result.exit_code == 0, result.output
    assert seen.pop() == (Settings("m", Path("o"), 3, ("a", "b"), "mean_pool"), None)


def test_defaults_are_the_dataclass_and_switches_turn(flag="--out"):
    runner = CliRunner()
    assert runner.invoke(app, ["m", flag, "o"]).exit_code == 0
    assert seen.pop()[0] == Settings("m", Path("o"))
    assert runner.invoke(app, ["m", flag, "o", "--no-progress", "--dry-run", "--folds", "s"]).exit_code == 0
    assert seen.pop() == (Settings("m", Path("o"), progress=False, dry_run=True), "s")


def test_the_types_of_a_dataclass_are_read_once(monkeypatch):
    def command(settings: Settings) -> None: ...

    asked, hints = [], typing.get_type_hints
    monkeypatch.setattr(typing, "get_type_hints", lambda of, **how: asked.append(of) or hints(of, **how))
    from_settings(command)
    assert asked == [command, Settings]


def test_help_and_limits_come_from_the_metadata():
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(text in shown for text in ("Clips at once.", "The model.", "16", "--no-progress", "Which folds."))
    for wrong in (["m"], ["m", "--out", "o", "--batch-size", "0"], ["m", "--out", "o", "--kind", "first"]):
        assert runner.invoke(app, wrong).exit_code == 2
