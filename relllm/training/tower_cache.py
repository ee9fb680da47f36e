"""Cache of the frozen towers' outputs: computed in the first epoch, read from the disk in the later ones.

A file is named by its clip's samples, its folder by all else that the outputs follow from, so another tower never
reads what this one wrote. The loader's workers read; the process that trains computes and writes what is missing,
under a name of its own, and renames it: a kill leaves no half. A damaged file counts as missing. Nothing is evicted; a
full disk ends the writing.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration, ReLLMModel
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.setting import setting

logger = logging.get_logger(__name__)

FORMAT = 2  # of a file, and of what our own code feeds a tower and takes from it: raise it when either changes
FEATURES = ("input_features", "input_features_mask", "input_values", "input_values_mask")
OUTPUTS = ("frames", "lengths", "emotion_embedding", "dimensions")
# Of the feature extractor: what a window is, and how it becomes a tower's input.
FEATURE_SETTINGS = (
    *("sampling_rate", "feature_size", "n_fft", "hop_length", "n_samples", "dither"),
    *("speech_input", "speech_do_normalize", "full_window"),
)
NO_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of a configuration
LEFTOVER_S = 24 * 3600  # a temporary file as old as this is of a killed process


@dataclass
class TowerCacheSettings:
    """The setting that the trainer's configuration inherits; the cache is off by default."""

    tower_cache_dir: str | None = setting(None, "Folder for the frozen towers' outputs.", aliases=["--cache-dir"])


def check_cache_dir(place: str) -> None:
    """Make the folder of a cache; `ValueError` where that cannot be, or nothing can be written into it."""
    folder = Path(place).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"tower_cache_dir must be a folder, or be made one, and {folder} cannot: {error}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"tower_cache_dir is {folder}, which this user may not write into. Name another folder.")


class TowerCache:
    """The outputs of one pair of towers, clip by clip, in files that several processes share.

    The `settings`, of [`cache_settings`], name the folder of these towers within `root`.
    """

    def __init__(self, root: Path, settings: Mapping[str, object]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.root = root
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.is_full = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():  # for people: whose folder this is
            (self.folder / "settings.json").write_text(json.dumps(json.loads(text), indent=2), encoding="utf-8")
        for path in self.folder.glob("??/*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
                if time.time() - path.stat().st_mtime > LEFTOVER_S:
                    path.unlink()

    def get(self, key: str) -> TowerOutputs | None:
        """Return a clip's outputs on the CPU, T that of its longest window; `None` if missing, or damaged."""
        path = self._path(key)
        try:
            stored: dict[str, Any] = load_file(path)
            return TowerOutputs(**stored)
        except FileNotFoundError:
            return None
        except SafetensorError:
            logger.warning(f"{path} is damaged; it will be written again.")
            return None

    def put(self, key: str, outputs: TowerOutputs) -> None:
        """Write a clip's outputs, `(windows, …)`, unless the disk is full, which is logged once."""
        if self.is_full:
            return
        kept = {name: outputs[name].detach().cpu().contiguous() for name in OUTPUTS if outputs.get(name) is not None}
        path = self._path(key)
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(save(kept))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.is_full = True
            logger.warning(
                f"The disk of the tower outputs in {self.root} is full: {error}. What is in it is read, and the other "
                "clips are computed. Delete folders of other towers; each says in settings.json whose it is."
            )

    def look_up(self, waveforms: Sequence[np.ndarray]) -> tuple[list[bool], dict[str, Tensor]]:
        """Return which clips are there, and what a batch carries of the cache.

        That is `tower_known` `(clips,)`, `tower_keys` `(missing clips, 32)` and the outputs of the others, as of
        [`TowerOutputs`], under `tower_frames` and so on. Clips are `(samples,)`, as the towers will hear them.
        """
        keys = [clip_key(waveform) for waveform in waveforms]
        found = [self.get(key) for key in keys]
        known = [outputs is not None for outputs in found]
        entries = {"tower_known": torch.tensor(known)}
        if stored := [outputs for outputs in found if outputs is not None]:
            entries |= {f"tower_{name}": tensor for name, tensor in join_clips(stored).items()}
        if missing := [bytes.fromhex(key) for key, is_known in zip(keys, known, strict=True) if not is_known]:
            entries["tower_keys"] = torch.tensor([list(key) for key in missing], dtype=torch.uint8)
        return known, entries

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


class TowerCacheMixin(Trainer):
    """For a trainer of a ReLLM whose collator has looked the clips up; its `args` are [`TowerCacheSettings`] too."""

    _tower_cache: TowerCache | None = None

    def open_tower_cache(self, model: ReLLMForConditionalGeneration, extractor: ReLLMFeatureExtractor) -> TowerCache:
        """Return the cache of this model's towers, which [`put_towers`] writes to; `ValueError` if none can be."""
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "tower_cache_dir is set, and FSDP and ZeRO 3 spread the towers' weights: all processes must run the "
                "towers together, whatever is cached. Use DDP, or leave tower_cache_dir out."
            )
        if not model.config.projector_masking:
            raise ValueError(
                "tower_cache_dir is set, and with projector_masking=False a clip's result depends on what the towers "
                "make of the padding beside it. Leave tower_cache_dir out."
            )
        precision = {"mixed_precision": self.accelerator.mixed_precision, "tf32": self.args.tf32}
        precision["deepspeed"] = self.is_deepspeed_enabled  # which casts the towers' weights later
        settings = cache_settings(model.base_model, extractor) | precision
        self._tower_cache = TowerCache(Path(self.args.tower_cache_dir).expanduser(), settings)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            folder = self._tower_cache.folder
            where = f"{folder}: {shutil.disk_usage(folder).free / 1e9:.3g} GB are free there"
            Console(stderr=True, markup=False).print(f"Tower outputs are kept in {where}.")
        return self._tower_cache

    def put_towers(self, inputs: dict) -> None:
        """Replace the features and entries of [`TowerCache.look_up`] by the outputs, cached or computed and kept."""
        known = inputs.pop("tower_known").tolist() if "tower_keys" in inputs else None
        given = {name: inputs.pop(f"tower_{name}") for name in OUTPUTS if f"tower_{name}" in inputs}
        if known is None:  # all are there; nothing waits for the device
            del inputs["tower_known"]
            inputs["tower_outputs"] = TowerOutputs(**given)
            return
        assert self._tower_cache is not None
        windows = list(zip(inputs["audio_num_windows"].tolist(), known, strict=True))
        features = {name: inputs.pop(name) for name in FEATURES if name in inputs}
        with self.accelerator.autocast():
            outputs = self.model.base_model.run_towers(**features)
        outputs = send_to_device(outputs, inputs["audio_num_windows"].device)  # of a spread model, from two
        computed = list(split_clips(outputs, [count for count, is_known in windows if not is_known]))
        for key, clip in zip(inputs.pop("tower_keys").cpu().numpy(), computed, strict=True):
            self._tower_cache.put(key.tobytes().hex(), clip)
        if given:
            stored = split_clips(TowerOutputs(**given), [count for count, is_known in windows if is_known])
            rest = iter(computed)
            outputs = join_clips([next(stored if is_known else rest) for _, is_known in windows])
        inputs["tower_outputs"] = outputs


def cache_settings(model: ReLLMModel, extractor: ReLLMFeatureExtractor) -> dict[str, object]:
    """Return what the towers' outputs follow from beside the clip and the precision; JSON can hold it."""
    return {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "features": {name: getattr(extractor, name) for name in FEATURE_SETTINGS},
        "audio_tower": _describe_tower(model.audio_tower),
        "emotion_tower": None if model.emotion_tower is None else _describe_tower(model.emotion_tower),
    }


def clip_key(waveform: np.ndarray) -> str:
    """Return the SHA-256 of a clip's float32 samples."""
    return hashlib.sha256(np.ascontiguousarray(waveform, dtype=np.float32).data).hexdigest()


def split_clips(outputs: TowerOutputs, num_windows: Sequence[int]) -> Iterator[TowerOutputs]:
    """Yield the outputs of each clip, which has so many windows, T that of its longest window."""
    start = 0
    for count in num_windows:
        clip = {name: outputs[name][start : start + count] for name in OUTPUTS if outputs.get(name) is not None}
        clip["frames"] = clip["frames"][:, : int(clip["lengths"].max())]
        start += count
        yield TowerOutputs(**clip)


def join_clips(clips: Sequence[TowerOutputs]) -> TowerOutputs:
    """Undo [`split_clips`], with zeros as padding."""
    windows = [window for clip in clips for window in clip["frames"]]
    joined: dict[str, Any] = {"frames": torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)}
    for name in OUTPUTS[1:]:
        if name in clips[0]:
            joined[name] = torch.cat([clip[name] for clip in clips])
    return TowerOutputs(**joined)


def _describe_tower(tower: PreTrainedModel) -> dict[str, object]:
    digest = hashlib.sha256()
    for name, weight in tower.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = _without_origin(tower.config.to_dict())
    return {"weights": digest.hexdigest(), "dtype": str(tower.dtype), "config": config}


def _without_origin(fields: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration without what depends on where it was loaded from."""
    return {
        name: _without_origin(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in NO_ARCHITECTURE
    }
