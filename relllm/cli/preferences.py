"""Pairs of replies to prefer: `relllm score-replies`."""

from __future__ import annotations

import typer
from rich.table import Table

from relllm.inference.inference_settings import CheckpointSettings
from relllm.preferences.preference_settings import ScoreRepliesSettings

from .options import console, from_settings
from .talking import load_relllm

app = typer.Typer()


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
    from relllm.preferences.pairs import samples_path, score_corpus

    place = CheckpointSettings(
        model=settings.model, device=settings.device, dtype=settings.dtype, revision=settings.revision
    )
    report = score_corpus(settings, lambda: load_relllm(place))
    table = Table("reward", "weight", "mean", "range", "chosen", "rejected", title="Scores of the replies")
    for name, of in report["scores"].items():
        numbers = ("—" if value is None else f"{value:.3f}" for value in of.values())
        table.add_row(name, f"{settings.weights[name]:g}" if name in settings.weights else "", *numbers)
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
