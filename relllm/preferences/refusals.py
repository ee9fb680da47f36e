"""What the trainers of this room refuse before anything is loaded: settings that cannot be, rows without audio."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from datasets import Dataset
from pyarrow import compute

from relllm.processing.processing_relllm import AUDIO_KEYS, audio_parts
from relllm.training.collator import place_clips
from relllm.training.config import ReLLMSettings

WHOLE = "the weights have to be whole here. Use DDP, as in recipes/accelerate/ddp.yaml"
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # as `accelerate launch` says it


def refuse_settings(settings: ReLLMSettings, reasons: Mapping[str, str], training: str) -> None:
    """Raise a `ValueError` for a setting that is on, of those that a kind of training cannot go with, and why."""
    defaults = {field.name: field.default for field in fields(settings)}
    values = {name: getattr(settings, name, None) for name in reasons}
    given = {name: reasons[name] for name, value in values.items() if value and value != defaults.get(name)}
    given |= {name: WHOLE for name in ("fsdp", "deepspeed") if getattr(settings, name)}
    given |= {name: WHOLE for name in SHARDING if os.environ.get(name, "").lower() in ("1", "true")}
    for name, reason in given.items():
        raise ValueError(f"{name} is set, and {training} cannot go with it: {reason}. Leave it out.")


def lacks_audio(row: Mapping) -> str | None:
    """Say why a row has no clip, or not one for each place of its messages and a place for each."""
    parts = [{"audio": row.get("audio")}]
    if row.get("messages") is not None:
        try:
            parts = audio_parts(place_clips(row))
        except ValueError as error:
            return str(error)
    heard = [any(part.get(key) is not None for key in AUDIO_KEYS) for part in parts]
    return None if heard and all(heard) else f"Row {row.get('id')!r} has no audio, or a place for some and none."


def unread_rows(rows: Dataset, *columns: str) -> Iterator[dict]:
    """Yield the rows with their clips and these columns; a clip that is no path is True, and no bytes are read."""
    own = [name for name in ("audio", "audios") if name in rows.column_names]
    unread = [name for name in own if "string" not in str(rows.features[name])]
    names = [name for name in ("id", *own, "messages", *columns) if name in rows.column_names and name not in unread]
    told = rows.select_columns(names) if names else [{}] * len(rows)
    for row, *clips in zip(told, *(_clips(rows, name) for name in unread), strict=True):
        yield {**row, **dict(zip(unread, clips, strict=True))}


def name_rows(rows: Sequence[Mapping]) -> str:
    """Name the first rows by their ids."""
    return ", ".join(repr(row.get("id")) for row in rows[:3]) + (", …" if len(rows) > 3 else "")


def _clips(rows: Dataset, name: str) -> Iterator[Any]:
    """Yield True, or as many as a list has, for the value of each row in a column; `None` for none."""
    for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
        if name == "audios":
            yield from ([True] * (count or 0) for count in compute.list_value_length(batch[name]).to_pylist())
        else:
            yield from (valid or None for valid in batch[name].is_valid().to_pylist())
