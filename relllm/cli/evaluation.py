"""Measuring: `relllm evaluate`, `compare`, `empathy train`, `empathy score` and `score-replies`."""

from typing import Annotated

import typer
from rich.table import Table

from relllm.evaluation.evaluation_settings import (
    ComparisonSettings,
    EmpathySettings,
    EvaluationSettings,
    ScoringSettings,
)
from relllm.preferences.preference_settings import ScoreRepliesSettings

from .options import console, from_settings
from .talking import load_relllm

app = typer.Typer()
empathy = typer.Typer(help="Train scorers of empathy, and score responses with them.", no_args_is_help=True)


@app.command("evaluate")
@from_settings
def evaluate_command(
    settings: EvaluationSettings,
    folds: Annotated[
        str | None,
        typer.Option(help="Column, or column=value,value: a run for each, {fold} in MODEL; pooled, and the mean."),
    ] = None,
) -> None:
    """Measure emotion recognition (three ways), dimensions and the empathy of replies.

    Killed, the same command goes on where it was; `accelerate launch -m relllm.cli evaluate …` shares the clips among
    processes. Clips that cannot be read are named; the exit status is 1 if none could be.

    Example: relllm evaluate runs/iemocap data/iemocap --out runs/iemocap-test
    """
    from relllm.evaluation.evaluating import evaluate
    from relllm.evaluation.folds import evaluate_folds
    from relllm.evaluation.summary import report_run

    metrics = evaluate(settings) if folds is None else evaluate_folds(settings, folds)
    report_run(metrics, settings.output_dir, console)
    if metrics["data"]["num_failed"] == metrics["data"]["num_clips"]:
        raise typer.Exit(1)


@app.command()
@from_settings
def compare(settings: ComparisonSettings) -> None:
    """Set runs side by side: values, gains over baselines, paired tests, intervals, the published numbers.

    Writes comparison.md, .tex and .json, a forest plot for each task and the histograms of levels.

    Example: relllm compare runs/text runs/speech runs/re-llm --baseline text-only --baseline speech-only
    """
    from relllm.evaluation.comparison_tables import report_comparison

    report_comparison(settings, console)


app.add_typer(empathy, name="empathy")


@empathy.command("train")
@from_settings
def train_command(settings: EmpathySettings) -> None:
    """Train a scorer of one mechanism of empathy (EPITOME), and measure it on pairs with unseen seeker posts.

    Killed, the same command goes on from the last epoch.

    Example: relllm empathy train --data emotional-reactions-reddit.csv --mechanism ER --encoder roberta-base
    """
    from relllm.evaluation.empathy.quality import describe_quality, find_weaknesses, quality_of
    from relllm.evaluation.empathy.scorer_training import train_scorer
    from relllm.evaluation.summary import show_value

    metrics = train_scorer(settings)
    data = metrics["data"]
    quality: dict[str, dict] = {settings.mechanism: quality_of(metrics)}
    table = Table("split", "pairs", "seeker posts", "level 0 / 1 / 2")
    for name, part in metrics["splits"].items():
        table.add_row(name, *(show_value(part[column]) for column in ("num_pairs", "num_seeker_posts", "levels")))
    console.print(table)
    same, other = data["duplicates_removed"]["count"], data["duplicates_with_another_level"]["count"]
    console.print(f"{data['num_rows']:,} rows, {same:,} duplicates removed, {other:,} of another level")
    for title, found in (("left out", data["dropped"]), ("teaches its level only", data["rationale_not_known"])):
        for reason, part in found.items():
            if part["count"]:
                console.print(f"{title}: {reason}: {part['count']:,} (lines {part['lines']})", style="yellow")
    console.print(*describe_quality(quality))
    for weakness in find_weaknesses(quality):
        console.print(f"`relllm evaluate` will refuse it: {weakness}", style="red")
    console.print(f"Scorer and metrics: {settings.output_dir / settings.mechanism}")


@empathy.command("score")
@from_settings
def score_command(settings: ScoringSettings) -> None:
    """Give each response a level of every mechanism there is a scorer for; print mean levels and histograms.

    Example: relllm empathy score replies.csv --scorers runs/empathy --out scored.csv
    """
    from relllm.evaluation.empathy.scoring import score_table
    from relllm.evaluation.summary import show_value

    found = score_table(settings)
    table = Table("empathy", "mean level", "level 0 / 1 / 2", "pairs")
    for name, part in found.items():
        table.add_row(name, *(show_value(part[column]) for column in ("mean_level", "levels", "num_pairs")))
    console.print(table)
    if num_empty := next(iter(found.values()))["num_empty"]:
        console.print(f"{num_empty:,} responses are empty: they count as level 0", style="yellow")
    console.print(f"Levels and probabilities of each pair: {settings.file}")


@app.command("score-replies")
@from_settings
def score_replies(settings: ScoreRepliesSettings) -> None:
    """Sample replies to each clip, score them, and write the best and the worst as pairs to prefer.

    Rows whose replies tie, or differ by less than the margin, are left out and counted. Beside the pairs are every
    reply with its scores, a report and a plot. Killed, the same command goes on where it was.

    Example: relllm score-replies data/iemocap --model runs/iemocap --scorers runs/scorers
    --out data/iemocap/pairs.jsonl
    """
    from relllm.data.journal import report_path
    from relllm.evaluation.summary import show_value
    from relllm.preferences.pairs import samples_path, score_corpus

    report = score_corpus(settings, lambda: load_relllm(settings))
    table = Table("reward", "weight", "mean", "range", "chosen", "rejected", title="Scores of the replies")
    for name, of in report["scores"].items():
        weight = f"{settings.weights[name]:g}" if name in settings.weights else ""
        table.add_row(name, weight, *map(show_value, of.values()))
    console.print(table)
    console.print(f"rows {report['rows']:,}, pairs {report['pairs']:,}")
    for reason, dropped in report["dropped"].items():
        console.print(f"left out: {reason}: {dropped['count']:,}", style="yellow")
    replies = report["replies"]
    told = ", ".join(f"{name} {value:.1f}" for name, value in replies["words"].items() if value is not None)
    console.print(f"words a reply: {told}; cut by the token limit: {replies['cut']:,} of {replies['count']:,}")
    if (with_words := replies["total_with_words"]) is not None:
        console.print(f"correlation of the total with the number of words: {with_words:+.2f}")
    file = settings.file
    console.print(f"Pairs: {file}; every reply: {samples_path(file)}; report and plot: {report_path(file)}, .png")
