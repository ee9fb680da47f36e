"""Checkpoints to keep and to share: `relllm merge`, `card` and `push`."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

from relllm.hub.sharing import CardSettings, MergeSettings, PushSettings

from .options import from_settings

app = typer.Typer()
console = Console()


@app.command()
@from_settings
def merge(settings: MergeSettings) -> None:
    """Write the full checkpoint of a light one: with its towers in it, and the processor's files.

    Example: relllm merge runs/stage2/checkpoint-900 --out re-llm
    """
    from relllm.hub.staging import merge_checkpoint

    merge_checkpoint(settings)
    console.print(f"Full checkpoint: [bold]{settings.output_dir}[/bold]")


@app.command()
@from_settings
def card(settings: CardSettings) -> None:
    """Write the README.md of a checkpoint for the Hub, with the metrics of runs that measured it.

    Example: relllm card runs/eval-iemocap runs/eval-esd --model re-llm --repo-id org/re-llm
    """
    from relllm.hub.cards import write_model_card

    with _clear_failure():
        path = write_model_card(settings)
    console.print(f"Card: [bold]{path}[/bold]{'' if settings.runs else ' (no run given: it says “not evaluated”)'}")


@app.command()
@from_settings
def push(settings: PushSettings) -> None:
    """Check a checkpoint and send it to the Hub. Run it again after an interruption: it sends what is missing.

    Example: relllm push re-llm org/re-llm --with-code --dry-run
    """
    from relllm.hub.push import push_checkpoint

    with _clear_failure():
        done = push_checkpoint(settings)
    for name, size in done.files.items():
        console.print(f"{size:>15,}  {name}", highlight=False)
    console.print(f"{sum(done.files.values()):>15,}  bytes in {len(done.files)} files", highlight=False)
    if done.left_out:
        console.print(f"Stays here: {', '.join(done.left_out)}", highlight=False, markup=False)
    console.print(f"[bold]{done.url}[/bold]" if done.url else "Nothing was sent (--dry-run).")


@contextlib.contextmanager
def _clear_failure() -> Iterator[None]:
    """Show the message of a failed check or of the Hub, and exit with status 1."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = f" {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else ""  # of an upload
        Console(stderr=True).print(f"[red]stopped:[/red] {escape(f'{error}{cause}')}", highlight=False)
        raise typer.Exit(1) from error
