"""The `relllm` command, one file for each group of commands; their flags are made by `options.py` from dataclasses.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

import sys

import typer

from relllm import register_with_transformers

from . import data, empathy, evaluation, hub, serving, talking, training
from .options import PlainCommands, same_flag

app = typer.Typer(
    name="relllm",
    cls=PlainCommands,
    help="RE-LLM: a speech LLM that hears how something is said.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": same_flag},
)
for group in (talking, serving, data, training, evaluation, empathy, hub):
    app.add_typer(group.app)


@app.callback()
def _commands() -> None:
    """RE-LLM: a speech LLM that hears how something is said."""
    if "--help" not in sys.argv:  # this runs before the command's own help
        register_with_transformers()
        if not sys.stderr.isatty():
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # of weights that are loaded


def main() -> None:
    """Entry point of the `relllm` command."""
    app()
