"""The `relllm` command, one file for each group of commands; their flags are made by `options.py` from dataclasses.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from relllm import register_with_transformers

from . import data, evaluation, hub, talking, training
from .options import PlainCommands, same_flag

app = typer.Typer(
    name="relllm",
    cls=PlainCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": same_flag},
)
for group in (talking, data, training, evaluation, hub):
    app.add_typer(group.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"relllm {version('relllm')}, transformers {version('transformers')}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def _commands(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error as well.")] = False,
    shown: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """RE-LLM: a speech LLM that hears how something is said."""
    if "--help" not in sys.argv:  # this runs before the command's own help
        register_with_transformers()
        if not sys.stderr.isatty():
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # of weights that are loaded


def main() -> None:
    """Entry point of the `relllm` command."""
    app()
