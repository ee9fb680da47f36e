"""Corpora: `relllm prepare …`, `inspect`, `write-targets` and `annotate`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from relllm.data import data_settings
from relllm.data.corpora.patterns import PATTERNS
from relllm.demo.demo_settings import SyntheticSettings, TinyTowersSettings
from relllm.labels import DIMENSIONS

from .options import console, from_settings

if TYPE_CHECKING:
    from relllm.data.inspection import Finding, Inspection
    from relllm.data.replies.writers import Writer

app = typer.Typer()
prepare = typer.Typer(help="Write corpora in the form that training reads.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")
# By name: whose settings, what is written, and what stands behind the name in an example.
CORPORA: dict[str, tuple[type, str, str]] = {
    "iemocap": (
        *(data_settings.IemocapSettings, "IEMOCAP: five sessions of two actors each"),
        "corpora/IEMOCAP_full_release --out data/iemocap",
    ),
    "esd": (
        *(data_settings.EsdSettings, "ESD: the same sentences in five emotions"),
        '"corpora/Emotion Speech Dataset" --leave-speakers-out 0019,0020',
    ),
    "msp-podcast": (
        *(data_settings.MspPodcastSettings, "MSP-Podcast with its own splits"),
        "corpora/MSP-Podcast --out data/msp-podcast",
    ),
    "folder": (
        *(data_settings.FolderSettings, "your own speech: a table with paths, or a bare folder of audio files"),
        "recordings --pattern '(?P<speaker>\\w+)/(?P<emotion>[a-z]+)_\\d+\\.wav'",
    ),
}
CORPORA |= {
    name: (data_settings.LabelSettings, pattern.facts.title, f"corpora/{name} --out data/{name}")
    for name, pattern in PATTERNS.items()
}


def _add_corpus(name: str, kind: type, what: str, example: str) -> None:
    def command(settings: Any) -> None:
        from relllm.data.corpora.folder import parse_pattern
        from relllm.data.preparing import prepare_corpus

        if name in PATTERNS:
            parse: Callable = partial(parse_pattern, PATTERNS[name])
            settings = replace(settings, output_dir=settings.output_dir or Path("data") / name)
        else:
            own = name.replace("-", "_")
            parse = getattr(import_module(f"relllm.data.corpora.{own}"), f"parse_{own}")
        _show_report(prepare_corpus(parse(settings), settings), settings.directory)

    command.__annotations__["settings"] = kind
    command.__doc__ = f"""Write {what}. Killed, the same command goes on where it was.

    Example: relllm prepare {name} {example}
    """
    prepare.command(name)(from_settings(command))


for _name, _told in CORPORA.items():
    _add_corpus(_name, *_told)


@prepare.command()
@from_settings
def synthetic(settings: SyntheticSettings) -> None:
    """Synthesise speech in five emotions with replies and all labels: rule-made prosody, not human emotion.

    Example: relllm prepare synthetic --train-clips 2000 --out data/synthetic
    """
    from relllm.demo.synthetic import prepare_synthetic

    _show_report(prepare_synthetic(settings), settings.directory)


@prepare.command("tiny-towers")
@from_settings
def tiny_towers(settings: TinyTowersSettings) -> None:
    """Write three tiny towers with random weights, for recipes/smoke.yaml."""
    from relllm.demo.tiny_towers import make_tiny_towers

    make_tiny_towers(settings.output_dir, seed=settings.seed)
    console.print(f"speech, emotion and llm in {settings.output_dir}")


@app.command()
@from_settings
def inspect(settings: data_settings.InspectSettings) -> None:
    """Look at a data set: counts, durations, a valence-arousal plot, a few rows, and what may be wrong with it.

    docs/data.md lists what is checked. Nothing is written into the data set.

    Example: relllm inspect data/iemocap
    """
    from relllm.data.inspection import inspect_corpus, write_report
    from relllm.data.report import summarise_rows

    inspection = inspect_corpus(settings)
    _show_splits({name: split.describe() for name, split in summarise_rows(inspection.rows).items()})
    _show_rows(inspection, settings.show)
    _show_findings(inspection)
    out = settings.output_dir or Path("runs/inspect") / Path(settings.data).absolute().name
    for path in write_report(inspection, out):
        console.print(f"written: {path}")
    if settings.strict and inspection.findings:
        raise typer.Exit(1)


@app.command("write-targets")
@from_settings
def write_replies(settings: data_settings.WriteTargetsSettings) -> None:
    """Have a chat LLM write the replies to learn, from transcript and emotion.

    Refusals and junk are dropped; what and why is in NAME.report.json. Killed, the same command goes on where it was.

    Example: relllm write-targets corpora/esd --text-model Qwen/Qwen2.5-7B-Instruct --out corpora/esd/targets.jsonl
    """
    from relllm.data.journal import report_path
    from relllm.data.replies.targets import run_write_targets, target_table

    if settings.engine == "vllm":
        from relllm.inference.vllm import check_vllm

        check_vllm()

    def load_vllm(*args: object, **options: object) -> Writer:
        from relllm.inference.vllm.vllm_engine import VllmWriter

        return VllmWriter.from_pretrained(*args, **options)  # type: ignore[arg-type]

    report = run_write_targets(settings, load_vllm)
    console.print(target_table(report))
    dropped = report_path(settings.out)
    console.print(f"Replies: {settings.out}; what was dropped, with ids and texts: {dropped}")


@app.command()
@from_settings
def annotate(settings: data_settings.AnnotateSettings) -> None:
    """Read arousal, dominance and valence with an emotion tower where a corpus has none.

    The column `dimension_source` says of each row whether its numbers are labels or a model's. Clips that cannot be
    read are in NAME.report.json. Killed, the same command goes on where it was.

    Example: relllm annotate corpora/esd --emotion-model audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim
    --out corpora/esd/annotated.jsonl
    """
    from relllm.data.annotate import annotation_table, run_annotate
    from relllm.data.journal import report_path

    console.print(annotation_table(run_annotate(settings)))
    console.print(f"Rows: {settings.out}; clipped and unread ones by id: {report_path(settings.out)}")


def _show_report(report: dict, out: Path) -> None:
    _show_splits(report["splits"])
    for reason, dropped in report["dropped"].items():
        console.print(f"left out: {reason}: {dropped['count']:,}", style="yellow")
    for reason, empty in report["left_empty"].items():
        console.print(f"kept, but left empty: {reason}: {empty['count']:,}")
    for mark, ids in report["kept_but_marked"].items():
        if ids:
            console.print(f"kept, but {mark}: {len(ids):,}")
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow")
    console.print(f"Data set in {out}; what was left out, by id: {out / 'report.json'}")


def _show(value: float | Mapping | None) -> str:
    """Return a number, or several with their names, as a table has it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(one)}" for name, one in value.items())
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _show_splits(splits: Mapping[str, Mapping]) -> None:
    """Show the numbers of splits, as a report has them."""
    from relllm.data.report import UNLABELLED

    columns = ("clips", "hours", "speakers", "with text", "with dimensions", "seconds", "emotions")
    table = Table("split", *columns, title="Clips", title_justify="left")
    for name, split in splits.items():
        speakers = len(split["speakers"].keys() - {UNLABELLED})
        rated = min(found["rows"] for found in split["dimensions"].values())
        counts = (split["rows"], split["hours"], speakers, split.get("with_text"), rated)  # of old, without texts
        table.add_row(name, *map(_show, (*counts, split["duration_s"], split["emotions"])))
    console.print(table)


def _show_rows(inspection: Inspection, count: int) -> None:
    table = Table("id", "split", "emotion", "A / D / V", "transcript", title="Some rows", title_justify="left")
    rows = inspection.rows
    chosen = sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))  # the same at every look
    for row in (rows[index] for index in chosen):
        dimensions = " / ".join(_show(row.get(name)) for name in DIMENSIONS)
        table.add_row(row["id"], row["split"] or "-", row.get("emotion") or "-", dimensions, row.get("text") or "-")
    if chosen:
        console.print(table)


def _show_findings(inspection: Inspection) -> None:
    by_check: dict[str, list[Finding]] = {}
    for finding in inspection.findings:
        by_check.setdefault(finding.check, []).append(finding)
    table = Table("check", "findings", "clips", "for example", title="Findings", title_justify="left")
    for check, found in by_check.items():
        clips = {row_id for finding in found for row_id in finding.ids}
        example = f"{', '.join(found[0].ids[:3])}: {found[0].detail}"
        table.add_row(check, _show(len(found)), _show(len(clips)), example)
    console.print(table if by_check else "No findings.")
    if not inspection.audio_was_read:
        console.print("The audio was not read: nothing is known of it.")
