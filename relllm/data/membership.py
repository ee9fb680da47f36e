"""Which rows a training has read, kept in its record as digests: without the ids and words of a corpus."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from relllm.modeling.places_relllm import find_file

from .journal import read_json

if TYPE_CHECKING:
    from datasets import Dataset

RECORD_NAME = "training_settings.json"  # beside the weights that a training wrote
DIGEST_BYTES = 6  # among a million rows one in a thousand runs has two alike


def read_training_record(checkpoint: str, *, revision: str = "main") -> dict:
    """Return the record of the training that made a checkpoint, in its own folder or the run's; empty without one."""
    if found := find_file(checkpoint, RECORD_NAME, revision):
        return read_json(Path(found))
    folder = Path(checkpoint).resolve()
    step = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    of_run = read_json(folder.parent / RECORD_NAME) if step else {}
    kept = {name: value for name, value in of_run.items() if name != "epochs_done"}
    return {**kept, "steps_done": int(step[1])} if step and of_run else {}


def is_chosen(record: Mapping) -> bool:
    """Tell whether a checkpoint, or one that its training began with, was chosen by its validation rows."""
    return any(record.get(name) for name in ("load_best_model_at_end", "early_stopping_patience", "chosen_before"))


def is_text_model_trained(record: Mapping) -> bool:
    """Tell whether the LLM itself, without a LoRA, has learnt from the rows that a training or one before it read."""
    return "text_model" in record.get("unfreeze", ()) or bool(record.get("text_model_trained"))


def digest_rows(rows: Dataset) -> set[bytes]:
    """Return a digest of the id and transcript of each row that has an id, wherever its audio lies."""
    absent = [None] * len(rows)
    ids, texts = (rows[name][:] if name in rows.column_names else absent for name in ("id", "text"))
    said = [f"{row_id}\0{text or ''}" for row_id, text in zip(ids, texts, strict=True) if row_id is not None]
    return {hashlib.sha256(one.encode()).digest()[:DIGEST_BYTES] for one in said}


def pack_digests(digests: Iterable[bytes]) -> str:
    """Write digests as text, in sorted order."""
    return base64.b64encode(b"".join(sorted(digests))).decode()


def unpack_digests(text: str) -> set[bytes]:
    """Read what [`pack_digests`] wrote; what it did not is a `ValueError`."""
    content = base64.b64decode(text, validate=True)
    if len(content) % DIGEST_BYTES:
        raise ValueError(f"{len(content)} bytes are no digests of {DIGEST_BYTES} each: the record is damaged.")
    return {content[at : at + DIGEST_BYTES] for at in range(0, len(content), DIGEST_BYTES)}
