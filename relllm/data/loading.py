"""Read rows from a prepared corpus, a file, a saved data set or the Hub; the audio is not decoded here."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from relllm.labels import DIMENSIONS
from relllm.modeling.places_relllm import PlaceError, check_place

from .columns import normalize_columns
from .journal import read_json, report_path
from .rows import ALL, COLUMNS, LIST_COLUMNS
from .table_files import read_table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Dataset | IterableDataset

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
LOOKED_AT = 1000  # rows of a stream, to see whether they name a split
SHARDS = 64  # of a streamed table: enough for the workers of a training run
HeldOut: TypeAlias = dict[str, tuple[str, tuple[str, ...]]]  # split -> column and values
AUDIO_KEYS = ("audio", "path", "url")  # of an audio part in `messages`
HELD_OUT_FORM = "column=value[,value…][;validation:column=value[,value…]], for example session=Ses05"

TRAIN = "train"  # what rows are that name no split
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # of a prepared data set, in `data/`


def load_corpus(
    data: str | Path, split: str | None = None, *, held_out: str | None = None, streaming: bool = False
) -> Rows:
    """Return rows as [`relllm.data.rows.Row`] has them, or with TRL's `messages`; further columns are kept.

    Args:
        data (`str` or `Path`): A directory that `relllm prepare` or `datasets.save_to_disk` wrote, or one with
            `metadata.jsonl` or Parquet files; a `.jsonl`, `.csv` or `.parquet` file; or a data set on the Hub,
            `org/name`, `org/name:configuration` or `org/name@revision`. Audio paths are relative to the folder.
        split (`str`, *optional*): A split of the data set, or a value of the column `split`; needed where there are
            several. `"all"`: the rows of every one. Where no row names a split, all are `"train"`.
        held_out (`str`, *optional*): Makes the splits anew from all rows: `"session=Ses05"` or
            `"speaker=0019,0020"` are `"test"`, all others `"train"`; with `"session=Ses05;validation:session=Ses04"`
            there is a `"validation"` too. Rows without a value in such a column are in none. Empty: the data's own.
        streaming (`bool`, *optional*, defaults to `False`): Whether to return an `IterableDataset`. Values in
            `held_out` that no row has cannot be noticed then.

    Raises:
        PlaceError: Nothing is at a path, or the Hub has no such data set; a `FileNotFoundError`.
        ValueError: The split is unknown, empty or has to be named, the file cannot be read as rows, or `held_out` does
            not fit the rows. The message names what is there.
    """
    if not held_out:
        return _load(str(data), split, streaming)
    wanted = _parse_held_out(held_out)
    if split not in ("train", *wanted):
        raise ValueError(f"held_out={held_out!r} makes the splits train, {', '.join(wanted)}; got split={split!r}.")
    return _hold_out(_load(str(data), ALL, streaming), split, wanted, str(data))


def holds_rows(path: Path) -> bool:
    """Tell whether a file or folder is what [`load_corpus`] reads, rather than audio."""
    if path.is_file():
        return path.suffix in (".jsonl", ".csv", ".parquet")
    named = any((path / name).is_file() for name in (METADATA, "state.json", "dataset_dict.json"))
    return named or any(path.rglob("*.parquet"))


def column_values(data: str | Path, column: str) -> list[str]:
    """Return the values of a column in the rows of all splits, sorted; missing ones are left out."""
    dataset = _load(str(data), ALL, True)
    names = list(dataset.features or {})
    if column not in names:
        raise ValueError(f"{data} has no column {column!r}; its columns are {names}.")
    return sorted({str(row[column]) for row in dataset.select_columns([column]) if row[column] is not None})


def corpus_name(data: str | Path) -> str:
    """Return the name of a published corpus that was prepared; else the folder's, `ours` of `data/ours/x.jsonl`."""
    folder = _folder_of(data)
    name = read_json(folder / "report.json").get("corpus", "folder")
    return folder.name if name == "folder" else name


def corpus_facts(data: str | Path) -> dict:
    """Return the [`~relllm.data.rows.CorpusFacts`] that `relllm prepare` wrote; empty if it did not."""
    return read_json(_folder_of(data) / "report.json").get("facts", {})


def pair_rewards(data: str | Path) -> dict[str, float]:
    """Return the weights by which `relllm score-replies` chose pairs of replies; empty of other rows."""
    path = Path(data).expanduser()
    settings = read_json(report_path(path / METADATA if path.is_dir() else path)).get("settings", {})
    return settings["weights"] if settings.get("task") == "score-replies" else {}


def _folder_of(data: str | Path) -> Path:
    path = Path(data).expanduser().absolute()
    return path.parent if path.is_file() else path


def _load(data: str, split: str | None, streaming: bool) -> Rows:
    from datasets import Dataset

    rows = _choose(_find_rows(data, split, streaming), split, data)
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(SHARDS, len(rows)))
    return normalize_columns(rows)


def _find_rows(data: str, split: str | None, streaming: bool) -> dict[str, Rows] | Rows:
    """Return the rows of each split, or those of one table; what `split` does not ask for may be left out."""
    from datasets import load_dataset, load_from_disk

    path = Path(data).expanduser()
    if path.exists():
        path = path / METADATA if (path / METADATA).is_file() else path
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return load_from_disk(str(path))
        if path.is_dir() or path.suffix == ".parquet":
            return _find_parquet(path, split, streaming)
        if path.suffix in (".jsonl", ".csv"):
            return _load_table(path, split)
        raise ValueError(f"{data} is a {path.suffix or 'nameless kind of'} file; expected .jsonl, .csv or .parquet.")
    check_place(data, repo_type="dataset")
    try:
        named = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(.+))?", data)
        name, config, revision = named.groups() if named else (data, None, None)
        loaded = load_dataset(name, config, revision=revision, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise PlaceError(f"{data} is no file or folder here, and no data set of the Hub comes: {error}") from error
    except ValueError as error:
        if "onfig" not in str(error):
            raise
        raise ValueError(f"{data}: {error} Name a configuration as ORG/NAME:CONFIGURATION.") from error
    return {name: add_column(rows, "id", f"{name}-{{:06d}}") for name, rows in loaded.items()}


def add_column(rows: Rows, name: str, form: str) -> Rows:
    """Add a column of texts such as `"row {}"` with the row's number, unless there is one of that name."""
    from datasets import Dataset, Features, Value

    if name in (rows.column_names or ()):
        return rows
    if isinstance(rows, Dataset):
        return rows.add_column(name, [form.format(number) for number in range(len(rows))])
    features = None
    if rows.features:
        rows = rows.decode(False)  # `map` would decode the audio, which stays as it is until it is read
        features = Features({**rows.features, name: Value("string")})
    fill = {"with_indices": True, "features": features}
    return rows.map(lambda row, number: {name: row.get(name, form.format(number))}, **fill)


def _find_parquet(path: Path, split: str | None, streaming: bool) -> dict[str, Rows] | Rows:
    from datasets import Value, load_dataset

    shards: dict[str, list[str]] = {}  # of a data set that `relllm prepare` wrote
    for file in sorted(path.glob("data/*.parquet")):
        if named := SHARD.fullmatch(file.name):
            shards.setdefault(named[1], []).append(str(file))
    # `datasets` keeps some names of splits for itself, so files are loaded as its "train".
    only = {"split": TRAIN, "streaming": streaming}
    if path.is_file():
        found = {"": load_dataset("parquet", data_files=str(path), **only)}
    elif shards:  # splits that are not asked for are not copied into the cache
        shards = {split: shards[split]} if split in shards else shards
        found = {name: load_dataset("parquet", data_files=files, **only) for name, files in shards.items()}
    elif any(path.rglob("*.parquet")):
        found = load_dataset("parquet", data_dir=str(path), streaming=streaming)
    else:
        raise ValueError(
            f"{path} is a directory without {METADATA}, without Parquet files, and not of `save_to_disk`. "
            f"It holds {sorted(entry.name for entry in path.iterdir())[:8]}."
        )
    folder = path if path.is_dir() else path.parent

    def locate(audio: list[str | None]) -> dict[str, list[str | None]]:
        return {"audio": [value if value is None else _located(value, folder) for value in audio]}

    for name, rows in found.items():
        if isinstance((rows.features or {}).get("audio"), Value):
            found[name] = rows.map(locate, input_columns="audio", batched=True, features=rows.features)
    return found if path.is_dir() else found[""]


def _parse_held_out(held_out: str) -> HeldOut:
    """`"session=Ses05;validation:session=Ses04"` -> what is `"test"` and what is `"validation"`."""
    wanted: HeldOut = {}
    for part in held_out.split(";"):
        named = re.fullmatch(r"(?:(test|validation):)?(\w+)=(.+)", part.strip())
        values = tuple(value.strip() for value in named[3].split(",")) if named else ()
        if named is None or not all(values) or (named[1] or "test") in wanted:
            raise ValueError(f"held_out is {held_out!r}, expected {HELD_OUT_FORM}.")
        wanted[named[1] or "test"] = (named[2], values)
    if "test" not in wanted:
        raise ValueError(f"held_out is {held_out!r} and holds nothing out for test; expected {HELD_OUT_FORM}.")
    return wanted


def _hold_out(dataset: Rows, split: str, wanted: HeldOut, source: str) -> Rows:
    """Return the rows of a split that is made from columns, with the column `split` saying so."""
    from datasets import Dataset, Value

    names = list(dataset.features or {})
    columns = [column for column, _ in wanted.values()]
    if absent := [column for column in columns if column not in names]:
        raise ValueError(
            f"{source} has no column {absent[0]!r} to hold out by; its columns are {names}. Hold out by one of them, "
            'or take the splits that the data has with held_out "".'
        )

    def assign(*values: Sequence[str | None]) -> list[str | None]:
        """Return the split of each row; `None` where a value is missing."""
        found = []
        for row in zip(*values, strict=True):
            of = [name for value, (name, (_, held)) in zip(row, wanted.items(), strict=True) if str(value) in held]
            if len(of) > 1 and None not in row:
                both = " and in ".join(of)
                raise ValueError(f"held_out has rows with {list(row)} both in {both}. Hold them out once.")
            found.append(None if None in row else of[0] if of else TRAIN)
        return found

    if not isinstance(dataset, Dataset):
        named = {"input_columns": columns, "batched": True}
        dataset = dataset.filter(lambda *values: [name == split for name in assign(*values)], **named)
    else:
        for column, values in wanted.values():
            found = sorted(str(value) for value in dataset.unique(column) if value is not None)
            if missing := sorted({*values} - {*found}):
                raise ValueError(
                    f"{source} has no rows with {column} {missing}; there are {found[:40] or 'none'}. Hold out what "
                    'is there, or take the splits that the data has with held_out "".'
                )
        assigned = assign(*(dataset[column] for column in columns))
        if unknown := assigned.count(None):
            logger.warning("%d rows of %s have no %s: they are in no split.", unknown, source, " or ".join(columns))
        dataset = dataset.select([index for index, name in enumerate(assigned) if name == split])
        if len(dataset) == 0:
            raise ValueError(f"{source} has no row left for {split!r} beside what is held out.")
    if "split" not in names:
        return dataset
    features = dataset.features.copy()
    features["split"] = Value("string")  # whatever it was, for example nothing but missing values
    rename = {"input_columns": "split", "batched": True, "features": features}
    return dataset.map(lambda old: {"split": [split] * len(old)}, **rename)


def _load_table(path: Path, split: str | None) -> Dataset:
    from datasets import Dataset, List, Value

    rows = [row for _, row in read_table(path)]
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    if own := [row for row in rows if split not in (None, ALL) and row.get("split") == split]:
        rows = own  # splits may differ in their columns, and in what these hold
    for row in rows:
        contents = [message["content"] for message in row.get("messages") or []]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        for place in (row, *(part for part in parts if part.get("type") == "audio")):
            for key in ("audio",) if place is row else AUDIO_KEYS:
                if isinstance(place.get(key), str):
                    place[key] = _located(place[key], path.parent)
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    dataset = Dataset.from_list(rows)
    types = dataset.features.copy()
    for name in types.keys() & set(COLUMNS):
        if name in DIMENSIONS:
            several = isinstance(types[name], List)  # one for each clip of a row
            types[name] = List(Value("float64")) if several else Value("float64")
        elif types[name] in (Value("null"), List(Value("null"))):  # every value is missing
            types[name] = List(Value("string")) if name in LIST_COLUMNS else Value("string")
    return dataset.cast(types) if types != dataset.features else dataset


def _say_splits(source: str, split: str, found: Sequence[str]) -> str:
    is_of = f"its rows are of {sorted(found)}" if found else f"its rows name no split, which makes them all {TRAIN!r}"
    return (
        f"{source} has no rows of the split {split!r}; {is_of}. Name one of these (all: every row), write splits into "
        f"the column `split`, or make them by held_out ({HELD_OUT_FORM})."
    )


def _choose(loaded: dict | Rows, split: str | None, source: str) -> Rows:
    """Return a split of several, the rows whose column `split` says so, or all of them with such a column."""
    from datasets import Dataset, Value, concatenate_datasets

    if split == ALL:
        if not isinstance(loaded, dict):
            return loaded
        parts = []
        for name, part in loaded.items():
            for dimension in DIMENSIONS:  # whole numbers in one split, fractions in the next
                if (part.features or {}).get(dimension) not in (None, Value("float64")):
                    part = part.cast_column(dimension, Value("float64"))
            parts.append(add_column(normalize_columns(part), "split", name))
        return concatenate_datasets(parts)
    if isinstance(loaded, dict):
        if split in loaded:
            return loaded[split]
        if len(loaded) > 1:
            if split is None:
                raise ValueError(f"{source} has the splits {sorted(loaded)}. Name one, or take all.")
            raise ValueError(_say_splits(source, split, list(loaded)))
        [loaded] = loaded.values()
    if split is None:
        return loaded
    if loaded.features and not isinstance(loaded, Dataset):
        loaded = loaded.decode(False)  # `filter` would decode the audio
    if "split" not in (loaded.features or {}):
        found: list[str] = []
    elif isinstance(loaded, Dataset):
        found = [value for value in loaded.unique("split") if value is not None]
    elif split == TRAIN and all(row["split"] is None for row in loaded.select_columns(["split"]).take(LOOKED_AT)):
        return loaded.filter(_names_none, input_columns="split")
    else:  # a stream shows its rows when it is read
        found = [split]
    if split == TRAIN and not found:
        return loaded
    if split not in found:
        raise ValueError(_say_splits(source, split, found))
    if isinstance(loaded, Dataset):
        return loaded.select([index for index, value in enumerate(loaded["split"][:]) if value == split])
    return loaded.filter(lambda value: value == split, input_columns="split")


def _names_none(split: str | None) -> bool:
    """Return True for each row of a stream in which none names a split."""
    if split is not None:
        raise ValueError(
            f"The first {LOOKED_AT} rows of the stream name no split, and were taken for {TRAIN!r}; a later one is of "
            f"{split!r}. Name the split of every row, or load the rows without streaming."
        )
    return True


def _located(audio: str, folder: Path) -> str:
    """Make a relative path absolute; leave an absolute path and a URL."""
    return audio if "://" in audio else str(folder.absolute() / audio)
