"""Checkpoints to keep and to share: `relllm merge`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    from relllm.checkpoints import merge_checkpoint

    moved = {"audio_tower": audio_tower, "emotion_tower": emotion_tower, "text_model": text_model}
    towers = {name: place for name, place in moved.items() if place is not None}
    merge_checkpoint(light, out, towers=towers, revision=revision)
    console.print(f"Full checkpoint: [bold]{out}[/bold]")
