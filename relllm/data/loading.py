"""Reads rows from wherever they lie: a prepared corpus, a file, a saved data set, the Hub.

What does not live here: making rows of a corpus, and decoding audio. Paths and bytes are passed on as they are, so
that each clip is decoded once, where a batch is made.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from relllm.data.rows import COLUMNS
from relllm.labels import DIMENSIONS

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

METADATA = "metadata.jsonl"
SHARDS = 64  # of a streamed table: enough for the workers of a training run
AUDIO_KEYS = ("audio", "path", "url")  # of an audio part in `messages`


def load_corpus(data: str, split: str | None = None, *, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows as [`relllm.data.rows.Row`] has them, or with TRL's `messages`; further columns are kept.

    Args:
        data (`str`): One of
            - a directory with `metadata.jsonl`, as the preparers write it (audio paths are relative to it),
            - a directory that `datasets.save_to_disk` wrote, or one of Parquet files,
            - a `.jsonl`, `.csv` or `.parquet` file (audio paths are relative to its folder),
            - the id of a data set on the Hub.
        split (`str`, *optional*): Name of a split of the data set, or else a value of the rows' column `split`.
            Not needed where there is only one.
        streaming (`bool`, *optional*, defaults to `False`): Whether to read rows when they are asked for.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming=True`: Audio is not decoded.

    Raises:
        FileNotFoundError: `data` looks like a path, and nothing is there.
        ValueError: The split is unknown or empty, several splits are there and none is named, a line is not a JSON
            object, or the kind of file is unknown. The message names what is there.
    """
    path = Path(data).expanduser()
    if not path.exists():
        if _looks_like_a_path(data):
            raise FileNotFoundError(f"No data at {data}. Give an existing path, or the id of a data set on the Hub.")
        return _leave_encoded(_load_hub(data, split, streaming))
    if path.is_dir() and (path / METADATA).is_file():
        path = path / METADATA
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return _leave_encoded(_load_saved(path, split, streaming))
    if path.is_dir() or path.suffix == ".parquet":
        return _leave_encoded(_load_parquet(path, split, streaming))
    if path.suffix in (".jsonl", ".csv"):
        return _load_table(path, split, streaming)
    raise ValueError(f"{data} is a {path.suffix or 'nameless kind of'} file; expected .jsonl, .csv or .parquet.")


def _looks_like_a_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or data.endswith((".jsonl", ".csv", ".parquet"))


def _load_hub(name: str, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_dataset

    loaded = load_dataset(name, streaming=streaming)
    return _choose(loaded, split, name)


def _load_saved(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    from datasets import load_from_disk

    dataset = _choose(load_from_disk(str(path)), split, str(path))
    return dataset.to_iterable_dataset(num_shards=min(SHARDS, len(dataset))) if streaming else dataset


def _load_parquet(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    from datasets import Value, load_dataset

    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise ValueError(
            f"{path} is a directory without {METADATA}, without Parquet files, and not of `save_to_disk`. "
            f"It holds {sorted(entry.name for entry in path.iterdir())[:8]}."
        )
    if path.is_dir():
        loaded = load_dataset("parquet", data_dir=str(path), streaming=streaming)
    else:  # which `datasets` calls "train", whatever is in it
        loaded = load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    dataset = _choose(loaded, split, str(path))
    if isinstance((dataset.features or {}).get("audio"), Value):
        dataset = dataset.map(lambda row: {"audio": _located(row["audio"], folder)})
    return dataset


def _load_table(path: Path, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    from datasets import Dataset, Features, Value

    rows = list(_read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path))
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    folder = path.absolute().parent
    rows = [_with_located_audio(row, folder) for row in _rows_of_split(rows, split, str(path))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    if all(name in COLUMNS for name in names):  # which keep their types where every value is missing
        types = {name: Value("float64" if name in DIMENSIONS else "string") for name in names}
        dataset = Dataset.from_list(rows, features=Features(types))
    else:
        dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset(num_shards=min(SHARDS, len(dataset))) if streaming else dataset


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): {line.strip():.80}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is {type(row).__name__}, expected one object for a row.")
            yield row


def _read_csv(path: Path) -> Iterator[dict]:
    """An empty field is a missing value; the dimensions are numbers, everything else is text."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, fields in enumerate(csv.DictReader(file), start=2):
            row: dict[str, str | float | None] = {name: value or None for name, value in fields.items()}
            for name in DIMENSIONS:
                if (value := row.get(name)) is None:
                    continue
                try:
                    row[name] = float(value)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {name} is {value!r}, expected a number.") from error
            yield row


def _rows_of_split(rows: list[dict], split: str | None, source: str) -> list[dict]:
    if split is None:
        return rows
    found = sorted({str(row["split"]) for row in rows if row.get("split") is not None})
    if split not in found:
        raise ValueError(f"{source} has no rows of the split {split!r}; its rows are of {found or 'no split'}.")
    return [row for row in rows if row.get("split") == split]


def _choose(loaded: dict | Dataset | IterableDataset, split: str | None, source: str) -> Dataset | IterableDataset:
    """A split of a `DatasetDict`, or the rows whose column `split` says so."""
    if isinstance(loaded, dict):
        if split in loaded:
            return loaded[split]
        if len(loaded) > 1:
            raise ValueError(f"{source} has the splits {sorted(loaded)}, and {split!r} was asked for. Name one.")
        loaded = next(iter(loaded.values()))
    if split is None:
        return loaded
    if "split" not in (loaded.features or {}):
        raise ValueError(f"{source} has no split {split!r} and no column `split`. Leave the split out, or add it.")
    chosen = loaded.filter(lambda value: value == split, input_columns="split")
    if not _is_streamed(loaded) and len(chosen) == 0:
        raise ValueError(f"{source} has no rows of the split {split!r}; its rows are of {loaded.unique('split')}.")
    return chosen


def _is_streamed(dataset: Dataset | IterableDataset) -> bool:
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def _with_located_audio(row: dict, folder: Path) -> dict:
    """Paths of the clip, and of the audio parts of `messages`, made absolute."""
    if isinstance(row.get("audio"), str):
        row = row | {"audio": _located(row["audio"], folder)}
    for message in row.get("messages") or []:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part.get("type") == "audio":
                part |= {key: _located(part[key], folder) for key in AUDIO_KEYS if isinstance(part.get(key), str)}
    return row


def _located(audio: str, folder: Path) -> str:
    """A relative path becomes absolute; an absolute path and a URL stay."""
    return audio if "://" in audio else str(folder.absolute() / audio)


def _leave_encoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    from datasets import Audio

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Audio) and feature.decode:
            dataset = dataset.cast_column(name, Audio(decode=False))
    return dataset


__all__ = ["load_corpus"]
