"""Corpora: `relllm prepare …` and `relllm inspect`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from relllm.data.clips import ClipSettings
    from relllm.data.inspection import Finding, Inspection
    from relllm.data.rows import Corpus

app = typer.Typer()
console = Console()
prepare = typer.Typer(help="Write corpora in the form that training reads.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")


Root = Annotated[Path, typer.Argument(help="Where the corpus was unpacked.")]
LabelSetOption = Annotated[
    Literal["4", "5", "all"], typer.Option(help="4: neutral, happy, angry, sad; 5: and surprise; all: every name.")
]
Embed = Annotated[bool, typer.Option(help="Put the audio into the Parquet files, at 16 kHz, instead of its path.")]
NumProc = Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each core.")]
Shortest = Annotated[float, typer.Option(help="Shorter clips are left out, in seconds.")]
Longest = Annotated[float, typer.Option(help="Longer clips are left out, in seconds.")]


@prepare.command()
def iemocap(
    root: Root,
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("data/iemocap"),
    label_set: LabelSetOption = "4",
    merge_excited: Annotated[bool, typer.Option(help="Excited counts as happy.")] = True,
    held_out_session: Annotated[int, typer.Option(min=0, max=5, help="The split test; 0 for none.")] = 5,
    validation_session: Annotated[int | None, typer.Option(min=1, max=5, help="The split validation.")] = None,
    embed_audio: Embed = False,
    min_seconds: Shortest = 0.025,
    max_seconds: Longest = 600.0,
    num_proc: NumProc = None,
) -> None:
    """Write IEMOCAP: five sessions of two actors each. Killed, the same command goes on where it was.

    Example: relllm prepare iemocap corpora/IEMOCAP_full_release --out data/iemocap
    """
    from relllm.data.clips import ClipSettings
    from relllm.data.corpora.iemocap import parse_iemocap

    options = {
        "label_set": label_set,
        "merge_excited": merge_excited,
        "held_out_session": held_out_session,
        "validation_session": validation_session,
    }
    with _plain_errors():
        corpus = parse_iemocap(
            root,
            label_set=label_set,
            merge_excited=merge_excited,
            held_out_session=held_out_session,
            validation_session=validation_session,
        )
        _write(corpus, out, options, ClipSettings(embed_audio, min_seconds, max_seconds), num_proc)


@prepare.command()
def esd(
    root: Root,
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("data/esd"),
    label_set: LabelSetOption = "5",
    language: Annotated[Literal["en", "zh", "all"], typer.Option(help="Whose speakers.")] = "en",
    splits: Annotated[
        Literal["auto", "numbers", "folders"], typer.Option(help="auto: the folder of a clip if any, else its number.")
    ] = "auto",
    leave_speakers_out: Annotated[
        str | None, typer.Option(help="Speakers of the split test, for example 0019,0020.")
    ] = None,
    embed_audio: Embed = False,
    min_seconds: Shortest = 0.025,
    max_seconds: Longest = 600.0,
    num_proc: NumProc = None,
) -> None:
    """Write ESD: the same sentences in five emotions. Killed, the same command goes on where it was.

    Example: relllm prepare esd "corpora/Emotion Speech Dataset" --leave-speakers-out 0019,0020
    """
    from relllm.data.clips import ClipSettings
    from relllm.data.corpora.esd import parse_esd

    held_out = [name.strip() for name in leave_speakers_out.split(",")] if leave_speakers_out else []
    options = {"label_set": label_set, "language": language, "splits": splits, "leave_speakers_out": held_out}
    with _plain_errors():
        corpus = parse_esd(root, label_set=label_set, language=language, splits=splits, held_out_speakers=held_out)
        _write(corpus, out, options, ClipSettings(embed_audio, min_seconds, max_seconds), num_proc)


@prepare.command("msp-podcast")
def msp_podcast(
    root: Root,
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("data/msp-podcast"),
    label_set: LabelSetOption = "5",
    embed_audio: Embed = False,
    min_seconds: Shortest = 0.025,
    max_seconds: Longest = 600.0,
    num_proc: NumProc = None,
) -> None:
    """Write MSP-Podcast with its own splits. Killed, the same command goes on where it was.

    Example: relllm prepare msp-podcast corpora/MSP-Podcast --out data/msp-podcast
    """
    from relllm.data.clips import ClipSettings
    from relllm.data.corpora.msp_podcast import parse_msp_podcast

    with _plain_errors():
        corpus = parse_msp_podcast(root, label_set=label_set)
        _write(corpus, out, {"label_set": label_set}, ClipSettings(embed_audio, min_seconds, max_seconds), num_proc)


@prepare.command()
def folder(
    root: Annotated[Path, typer.Argument(help="A .csv or .jsonl table with paths, or a folder of audio files.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the data set; by default data/NAME.")] = None,
    label_set: LabelSetOption = "all",
    split: Annotated[str | None, typer.Option(help="Of the rows that name none.")] = None,
    language: Annotated[str | None, typer.Option(help="Of the rows that name none, for example en.")] = None,
    vad: Annotated[bool, typer.Option(help="Cut each file into turns: for long recordings.")] = False,
    embed_audio: Embed = False,
    min_seconds: Shortest = 0.025,
    max_seconds: Longest = 600.0,
    num_proc: NumProc = None,
) -> None:
    """Write your own speech: a table with paths and any of the columns, or a bare folder of audio files.

    Example: relllm prepare folder recordings/labels.csv --out data/ours --split train
    """
    from relllm.data.clips import ClipSettings
    from relllm.data.corpora.folder import parse_folder

    with _plain_errors():
        corpus = parse_folder(root, label_set=label_set, split=split, language=language)
        options = {"label_set": label_set, "split": split, "language": language}
        clips = ClipSettings(embed_audio, min_seconds, max_seconds, vad)
        _write(corpus, out or Path("data") / root.absolute().stem, options, clips, num_proc)


@prepare.command()
def synthetic(
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("data/synthetic"),
    train_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 180,
    validation_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 30,
    test_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 40,
    seed: Annotated[int, typer.Option(help="The same settings give the same bytes.")] = 0,
    num_proc: NumProc = None,
) -> None:
    """Synthesise speech in five emotions with replies and all labels: rule-made prosody, not human emotion.

    Example: relllm prepare synthetic --train-clips 2000 --out data/synthetic
    """
    from relllm.demo.synthetic import prepare_synthetic

    counts = {"train": train_clips, "validation": validation_clips, "test": test_clips}
    with _plain_errors():
        _show(prepare_synthetic(out, counts, seed=seed, num_proc=num_proc), out)


@prepare.command()
def examples(out: Annotated[Path, typer.Option(help="Folder of the clips.")] = Path("data/examples")) -> None:
    """Synthesise eight short clips to talk with: one sentence in five emotions, and three others.

    Rule-made prosody (eSpeak NG), not human emotion. `relllm web --examples` shows them; WAV files and an index.
    """
    from relllm.demo.examples import write_examples

    with _plain_errors():
        table = Table("emotion", "words")
        for example in write_examples(out):
            table.add_row(example.emotion, example.text)
    console.print(table)
    console.print(f"in [bold]{escape(str(out))}[/bold]")


@prepare.command("tiny-towers")
def tiny_towers(
    out: Annotated[Path, typer.Option(help="Folder of the three towers.")] = Path("data/tiny-towers"),
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write three tiny towers with random weights, for recipes/smoke.yaml."""
    from relllm.demo.tiny_towers import make_tiny_towers

    make_tiny_towers(out, seed=seed)
    console.print(f"speech, emotion and llm in [bold]{out}[/bold]")


def _write(
    corpus: Corpus, out: Path, options: Mapping[str, object], clips: ClipSettings, num_proc: int | None
) -> None:
    from relllm.data.preparing import prepare_corpus

    _show(prepare_corpus(corpus, out, options=options, clips=clips, num_proc=num_proc), out)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What is wrong with the input, without the lines of code that found it."""
    try:
        yield
    except (OSError, ValueError) as error:
        console.print(f"[red]stopped:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error


def _show(report: dict, out: Path) -> None:
    from relllm.data.report import UNLABELLED

    table = Table("split", "rows", "hours", "speakers", "emotions")
    for name, split in report["splits"].items():
        emotions = ", ".join(f"{emotion} {count:,}" for emotion, count in split["emotions"].items())
        speakers = len(split["speakers"].keys() - {UNLABELLED})
        table.add_row(name, f"{split['rows']:,}", f"{split['hours']:.3g}", f"{speakers:,}", emotions)
    console.print(table)
    for reason, dropped in report["dropped"].items():
        console.print(f"[yellow]left out:[/yellow] {escape(reason)}: {dropped['count']:,}")
    for mark, ids in report["kept_but_marked"].items():
        if ids:
            console.print(f"kept, but {mark}: {len(ids):,}")
    for note in report["notes"]:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    console.print(f"Data set in [bold]{out}[/bold]; what was left out, by id: [bold]{out / 'report.json'}[/bold]")


@app.command()
def inspect(
    data: Annotated[str, typer.Argument(help="A data set: a folder, a .jsonl/.csv/.parquet file, or a Hub id.")],
    out: Annotated[Path | None, typer.Option(help="Folder of report and plot; else runs/inspect/NAME.")] = None,
    audio: Annotated[bool, typer.Option(help="Decode every clip; --no-audio looks at the table alone.")] = True,
    num_proc: Annotated[int | None, typer.Option(min=1, help="Processes that decode; else one for each core.")] = None,
    max_seconds: Annotated[float, typer.Option(min=0, help="Longer clips are a finding.")] = 30.0,
    show: Annotated[int, typer.Option(min=0, help="Rows to show, from all over the data set.")] = 5,
    strict: Annotated[bool, typer.Option(help="Exit with 1 if there is a finding.")] = False,
) -> None:
    """Look at a data set: counts, durations, a valence-arousal plot, a few rows, and what may be wrong with it.

    Checked, by id: ids used more than once; speakers in several splits;
    emotions that contradict a dimension (happy with valence below 0.35, angry
    or sad with valence above 0.65, angry with arousal below 0.35). Of the
    audio: what cannot be read; the same samples twice, in whatever container;
    clipped (three samples in a row at full scale); silent (a peak below
    -60 dB); long clips. Nothing is written into the data set.

    Example: relllm inspect data/iemocap
    """
    from relllm.data.inspection import inspect_corpus, write_report

    inspection = inspect_corpus(data, read_audio=audio, num_proc=num_proc, max_duration_s=max_seconds)
    _show_splits(inspection)
    _show_rows(inspection, show)
    _show_findings(inspection)
    out = out or Path("runs/inspect") / Path(data).absolute().name
    for path in write_report(inspection, out):
        console.print(f"written: [bold]{escape(str(path))}[/bold]")
    if strict and inspection.findings:
        raise typer.Exit(1)


def _show_splits(inspection: Inspection) -> None:
    from relllm.data.inspection import summarize

    summary = summarize(inspection)
    numbers = Table("split", title="Clips", title_justify="left")
    for name in ("clips", "hours", "shortest", "median", "longest", "speakers", "with text", "with dimensions"):
        numbers.add_column(name, justify="right")
    for split, of in summary.items():
        seconds = of["duration_s"]
        durations = ["-"] * 4
        if seconds is not None:
            durations = [f"{of['hours']:.2f}", *(f"{seconds[name]:.1f} s" for name in ("min", "median", "max"))]
        counted = [f"{of[name]:,}" for name in ("num_speakers", "num_with_text", "num_with_dimensions")]
        numbers.add_row(escape(split), f"{of['num_clips']:,}", *durations, *counted)
    emotions = Table("emotion", title="Clips of each emotion", title_justify="left")
    for split in summary:
        emotions.add_column(escape(split), justify="right")
    for emotion in dict.fromkeys(name for of in summary.values() for name in of["emotions"]):
        emotions.add_row(emotion, *(f"{of['emotions'].get(emotion, 0):,}" for of in summary.values()))
    console.print(numbers, emotions)


def _show_rows(inspection: Inspection, count: int) -> None:
    table = Table("id", "split", "emotion", "A / D / V", "transcript", title="Some rows", title_justify="left")
    rows = inspection.rows
    chosen = sorted(random.Random(0).sample(range(len(rows)), min(count, len(rows))))  # the same at every look
    for row in (rows[index] for index in chosen):
        values = [row.get(name) for name in ("arousal", "dominance", "valence")]
        dimensions = " / ".join("-" if value is None else f"{value:.2f}" for value in values)
        texts = [row["id"], row["split"] or "-", row.get("emotion") or "-", dimensions, row.get("text") or "-"]
        table.add_row(*map(escape, texts))
    if chosen:
        console.print(table)


def _show_findings(inspection: Inspection) -> None:
    by_check: dict[str, list[Finding]] = {}
    for finding in inspection.findings:
        by_check.setdefault(finding.check, []).append(finding)
    table = Table("check", title="Findings", title_justify="left")
    table.add_column("findings", justify="right")
    table.add_column("clips", justify="right")
    table.add_column("for example")
    for check, found in by_check.items():
        clips = len({row_id for finding in found for row_id in finding.ids})
        example = f"{', '.join(found[0].ids[:3])}: {found[0].detail}"
        table.add_row(check, f"{len(found):,}", f"{clips:,}", escape(example))
    console.print(table if by_check else "No findings.")
    if not inspection.audio_was_read:
        console.print("The audio was not read: nothing is known of it.")
