"""Putting a ReLLM together from towers, and light checkpoints, which leave out what the towers' sources have.

It has what was trained, what is outside the towers, and tower weights that differ from their source. A fingerprint of
the sources' files guards the rest. A model's first light save loads each source to compare; later saves only write.
"""

import contextlib
import copy
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .causal_lm_relllm import find_llm_loader, take_language_model
from .emotion_tower_relllm import ReLLMEmotionModel
from .lora_relllm import is_lora_parameter
from .places_relllm import check_place

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
AUDIO_TOKEN = "<|audio|>"
TOWERS = ("audio_tower", "emotion_tower", "text_model")
# Whatever is outside the LLM, its output embeddings, and its LoRA: in 4 bit it would neither hear nor train. Regular
# expressions for a module's name from its first part on.
NEVER_QUANTIZED = (
    *(r"(model\.)?audio_tower", r"(model\.)?emotion_tower", r"(model\.)?multi_modal_projector"),
    *(r"(model\.)?emotion_projector", r"(model\.)?emotion_head", r"(model\.)?dimension_head"),
    *(".*lm_head", ".*embed_out", ".*lora_[AB]"),
)
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # names for it, one a method
# Of an LLM without a chat template, as in `build_chat_template`: a token of its tokenizer -> what ends a turn.
TURN_ENDS = {"<|im_start|>": "<|im_end|>", "<|start_header_id|>": "<|eot_id|>", "<start_of_turn>": "<end_of_turn>"}


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Have each model made in the `with` block come whole into this process, also with DeepSpeed's ZeRO 3."""
    running = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = running


def load_tower(
    kind: str, source: str | os.PathLike | PreTrainedModel, *, dtype: torch.dtype | str | None = None, **options: Any
) -> PreTrainedModel:
    """Return a model as it is, or load a tower (one of `TOWERS`) from safetensors; of Whisper return the encoder."""
    if not isinstance(source, PreTrainedModel):
        check_place(source)
        loaders = {"audio_tower": AutoModel, "emotion_tower": ReLLMEmotionModel}
        options |= {"use_safetensors": True, **({"dtype": dtype} if dtype else {})}
        loader = loaders[kind] if kind in loaders else find_llm_loader(source, options)
        source = loader.from_pretrained(source, **options)
    if kind == "text_model":
        return take_language_model(source)
    return source.get_encoder() if kind == "audio_tower" and source.config.is_encoder_decoder else source


def check_dtype(dtype: torch.dtype | str | dict | None) -> None:
    """Raise a `ValueError` for a precision for each part, which some releases of Transformers obey and others drop."""
    if isinstance(dtype, dict):
        raise ValueError(
            f"dtype={dtype} names a precision for each part, and a ReLLM takes one for its towers and its LLM. Pass "
            'that; for towers in their own, `from_towers(…, dtype="auto")`.'
        )


def other_dtypes(towers: Mapping[str, PreTrainedModel | None], dtype: torch.dtype) -> dict[str, str]:
    """Return `config.tower_dtypes`: the precision of each tower that has another than the LLM's."""
    found = {kind: tower.dtype for kind, tower in towers.items() if kind != "text_model" and tower is not None}
    return {kind: str(own).removeprefix("torch.") for kind, own in found.items() if own != dtype}


def tower_dtype(config: PreTrainedConfig, kind: str) -> torch.dtype:
    """Return the precision to make a tower in: its own where one is recorded, else the default of the load."""
    default = torch.get_default_dtype()
    own = getattr(torch, config.tower_dtypes.get(kind, "float32"))
    if kind not in config.tower_dtypes:
        return default
    return torch.promote_types(default, own) if own == torch.float32 else own


def obey_dtype(model: PreTrainedModel, dtype: torch.dtype | str | None) -> None:
    """Have towers in half precision in the one that a load asked for by name; those in float32 were trained so."""
    if dtype not in (None, "auto"):
        for kind in TOWERS[:2]:
            if (tower := getattr(model, kind)) is not None and tower.dtype != torch.float32:
                tower.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def tower_source(source: str | os.PathLike | PreTrainedModel) -> dict[str, str | None] | None:
    """Return a tower's place for `config.towers`; `None` for a model that was never loaded from anywhere."""
    name = source.config.name_or_path if isinstance(source, PreTrainedModel) else source
    return {"name": place_of(name), "revision": find_commit(name)} if name else None


def find_commit(name: str | os.PathLike, revision: str | None = None) -> str | None:
    """Return the commit of a Hub id in this machine's cache, which Transformers does not tell; `None` elsewhere."""
    if os.path.isdir(name):
        return None
    try:
        path = try_to_load_from_cache(str(name), "config.json", revision=revision)
    except HFValidationError:  # no Hub id: a folder that is gone
        return None
    return os.path.basename(os.path.dirname(path)) if isinstance(path, str) else None


def place_of(name: str | os.PathLike) -> str:
    """Return a Hub id as it is, a directory by its absolute path."""
    return os.path.abspath(name) if os.path.isdir(name) else str(name)


def name_tower_weights(names: Iterable[str], towers: Mapping[str, PreTrainedModel | None]) -> dict[str, Tensor]:
    """Return the towers' weights by their `names` in [`ReLLMModel`], where a LoRA moves a weight to `base_layer`."""
    renamed = {name.replace(".base_layer.", "."): name for name in names}
    weights: dict[str, Tensor] = {}
    for kind, tower in towers.items():
        own = {f"{kind}.{name}": weight for name, weight in tower.state_dict().items()} if tower is not None else {}
        if extra := sorted(own.keys() - renamed.keys()):
            raise ValueError(f"{kind} has {len(extra)} weights that do not fit its configuration: {extra[:4]}.")
        weights |= {renamed[name]: weight for name, weight in own.items()}
    return weights


def load_parts(
    cls: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor], dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load a model with these tower weights and fresh ones elsewhere, of which Transformers would warn."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    towers = ("model.audio_tower.", "model.emotion_tower.", "model.text_model.")
    missing = [name for name in info["missing_keys"] if name.startswith(towers) and not is_lora_parameter(name)]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"The towers do not fit their configurations: {info | {'missing_keys': missing}}.")
    return model


def quantize_llm_alone(quantization: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """Return a `quantization_config` that takes the LLM's own layers alone, and of them none that it leaves out."""
    given = AutoQuantizationConfig.from_dict(quantization) if isinstance(quantization, dict) else quantization
    skip_list = next((name for name in SKIP_LISTS if name in vars(given)), None)
    if skip_list is None:
        raise ValueError(
            f"A {type(given).__name__} has no list of modules to leave out, so it would quantise the towers and what "
            "was trained as well. Use one that has, such as BitsAndBytesConfig."
        )
    alone, own = copy.deepcopy(given), getattr(given, skip_list) or []
    inside = [f"{name}.base_layer" for name in own]  # what the layer of that name is called under a LoRA
    setattr(alone, skip_list, list(dict.fromkeys([*own, *inside, *NEVER_QUANTIZED])))
    return alone


def load_llm_tokenizer(
    source: str | os.PathLike | PreTrainedTokenizerBase | PreTrainedModel,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer as it is, or load the one beside an LLM."""
    if isinstance(source, PreTrainedModel):
        raise ValueError("`text` is a loaded model, so its tokenizer is not known. Pass tokenizer=… as well.")
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    check_place(source)
    return AutoTokenizer.from_pretrained(source)


def find_audio_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.get_vocab().get(AUDIO_TOKEN, len(tokenizer))


def find_ends(
    settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> int | list[int] | None:
    """Return the tokens that end a reply: those of the generation settings, and the one that ends a turn.

    A base LLM does not name the latter, and a checkpoint that was trained on it would never end. It is what the chat
    template, by default the tokenizer's own, writes behind an answer.
    """
    vocabulary = tokenizer.get_vocab()
    end = next((end for token, end in TURN_ENDS.items() if token in vocabulary), "")
    if chat_template or tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "«reply»"}]
        try:
            text = tokenizer.apply_chat_template(turns, chat_template=chat_template, tokenize=False)
        except TemplateError:  # then there is no turn format to derive either, which the processor says
            return settings.eos_token_id
        end = text.rpartition("«reply»")[2].lstrip()
    found = tokenizer(end or tokenizer.eos_token or "", add_special_tokens=False)["input_ids"][:1]
    given = settings.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return [*ends, *found] if special.issuperset(found) and not set(ends).issuperset(found) else given


def source_fingerprint(source: Mapping[str, Any], hub: Mapping[str, Any] | None = None) -> str:
    """Hash the SHA-256 of each safetensors file of a tower (`name` and `revision`, as in `config.towers`).

    In the Hub's cache a file has its SHA-256 for a name; one elsewhere is read once, while its size and time stay.
    """
    digests = []
    for path in weight_files(source["name"], _source_options(source, hub)):
        blob = os.path.realpath(path)
        name = os.path.basename(blob)
        if len(name) == 64 and set(name) <= set("0123456789abcdef"):
            digests.append(name)
        else:
            status = os.stat(blob)
            digests.append(_file_digest(blob, status.st_size, status.st_mtime_ns))
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


@functools.lru_cache
def _file_digest(path: str, size: int, time_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def why_not_light(model: PreTrainedModel) -> str | None:
    """Tell why a model cannot be saved light, with the remedy; `None` if it can."""
    if getattr(model, "is_quantized", False):
        return "A quantised model cannot be saved light: its weights are not those of its sources. Save it in full."
    if any(weight.device.type == "meta" for weight in model.parameters()):
        return "An offloaded model cannot be saved light: it would be compared with its sources. Save it in full."
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
    """Return the weights that a light checkpoint of a model holds, and its `config.towers`."""
    if reason := why_not_light(model):
        raise ValueError(reason)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name in model.all_tied_weights_keys:  # follows its partner
        state.pop(name, None)
    trained = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}
    record: dict[str, dict] = dict(model.config.towers or {})
    for tower in TOWERS:
        prefix = ("" if model.base_model is model else f"{model.base_model_prefix}.") + f"{tower}."
        kept = {name for name in state if name in trained or is_lora_parameter(name)}
        frozen = {name: state[name] for name in state if name.startswith(prefix) and name not in kept}
        if not frozen:  # no such tower, or all of it trained
            continue
        source = model.config.towers[tower]
        numbers: Counter[torch.dtype] = Counter()
        for weight in frozen.values():
            numbers[weight.dtype] += weight.numel() if weight.is_floating_point() else 0
        dtype = numbers.most_common(1)[0][0]  # of most of them
        for name in _shared_with_source(model, tower, source, dtype, frozen, prefix):
            del state[name]
        left_out = {"dtype": str(dtype).removeprefix("torch."), "fingerprint": source_fingerprint(source)}
        record[tower] = {**source, **left_out}
    return state, record


def _shared_with_source(
    model: PreTrainedModel, tower: str, source: dict, dtype: torch.dtype, frozen: dict[str, Tensor], prefix: str
) -> set[str]:
    """Name the weights that the source has as well, to the bit; they are compared again where one may have changed."""
    cache = model.__dict__.setdefault("_light_cache", {})
    key = (tower, source["name"], source.get("revision"), dtype)
    states = {name: (weight.data_ptr(), weight._version, weight.shape) for name, weight in frozen.items()}
    if key not in cache or cache[key][0] != states:
        expected = _load_source(tower, source, dtype, {}).state_dict()
        bare = {name: name.removeprefix(prefix).replace(".base_layer.", ".") for name in frozen}
        shared = set()
        for name, weight in frozen.items():
            other = expected.get(bare[name])
            if other is not None and other.dtype == weight.dtype and torch.equal(other, weight.to(other.device)):
                shared.add(name)
        cache[key] = (states, shared)
        if own := sorted(bare[name] for name in frozen.keys() - shared):
            logger.warning_once(
                f"{len(own)} frozen weights of {tower} are not those of {source['name']} and are saved with what was "
                f"trained: {', '.join(own[:4])}{', …' if len(own) > 4 else ''}."
            )
    return cache[key][1]


def read_light_record(
    path: str | os.PathLike | None, given: Mapping[str, str | os.PathLike] | None, options: Mapping[str, Any]
) -> dict | None:
    """Read the towers that a light checkpoint names, each from `given` where it is there; `None` for a full one."""
    config: PreTrainedConfig | None = options.get("config")
    if given is None and isinstance(config, PreTrainedConfig) and config.towers:
        # The Auto classes take an argument that is also a field of the configuration for the field.
        given = {tower: place for tower, place in config.towers.items() if not isinstance(place, Mapping)}
    if path is None:
        return None
    check_place(path)
    check_one_form(path, _hub_options(options))
    recorded, _ = PreTrainedConfig.get_config_dict(path, **_hub_options(options))
    if not recorded.get("light_checkpoint"):
        if given:
            raise ValueError(f"towers={dict(given)} is for light checkpoints, and {path} is a full one. Leave it out.")
        return None
    if unknown := sorted(set(given or {}) - recorded["towers"].keys()):
        raise ValueError(f"towers has {unknown}; this checkpoint has the towers {sorted(recorded['towers'])}.")
    moved = {tower: {"name": place_of(place), "revision": None} for tower, place in (given or {}).items()}
    return {tower: {**source, **moved.get(tower, {})} for tower, source in recorded["towers"].items()}


def load_light(
    cls: type[PreTrainedModel], path: str | os.PathLike, record: Mapping[str, dict], options: dict[str, Any]
) -> dict[str, Any]:
    """Return arguments for `from_pretrained(None, …)` that build the whole model of a checkpoint.

    Args:
        record (`Mapping`): The towers of a light one, of [`read_light_record`]; empty for a full one.
    """
    hub = _hub_options(options)
    options = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
    config = options.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config, options = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **hub, **options)
    config = copy.deepcopy(config)
    if record:
        config.towers = {tower: {key: source[key] for key in ("name", "revision")} for tower, source in record.items()}
    config.light_checkpoint = False
    return {**options, "config": config, "state_dict": dict(read_state(cls, config, path, record, hub))}


def read_state(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    path: str | os.PathLike,
    record: Mapping[str, dict],
    hub: Mapping[str, Any],
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of the model that a configuration makes and its name: of its checkpoint, then of each tower.

    `record` and `hub` are as in [`load_light`]. One tower at a time is in memory, and of the checkpoint one weight.
    """
    with torch.device("meta"):  # only to learn the names
        base = cls(copy.deepcopy(config)).base_model
    inside = set(weight_names(path, hub))
    prefix = "model." if any(name.startswith("model.") for name in inside) else ""
    wanted = {prefix + name for name in base.state_dict()}
    wrapped = {name.replace(".base_layer.", "."): name for name in wanted}
    if extra := sorted({wrapped.get(name, name) for name in inside} - wanted):
        raise ValueError(
            f"{path} has {len(extra)} weights that the model of this configuration has no place for: {extra[:4]}. "
            "Load it with the configuration that it was saved with, above all its lora_config."
        )
    for name, weight in iterate_weights(path, hub):
        yield wrapped.get(name, name), weight  # of a LoRA that was not there
    tied = {prefix + name for name in base.all_tied_weights_keys}
    missing = wanted - tied - {wrapped.get(name, name) for name in inside}
    for tower, source in record.items():
        if not any(name.startswith(f"{prefix}{tower}.") for name in missing):
            continue
        loaded = _load_source(tower, source, getattr(torch, source["dtype"]), hub)
        if (found := source_fingerprint(source, hub)) != source["fingerprint"]:
            raise ValueError(
                f"The {tower} at {source['name']} is not the one that this light checkpoint was trained with: its "
                f"files have the fingerprint {found[:16]}…, expected {source['fingerprint'][:16]}…. Bring the "
                f"original back, or say where it is: from_pretrained(…, towers={{{tower!r}: DIRECTORY_OR_HUB_ID}})."
            )
        weights = name_tower_weights(base.state_dict(), {tower: loaded})
        yield from ((prefix + name, weight) for name, weight in weights.items() if prefix + name in missing)


def gets_lora(path: str | os.PathLike | None, options: Mapping[str, Any]) -> bool:
    """Tell whether the arguments of `from_pretrained` ask for a LoRA and the checkpoint has none."""
    config = options.get("config")
    asked = options.get("lora_config") or (isinstance(config, PreTrainedConfig) and config.lora_config)
    if path is None or not asked:
        return False
    recorded, _ = PreTrainedConfig.get_config_dict(path, **_hub_options(options))
    return recorded.get("lora_config") is None


def check_complete(path: str | os.PathLike, missing: Iterable[str], fresh_lora: bool) -> None:
    """Raise a `ValueError` if a checkpoint lacked weights that nothing but the checkpoint can have."""
    fresh = tuple(f"{prefix}{head}." for prefix in ("", "model.") for head in ("emotion_head", "dimension_head"))
    lost = [name for name in missing if not name.startswith(fresh) and not (fresh_lora and is_lora_parameter(name))]
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} weights of the model that its configuration makes, and they would be drawn at "
            f"random: {', '.join(sorted(lost)[:4])}{', …' if len(lost) > 4 else ''}. Load it with the configuration "
            "that it was saved with (above all its lora_config), or bring the whole checkpoint back."
        )


def finish_light(model: PreTrainedModel, path: str | os.PathLike, options: Mapping[str, Any]) -> None:
    """Read what Transformers reads beside the weights of a full checkpoint: generation settings, and the place."""
    model.config.name_or_path = model.name_or_path = str(path)
    hub = _hub_options(options)
    found = cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if found and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


def check_left_out(model: PreTrainedModel, path: str | os.PathLike) -> None:
    """Raise a `ValueError` if a model that is to go on training has other towers than a light checkpoint left out."""
    config, _ = PreTrainedConfig.get_config_dict(path)
    if not config.get("light_checkpoint"):
        return
    inside = {*weight_names(path), *model.all_tied_weights_keys}
    for tower, source in config["towers"].items():
        prefix = f"{model.base_model_prefix}.{tower}."
        weights = {k: w for k, w in model.state_dict().items() if k.startswith(prefix) and k not in inside}
        own = (model.config.towers or {}).get(tower, {})
        same = bool(own) and source_fingerprint(own) == source["fingerprint"]
        dtype = getattr(torch, source["dtype"])
        if weights and not (same and _shared_with_source(model, tower, own, dtype, weights, prefix) == weights.keys()):
            raise ValueError(
                f"The model's {tower} is not the one that {path} was trained with: its files or its weights are "
                f"others. Build the model from {source['name']} (fingerprint {source['fingerprint'][:16]}…) in "
                f"{source['dtype']}, or load it from the checkpoint."
            )


def read_weights(path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, a directory or a Hub id, of one file or of several, to the CPU."""
    return dict(iterate_weights(path, hub))


def iterate_weights(path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of [`read_weights`] by name, one after the other."""
    for file in weight_files(path, hub or {}):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def weight_names(path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the weights of a checkpoint; only the heads of its files are read."""
    names: list[str] = []
    for file in weight_files(path, hub or {}):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def weight_files(path: str | os.PathLike, options: Mapping[str, Any]) -> list[str]:
    """Find the safetensors files that Transformers loads: one, before the several of an index."""
    lenient = {"_raise_exceptions_for_missing_entries": False, **options}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **lenient):
        return [single]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **lenient)
    if index is None:
        return [cached_file(path, SAFE_WEIGHTS_NAME, **options)]  # whose error says what is not there
    with open(index, encoding="utf-8") as file:
        names = sorted(set(json.load(file)["weight_map"].values()))
    return [cached_file(path, name, **options) for name in names]


def check_one_form(path: str | os.PathLike, hub: Mapping[str, Any] | None = None) -> None:
    """Raise a `ValueError` for weights in one file beside weights in several: what an earlier save or push left."""
    options = {"_raise_exceptions_for_missing_entries": False, **(hub or {})}
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if all(cached_file(path, name, **options) for name in names):
        raise ValueError(
            f"{path} holds {names[0]} and {names[1]}: one of them is of an earlier checkpoint, and the first would be "
            "loaded. Delete what is older, or save or push it again (`relllm push` removes what it replaces)."
        )


@contextlib.contextmanager
def replaces_weights(folder: str | os.PathLike, writes: bool) -> Iterator[None]:
    """Leave in a folder no weights but those that are saved in the `with` block, in one file or in several.

    Transformers removes surplus shards and leaves the other form, which a load might prefer.
    """
    index, single = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), os.path.join(folder, SAFE_WEIGHTS_NAME)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        writes = writes and torch.distributed.get_rank() == 0
    aside = f"{index}.before"
    if writes and os.path.exists(index):
        os.replace(index, aside)
    try:
        yield
    except BaseException:
        if writes and os.path.exists(aside):  # refused before anything was written, as a light save may be
            os.replace(aside, index)
        raise
    if writes and os.path.exists(aside):
        os.remove(aside)
    if writes and os.path.exists(index) and os.path.exists(single):
        os.remove(single)


@whole_weights()
def _load_source(tower: str, source: Mapping[str, Any], dtype: torch.dtype, hub: Mapping[str, Any]) -> PreTrainedModel:
    options = _source_options(source, hub)
    try:
        with torch.random.fork_rng(devices=[]):  # a save in mid-training must not move the run's random numbers
            return load_tower(tower, source["name"], dtype=dtype, **options)
    except (OSError, ValueError) as error:
        at = f"{source['name']} (revision {source['revision']})" if source.get("revision") else source["name"]
        raise OSError(
            f"A light checkpoint needs its {tower}, and {at} did not load: {error} Bring it back, or say where it is: "
            f"from_pretrained(…, towers={{{tower!r}: DIRECTORY_OR_HUB_ID}}). A full checkpoint needs no towers."
        ) from error


def _source_options(source: Mapping[str, Any], hub: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the Hub's options for a tower: those of its checkpoint, and its own revision."""
    options = {name: value for name, value in (hub or {}).items() if name not in ("revision", "subfolder")}
    return options | ({"revision": source["revision"]} if source.get("revision") else {})


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
