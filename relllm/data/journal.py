"""Writing rows: a journal that survives a kill, and the file of rows at the end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, Value

SUFFIXES = (".jsonl", ".parquet")


class Journal:
    """Finished rows of a run, one JSON line each behind a line with the settings that its runs must share.

    Used as a context manager, by one process at a time. Opened again after a kill, it has what was finished in `done`;
    a half-written last line is dropped.

    One of other settings, and a line before the last that is no JSON, are a `ValueError`; one that another process has
    open is a `BlockingIOError`.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        self.done: dict[str, dict] = {}
        self._first: list[dict] = []  # the line with the settings: a run that comes to nothing leaves none
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover(json.loads(json.dumps(settings)))
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(f"Another process is writing {path}. Wait, or choose another --out.") from error
            raise

    def append(self, entries: Iterable[Mapping[str, object]]) -> None:
        """Add finished rows, each with its `id`; they are on disk when this returns."""
        written = [dict(entry) for entry in entries]
        self._file.writelines(json.dumps(entry).encode() + b"\n" for entry in [*self._first, *written])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._first = []
        self.done |= {str(entry["id"]): entry for entry in written}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _recover(self, settings: dict[str, object]) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(complete))  # of a line in whose middle it was killed
        lines = []
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                wrong = f"{self.path}:{number} is no JSON ({error})"
                raise ValueError(f"{wrong}. Delete it to have its row done again.") from error
        if not lines:
            self._first = [{"settings": settings}]
        elif (found := lines[0].get("settings")) != settings:
            raise ValueError(
                f"{self.path} belongs to a run with other settings ({name_differences(found, settings)}), and one "
                "file must not mix them. Use the same settings, choose another --out, or delete the journal."
            )
        self.done = {str(line["id"]): line for line in lines[1:]}


def write_rows(rows: Dataset, path: Path) -> None:
    """Write a data set with undecoded `audio`; the file is complete or not there.

    `.jsonl` names audio beneath the file's folder relative to it and other audio by its absolute path; `.parquet`
    holds audio as it is, bytes included.
    """
    with write_whole(path) as partial:
        if path.suffix == ".parquet":
            rows.to_parquet(str(partial))
            return
        folder = path.parent.absolute()
        lines = (json.dumps({**row, "audio": _audio_path(row["audio"], folder)}, ensure_ascii=False) for row in rows)
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def read_json(path: Path) -> dict:
    """Return the object in a file; empty where there is no file. What is no object is a `ValueError`."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Write it anew, or delete it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object. Write it anew, or delete it.")
    return content


def write_json(content: Mapping[str, object], path: Path) -> None:
    """Write JSON with indents; the file is complete or not there."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_out(rows: Dataset, path: Path) -> None:
    """Say before the work, as a `ValueError`, why [`write_rows`] will not be able to write these rows there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out {path}: expected a file that ends in one of {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: expected a file, such as {path / 'rows.jsonl'}.")
    check_ids(rows)
    first = rows[0]["audio"]
    if path.suffix == ".jsonl" and isinstance(first, Mapping) and first.get("bytes") is not None:
        raise ValueError(f"The data holds its audio as bytes, which JSON cannot. Use --out {path.stem}.parquet.")


def digest_values(values: Iterable[object]) -> str:
    """Return a short digest of values, of which JSON has a form, or else `str`; bytes by a digest of their own."""
    digest = hashlib.sha256()

    def shorten(value: object) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)

    for value in values:
        digest.update(json.dumps(value, default=shorten).encode() + b"\n")
    return digest.hexdigest()[:16]


def rows_fingerprint(rows: Dataset, columns: Sequence[str]) -> str:
    """Return a digest of some columns, so that a journal is not continued with another corpus; absent: None."""
    values = [rows[name] if name in rows.column_names else [None] * len(rows) for name in columns]
    return digest_values(zip(*values, strict=True))


def audio_fingerprint(rows: Dataset) -> str | None:
    """Return a digest of clips that are in the column `audio` as bytes; `None` where it has paths alone.

    Of each clip it takes the number of bytes and 64 of them at two places, so that a data set is not read through: a
    file that was edited elsewhere and kept its size is not noticed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.data.column("audio") if "audio" in rows.column_names else pa.chunked_array([], pa.null())
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        return None
    clips = pc.struct_field(column, "bytes")
    if clips.null_count == len(clips):
        return None
    parts = [pc.binary_length(clips), *(pc.binary_slice(clips, start, start + 64) for start in (4096, -4160))]
    if rows._indices is not None:  # of rows that were selected
        parts = [part.take(rows._indices.column(0)) for part in parts]
    digest = hashlib.sha256()
    for row in zip(*(part.to_pylist() for part in parts), strict=True):
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def report_path(out: Path) -> Path:
    """Return where the report of a run that writes `out` goes: `name.report.json` beside it."""
    return out.with_name(out.stem + ".report.json")


def journal_path(out: Path) -> Path:
    """Return where the journal of a run that writes `out` lies until it is complete."""
    return out.with_name(out.name + ".journal")


def make_file(
    out: Path,
    settings: Mapping[str, object],
    fill: Callable[[Journal], None],
    finish: Callable[[Mapping[str, dict]], tuple[dict, Callable[[Path], None]]],
) -> dict:
    """Make a file by way of a journal, and return the report, which is written beside it.

    `fill` puts what the file is made of into the journal, beside what is `done`; `finish` makes the report and what
    writes the file from all entries. A run that is complete is not done again; one of other settings is a `ValueError`
    where it is unfinished, else a `FileExistsError`.
    """
    wanted = json.loads(json.dumps(settings))
    if out.exists() and not journal_path(out).exists():
        found = read_json(report_path(out))
        check_same(out, found.get("settings"), wanted)
        return found
    with Journal(journal_path(out), wanted) as journal:
        fill(journal)
    counts, write = finish(journal.done)
    report = {"settings": wanted, **counts}
    write_json(report, report_path(out))
    write(out)
    journal_path(out).unlink()
    return report


def check_same(out: Path, found: object, wanted: Mapping[str, object]) -> None:
    """Raise a `FileExistsError` where what is complete already is of other settings than those of this run."""
    if found != wanted:
        raise FileExistsError(
            f"{out} is there already, from a run with other settings ({name_differences(found, wanted)}). "
            "Choose another --out, or delete it."
        )


def check_columns(rows: Dataset, needed: Iterable[str]) -> None:
    """Raise a `ValueError` that names the columns which the rows lack."""
    if lacking := sorted(set(needed) - set(rows.column_names)):
        raise ValueError(f"The data lacks the columns {lacking}; it has {rows.column_names}.")


def check_ids(rows: Dataset) -> None:
    """Raise a `ValueError` unless there are rows, each with an `id` of its own, a string."""
    seen: set[str] = set()
    for row_id in rows["id"]:
        if not isinstance(row_id, str) or not row_id or row_id in seen:
            raise ValueError(f"Every row needs an `id` of its own, a string; got {row_id!r} (again).")
        seen.add(row_id)
    if not seen:
        raise ValueError(f"The data has no rows with an `id`; its columns are {rows.column_names}.")


def replace_columns(rows: Dataset, columns: Mapping[str, Sequence], types: Mapping[str, Value]) -> Dataset:
    """Return the rows with columns of these types in the place of those they have, new ones at the end."""
    order = list({**rows.features, **types})
    rows = rows.remove_columns([name for name in types if name in rows.column_names])
    for name, dtype in types.items():
        rows = rows.add_column(name, list(columns[name]), feature=dtype)
    return rows.select_columns(order)


def _audio_path(audio: object, folder: Path) -> str:
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    if not isinstance(path, str) or (isinstance(audio, Mapping) and audio.get("bytes") is not None):
        raise ValueError("A row has its audio in itself, and no path. Use an --out that ends in .parquet.")
    if "://" in path:
        return path
    place = Path(path).absolute()
    return str(place.relative_to(folder) if place.is_relative_to(folder) else place)


def name_differences(found: object, wanted: Mapping[str, object]) -> str:
    """Return the settings that differ, each with both values, for an error."""
    if not isinstance(found, Mapping):
        return "none are known"
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {found.get(name)!r:.80}, now {wanted.get(name)!r:.80}" for name in names)


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which gets its name once its bytes are on the disk: it is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
