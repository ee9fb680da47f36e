"""Light checkpoints: the weights that a model does not share with its towers' sources, and where those sources are.

In one are every trained parameter, everything outside the towers, and those tower weights that differ from their
source (resized embeddings, a tower that was trained before). The rest comes back from the sources, and a fingerprint
of what was left out guards it. Which class the model has, and how a tower is loaded, are the business of the siblings.

The cost: the first light save of a model loads each source once more and hashes both sides with SHA-256, later saves
only write; a load hashes each source once. Hashing takes about a second for 1 GB on one core, and uses them all.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from .assembly_relllm import TOWERS, load_tower, name_tower_weights, place_of, whole_weights

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def fingerprint(weights: Iterable[Tensor]) -> str:
    """SHA-256 over the weights' own hashes, in sorted order.

    Names are left out: a new release of Transformers may rename a tower's modules, and its weights are the same.
    """
    return _combine(_digests(dict(enumerate(weights))).values())


def why_not_light(model: PreTrainedModel) -> str | None:
    """Why a model cannot be saved light, with the remedy; `None` if it can."""
    if getattr(model, "is_quantized", False):
        return "A quantised model cannot be saved light: its weights are not those of its sources. Save it in full."
    for kind in TOWERS:
        tower = getattr(model.base_model, kind)
        frozen = tower is not None and not all(weight.requires_grad for weight in tower.parameters())
        if frozen and kind not in (model.config.towers or {}):
            return (
                f"A light checkpoint points at its towers, and it is not known where this model's {kind} came from. "
                "Save that tower and pass its directory or Hub id to `from_towers`, or save the model in full."
            )
    return None


def light_state(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict]:
    """What a light checkpoint of a model holds.

    Args:
        model ([`ReLLMForConditionalGeneration`] or [`ReLLMModel`]): With `config.towers`.
        state_dict (`dict` of `str` to `torch.Tensor`, *optional*): Its weights, by default `model.state_dict()`.

    Returns:
        `tuple`: The weights to write, and the record of the towers for `config.towers`.

    Raises:
        ValueError: If a tower with frozen weights has no known source, or the model is quantised.
        OSError: If a source cannot be loaded.
    """
    if reason := why_not_light(model):
        raise ValueError(reason)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name in model.all_tied_weights_keys:  # follows its partner
        state.pop(name, None)
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    record: dict[str, dict] = dict(model.config.towers or {})
    for tower in TOWERS:
        prefix = ("" if model.base_model is model else f"{model.base_model_prefix}.") + f"{tower}."
        frozen = {name: state[name] for name in state if name.startswith(prefix) and name not in trained}
        if not frozen:  # no such tower, or all of it trained
            continue
        source = model.config.towers[tower]
        dtype = _main_dtype(frozen.values())
        shared = _shared_with_source(model, tower, source, dtype, frozen, prefix)
        for name in shared:
            del state[name]
        left_out = {"dtype": str(dtype).removeprefix("torch."), "fingerprint": _combine(shared.values())}
        record[tower] = {**source, **left_out}
    return state, record


def _shared_with_source(
    model: PreTrainedModel, tower: str, source: dict, dtype: torch.dtype, frozen: dict[str, Tensor], prefix: str
) -> dict[str, str]:
    """Names and hashes of those weights that the source has as well, to the bit."""
    cache = model.__dict__.setdefault("_light_cache", {})
    key = (tower, source["name"], source.get("revision"), dtype)
    if key not in cache:
        loaded = _load_source(tower, source, dtype, {})
        cache[key] = (_digests(loaded.state_dict()), {})
        del loaded
    expected, seen = cache[key]
    state_of = {name: (weight.data_ptr(), weight._version, weight.shape) for name, weight in frozen.items()}
    changed = {name: weight for name, weight in frozen.items() if seen.get(name, (None,))[0] != state_of[name]}
    seen.update({name: (state_of[name], digest) for name, digest in _digests(changed).items()})
    digests = {name: seen[name][1] for name in frozen}
    bare = {name: name.removeprefix(prefix).replace(".base_layer.", ".") for name in frozen}
    shared = {name: digests[name] for name in frozen if expected.get(bare[name]) == digests[name]}
    if own := sorted(bare[name] for name in frozen.keys() - shared.keys()):
        logger.warning_once(
            f"{len(own)} frozen weights of {tower} are not those of {source['name']} and are saved with what was "
            f"trained: {', '.join(own[:4])}{', …' if len(own) > 4 else ''}."
        )
    return shared


def read_light_record(
    path: str | os.PathLike | None, given: Mapping[str, str | os.PathLike] | None, options: Mapping[str, Any]
) -> dict | None:
    """The towers that a light checkpoint names, each from `given` where it is there; `None` for a full checkpoint.

    Args:
        path (`str` or `os.PathLike`, *optional*): A directory or a Hub id.
        given (`dict` of `str` to `str`, *optional*): Other places of towers, for this load.
        options (`dict`): The other arguments of `from_pretrained`.

    Raises:
        ValueError: If `given` names something that is no tower, or the checkpoint is a full one.
    """
    config: PreTrainedConfig | None = options.get("config")
    if given is None and isinstance(config, PreTrainedConfig) and config.towers:
        # The Auto classes take an argument that is also a field of the configuration for the field.
        given = {tower: place for tower, place in config.towers.items() if not isinstance(place, Mapping)}
    if path is None:
        return None
    recorded, _ = PreTrainedConfig.get_config_dict(path, **_hub_options(options))
    if given and not recorded.get("light_checkpoint"):
        raise ValueError(f"towers={dict(given)} is for light checkpoints, and {path} is a full one. Leave it out.")
    if not recorded.get("light_checkpoint"):
        return None
    if unknown := sorted(set(given or {}) - recorded["towers"].keys()):
        raise ValueError(f"towers has {unknown}; this checkpoint has the towers {sorted(recorded['towers'])}.")
    moved = {tower: {"name": place_of(place), "revision": None} for tower, place in (given or {}).items()}
    return {tower: {**source, **moved.get(tower, {})} for tower, source in recorded["towers"].items()}


def load_light(
    cls: type[PreTrainedModel], path: str | os.PathLike, record: Mapping[str, dict], options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments for `from_pretrained(None, …)` that build the whole model of a light checkpoint.

    Args:
        cls (`type`): The class to load.
        path (`str` or `os.PathLike`): The light checkpoint.
        record (`dict`): From [`read_light_record`].
        options (`dict`): The other arguments of `from_pretrained`.

    Raises:
        OSError: If a tower cannot be loaded; the message names it and the remedy.
        ValueError: If a tower's weights are not the ones that were left out, or weights are missing.
    """
    hub = _hub_options(options)
    options = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
    config = options.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config, options = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **hub, **options)
    config = copy.deepcopy(config)
    config.towers = {tower: {key: source[key] for key in ("name", "revision")} for tower, source in record.items()}
    config.light_checkpoint = False
    state = read_weights(path, hub)
    prefix = "model." if any(name.startswith("model.") for name in state) else ""
    with torch.device("meta"):  # only to learn the names
        base = cls(copy.deepcopy(config)).base_model
    missing = {name for name in base.state_dict() if prefix + name not in state} - base.all_tied_weights_keys.keys()
    for tower, source in record.items():
        left_out = sorted(name for name in missing if name.startswith(f"{tower}."))
        if left_out:
            loaded = _load_source(tower, source, getattr(torch, source["dtype"]), hub)
            weights = name_tower_weights(base.state_dict(), {tower: loaded})
            found = {name: weights[name] for name in left_out if name in weights}
            _check_fingerprint(tower, source, found)
            state |= {prefix + name: weight for name, weight in found.items()}
            missing -= found.keys()
    if missing:
        raise ValueError(f"{path} and its towers lack {len(missing)} weights: {sorted(missing)[:4]}. It is damaged.")
    return {**options, "config": config, "state_dict": state}


@contextlib.contextmanager
def config_fields(config: PreTrainedConfig, fields: Mapping[str, object]) -> Iterator[None]:
    """Fields that a configuration has for the length of a `with` block, as for one save."""
    own: dict[str, object] = config.__dict__
    before = {name: own[name] for name in fields if name in own}
    own.update(fields)
    try:
        yield
    finally:
        for name in fields:
            del own[name]
        own.update(before)


def finish_light(model: PreTrainedModel, path: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """What Transformers reads beside the weights of a full checkpoint: the generation settings, and the place."""
    model.config.name_or_path = model.name_or_path = str(path)
    hub = _hub_options(options)
    if model.can_generate() and cached_file(
        path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub
    ):
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


def check_left_out(model: PreTrainedModel, path: str | os.PathLike) -> None:
    """Hold a model's frozen weights against those that a light checkpoint left out, before it goes on training.

    Args:
        model ([`ReLLMForConditionalGeneration`]): Built from the same towers.
        path (`str` or `os.PathLike`): The checkpoint; nothing is checked of a full one.

    Raises:
        ValueError: If they differ; the message names the tower.
    """
    config, _ = PreTrainedConfig.get_config_dict(path)
    if not config.get("light_checkpoint"):
        return
    inside = read_weights(path).keys() | model.all_tied_weights_keys.keys()
    for tower, source in config["towers"].items():
        prefix = f"{model.base_model_prefix}.{tower}."
        weights = {k: v for k, v in model.state_dict().items() if k.startswith(prefix) and k not in inside}
        if weights and (found := fingerprint(weights.values())) != source["fingerprint"]:
            raise ValueError(
                f"The model's {tower} is not the one that {path} was trained with: its weights have the fingerprint "
                f"{found[:16]}…, expected {source['fingerprint'][:16]}…. Build the model from {source['name']} in "
                f"{source['dtype']}, or load it from the checkpoint."
            )


def read_weights(path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The weights of a checkpoint, of one file or of several, on the CPU.

    Args:
        path (`str` or `os.PathLike`): A directory or a Hub id.
        hub (`dict`, *optional*): `revision`, `token` and the like.
    """
    options = dict(hub or {})
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= load_file(cached_file(path, name, **options))
    return weights


@whole_weights()
def _load_source(tower: str, source: Mapping[str, Any], dtype: torch.dtype, hub: Mapping[str, Any]) -> PreTrainedModel:
    options = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    if source.get("revision"):
        options["revision"] = source["revision"]
    try:
        with torch.random.fork_rng(devices=[]):  # a save in mid-training must not move the run's random numbers
            return load_tower(tower, source["name"], dtype=dtype, **options)
    except (OSError, ValueError) as error:
        at = f"{source['name']} (revision {source['revision']})" if source.get("revision") else source["name"]
        raise OSError(
            f"A light checkpoint needs its {tower}, and {at} did not load: {error} Bring it back, or say where it is: "
            f"from_pretrained(…, towers={{{tower!r}: DIRECTORY_OR_HUB_ID}}). A full checkpoint needs no towers."
        ) from error


def _check_fingerprint(tower: str, source: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    found = fingerprint(weights.values())
    if found != source["fingerprint"]:
        raise ValueError(
            f"The {tower} at {source['name']} is not the one that this light checkpoint was trained with: its weights "
            f"have the fingerprint {found[:16]}…, expected {source['fingerprint'][:16]}…. Bring the original back, or "
            f"say where it is: from_pretrained(…, towers={{{tower!r}: DIRECTORY_OR_HUB_ID}})."
        )


def _digests(weights: Mapping[Any, Tensor]) -> dict[Any, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing leaves other threads the interpreter
        return dict(zip(weights, pool.map(_digest, weights.values()), strict=True))


def _digest(weight: Tensor) -> str:
    hashed = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    hashed.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _combine(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _main_dtype(weights: Iterable[Tensor]) -> torch.dtype:
    """The floating type of most of the numbers."""
    counts: dict[torch.dtype, int] = {}
    for weight in weights:
        if weight.is_floating_point():
            counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}


__all__ = [
    "check_left_out",
    "config_fields",
    "fingerprint",
    "finish_light",
    "light_state",
    "load_light",
    "read_light_record",
    "read_weights",
    "why_not_light",
]
