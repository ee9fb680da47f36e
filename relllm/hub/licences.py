"""Licences of the towers, as ids of the Hub, and the one that the whole model carries.

Towers that people often use are listed as we know their pages; any other counts as unknown, and the card says so.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.repocard import metadata_load

MSP_TOWER = "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"
UNKNOWN = "unknown"
TOWER_LICENCES = {
    MSP_TOWER: "cc-by-nc-sa-4.0",
    "Qwen/Qwen-7B-Chat": "other",  # Tongyi Qianwen licence agreement
    **{f"Qwen/Qwen2.5-{size}-Instruct": "apache-2.0" for size in ("0.5B", "1.5B", "7B")},
    **{f"openai/whisper-{size}": "apache-2.0" for size in ("tiny", "base", "small", "medium", "large-v2", "large-v3")},
}
# From the one that asks least to the one that asks most of those who use the model.
STRICTNESS = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")


@dataclass(frozen=True)
class Tower:
    """One pretrained part of a model, as its card names it."""

    part: str  # "audio_tower", "emotion_tower" or "text_model"
    hub_id: str | None  # None: a folder that is not on the Hub, or not recorded
    model_type: str
    licence: str  # an id, or UNKNOWN


def read_towers(config: Mapping) -> list[Tower]:
    """List the towers of a checkpoint, by the content of its `config.json`, with their licences.

    A tower in a folder of this machine has the licence of the `README.md` there; its path goes into no card.
    """
    towers = []
    sections = {"audio_tower": "audio_config", "emotion_tower": "emotion_config", "text_model": "text_config"}
    for part, section in sections.items():
        if config.get(section) is None:
            continue
        name = (config.get("towers") or {}).get(part, {}).get("name")
        folder = Path(name) if name is not None and is_local(name) else None
        licence = TOWER_LICENCES.get(name or "", UNKNOWN) if folder is None else _licence_of_folder(folder)
        model_type = str(config[section].get("model_type", UNKNOWN))
        towers.append(Tower(part, None if folder else name, model_type, licence))
    return towers


def is_local(name: str) -> bool:
    """Tell whether a tower's name is a folder of a machine (this one or another) and not an id of the Hub."""
    return os.path.isabs(name) or os.path.isdir(name) or name.count("/") > 1 or name.startswith((".", "~"))


def model_licence(towers: Sequence[Tower], chosen: str | None = None) -> str:
    """Find the licence of the whole: the strictest of its towers', or `chosen`, or `"unknown"`.

    A `chosen` that asks for less than a tower is a `ValueError`, and so is one that cannot be compared with a tower's
    that forbids commercial use or binds what is built on it.
    """
    known = [tower for tower in towers if tower.licence in STRICTNESS]
    strictest = max(known, key=lambda tower: STRICTNESS.index(tower.licence), default=None)
    if chosen is None:
        return strictest.licence if strictest else next((t.licence for t in towers if t.licence == "other"), UNKNOWN)
    if strictest is None:
        return chosen
    needed = STRICTNESS.index(strictest.licence)
    weaker = chosen in STRICTNESS and STRICTNESS.index(chosen) < needed
    if weaker or (chosen not in STRICTNESS and needed >= STRICTNESS.index("cc-by-sa-4.0")):
        raise ValueError(
            f"--license {chosen}: the {strictest.part} ({strictest.hub_id or 'a local folder'}) is under "
            f"{strictest.licence}, which marks the whole model. Leave --license out, or give one at least as strict: "
            f"{', '.join(STRICTNESS[needed:])}."
        )
    return chosen


def _licence_of_folder(folder: Path) -> str:
    """Read it in the card in a tower's folder, if there is one."""
    card = folder / "README.md"
    licence = ((metadata_load(card) if card.is_file() else None) or {}).get("license")
    return licence if isinstance(licence, str) else UNKNOWN
