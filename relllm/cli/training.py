"""Training: `relllm train`, `train-emotion`, `train-text`, `plan`."""

import hashlib
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import typer

from .options import console

app = typer.Typer()
# Every setting of TRL is a flag of these commands, and they have a help page of their own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a ReLLM from a YAML file and flags; `relllm train --help` lists them all.

    Example: relllm train --config recipes/stage2_emotion.yaml --data data/iemocap/targets.jsonl --out runs/iemocap
    """
    _run(context, "run", ("parse_arguments", "run_training"), "The model and its processor are in")


@app.command("train-emotion", context_settings=PASSED_ON)
def train_emotion(context: typer.Context) -> None:
    """Fine-tune an emotion tower to arousal, dominance and valence; `relllm train-emotion --help` lists the settings.

    Example: relllm train-emotion --model_name_or_path microsoft/wavlm-large --data data/msp --output_dir runs/tower
    """
    _run(context, "emotion_training", ("parse_emotion_arguments", "run_emotion_training"), "The tower is in")


@app.command("train-text", context_settings=PASSED_ON)
def train_text(context: typer.Context) -> None:
    """Fine-tune an LLM alone on transcripts and replies, the baseline text-only-tuned; `--help` lists the settings.

    Example: relllm train-text --config recipes/text_only.yaml --data data/iemocap/targets.jsonl --out runs/text
    """
    _run(context, "baselines.text_training", ("parse_text_arguments", "run_text_training"), "The adapter is in")


@app.command(context_settings=PASSED_ON)
def plan(context: typer.Context) -> None:
    """Say what a run takes before a GPU is rented: memory, largest batch, speed; `relllm plan --help` lists the flags.

    It takes every setting of `relllm train` and reads configurations only. The exit status is 1 if the batch does not
    fit.

    Example: relllm plan --config recipes/stage2_emotion.yaml --gpu-memory 24GB
    """
    if _asks_help(context):
        return _show_help("planning.plan", "parse_plan")
    from relllm.training.planning.plan import parse_plan, run_plan

    if not run_plan(*parse_plan(context.args), console):
        raise typer.Exit(1)


def _run(context: typer.Context, module: str, names: tuple[str, str], what: str) -> None:
    """Parse, train and say where the result is, by the functions of a module; or print the settings."""
    if _asks_help(context):
        return _show_help(module, names[0])
    from relllm.training.checkpoints import RunComplete

    parse, run = (getattr(import_module(f"relllm.training.{module}"), name) for name in names)
    try:
        trainer = run(*parse(context.args))
    except RunComplete as complete:
        console.print(str(complete))
        return
    if trainer.is_world_process_zero():
        console.print(f"{what} {trainer.args.output_dir}.")


def _asks_help(context: typer.Context) -> bool:
    return bool({"--help", "-h"}.intersection(context.args))


def _show_help(module: str, parse: str) -> None:
    """Print a command's page of settings, which is kept: it lists TRL's, and importing TRL takes seconds."""
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    versions = [sys.version, *map(version, ("torch", "transformers", "trl"))]
    made_of = [*versions, *((str(file), file.stat().st_mtime_ns) for file in own)]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relllm"
    path = cache / f"help-{module}-{key}.txt"
    if not path.is_file():
        page = io.StringIO()
        with redirect_stdout(page), suppress(SystemExit):
            getattr(import_module(f"relllm.training.{module}"), parse)(["--help"])
        print(page.getvalue(), end="")
        with suppress(OSError):  # a home that cannot be written to: it is made again next time
            cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(page.getvalue(), encoding="utf-8")
            partial.replace(path)
        return
    print(path.read_text(encoding="utf-8"), end="")
