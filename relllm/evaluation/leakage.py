"""Whether a model has read the rows that it is measured on: its training's record against them.

The record (`training_settings.json`, beside the weights) has digests of the rows that the run, and the checkpoints it
began with, were trained on and chosen by. A model without a record, or with an older one, cannot be checked.
"""

from collections.abc import Mapping

from datasets import Dataset

from relllm.data.membership import RECORD_NAME, digest_rows, is_chosen, unpack_digests

# Towers whose training is known though they have no record: their id on the Hub, and the corpus.
PUBLIC_TOWERS = {"audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim": "msp-podcast"}


def find_seen(record: Mapping, rows: Dataset, *, towers: Mapping[str, Mapping] | None = None) -> dict[str, object]:
    """Return what a model's training has to do with the rows, by `id` and `text`, that it is to be measured on.

    That is `recorded`, whether its record ([`~relllm.data.membership.read_training_record`]) says which rows were
    read; `trained_on` and `validated_on`, how many of `rows` were; `chosen_by`, whether the checkpoint was chosen by
    its validation rows; `corpora`, what it and its `towers` were trained on, as far as that is known.
    """
    packed: Mapping[str, str] = record.get("seen_rows") or {}
    digests = digest_rows(rows) if packed else set()
    known = {PUBLIC_TOWERS.get(str(tower.get("name"))) for tower in (towers or {}).values()} - {None}
    return {
        "recorded": record.get("seen_rows") is not None,
        "trained_on": len(digests & unpack_digests(packed.get("train", ""))),
        "validated_on": len(digests & unpack_digests(packed.get("validation", ""))),
        "chosen_by": is_chosen(record),
        "corpora": sorted({*record.get("seen_corpora", []), *known}),
    }


def check_unseen(seen: Mapping[str, object], num_rows: int, where: str) -> None:
    """Raise `ValueError` if rows that are to measure a model ([`find_seen`]) trained it, or chose the checkpoint."""
    what = []
    if seen["trained_on"]:
        what.append(f"{seen['trained_on']} of them are among the rows that it was trained on")
    if seen["validated_on"] and seen["chosen_by"]:
        what.append(f"{seen['validated_on']} among those that its checkpoint was chosen by")
    if what:
        raise ValueError(
            f"{where} cannot be measured on these {num_rows} rows: {' and '.join(what)} ({RECORD_NAME}). Take the "
            "rows that its training held out, or the model of this fold; --allow-seen measures it all the same, and "
            "metrics and card say so."
        )
