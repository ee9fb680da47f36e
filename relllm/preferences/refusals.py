"""What the trainers of this room refuse before anything is loaded: settings that cannot be, rows without audio."""

import os
from collections.abc import Iterator, Mapping, Sequence

from datasets import Dataset

from relllm.processing.processing_relllm import AUDIO_KEYS, audio_parts
from relllm.training.config import ReLLMSettings

WHOLE = "the weights have to be whole here. Use DDP, as in recipes/accelerate/ddp.yaml"
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # as `accelerate launch` says it


def refuse_settings(settings: ReLLMSettings, reasons: Mapping[str, str], training: str) -> None:
    """Raise a `ValueError` for a setting that is on, of those that a kind of training cannot go with, and why."""
    given = {name: reason for name, reason in reasons.items() if getattr(settings, name)}
    given |= {name: WHOLE for name in ("fsdp", "deepspeed") if getattr(settings, name)}
    given |= {name: WHOLE for name in SHARDING if os.environ.get(name, "").lower() in ("1", "true")}
    for name, reason in given.items():
        raise ValueError(f"{name} is set, and {training} cannot go with it: {reason}. Leave it out.")


def lacks_audio(row: Mapping) -> bool:
    """Tell whether a row has no clip, or a place for one in its messages and none for it."""
    parts = [row] if row.get("messages") is None else audio_parts(row["messages"])
    clips = [clip for clip in (row.get("audio"), *(row.get("audios") or ())) if clip is not None]
    in_messages = [part for part in parts if any(part.get(key) is not None for key in AUDIO_KEYS)]
    return not clips and (not in_messages or len(in_messages) < len(parts))


def unread_rows(rows: Dataset, *columns: str) -> Iterator[dict]:
    """Yield the rows with their clips and these columns; `audio` is True or `None`, and no bytes are read."""
    names = [name for name in ("id", "audios", "messages", *columns) if name in rows.column_names]
    told = rows.select_columns(names) if names else [{}] * len(rows)
    for row, heard in zip(told, _present(rows, "audio"), strict=True):
        yield {**row, "audio": heard or None}


def name_rows(rows: Sequence[Mapping]) -> str:
    """Name the first rows by their ids."""
    return ", ".join(repr(row.get("id")) for row in rows[:3]) + (", …" if len(rows) > 3 else "")


def _present(rows: Dataset, name: str) -> Iterator[bool]:
    """Yield whether each row has a value in a column."""
    if name not in rows.column_names:
        yield from [False] * len(rows)
        return
    for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
        yield from batch[name].is_valid().to_pylist()
