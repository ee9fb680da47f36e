"""Scorers of empathy: `relllm empathy train` and `relllm empathy score`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer()
console = Console()
empathy = typer.Typer(help="Train scorers of empathy, and score responses with them.", no_args_is_help=True)
app.add_typer(empathy, name="empathy")


@empathy.command()
def train(
    data: Annotated[Path, typer.Option(help="EPITOME's CSV file of the mechanism.")],
    mechanism: Annotated[
        Literal["ER", "IP", "EX"], typer.Option(help="Emotional reactions, interpretations or explorations.")
    ],
    encoder: Annotated[
        str, typer.Option(help="Any encoder of Transformers: a Hub id or a directory.")
    ] = "roberta-base",
    out: Annotated[Path, typer.Option(help="The scorer goes into OUT/MECHANISM.")] = Path("runs/empathy"),
    revision: Annotated[str, typer.Option(help="Of the encoder: branch, tag or commit on the Hub.")] = "main",
    max_length: Annotated[int, typer.Option(min=3, help="Tokens of a post or response; the rest is cut.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Falls linearly to 0.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="The best on the validation split is kept.")] = 4,
    level_weight: Annotated[float, typer.Option(min=0, help="Of the level's loss.")] = 1.0,
    rationale_weight: Annotated[float, typer.Option(min=0, help="Of the rationale's loss.")] = 0.5,
    validation_share: Annotated[float, typer.Option(help="Of the seeker posts.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Of the seeker posts.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the scorer, an id of the Hub; by default the encoder's.")
    ] = None,
    device: Annotated[Literal["auto", "cpu"], typer.Option(help="auto takes a GPU if there is one.")] = "auto",
) -> None:
    """Train a scorer of one mechanism of empathy (EPITOME), and measure it on pairs with unseen seeker posts.

    Killed, the same command goes on from the last epoch.

    Example: relllm empathy train --data emotional-reactions-reddit.csv --mechanism ER --encoder roberta-base
    """
    from relllm.evaluation.empathy.scorer_training import EmpathySettings, train_scorer

    with _plain_errors():
        settings = EmpathySettings(
            data=data,
            mechanism=mechanism,
            encoder=encoder,
            out=out,
            revision=revision,
            max_length=max_length,
            learning_rate=learning_rate,
            batch_size=batch_size,
            epochs=epochs,
            level_weight=level_weight,
            rationale_weight=rationale_weight,
            validation_share=validation_share,
            test_share=test_share,
            seed=seed,
            licence=licence,
            device=device,
        )
        _show_training(train_scorer(settings), out / mechanism)


@empathy.command()
def score(
    pairs: Annotated[Path, typer.Argument(help="A .csv or .jsonl table with seeker_post and response_post.")],
    scorers: Annotated[Path, typer.Option(help="Folder of trained scorers, or of one.")] = Path("runs/empathy"),
    out: Annotated[Path | None, typer.Option(help="The table with levels; by default PAIRS.scored beside it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs at once.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
) -> None:
    """Give each response a level of every mechanism there is a scorer for; print mean levels and histograms.

    Example: relllm empathy score replies.csv --scorers runs/empathy --out scored.csv
    """
    import torch

    from relllm.evaluation.empathy.scoring import load_scorers, score_table

    out = out or pairs.with_name(f"{pairs.stem}.scored{pairs.suffix}")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with _plain_errors():
        found = score_table(pairs, load_scorers(scorers), out, batch_size=batch_size, device=place)
    table = Table("empathy", "mean level", "level 0 / 1 / 2", "pairs")
    for name, part in found.items():
        counts = " / ".join(f"{count:,}" for count in part["levels"])
        table.add_row(name, f"{part['mean_level']:.3f}", counts, f"{part['num_pairs']:,}")
    console.print(table)
    if num_empty := next(iter(found.values()))["num_empty"]:
        console.print(f"[yellow]{num_empty:,} responses are empty:[/yellow] they count as level 0")
    console.print(f"Levels and probabilities of each pair: [bold]{escape(str(out))}[/bold]")


def _show_training(metrics: dict, folder: Path) -> None:
    data, test = metrics["data"], metrics["test"]
    table = Table("split", "pairs", "seeker posts", "level 0 / 1 / 2")
    for name, part in metrics["splits"].items():
        counts = " / ".join(f"{count:,}" for count in part["levels"])
        table.add_row(name, f"{part['num_pairs']:,}", f"{part['num_seeker_posts']:,}", counts)
    console.print(table)
    duplicates, contradicting = (
        data[name]["count"] for name in ("duplicates_removed", "duplicates_with_another_level")
    )
    console.print(f"{data['num_rows']:,} rows, {duplicates:,} duplicates removed, {contradicting:,} of another level")
    for title, found in (("left out", data["dropped"]), ("teaches its level only", data["rationale_not_known"])):
        for reason, part in found.items():
            if part["count"]:
                console.print(f"[yellow]{title}:[/yellow] {reason}: {part['count']:,} (lines {part['lines']})")
    baseline, level, rationale = metrics["test_baseline"], test["level"], test["rationale"]
    numbers = Table("test", "accuracy", "macro-F1", "token F1", "IOU-F1")
    scores = [level["accuracy"], level["macro_f1"], rationale["token_f1"], rationale["iou_f1"]]
    numbers.add_row(metrics["mechanism"], *("—" if value is None else f"{value:.3f}" for value in scores))
    numbers.add_row(
        f"always {baseline['level']}", f"{baseline['accuracy']:.3f}", f"{baseline['macro_f1']:.3f}", "", ""
    )
    console.print(numbers)
    console.print(f"Scorer, metrics and card: [bold]{escape(str(folder))}[/bold]")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What is wrong with the input, without the lines of code that found it."""
    try:
        yield
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"[red]stopped:[/red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
