"""Look at a data set before a model does: what is in it, and what may be wrong with it; nothing is mended."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from relllm.processing.audio_relllm import SAMPLING_RATE, AudioSource, load_audio

from .clips import CLIPPED_SAMPLES, SILENT_PEAK, measure_loudness, read_header
from .data_settings import InspectSettings
from .journal import write_json
from .loading import add_column, load_corpus
from .processes import available_cores, run_in_processes
from .report import summarise_rows
from .rows import ALL, UNSPLIT

if TYPE_CHECKING:
    from datasets import Dataset

LOW, HIGH = 0.35, 0.65
# Emotion, dimension, and the side of LOW or HIGH where the two do not go together.
CONTRADICTIONS = (
    *(("happy", "valence", "below"), ("angry", "arousal", "below")),
    *(("angry", "valence", "above"), ("sad", "valence", "above")),
)

FEWEST_WORDS = 3  # of a transcript that two splits should not share
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff"  # each counts as a word: nothing is between them
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|(?:[^\W{_IDEOGRAPHS}]|')+")
_CHUNK = 32  # clips that a process reads before it reports


@dataclass(frozen=True)
class Finding:
    """Something to look at."""

    check: str  # a category: the same words for the same check
    ids: list[str]  # all the rows it is about
    detail: str  # the value, the speaker, the splits


@dataclass(frozen=True)
class ClipFacts:
    """What was measured of a clip, mono and at its own rate."""

    error: str | None = None  # why it could not be read; then nothing else is known
    duration_s: float | None = None
    digest: str | None = None  # of rate and samples, whatever the container
    peak: float = 1.0  # largest magnitude; 1 is full scale
    full_scale_run: int = 0  # most samples in a row at full scale


@dataclass(frozen=True)
class Inspection:
    """A data set's rows without their audio, and what was found."""

    data: str  # as it was named
    rows: list[dict]  # with `id`, `split` and, where known, `duration_s`
    audio_was_read: bool
    findings: list[Finding]  # in the order of the checks


def inspect_corpus(settings: InspectSettings, *, progress: bool = True) -> Inspection:
    """Read all splits of whatever [`load_corpus`] reads, and check them; nothing is written.

    With more than one process a script needs `if __name__ == "__main__":`.
    """
    data = settings.data
    table = add_column(load_corpus(data, ALL), "id", "row {}")
    rows = [
        {**row, "id": str(row["id"]), "split": None if row.get("split") == UNSPLIT else row.get("split")}
        for row in table.remove_columns([name for name in ("audio", "messages") if name in table.column_names])
    ]
    findings = check_table(rows)
    if settings.audio:
        if "audio" not in table.column_names:
            raise ValueError(f"{data} has no column `audio`. Look at the table alone: --no-audio.")
        facts = _measure(table, settings.num_proc or available_cores(), progress)
        for row, measured in zip(rows, facts, strict=True):
            if measured.duration_s is not None:
                row["duration_s"] = measured.duration_s
        findings += check_audio(rows, facts)
    long = [row for row in rows if (row.get("duration_s") or 0.0) > settings.max_seconds]
    findings += [Finding("long", [row["id"]], f"{row['duration_s']:.1f} s") for row in long]
    return Inspection(data=data, rows=rows, audio_was_read=settings.audio, findings=findings)


def check_table(rows: Sequence[Mapping]) -> list[Finding]:
    """Find ids used twice, speakers and transcripts in several splits, and emotions that contradict their dimensions.

    Rows need `id` and `split`; a speaker, a transcript or a split that is `None` leaks nowhere.
    """
    counts = Counter(row["id"] for row in rows)
    findings = [Finding("id used more than once", [name], f"{n} rows") for name, n in counts.items() if n > 1]
    findings += _find_shared(rows, "speaker in several splits", [row.get("speaker") for row in rows])
    words = [_WORD.findall(text.casefold()) if isinstance(text := row.get("text"), str) else [] for row in rows]
    said = [" ".join(of_row) if len(of_row) >= FEWEST_WORDS else None for of_row in words]
    findings += _find_shared(rows, "same transcript in several splits", said)
    for row in rows:
        for emotion, dimension, side in CONTRADICTIONS:
            value = row.get(dimension) if row.get("emotion") == emotion else None
            limit = LOW if side == "below" else HIGH
            if value is not None and (value < limit if side == "below" else value > limit):
                detail = f"{emotion}, {dimension} {value:.2f} is {side} {limit}"
                findings.append(Finding("emotion contradicts a dimension", [row["id"]], detail))
    return findings


def _find_shared(rows: Sequence[Mapping], check: str, values: Sequence[object]) -> Iterator[Finding]:
    """Yield what rows of several splits have in common, with the number of its rows in each."""
    found: dict[object, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row, value in zip(rows, values, strict=True):
        if row["split"] is not None and value is not None:
            found[value][row["split"]].append(row["id"])
    for value, splits in sorted(found.items(), key=lambda item: str(item[0])):
        if len(splits) > 1:
            counts = ", ".join(f"{len(ids)} in {split}" for split, ids in splits.items())
            yield Finding(check, [name for ids in splits.values() for name in ids], f"{value!s:.60}: {counts}")


def check_audio(rows: Sequence[Mapping], facts: Sequence[ClipFacts]) -> list[Finding]:
    """Find clips that cannot be read, are clipped or silent, or the same as others (one finding for all)."""
    findings = []
    by_digest: dict[str, list[Mapping]] = defaultdict(list)
    for row, measured in zip(rows, facts, strict=True):
        if measured.error is not None:
            findings.append(Finding("audio cannot be read", [row["id"]], measured.error))
        if measured.digest is not None:
            by_digest[measured.digest].append(row)
        if (run := measured.full_scale_run) >= CLIPPED_SAMPLES:
            findings.append(Finding("clipped", [row["id"]], f"{run} samples in a row at full scale"))
        if measured.peak < SILENT_PEAK:
            findings.append(Finding("silent", [row["id"]], f"peak {measured.peak:.1e} of full scale"))
    for same in by_digest.values():
        if len(same) > 1:
            splits = sorted({row["split"] or UNSPLIT for row in same})
            check = "same audio in several splits" if len(splits) > 1 else "same audio"
            findings.append(Finding(check, [row["id"] for row in same], ", ".join(splits)))
    return findings


def measure_clip(audio: AudioSource) -> ClipFacts:
    """Decode a clip and measure it; one that cannot be read is described, not raised."""
    info = read_header(audio)
    rate = info.samplerate if info else SAMPLING_RATE
    try:
        waveform = load_audio(audio, sampling_rate=rate, max_duration_s=math.inf)
    except (OSError, TypeError, ValueError) as error:
        return ClipFacts(error=str(error))
    peak, full_scale_run = measure_loudness(waveform)
    digest = hashlib.blake2b(waveform.tobytes(), digest_size=16, salt=rate.to_bytes(8, "little"))
    return ClipFacts(None, len(waveform) / rate, digest.hexdigest(), peak, full_scale_run)


def write_report(inspection: Inspection, out: Path) -> list[Path]:
    """Write `report.json`, with all findings, and a plot where rows have valence and arousal; return the paths."""
    from relllm.plots import plot_valence_arousal_labels

    summary = summarise_rows(inspection.rows)
    content = {
        "data": inspection.data,
        "audio_was_read": inspection.audio_was_read,
        "splits": {name: split.describe() for name, split in summary.items()},
        "num_findings": dict(Counter(finding.check for finding in inspection.findings)),
        "findings": [asdict(finding) for finding in inspection.findings],
    }
    written = [out / "report.json"]
    write_json(content, written[0])
    if points := [point for split in summary.values() for point in split.points]:
        valence, arousal, emotions = zip(*points, strict=True)
        plot, title = out / "valence_arousal.png", f"{Path(inspection.data).name}: {len(points):,} clips"
        written.append(plot_valence_arousal_labels(valence, arousal, emotions, plot, title=title))
    return written


def _measure(table: Dataset, num_proc: int, progress: bool) -> list[ClipFacts]:
    """Facts of every clip in the order of the rows."""
    starts = range(0, len(table), _CHUNK)
    chunks = ((start, table[start : start + _CHUNK]["audio"]) for start in starts)
    found: dict[int, list[ClipFacts]] = {}
    with tqdm(total=len(table), desc="Reading audio", unit="clip", disable=not progress) as bar:
        num_proc = max(1, min(num_proc, len(starts)))
        for (start, _), facts in run_in_processes(_measure_chunk, chunks, num_proc, preload=__name__):
            found[start] = facts
            bar.update(len(facts))
    return [fact for start in starts for fact in found[start]]


def _measure_chunk(chunk: tuple[int, list[AudioSource]]) -> list[ClipFacts]:
    return [measure_clip(audio) for audio in chunk[1]]
