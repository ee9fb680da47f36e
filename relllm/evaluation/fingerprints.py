"""What a run measured and with what: fingerprints of weights and rows (digests of content), versions, hardware."""

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModel, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from relllm.labels import DIMENSIONS
from relllm.modeling.checkpoint_relllm import weight_files

from .adapters import ADAPTER_WEIGHTS, base_of, describe_adapter, read_adapter

UNFINISHED = ".unfinished/"  # in the path of a training that was killed, beside the scorers that are complete
ROWS_AT_ONCE = 64
# Of a configuration: the same weights with another of these are another model.
BEHAVIOUR = ("model_type", "emotion_fusion", "emotion_labels", "lora_config", "lora_scope")
COVERED = ("id", "text", "emotion", *DIMENSIONS)  # of a row, beside its audio


def data_fingerprint(rows: Iterable[Mapping]) -> str:
    """Return SHA-256 over each row's id, transcript, emotion, dimensions and undecoded audio, in order.

    A file that is not there counts as missing, audio behind a URL by its address.
    """
    digest, remaining = hashlib.sha256(), iter(rows)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(remaining, ROWS_AT_ONCE)):  # whose audio may be bytes in memory
            for line in pool.map(_row_line, chunk):
                digest.update(line)
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(model: str, *, revision: str = "main") -> str:
    """Return SHA-256 over a model's weights and what its configuration makes of them (`BEHAVIOUR`).

    The weights are those of the full checkpoint, whether it is one file, shards, or a light one, which is put together
    with its towers: each by its name, precision, shape and bytes. An adapter's are behind those of the model below it.
    """
    if (adapter := read_adapter(model, revision)) is not None:
        base = base_of(adapter)
        below = model_fingerprint(base["pretrained_model_name_or_path"], revision=base["revision"])
        weights = _lines_of_files([cached_file(model, ADAPTER_WEIGHTS, revision=revision)])
        return combine_fingerprints([below, *weights, describe_adapter(adapter)])
    config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    if config.get("light_checkpoint"):
        whole = AutoModel.from_pretrained(model, revision=revision)
        own = {name: weight for name, weight in whole.state_dict().items() if name not in whole.all_tied_weights_keys}
        state = revert_weight_conversion(whole, own)  # named as a full one's files do
        with ThreadPoolExecutor() as pool:  # hashing leaves other threads the interpreter
            weights = sorted(pool.map(_weight_line, state, state.values()))
    else:
        weights = _lines_of_files(weight_files(model, {"revision": revision}))
    behaviour = json.dumps({name: config.get(name) for name in BEHAVIOUR}, sort_keys=True)
    return combine_fingerprints([*weights, behaviour])


def folder_fingerprint(path: str) -> str:
    """Return SHA-256 over every safetensors file beneath a folder, with its place there."""
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*.safetensors") if UNFINISHED not in file.as_posix())
    if not files:
        raise FileNotFoundError(f"No safetensors in {path}. Give the folder that `relllm empathy train` wrote.")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    places = [file.relative_to(folder).as_posix() for file in files]
    return combine_fingerprints([f"{place} {digest}" for place, digest in zip(places, digests, strict=True)])


def combine_fingerprints(parts: Sequence[str]) -> str:
    """Return the fingerprint of several, in order."""
    return f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


def _lines_of_files(files: Sequence[str]) -> list[str]:
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:
        for file in files:
            with safe_open(file, "pt") as opened:
                read = opened.get_tensor
                lines += pool.map(lambda name, read=read: _weight_line(name, read(name)), opened.keys())
    return sorted(lines)


def _weight_line(name: str, weight: torch.Tensor) -> str:
    content = weight.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {weight.dtype} {list(weight.shape)} {hashlib.sha256(content).hexdigest()}"


def check_extras(what: str, *names: str) -> None:
    """Say at the beginning what would be missing at the end: raise `ImportError` without one of these packages."""
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(f"{what} needs {name}: `pip install relllm[eval]`.") from error


def describe_hardware(device: torch.device) -> str:
    """Return the name of the GPU, or what the CPU is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def _row_line(row: Mapping) -> bytes:
    values = [row.get(name) for name in COVERED]
    return json.dumps([*values, _audio_digest(row["audio"])]).encode() + b"\n"


def _audio_digest(audio: object) -> str:
    if isinstance(audio, Mapping):
        audio = audio["bytes"] if audio.get("bytes") is not None else audio.get("path")
    if not isinstance(audio, bytes):
        source = str(audio).removeprefix("file://")
        if "://" in source:
            return source
        if not Path(source).is_file():
            return "missing"
        audio = Path(source).read_bytes()
    return hashlib.sha256(audio).hexdigest()
