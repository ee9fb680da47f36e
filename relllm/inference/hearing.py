"""The emotions of many clips as a table: a row for each clip, or for each window of it (`relllm hear`).

A clip's rows go into a journal when it has been heard: a run that was killed goes on where it was. No LLM runs.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from relllm.data.corpora.folder import AUDIO_SUFFIXES, OTHER_SUFFIXES, find_audio
from relllm.data.journal import Journal, audio_fingerprint, check_columns, make_file
from relllm.data.loading import holds_rows, load_corpus
from relllm.data.table_files import read_table, write_csv, write_table
from relllm.labels import DIMENSIONS
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.places_relllm import PlaceError, check_place
from relllm.plots import check_matplotlib, plot_over_time
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.processing.processing_relllm import ReLLMProcessor

from .inference_settings import HearSettings
from .replies import EMOTION, Heard, hear

STDIN = "-"
SUFFIXES = (".csv", ".jsonl", ".parquet")
LONGEST_S = 4 * 3600.0  # of a file that is heard window by window
DIGITS = 6
IDENTITY = ("model", "revision", "dtype", "every", "overlap", "channel")  # what two runs share to make one table


# By name what opens a clip, and what tells it from others of its name; of a URL nothing does.
Clips: TypeAlias = Mapping[str, tuple[Callable[[], AudioSource], str | None]]
LoadModel: TypeAlias = Callable[[], tuple[ReLLMForConditionalGeneration, ReLLMProcessor]]


def find_clips(sources: Sequence[str], split: str | None = None) -> Clips:
    """Return what opens each clip, by name, of files, URLs, folders of audio, data sets, or `-` for standard input.

    A file's name is its path, a row's its `id`, or its path where it has none. What is not there is a [`PlaceError`].
    """
    clips: dict[str, tuple[Callable[[], AudioSource], str | None]] = {}
    for source in sources:
        path = Path(os.path.expanduser(source))
        if source == STDIN:
            content = sys.stdin.buffer.read()
            clips["stdin"] = (partial(bytes, content), hashlib.sha256(content).hexdigest())
        elif "://" in source:
            clips[source] = (partial(str, source), None)
        elif os.path.exists(path) and not holds_rows(path):
            found = find_audio(path) if path.is_dir() else [path]
            if not found:
                raise PlaceError(f"{source} holds no audio files ({', '.join(AUDIO_SUFFIXES)}) and no data set.")
            clips |= {str(file): (partial(Path, file), _stamp(file)) for file in found}
        else:
            of_hub = (
                re.fullmatch(r"[^/]+/[^/]+", source) and path.suffix.lower() not in AUDIO_SUFFIXES + OTHER_SUFFIXES
            )
            check_place(source, repo_type="dataset" if of_hub else None)
            _add_rows(clips, source, split)
    return clips


def _add_rows(clips: dict, data: str, split: str | None) -> None:
    rows = load_corpus(data, split or "all")
    check_columns(rows, {"audio"})
    has_ids = "id" in rows.column_names
    content = audio_fingerprint(rows)  # of clips that are in the rows themselves
    audio = [None] * len(rows) if content and has_ids else rows["audio"]
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in audio]
    for number, (name, path) in enumerate(zip(rows["id"] if has_ids else paths, paths, strict=True)):
        if not isinstance(name, str) or name in clips:
            raise ValueError(f"{data}: every row needs an `id` or an audio path of its own; got {name!r} (again).")
        stamp = _stamp(Path(path)) if isinstance(path, str) else None
        clips[name] = (partial(lambda at: rows[at]["audio"], number), content or stamp)


def write_heard(clips: Clips, load_model: LoadModel, settings: HearSettings) -> dict:
    """Hear the clips, write `settings.out`, and return the report: `clips`, `rows`, and `not_read`, by name with why.

    `load_model` is called once, if there is anything left to hear. Killed, the same call goes on where it was. Without
    `settings.out` the table is printed as CSV, and nothing is kept. Errors are those of [`make_file`].
    """
    if settings.plots is not None:
        check_matplotlib()

    def fill(journal: Journal) -> None:
        todo = {name: clip for name, clip in clips.items() if name not in journal.done}
        for entries in hear_windows(todo, load_model, settings, len(journal.done)):
            journal.append(entries)

    def finish(done: Mapping[str, dict]) -> tuple[dict, Callable[[Path], None]]:
        rows = _collect(clips, done)
        not_read = {row["clip"]: row["error"] for row in rows if row["error"]}
        return {"clips": len(clips), "rows": len(rows), "not_read": not_read}, lambda path: write_table(rows, path)

    if (out := settings.out) is None:
        done = {entry["id"]: entry for entries in hear_windows(clips, load_model, settings) for entry in entries}
        report, rows = finish(done)[0], _collect(clips, done)
        write_csv(rows, sys.stdout)
    else:
        if out.suffix not in SUFFIXES or out.is_dir():
            raise ValueError(f"--out {out}: expected a file that ends in one of {', '.join(SUFFIXES)}.")
        names = "".join(f"{name}\0{stamp}\n" for name, (_, stamp) in clips.items())  # which they are, what is in them
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        identity = {name: getattr(settings, name) for name in IDENTITY}
        stamps = {"weights": _stamp(Path(os.path.expanduser(settings.model))), "clips": digest}
        report = make_file(out, {"task": "hear", **identity, **stamps}, fill, finish)
        rows = [row for _, row in read_table(out)] if settings.plots else []  # also of one that was complete before
    if settings.plots is not None:
        _draw(rows, settings.plots)
    return report


def hear_windows(clips: Clips, load_model: LoadModel, settings: HearSettings, done: int = 0) -> Iterator[list[dict]]:
    """Yield `{"id": name, "rows": […]}` of the clips that each batch completes, in order; `done` were heard before."""
    if not clips:
        return
    model, processor = load_model()
    extractor = processor.feature_extractor
    waiting: list[tuple[str, list[dict], list[np.ndarray]]] = []
    windows = 0  # of the speech tower, in those

    def hear_waiting() -> list[dict]:
        samples: list[AudioSource] = [{"waveform": part} for *_, parts in waiting for part in parts]
        at_once = max(1, settings.batch_size * len(samples) // max(windows, 1))
        heard = hear(model, processor, samples, batch_size=at_once)
        entries = [
            {"id": name, "rows": [row | _columns(next(heard), name) for row in rows] if parts else rows}
            for name, rows, parts in waiting
        ]
        waiting.clear()
        bar.update(len(entries))
        return entries

    with tqdm(total=done + len(clips), initial=done, desc="Hearing", unit="clip", disable=None) as bar:
        for name, (open_clip, _) in clips.items():
            rows, parts = _read_rows(name, open_clip, extractor, settings)
            own = sum(-(-len(part) // extractor.n_samples) for part in parts)
            if waiting and windows + own > settings.batch_size:
                yield hear_waiting()
                windows = 0
            waiting.append((name, rows, parts))
            windows += own
        yield hear_waiting()


def _read_rows(
    name: str, open_clip: Callable[[], AudioSource], extractor: ReLLMFeatureExtractor, settings: HearSettings
) -> tuple[list[dict], list[np.ndarray]]:
    """Return the rows of a clip and the samples of each; where it cannot be read, a row with the reason and none."""
    try:
        read = extractor.read_clip(open_clip(), channel=settings.channel, max_duration_s=LONGEST_S, name=name)
        duration_s = read.shape[-1] / extractor.sampling_rate
        if settings.every is None and duration_s > extractor.max_duration_s:
            longest = f"{extractor.max_duration_s:g} s"
            raise ValueError(f"{name}: it lasts {duration_s:.1f} s, one row is of at most {longest}: --every 10.")
    except (ImportError, OSError, ValueError, TypeError) as error:  # ImportError: what a container needs
        return [{"clip": name, "error": f"{error}"}], []
    channels = np.atleast_2d(read)
    spans = list(_cut_spans(read.shape[-1], extractor, settings))
    times = [[round(place / extractor.sampling_rate, 3) for place in span] for span in spans]
    rows = [
        {"clip": name, "channel": channel, "start_s": start, "end_s": end}
        for channel in name_channels(settings.channel, len(channels))
        for start, end in times
    ]
    return rows, [samples[start:end] for samples in channels for start, end in spans]


def name_channels(channel: str, count: int) -> list[str]:
    """Return what each of the clips is called that the setting `channel` makes of a file."""
    if channel != "each":
        return [channel] * count
    return ["left", "right"] if count == 2 else [str(number + 1) for number in range(count)]


def _cut_spans(length: int, extractor: ReLLMFeatureExtractor, settings: HearSettings) -> Iterator[tuple[int, int]]:
    """Yield where the windows begin and end, in samples; a rest below half a window belongs to the last one."""
    if settings.every is None:
        yield 0, length
        return
    step = round(settings.every * extractor.sampling_rate)
    beyond = round(settings.overlap * extractor.sampling_rate)
    least = max(step / 2, extractor.min_duration_s * extractor.sampling_rate)
    starts = [start for start in range(0, length, step) if start == 0 or length - start >= least]
    for start in starts:
        yield start, length if start == starts[-1] else min(start + step + beyond, length)


def _columns(heard: Heard, clip: str) -> dict[str, object]:
    named = {name: round(value, DIGITS) for name, value in heard.flatten().items()}
    if wrong := [name for name, value in named.items() if not math.isfinite(value)]:
        raise ValueError(f"{clip}: the model gives no number for {', '.join(wrong)}. Try --dtype float32.")
    return {"emotion": heard.emotion, **named}


def _stamp(place: Path) -> str | None:
    """Return path, size and time of a file, or of a folder's weights; `None` of what is elsewhere."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    return " ".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files) or None


def _collect(clips: Clips, done: Mapping[str, dict]) -> list[dict[str, object]]:
    """Return the rows of clips, in order, each with every column of any, the error last."""
    rows = [row for name in clips for row in done[name]["rows"]]
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    return [{name: row.get(name) for name in (*names, "error")} for row in rows]


def _draw(rows: Sequence[Mapping], folder: Path) -> None:
    """Draw each channel of each clip that has more than one window."""
    import pandas

    table = pandas.DataFrame(rows)
    if "channel" not in table:  # no clip was read
        return
    numbers = {clip: number for number, clip in enumerate(table["clip"].unique(), start=1)}
    for (clip, channel), own in table.groupby(["clip", "channel"], sort=False):
        if len(own) < 2:
            continue
        starts, ends = own["start_s"].astype(float).tolist(), own["end_s"].astype(float).tolist()
        readings = {name: own[name].astype(float).tolist() for name in own if name.startswith((EMOTION, *DIMENSIONS))}
        stem = f"{numbers[clip]:04d}_" + re.sub(r"[^\w.-]+", "_", Path(clip).name)
        plot_over_time(
            [*starts, ends[-1]],
            {name.removeprefix(EMOTION): values for name, values in readings.items() if name.startswith(EMOTION)},
            {name: readings[name] for name in DIMENSIONS if name in readings},
            folder / f"{stem}_{channel}.png",
            title=f"{clip} ({channel})",
        )
