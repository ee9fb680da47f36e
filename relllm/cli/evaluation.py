"""Measuring a model, and runs side by side: `relllm evaluate`, `relllm compare`."""

from typing import Annotated

import typer

from relllm.evaluation.evaluation_settings import ComparisonSettings, EvaluationSettings

from .options import console, from_settings

app = typer.Typer()


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
