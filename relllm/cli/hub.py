"""Checkpoints to keep and to share: `relllm merge`, `card`, `push` and `pull`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer()
console = Console()


@app.command()
def merge(
    light: Annotated[str, typer.Argument(help="A light checkpoint: a directory or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Where the full checkpoint goes.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    audio_tower: Annotated[str | None, typer.Option(help="Where the speech tower is, if it moved.")] = None,
    emotion_tower: Annotated[str | None, typer.Option(help="Where the emotion tower is, if it moved.")] = None,
    text_model: Annotated[str | None, typer.Option(help="Where the LLM is, if it moved.")] = None,
) -> None:
    """Write the full checkpoint of a light one: with its towers in it, and the processor's files.

    Example: relllm merge runs/stage2/checkpoint-900 --out re-llm
    """
    from relllm.hub.merging import merge_checkpoint

    moved = {"audio_tower": audio_tower, "emotion_tower": emotion_tower, "text_model": text_model}
    towers = {name: place for name, place in moved.items() if place is not None}
    merge_checkpoint(light, out, towers=towers, revision=revision)
    console.print(f"Full checkpoint: [bold]{out}[/bold]")


@app.command()
def card(
    model: Annotated[Path, typer.Option(help="The checkpoint's folder; the card goes into it.")],
    run: Annotated[
        list[Path] | None, typer.Argument(help="Folders of `relllm evaluate` on this checkpoint; none: not evaluated.")
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where it will be: org/name.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="An id of the Hub, at least as strict as the towers'.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that is there.")] = False,
) -> None:
    """Write the README.md of a checkpoint for the Hub, with the metrics of runs that measured it.

    Example: relllm card runs/eval-iemocap runs/eval-esd --model re-llm --repo-id org/re-llm
    """
    from relllm.hub.cards import write_card

    with _clear_failure():
        path = write_card(model, run or [], repo_id=repo_id, licence=licence, overwrite=overwrite)
    console.print(f"Card: [bold]{path}[/bold]" + ("" if run else " (no run given: it says “not evaluated”)"))


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="The checkpoint's folder, with a card.")],
    repo_id: Annotated[str, typer.Argument(help="org/name")],
    private: Annotated[bool, typer.Option("--private", help="The repository must be private.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="With the code files, for trust_remote_code=True.")
    ] = False,
    light: Annotated[bool, typer.Option("--light", help="What was trained, and the towers' Hub ids.")] = False,
    full: Annotated[bool, typer.Option("--full", help="With the towers in it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="All checks and the list of files; nothing sent.")
    ] = False,
) -> None:
    """Check a checkpoint and send it to the Hub. Run it again after an interruption: it sends what is missing.

    Example: relllm push re-llm org/re-llm --with-code --dry-run
    """
    from relllm.hub.transfer import push_checkpoint

    if light and full:
        raise typer.BadParameter("--light and --full exclude each other.")
    form: Literal["light", "full"] | None = "light" if light else "full" if full else None
    with _clear_failure():
        done = push_checkpoint(model, repo_id, private=private, with_code=with_code, form=form, dry_run=dry_run)
    for name, size in done.files.items():
        console.print(f"{size:>15,}  {name}", highlight=False)
    console.print(f"{sum(done.files.values()):>15,}  bytes in {len(done.files)} files", highlight=False)
    if done.left_out:
        console.print(f"Stays here: {', '.join(done.left_out)}", highlight=False, markup=False)
    console.print(f"[bold]{done.url}[/bold]" if done.url else "Nothing was sent (--dry-run).")


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="org/name")],
    out: Annotated[Path, typer.Option(help="The folder for its files.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
) -> None:
    """Download a model from the Hub into a folder. Run it again after an interruption: it fetches what is missing.

    Example: relllm pull org/re-llm --revision v1 --out re-llm
    """
    from relllm.hub.transfer import pull_checkpoint

    with _clear_failure():
        files = pull_checkpoint(repo_id, out, revision=revision)
    console.print(f"{len(files)} files, {sum(files.values()):,} bytes: [bold]{out}[/bold]", highlight=False)


@contextlib.contextmanager
def _clear_failure() -> Iterator[None]:
    """The message of a failed check or of the Hub, which says what to do, and exit status 1."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        Console(stderr=True).print(f"[red]stopped:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
