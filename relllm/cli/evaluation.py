"""Measuring a model, and runs side by side: `relllm evaluate`, `relllm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint, or for text-only any causal LM: a directory or Hub id.")],
    data: Annotated[str, typer.Argument(help="A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions, metrics and plots.")],
    tasks: Annotated[
        str | None, typer.Option(help="Of ser, dimensions, empathy, with commas; by default all that can be measured.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="re-llm, speech-only or text-only; by default what the checkpoint is.")
    ] = None,
    label_set: Annotated[
        str | None, typer.Option(help="Emotions to choose from: 4, 5 or all; by default the checkpoint's.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data; empty for all rows.")] = "test",
    held_out: Annotated[
        str | None, typer.Option(help="The test split made at reading, such as session=Ses05.")
    ] = None,
    folds: Annotated[
        str | None,
        typer.Option(
            help="Column, or column=value,value: a run for each, with {fold} in MODEL; pooled, and the mean."
        ),
    ] = None,
    empathy_scorers: Annotated[str | None, typer.Option(help="Folder of trained scorers of ER, IP, EX.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips at once, in each process.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")] = "auto",
    revision: Annotated[str, typer.Option(help="Of the model: branch, tag or commit on the Hub.")] = "main",
    seed: Annotated[int, typer.Option(help="Recorded; answers are greedy.")] = 0,
    name: Annotated[str | None, typer.Option(help="What tables call the run; by default the folder's name.")] = None,
) -> None:
    """Measure emotion recognition (three ways), dimensions and the empathy of replies.

    Killed, the same command goes on where it was; `accelerate launch -m relllm.cli evaluate …` shares the clips among
    processes. Clips that cannot be read are named; the exit status is 1 if none could be.

    Example: relllm evaluate runs/iemocap data/iemocap --out runs/iemocap-test
    """
    from relllm.evaluation.evaluating import evaluate as measure
    from relllm.evaluation.folds import evaluate_folds
    from relllm.evaluation.planning import EvaluationSettings
    from relllm.evaluation.terminal import report_run

    settings = EvaluationSettings(
        model=model,
        data=data,
        out=out,
        tasks=tuple(task.strip() for task in tasks.split(",")) if tasks is not None else None,  # type: ignore[misc]
        system=system,  # type: ignore[arg-type]
        label_set=label_set,  # type: ignore[arg-type]
        split=split or "all",
        held_out=held_out,
        empathy_scorers=empathy_scorers,
        revision=revision,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        limit=limit,
        seed=seed,
        name=name,
    )
    metrics = measure(settings) if folds is None else evaluate_folds(settings, folds)
    report_run(metrics, out, console)
    if metrics["data"]["num_failed"] == metrics["data"]["num_clips"]:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `relllm evaluate` wrote.")],
    baseline: Annotated[
        list[str], typer.Option(help="What gains are over: a system, a run's name or its folder. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tables and plots.")] = Path("runs/comparison"),
    resample: Annotated[
        str, typer.Option(help="What the bootstrap draws: clips, speakers, or auto: speakers where there are 10.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Set runs side by side: values, gains over baselines, paired tests, intervals, the published numbers.

    Writes comparison.md, .tex and .json, a forest plot for each task and the histograms of levels.

    Example: relllm compare runs/text runs/speech runs/re-llm --baseline text-only --baseline speech-only
    """
    from relllm.evaluation.comparison import compare_runs
    from relllm.evaluation.comparison_tables import comparison_tables, write_comparison
    from relllm.evaluation.runs import read_run
    from relllm.evaluation.tables import to_rich

    comparison = compare_runs([read_run(path) for path in runs], baseline, resample=resample, seed=seed)
    written = write_comparison(comparison, out)
    for table in comparison_tables(comparison):
        console.print(to_rich(table))
        for note in table.notes:
            console.print(note, style="dim", markup=False, highlight=False)
    console.print(f"{', '.join(path.name for path in written)} in [bold]{out}[/bold]")
