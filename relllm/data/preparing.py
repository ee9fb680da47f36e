"""From the rows of a corpus to a data set on disk: shards of Parquet made by all cores, a report, a card, pictures.

What lives here: the order of the work, the processes, and going on after a kill. What does not: parsing corpora, what
happens to a clip (`clips.py`), and what the report and the card say (`report.py`, `card.py`).

Design:
- A shard is a few rows, made by one process from them alone. So the bytes do not depend on the number of processes, a
  process holds one shard's rows and a few megabytes of audio, and the first process holds rows only.
- Everything goes to `DIR.partial`, which is renamed when it is complete. `DIR.journal` beside it knows the finished
  shards, and its lock keeps a second process out. Started again, the same command does the shards that are missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relllm.labels import DIMENSIONS

from .clips import ClipSettings, read_row
from .journal import Journal, name_differences, publish, write_json
from .report import FORMAT, UNSPLIT, build_report, summarise_shards
from .rows import COLUMNS, Corpus, Dropped, Row, validate_row

if TYPE_CHECKING:
    import pyarrow

SHARD_ROWS = 256
SHARD_RECORDINGS = 8  # with `vad`: a recording may last hours
SMALL = 16  # rows that are not worth a process
GROUP_BYTES = 32 * 1024**2  # of embedded audio in one row group, which is what a reader holds at once
WORK_FOLDERS = ("data", "audio", "plots")

MakeAudio = Callable[[Sequence[Row], Path], None]


@dataclass(frozen=True)
class Shard:
    """The rows of one file, before they are read.

    Attributes:
        name (`str`): Split and number.
        rows (`Sequence[Row]`): In the corpus's order.
    """

    name: str
    rows: Sequence[Row]


def prepare_corpus(
    corpus: Corpus,
    directory: str | Path,
    *,
    options: Mapping[str, object],
    clips: ClipSettings | None = None,
    make_audio: MakeAudio | None = None,
    num_proc: int | None = None,
    progress: bool = True,
) -> dict:
    """Writes a corpus as a data set that [`~relllm.data.loading.load_corpus`] reads; goes on where it was killed.

    Args:
        corpus ([`Corpus`]): As its parser returned it.
        directory (`str` or `Path`): The data set. It appears when it is complete.
        options (`Mapping[str, object]`): What the parser was told, for the report; JSON can hold it.
        clips ([`ClipSettings`], *optional*): What is done with the audio.
        make_audio (`Callable[[Sequence[Row], Path], None]`, *optional*): Makes the audio of these rows in this folder
            before it is read, for a corpus whose audio does not exist yet; processes must be able to pickle it.
        num_proc (`int`, *optional*): Processes of one thread each; by default as many as this process may use cores.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: The report, as in `report.json`. Of a data set that is complete already it is read.

    Raises:
        ValueError: A row that breaks the schema, an id that comes twice, no row that could be kept, or a half-made
            data set of other settings. The message names the row or the settings.
        FileExistsError: `directory` holds something else, or a data set of other settings.
        BlockingIOError: Another process is writing the data set.
        ImportError: `datasets` or matplotlib is missing (`pip install relllm[data]`), or silero-vad with `vad`.
    """
    from relllm.plots import check_matplotlib, plot_report

    from .card import write_card

    check_matplotlib()
    clips = clips or ClipSettings()
    if clips.vad:
        from .segmentation import load_detector

        load_detector()  # what is missing is named before the work
    directory = Path(directory).expanduser().absolute()
    _check_rows(corpus)
    settings = _describe(corpus, options, clips)
    journal_path = directory.with_name(directory.name + ".journal")
    if not journal_path.exists() and (report := find_complete(directory, settings)) is not None:
        return report
    with Journal(journal_path, settings) as journal:
        report = find_complete(directory, settings)  # killed between the renaming and the removal of the journal
        if report is None:
            partial = directory.with_name(directory.name + ".partial")
            shards = plan_shards(corpus.rows, SHARD_RECORDINGS if clips.vad else SHARD_ROWS)
            _make_shards(shards, journal, partial, clips, make_audio, num_proc or available_cores(), progress)
            results = [(shard, journal.done[shard.name]) for shard in shards]
            if not any(entry["kept"] for _, entry in results):
                shutil.rmtree(partial)
                journal_path.unlink()
                _fail_empty(Counter(dropped["reason"] for _, entry in results for dropped in entry["dropped"]))
            summary = summarise_shards(results)
            report = build_report(corpus, results, summary, settings) | {"files": _number_files(partial, results)}
            plot_report(summary, partial / "plots", title=corpus.facts.title)
            write_card(corpus.facts, report, partial / "README.md")
            write_json(report, partial / "report.json")
            partial.rename(directory)
        journal_path.unlink()
    return report


def plan_shards(rows: Iterable[Row], size: int) -> list[Shard]:
    """Rows by split, in shards of at most `size` rows; splits and rows keep their order."""
    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_split[row["split"] or UNSPLIT].append(row)
    return [
        Shard(f"{split}-{start // size:05d}", members[start : start + size])
        for split, members in by_split.items()
        for start in range(0, len(members), size)
    ]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def find_complete(directory: Path, settings: Mapping[str, object]) -> dict | None:
    """The report of a data set that is complete already; `None` where nothing is.

    Raises:
        FileExistsError: If something else is there, or a data set of other settings.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    path = directory / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if report.get("format") != FORMAT:
        raise FileExistsError(
            f"{directory} holds no data set of `relllm prepare`. Choose another --out, or delete it."
        )
    if report["settings"] != settings:
        raise FileExistsError(
            f"{directory} is there already, with other settings ({name_differences(report['settings'], settings)}). "
            "Choose another --out, or delete it."
        )
    return report


def write_shard(
    shard: Shard, *, partial: Path, clips: ClipSettings, make_audio: MakeAudio | None, schema: pyarrow.Schema
) -> dict[str, object]:
    """Reads the rows of a shard and writes those that can be kept; runs in any process.

    Args:
        shard ([`Shard`]): What to write.
        partial (`Path`): The data set in the making.
        clips, make_audio: See [`prepare_corpus`].
        schema (`pyarrow.Schema`): Of the table.

    Returns:
        `dict`: The journal's entry: the file's `num_bytes`; `kept`, index in the shard, duration in seconds and id of
        each row; `dropped`; ids that are `silent`, `clipped` or `converted`; `overshoot`, samples by id.
    """
    import pyarrow.parquet

    if make_audio is not None:
        make_audio(shard.rows, partial)
    entry: dict = {"id": shard.name, "kept": [], "dropped": [], "silent": [], "clipped": [], "converted": 0}
    entry["overshoot"] = {}
    path = partial / "data" / f"{shard.name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        for group in _group_rows(_read_shard(shard, entry, partial, clips)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
    publish(unfinished, path)
    return entry


def _read_shard(shard: Shard, entry: dict, partial: Path, clips: ClipSettings) -> Iterator[dict[str, object]]:
    """Rows as they are written; what happened to them goes into the entry."""
    for index, row in enumerate(shard.rows):
        for clip in read_row(row, clips, partial, f"audio/{shard.name}/{index:03d}"):
            if isinstance(clip, Dropped):
                entry["dropped"].append(asdict(clip))
                continue
            entry["kept"].append([index, round(clip.duration_s, 4), clip.id])
            entry["converted"] += clip.converted
            for mark, is_set in (("silent", clip.silent), ("clipped", clip.clipped)):
                if is_set:
                    entry[mark].append(clip.id)
            if clip.num_overshoot:
                entry["overshoot"][clip.id] = clip.num_overshoot
            # What was said in a recording, and the reply to it, belong to none of its turns.
            said = {"text": None, "response": None} if clips.vad else {}
            yield {**row, **said, "id": clip.id, "audio": clip.audio, "duration_s": clip.duration_s}


def _group_rows(rows: Iterable[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    group, num_bytes = [], 0
    for row in rows:
        audio = row["audio"]
        num_bytes += len(audio["bytes"]) if isinstance(audio, dict) else 0
        group.append(row)
        if num_bytes >= GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _make_shards(
    shards: Sequence[Shard],
    journal: Journal,
    partial: Path,
    clips: ClipSettings,
    make_audio: MakeAudio | None,
    num_proc: int,
    progress: bool,
) -> None:
    """Makes the shards that the journal does not know, and tells it."""
    from tqdm import tqdm

    if not journal.done:  # what lies there is of no run, or of one whose journal was deleted
        for name in WORK_FOLDERS:
            shutil.rmtree(partial / name, ignore_errors=True)
    (partial / "data").mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if shard.name not in journal.done]
    work = functools.partial(
        write_shard, partial=partial, clips=clips, make_audio=make_audio, schema=_table_schema(clips.embed_audio)
    )
    total, remaining = sum(len(shard.rows) for shard in shards), sum(len(shard.rows) for shard in missing)
    with tqdm(total=total, initial=total - remaining, desc="Preparing", unit="clip", disable=not progress) as bar:
        # A few rows are done before other processes have begun.
        for shard, entry in _run(work, missing, 1 if remaining <= SMALL else min(num_proc, len(missing))):
            journal.append([entry])
            bar.update(len(shard.rows))


def _run(
    work: Callable[[Shard], dict[str, object]], shards: Sequence[Shard], num_proc: int
) -> Iterator[tuple[Shard, dict[str, object]]]:
    """Finished shards in any order; here with one process, else in others that import this file once."""
    if num_proc == 1:
        yield from _run_here(work, shards)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_proc, mp_context=context, initializer=_begin_process)
    try:
        waiting = {pool.submit(work, shard): shard for shard in shards}
        for future in as_completed(waiting):
            yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A process ended in the middle of a shard, perhaps killed for memory. What is finished is kept: start the "
            "same command again, with a smaller --num-proc if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_here(
    work: Callable[[Shard], dict[str, object]], shards: Sequence[Shard]
) -> Iterator[tuple[Shard, dict[str, object]]]:
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over several threads may round differently, and the bytes must not
    try:
        for shard in shards:
            yield shard, work(shard)
    finally:
        torch.set_num_threads(num_threads)


def _begin_process() -> None:
    """One thread; Ctrl-C is for the first process; and no life without it."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody takes the shard, and another run may be making it


def _check_rows(corpus: Corpus) -> None:
    for row in corpus.rows:
        validate_row(row)
    counts = Counter(row["id"] for row in corpus.rows)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{len(repeated)} ids come more than once, for example {repeated[0]!r}. Make them unique.")
    if not corpus.rows:
        _fail_empty(Counter(entry.reason for entry in corpus.dropped))


def _fail_empty(reasons: Mapping[str, int]) -> None:
    counts = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.items()) or "nothing was found"
    raise ValueError(f"No utterance can be kept ({counts}). Check ROOT, the label set and the limits.")


def _describe(corpus: Corpus, options: Mapping[str, object], clips: ClipSettings) -> dict:
    """What two runs must share to make one data set, as JSON gives it back."""
    digest = hashlib.sha256()
    for row in corpus.rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    digest.update(json.dumps([asdict(entry) for entry in corpus.dropped]).encode())
    settings = {
        "format": FORMAT,
        "corpus": corpus.facts.name,
        **options,
        **asdict(clips),
        "rows_fingerprint": digest.hexdigest()[:16],
    }
    return json.loads(json.dumps(settings))


def _table_schema(embed_audio: bool) -> pyarrow.Schema:
    """The columns, with what `datasets` wants to know of them."""
    from datasets import Audio, Features, Value

    from relllm.processing.audio_relllm import SAMPLING_RATE

    types = {name: Value("float64" if name in DIMENSIONS else "string") for name in COLUMNS}
    types["audio"] = Audio(sampling_rate=SAMPLING_RATE) if embed_audio else Value("string")
    return Features({**types, "duration_s": Value("float64")}).arrow_schema


def _number_files(partial: Path, results: Sequence[tuple[Shard, dict]]) -> dict[str, int]:
    """Gives the files their final names, empty ones left out; what an earlier run renamed already stays.

    Returns:
        `dict[str, int]`: Files by split.
    """
    by_split: dict[str, list[str]] = defaultdict(list)
    for shard, entry in results:
        if entry["kept"]:
            by_split[shard.name.rpartition("-")[0]].append(shard.name)
        else:
            (partial / "data" / f"{shard.name}.parquet").unlink(missing_ok=True)
    for split, names in by_split.items():
        for number, name in enumerate(names):
            target = partial / "data" / f"{split}-{number:05d}-of-{len(names):05d}.parquet"
            if not target.exists():
                (partial / "data" / f"{name}.parquet").rename(target)
    return {split: len(names) for split, names in by_split.items()}
