"""Licences as ids of the Hub: of the towers, of the corpora, and the one that the whole model carries.

What is not known to be compatible is never simplified: it makes the whole `other`, with a name and a link. Not legal
advice, and no proof: it keeps an id from saying more than is known.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.repocard import metadata_load

MSP_TOWER = "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"
OTHER, UNKNOWN = "other", "unknown"
CHECKPOINT = "checkpoint"
PARTS = "terms-of-its-parts"  # the name of an `other` whose link is the card's table of parts
TOWER_LICENCES = {  # of what people often use, as we know their pages; of any other its card is read
    MSP_TOWER: "cc-by-nc-sa-4.0",
    **{f"Qwen/Qwen2.5-{size}-Instruct": "apache-2.0" for size in ("0.5B", "1.5B", "7B")},
    **{f"openai/whisper-{size}": "apache-2.0" for size in ("tiny", "base", "small", "medium", "large-v2", "large-v3")},
}
# https://huggingface.co/docs/hub/repositories-licenses, where the Hub takes no other id
HUB_LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other""".split()  # noqa: SIM905
)
_FREE = frozenset(("mit", "isc", "bsd-2-clause", "bsd-3-clause", "zlib", "ncsa", "cc0-1.0", "unlicense"))
_PERMISSIVE = _FREE | {"apache-2.0"}
_NAMED = _PERMISSIVE | {"cc-by-3.0", "cc-by-4.0"}
# A licence of the whole -> those of parts that it is known to carry, from the one that asks least. Share-alike,
# no-derivatives and the GPL carry their own kind alone; whatever is not here is carried by itself only.
CARRIES = {
    "mit": _FREE,
    "apache-2.0": _PERMISSIVE,
    "cc-by-4.0": _NAMED,
    "cc-by-nc-4.0": _NAMED | {"cc-by-nc-4.0"},
    "cc-by-sa-4.0": _NAMED | {"cc-by-sa-4.0"},
    "cc-by-nc-sa-4.0": _NAMED | {"cc-by-nc-4.0", "cc-by-nc-sa-4.0"},
    "gpl-3.0": _PERMISSIVE | {"gpl-3.0"},
    "agpl-3.0": _PERMISSIVE | {"agpl-3.0"},
    **dict.fromkeys(("openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m"), _PERMISSIVE),
}


@dataclass(frozen=True)
class Licence:
    """The licence of a whole model; `other` has a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Tower:
    """One pretrained part of a model, as its card names it."""

    part: str  # "audio_tower", "emotion_tower" or "text_model"; "checkpoint", from which its training started
    hub_id: str | None  # None: a folder that is not on the Hub, or not recorded
    model_type: str
    licence: str  # an id, or UNKNOWN
    name: str | None = None  # of a licence that is `other`
    link: str | None = None

    @property
    def place(self) -> str:
        """Return where it is from, for a card and an error."""
        return self.hub_id or "not on the Hub, or not recorded"


def read_towers(
    config: Mapping, told: Mapping[str, str] | None = None, *, started_from: str | None = None
) -> list[Tower]:
    """List the towers of a checkpoint, by the content of its `config.json`, with the licences of their own cards.

    `told` are licences by part, as people said where nothing else says it; what contradicts a tower is a `ValueError`.
    `started_from` is the ReLLM of the Hub that its training went on with, whose terms it has too.
    """
    told = told or {}
    sections = {"audio_tower": "audio_config", "emotion_tower": "emotion_config", "text_model": "text_config"}
    configs = {part: config[section] for part, section in sections.items() if config.get(section) is not None}
    sources = dict(config.get("towers") or {})
    if started_from is not None:
        configs[CHECKPOINT], sources[CHECKPOINT] = {"model_type": "relllm"}, {"name": started_from}
    for part, licence in told.items():
        if part not in configs:
            raise ValueError(f"--tower-license {part}={licence}: this model has {', '.join(configs)}.")
        check_id(licence, f"--tower-license {part}={licence}")
    towers = []
    for part, own in configs.items():
        place = sources.get(part, {}).get("name")
        found = _find_licence(place, sources.get(part, {}).get("revision"))
        said = told.get(part, found.id)
        if found.id == UNKNOWN:
            found = Licence(said)
        elif said != found.id:
            raise ValueError(f"{said} is given for the {part}, which is under {found.id} ({place}). Leave it out.")
        hub_id = None if place is None or is_local(place) else place
        towers.append(Tower(part, hub_id, str(own.get("model_type", UNKNOWN)), found.id, found.name, found.link))
    return towers


def is_local(name: str) -> bool:
    """Tell whether a tower's name is a folder of a machine (this one or another) and not an id of the Hub."""
    return os.path.isabs(name) or os.path.isdir(name) or name.count("/") > 1 or name.startswith((".", "~"))


def check_id(licence: str, what: str) -> None:
    """Raise a `ValueError` for a licence that the Hub does not know."""
    if licence not in HUB_LICENCES - {UNKNOWN}:
        near = difflib.get_close_matches(licence.lower(), HUB_LICENCES, n=3, cutoff=0.5)
        raise ValueError(
            f"{what}: the Hub has no licence of that id; near ones: {', '.join(near) or 'none'}. One that it does not "
            "list is `other`, with --license-name and --license-link."
        )


def choose_licence(
    towers: Sequence[Tower], corpora: Sequence[Mapping] = (), chosen: Licence | None = None, *, link: str = ""
) -> Licence:
    """Return the licence of the whole: `chosen`, if it is known to carry the towers', or what follows from the parts.

    Of those that carry all parts it is the one that asks least. What a model may carry of its training data
    (`corpora`) people choose themselves; without a choice its terms are a part's. `link` is to the card, where the
    terms of each part are.
    """
    if chosen is not None:
        check_id(chosen.id, f"--license {chosen.id}")
        check_carries(towers, chosen.id)
        return chosen if chosen.id != OTHER else Licence(OTHER, chosen.name or PARTS, chosen.link or link)
    of_corpora = {str(facts.get("licence", UNKNOWN)) for facts in corpora}
    parts = {tower.licence for tower in towers} | of_corpora
    carrying = [*parts] if len(parts) == 1 else [whole for whole, carried in CARRIES.items() if parts <= carried]
    if carrying and carrying[0] not in (OTHER, UNKNOWN):
        return Licence(carrying[0])
    special = [tower for tower in towers if tower.licence not in _PERMISSIVE]
    if len(special) == 1 and special[0].licence != UNKNOWN and of_corpora <= _PERMISSIVE:
        own = special[0]  # whose terms the whole can have
        name = own.name or (own.licence if own.licence != OTHER else None)
        place = own.link or (f"https://huggingface.co/{own.hub_id}" if own.hub_id else None)
        if name and place:
            return Licence(OTHER, name, place)
    return Licence(OTHER, PARTS, link)


def check_carries(towers: Sequence[Tower], licence: str) -> None:
    """Raise a `ValueError` if a licence is not known to carry those of all towers; `other` says nothing of them."""
    borne = {licence, *CARRIES.get(licence, ())}
    others = [tower for tower in towers if licence != OTHER and tower.licence not in borne]
    for tower in sorted(others, key=lambda tower: sum(tower.licence in carried for carried in CARRIES.values())):
        if tower.licence == UNKNOWN:
            raise ValueError(
                f"--license {licence}: the licence of the {tower.part} ({tower.place}) is not known, and it binds the "
                f"whole model. Find out and say it: --tower-license {tower.part}=ID, or `license:` in the README.md "
                "of its folder. Without --license the card says `other`."
            )
        carrying = [whole for whole, carried in CARRIES.items() if all(t.licence in carried for t in towers)]
        remedy = f"give one that is known to carry them: {', '.join(carrying)}" if carrying else "give `other`"
        raise ValueError(
            f"--license {licence}: the {tower.part} ({tower.place}) is under {tower.licence}, which marks the whole "
            f"model, and {licence} is not known to carry it. Leave --license out, or {remedy}."
        )


def _find_licence(place: str | None, revision: str | None) -> Licence:
    """Return the licence on the card of a tower, here or on the Hub; `UNKNOWN` where no card can be seen."""
    if place is None:
        return Licence(UNKNOWN)
    if place in TOWER_LICENCES:
        return Licence(TOWER_LICENCES[place])
    card = Path(place) / "README.md"
    if not is_local(place):
        try:
            card = Path(hf_hub_download(place, "README.md", revision=revision))
        except (OSError, HTTPError):  # offline, gone, not for this token: then it is not known, which the card says
            return Licence(UNKNOWN)
    found = (metadata_load(card) if card.is_file() else None) or {}
    licence = found.get("license")
    if not isinstance(licence, str) or licence not in HUB_LICENCES:
        return Licence(UNKNOWN)
    return Licence(licence, found.get("license_name"), found.get("license_link"))
