"""Scorers of empathy: `relllm empathy train` and `relllm empathy score`."""

from pathlib import Path

import typer
from rich.table import Table

from relllm.evaluation.evaluation_settings import EmpathySettings, ScoringSettings
from relllm.setting import pick_device

from .options import console, from_settings

app = typer.Typer()
empathy = typer.Typer(help="Train scorers of empathy, and score responses with them.", no_args_is_help=True)
app.add_typer(empathy, name="empathy")


@empathy.command("train")
@from_settings
def train_command(settings: EmpathySettings) -> None:
    """Train a scorer of one mechanism of empathy (EPITOME), and measure it on pairs with unseen seeker posts.

    Killed, the same command goes on from the last epoch.

    Example: relllm empathy train --data emotional-reactions-reddit.csv --mechanism ER --encoder roberta-base
    """
    from relllm.evaluation.empathy.scorer_training import train_scorer

    _show_training(train_scorer(settings), settings.output_dir / settings.mechanism)


@empathy.command("score")
@from_settings
def score_command(settings: ScoringSettings) -> None:
    """Give each response a level of every mechanism there is a scorer for; print mean levels and histograms.

    Example: relllm empathy score replies.csv --scorers runs/empathy --out scored.csv
    """
    from relllm.evaluation.empathy.scoring import load_scorers, score_table

    pairs = settings.pairs
    out = settings.out or pairs.with_name(f"{pairs.stem}.scored{pairs.suffix}")
    device = pick_device(settings.device)
    found = score_table(pairs, load_scorers(settings.scorers), out, batch_size=settings.batch_size, device=device)
    table = Table("empathy", "mean level", "level 0 / 1 / 2", "pairs")
    for name, part in found.items():
        counts = " / ".join(f"{count:,}" for count in part["levels"])
        table.add_row(name, f"{part['mean_level']:.3f}", counts, f"{part['num_pairs']:,}")
    console.print(table)
    if num_empty := next(iter(found.values()))["num_empty"]:
        console.print(f"{num_empty:,} responses are empty: they count as level 0", style="yellow")
    console.print(f"Levels and probabilities of each pair: {out}")


def _show_training(metrics: dict, folder: Path) -> None:
    from relllm.evaluation.empathy.quality import find_weaknesses, quality_of

    data, test = metrics["data"], metrics["test"]
    table = Table("split", "pairs", "seeker posts", "level 0 / 1 / 2")
    for name, part in metrics["splits"].items():
        counts = " / ".join(f"{count:,}" for count in part["levels"])
        table.add_row(name, f"{part['num_pairs']:,}", f"{part['num_seeker_posts']:,}", counts)
    console.print(table)
    same, other = data["duplicates_removed"]["count"], data["duplicates_with_another_level"]["count"]
    console.print(f"{data['num_rows']:,} rows, {same:,} duplicates removed, {other:,} of another level")
    for title, found in (("left out", data["dropped"]), ("teaches its level only", data["rationale_not_known"])):
        for reason, part in found.items():
            if part["count"]:
                console.print(f"{title}: {reason}: {part['count']:,} (lines {part['lines']})", style="yellow")
    baseline, bag, token_f1 = metrics["test_baseline"], metrics["bag_of_words"], test["rationale"]["token_f1"]
    numbers = Table("test", "accuracy", "macro-F1", "recall 0 / 1 / 2", "token F1")
    found = "—" if token_f1 is None else f"{token_f1:.3f}"
    for name, level, tokens in ((metrics["mechanism"], test["level"], found), ("bag of words", bag, "")):
        recalls = " / ".join("—" if recall is None else f"{recall:.2f}" for recall in level["recall"].values())
        numbers.add_row(name, f"{level['accuracy']:.3f}", f"{level['macro_f1']:.3f}", recalls, tokens)
    numbers.add_row(f"always {baseline['level']}", f"{baseline['accuracy']:.3f}", f"{baseline['macro_f1']:.3f}")
    console.print(numbers)
    for weakness in find_weaknesses({metrics["mechanism"]: quality_of(metrics)}):
        console.print(f"`relllm evaluate` will refuse it: {weakness}", style="red")
    console.print(f"Scorer and metrics: {folder}")
