"""From the rows of a corpus to a data set on disk: shards of Parquet made by all cores, a report, a card, pictures.

- A shard is a few rows, made by one process from them alone. So the bytes do not depend on the number of processes, a
  process holds one shard's rows and a few megabytes of audio, and the first process holds rows only.
- Everything goes to `DIR.partial`, which is renamed when it is complete. `DIR.journal` beside it knows the finished
  shards, and its lock keeps a second process out. Started again, the same command does the shards that are missing.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from relllm.labels import DIMENSIONS

from .clips import read_row
from .data_settings import PrepareSettings
from .journal import Journal, check_same, digest_values, read_json, write_json, write_whole
from .processes import available_cores, run_in_processes
from .report import FORMAT, build_report, summarise_rows
from .rows import COLUMNS, LIST_COLUMNS, UNSPLIT, Corpus, Dropped, Row, validate_row

if TYPE_CHECKING:
    import pyarrow

SHARD_ROWS = 256
SMALL = 16  # rows that are not worth a process
GROUP_BYTES = 32 * 1024**2  # of embedded audio in one row group, which is what a reader holds at once

MakeAudio = Callable[[Sequence[Row], Path], None]
Shard = tuple[str, list[Row]]  # the name of a file, and its rows before they are read


def prepare_corpus(
    corpus: Corpus, settings: PrepareSettings, *, make_audio: MakeAudio | None = None, progress: bool = True
) -> dict:
    """Write a corpus as a data set that [`~relllm.data.loading.load_corpus`] reads; go on where it was killed.

    `make_audio` makes the audio of rows in a folder before it is read, for a corpus whose audio does not exist yet;
    processes must be able to pickle it. Returned is the report, as in `report.json`, also of what is complete already.
    A row that breaks the schema, a repeated id, and no row that could be kept are a `ValueError`; a folder with
    something else, or of other settings, is a `FileExistsError`; another process at it is a `BlockingIOError`.
    """
    from relllm.plots import check_matplotlib, plot_report

    from .card import write_card

    check_matplotlib()
    directory = settings.directory
    _check_rows(corpus)
    run = _describe(corpus, settings)
    journal_path = directory.with_name(directory.name + ".journal")
    if not journal_path.exists() and (report := _find_report(directory, run)):
        return report
    with Journal(journal_path, run) as journal:
        report = _find_report(directory, run)  # killed between the renaming and the removal of the journal
        if not report:
            partial = directory.with_name(directory.name + ".partial")
            shards = plan_shards(corpus.rows)
            _make_shards(shards, journal, partial, settings, make_audio, progress)
            entries = {name: journal.done[name] for name in shards}
            kept = [
                {**shards[name][index], "duration_s": duration_s}
                for name, entry in entries.items()
                for index, duration_s in entry["kept"]
            ]
            if not kept:
                shutil.rmtree(partial)
                journal_path.unlink()
                _fail_empty(item["reason"] for entry in entries.values() for item in entry["dropped"])
            summary = summarise_rows(kept)
            report = build_report(corpus, list(entries.values()), summary, run)
            plot_report(summary, partial / "plots", title=corpus.facts.title)
            write_card(corpus.facts, report, partial / "README.md")
            write_json(report, partial / "report.json")
            partial.rename(directory)
        journal_path.unlink()
    return report


def plan_shards(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return rows by the names of their files, at most `SHARD_ROWS` in each; splits and rows keep their order."""
    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_split[row["split"] or UNSPLIT].append(row)
    shards = {}
    for split, members in by_split.items():
        total = math.ceil(len(members) / SHARD_ROWS)
        for number in range(total):
            of_shard = members[number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
            shards[f"{split}-{number:05d}-of-{total:05d}"] = of_shard
    return shards


def write_shard(shard: Shard, *, partial: Path, settings: PrepareSettings, make_audio: MakeAudio | None) -> dict:
    """Write those rows of a shard that can be kept into `partial/data`, and return the journal's entry.

    `kept` has index in the shard and duration in seconds of each row, `overshoot` numbers of samples by id.
    """
    import pyarrow.parquet

    name, rows = shard
    if make_audio is not None:
        make_audio(rows, partial)
    entry: dict = {"id": name, "kept": [], "dropped": [], "silent": [], "clipped": [], "converted": 0, "overshoot": {}}
    schema = _table_schema(settings.embed_audio)
    path = partial / "data" / f"{name}.parquet"
    with write_whole(path) as unfinished, pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        for group in _group_rows(_read_rows(rows, entry, partial, settings)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
    if not entry["kept"]:
        path.unlink()
    return entry


def _read_rows(rows: Sequence[Row], entry: dict, partial: Path, settings: PrepareSettings) -> Iterator[dict]:
    """Rows as they are written; what happened to them goes into the entry."""
    for index, row in enumerate(rows):
        clips = read_row(row, settings, partial)
        if isinstance(clips, Dropped):
            entry["dropped"].append(asdict(clips))
            continue
        for name, clip in clips.items():
            entry["kept"].append([index, round(clip.duration_s, 4)])
            entry["converted"] += clip.converted
            entry["silent"] += [name] * clip.silent
            entry["clipped"] += [name] * clip.clipped
            if clip.num_overshoot:
                entry["overshoot"][name] = clip.num_overshoot
            yield {**row, "id": name, "audio": clip.audio, "duration_s": clip.duration_s}


def _group_rows(rows: Iterable[dict]) -> Iterator[list[dict]]:
    group: list[dict] = []
    for row in rows:
        group.append(row)
        if sum(len(one["audio"]["bytes"]) for one in group if isinstance(one["audio"], dict)) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _make_shards(
    shards: Mapping[str, list[Row]],
    journal: Journal,
    partial: Path,
    settings: PrepareSettings,
    make_audio: MakeAudio | None,
    progress: bool,
) -> None:
    """Make the shards that the journal does not know, and tell it."""
    from tqdm import tqdm

    if not journal.done:  # what lies there is of no run, or of one whose journal was deleted
        for name in ("data", "audio", "plots"):
            shutil.rmtree(partial / name, ignore_errors=True)
    (partial / "data").mkdir(parents=True, exist_ok=True)
    missing = [(name, rows) for name, rows in shards.items() if name not in journal.done]
    work = functools.partial(write_shard, partial=partial, settings=settings, make_audio=make_audio)
    total, remaining = sum(map(len, shards.values())), sum(len(rows) for _, rows in missing)
    # A few rows are done before other processes have begun.
    num_proc = 1 if remaining <= SMALL else min(settings.num_proc or available_cores(), len(missing))
    with tqdm(total=total, initial=total - remaining, desc="Preparing", unit="clip", disable=not progress) as bar:
        for (_, rows), entry in run_in_processes(work, missing, num_proc, preload=__name__):
            journal.append([entry])
            bar.update(len(rows))


def _find_report(directory: Path, settings: Mapping[str, object]) -> dict:
    """Find the report of a data set that is complete already; empty where nothing is."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return {}
    report = read_json(directory / "report.json")
    if report.get("format") != FORMAT:
        earlier = str(report.get("format")).startswith("relllm-data-")
        what = "a data set that another release prepared" if earlier else "no data set of `relllm prepare`"
        raise FileExistsError(f"{directory} holds {what}. Choose another --out, or delete it.")
    check_same(directory, report["settings"], settings)
    return report


def _check_rows(corpus: Corpus) -> None:
    for row in corpus.rows:
        validate_row(row, corpus.own_emotions)
    counts = Counter(row["id"] for row in corpus.rows)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{len(repeated)} ids come more than once, for example {repeated[0]!r}. Make them unique.")
    if not corpus.rows:
        _fail_empty(entry.reason for entry in corpus.dropped)


def _fail_empty(reasons: Iterable[str]) -> None:
    counts = "; ".join(f"{reason}: {count:,}" for reason, count in Counter(reasons).items()) or "nothing was found"
    raise ValueError(f"No utterance can be kept ({counts}). Check ROOT, the label set and the limits.")


def _describe(corpus: Corpus, settings: PrepareSettings) -> dict:
    """Return what two runs must share to make one data set, as JSON gives it back."""
    digest = digest_values([*corpus.rows, *map(asdict, [*corpus.dropped, *corpus.blanked])])
    run = {"format": FORMAT, "corpus": corpus.facts.name, **settings.identity, "rows_fingerprint": digest}
    return json.loads(json.dumps(run))


def _table_schema(embed_audio: bool) -> pyarrow.Schema:
    """Return the columns, with what `datasets` wants to know of them."""
    from datasets import Audio, Features, List, Value

    from relllm.processing.audio_relllm import SAMPLING_RATE

    types = {name: Value("float64" if name in DIMENSIONS else "string") for name in COLUMNS}
    types |= {name: List(Value("string")) for name in LIST_COLUMNS}
    types["audio"] = Audio(sampling_rate=SAMPLING_RATE) if embed_audio else Value("string")
    return Features({**types, "duration_s": Value("float64")}).arrow_schema
