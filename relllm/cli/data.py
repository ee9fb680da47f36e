"""Corpora: `relllm prepare …`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console()
prepare = typer.Typer(help="Write corpora in the form that training reads.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")


@prepare.command()
def synthetic(
    out: Annotated[Path, typer.Option(help="Folder of the corpus.")] = Path("data/synthetic"),
    train_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 180,
    validation_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 30,
    test_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 40,
    seed: Annotated[int, typer.Option(help="The same settings give the same bytes.")] = 0,
) -> None:
    """Synthesise speech in five emotions with replies and all labels: rule-made prosody, not human emotion."""
    from relllm.data.synthetic import synthesize_corpus

    corpus = synthesize_corpus(
        out,
        train_clips_per_emotion=train_clips,
        validation_clips_per_emotion=validation_clips,
        test_clips_per_emotion=test_clips,
        seed=seed,
    )
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in corpus.items())
    console.print(f"{counts} clips in [bold]{out}[/bold]")


@prepare.command("tiny-towers")
def tiny_towers(
    out: Annotated[Path, typer.Option(help="Folder of the three towers.")] = Path("data/tiny-towers"),
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write three tiny towers with random weights, for recipes/smoke.yaml."""
    from relllm.training.tiny_towers import make_tiny_towers

    make_tiny_towers(out, seed=seed)
    console.print(f"speech, emotion and llm in [bold]{out}[/bold]")
