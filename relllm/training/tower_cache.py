"""Cache of the frozen towers' outputs: computed in the first epoch, read from the disk in the later ones.

What lives here: which file a clip has, reading and writing it, and the trainer's part. What does not: where a batch is
made (`collator.py`), how the model takes tower outputs instead of features (`towers_relllm.py`).

Design:
- A file is named by the SHA-256 of its clip's samples, decoded and resampled; its folder by all else that the outputs
  follow from: the towers' weights and configurations, the features' settings, the precision, the release of
  Transformers. So another tower never reads what this one wrote.
- The loader's workers read. The process that trains runs the towers over the clips that are missing, and writes them.
- A file is written under a name of its own and renamed: processes may write the same clip at once, and a kill leaves
  none that is half written. One that does not read, or whose checksum is another, counts as missing and is replaced.
- Nothing is evicted. A full cache goes on being read, and the clips that are not in it are computed.
"""

import errno
import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from relllm.data.journal import write_json
from relllm.modeling.light_checkpoint_relllm import fingerprint
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration, ReLLMModel
from relllm.modeling.towers_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor

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
GB = 1e9
RECOUNT = 0.02  # of the limit: how much a process writes before it counts again what others have written
LEFTOVER_S = 24 * 3600  # a temporary file as old as this is of a killed process


@dataclass
class TowerCacheSettings:
    """The settings that the trainer's configuration inherits; the cache is off by default.

    Args:
        tower_cache_dir (`str`, *optional*): Folder in which the outputs of the frozen towers are kept from one epoch
            to the next, and from one run to another; by default none are.
        tower_cache_gb (`float`, *optional*, defaults to 100.0): Largest size of that folder in GB (1e9 bytes), of all
            towers together. Once it is reached, nothing more is written.
    """

    tower_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Keep the frozen towers' outputs here (also --cache-dir).", "aliases": ["--cache-dir"]},
    )
    tower_cache_gb: float = field(default=100.0, metadata={"help": "Largest size of that folder in GB."})


class TowerCache:
    """The outputs of one pair of towers, clip by clip, in files that several processes share.

    Args:
        root (`Path`): Folder of all towers.
        settings (`Mapping`): Of [`cache_settings`]; they name the folder of these.
        limit_bytes (`float`): Largest size of `root`. Exceeded by at most 2 % for each process that writes.
    """

    def __init__(self, root: Path, settings: Mapping[str, object], *, limit_bytes: float) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.root = root
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.limit_bytes = limit_bytes
        self.is_full = False
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():  # for people: whose folder this is
            write_json(json.loads(text), self.folder / "settings.json")
        for path in self.folder.glob("??/*.partial"):
            _remove_leftover(path)
        self._count()

    def get(self, key: str) -> TowerOutputs | None:
        """A clip's outputs on the CPU, T that of its longest window; `None` if they are not there, or damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                outputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get("crc32")
        except FileNotFoundError:
            return None
        except SafetensorError:
            checksum, outputs = None, {}
        if not outputs or checksum != _checksum(outputs):
            logger.warning(f"{path} is damaged; it will be written again.")
            return None
        return _outputs(outputs)

    def put(self, key: str, outputs: TowerOutputs) -> None:
        """Writes a clip's outputs, `(windows, …)`, unless the cache or the disk is full, which is logged once."""
        if self.is_full:
            return
        kept = {name: outputs[name].detach().cpu().contiguous() for name in OUTPUTS if outputs.get(name) is not None}
        content = save(kept, {"crc32": _checksum(kept)})
        if self.size_bytes + len(content) > self.limit_bytes or self._unseen > RECOUNT * self.limit_bytes:
            self._count()
        if self.size_bytes + len(content) > self.limit_bytes:
            self._stop(f"it holds {self.size_bytes / GB:.3g} of {self.limit_bytes / GB:.3g} GB (tower_cache_gb)")
            return
        path = self._path(key)
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._stop(str(error))
            return
        self.size_bytes += len(content)
        self._unseen += len(content)

    def look_up(self, waveforms: Sequence[np.ndarray]) -> tuple[list[bool], dict[str, Tensor]]:
        """What a batch carries of the cache.

        Args:
            waveforms (`Sequence[np.ndarray]`): The batch's clips, each `(samples,)` as the towers will hear it.

        Returns:
            `tuple`: Which clips are there, and entries of the batch: `tower_known` `(clips,)`, `tower_keys`
            `(missing clips, 32)` and the outputs of the others, as of [`TowerOutputs`] under `tower_frames` and so on.
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

    def _count(self) -> None:
        """Files come and go meanwhile, by other processes."""
        self.size_bytes, self._unseen = sum(_sizes(self.root)), 0

    def _stop(self, reason: str) -> None:
        self.is_full = True
        logger.warning(
            f"The cache of tower outputs in {self.root} is full: {reason}. What is in it is read, and the other clips "
            "are computed. Delete folders of other towers (each says in settings.json whose it is), or raise "
            "tower_cache_gb."
        )


class TowerCacheMixin(Trainer):
    """For a trainer of a ReLLM whose collator has looked the clips up; its `args` are [`TowerCacheSettings`] too."""

    _tower_cache: TowerCache | None = None

    def open_tower_cache(self, model: ReLLMForConditionalGeneration, extractor: ReLLMFeatureExtractor) -> TowerCache:
        """The cache of this model's towers, which [`put_towers`] then writes to.

        Raises:
            ValueError: If the run cannot have one; the message names the setting.
        """
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
        self._tower_cache = TowerCache(
            Path(self.args.tower_cache_dir).expanduser(),
            cache_settings(model.base_model, extractor) | precision,
            limit_bytes=self.args.tower_cache_gb * GB,
        )
        self.add_callback(_SayWhereCallback(self._tower_cache))
        return self._tower_cache

    def put_towers(self, inputs: dict) -> None:
        """Replaces a batch's features by the towers' outputs, of the cache or computed now and kept; in place.

        Args:
            inputs (`dict`): A batch with the entries of [`TowerCache.look_up`], which leave it too.
        """
        known = inputs.pop("tower_known").tolist() if "tower_keys" in inputs else None
        given = {name: inputs.pop(f"tower_{name}") for name in OUTPUTS if f"tower_{name}" in inputs}
        if known is None:  # all are there; nothing waits for the device
            del inputs["tower_known"]
            inputs["tower_outputs"] = _outputs(given)
            return
        assert self._tower_cache is not None
        windows = list(zip(inputs["audio_num_windows"].tolist(), known, strict=True))
        features = {name: inputs.pop(name) for name in FEATURES if name in inputs}
        with self.accelerator.autocast():
            outputs = self.model.base_model.run_towers(**features)
        computed = list(split_clips(outputs, [count for count, is_known in windows if not is_known]))
        for key, clip in zip(inputs.pop("tower_keys").cpu().numpy(), computed, strict=True):
            self._tower_cache.put(key.tobytes().hex(), clip)
        if given:
            stored = split_clips(_outputs(given), [count for count, is_known in windows if is_known])
            rest = iter(computed)
            outputs = join_clips([next(stored if is_known else rest) for _, is_known in windows])
        inputs["tower_outputs"] = outputs


class _SayWhereCallback(TrainerCallback):
    def __init__(self, cache: TowerCache) -> None:
        self.cache = cache

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            used, limit = self.cache.size_bytes / GB, self.cache.limit_bytes / GB
            Console(stderr=True).print(f"Tower outputs are kept in {self.cache.folder}: {used:.3g} of {limit:.3g} GB.")


def cache_settings(model: ReLLMModel, extractor: ReLLMFeatureExtractor) -> dict[str, object]:
    """What the towers' outputs follow from beside the clip and the precision; JSON can hold it.

    Args:
        model ([`ReLLMModel`]): Its weights are hashed: a second or two for a GB.
        extractor ([`ReLLMFeatureExtractor`]): Makes its features.
    """
    return {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "features": {name: getattr(extractor, name) for name in FEATURE_SETTINGS},
        "audio_tower": _describe(model.audio_tower),
        "emotion_tower": None if model.emotion_tower is None else _describe(model.emotion_tower),
    }


def clip_key(waveform: np.ndarray) -> str:
    """SHA-256 of a clip's float32 samples."""
    return hashlib.sha256(np.ascontiguousarray(waveform, dtype=np.float32).data).hexdigest()


def split_clips(outputs: TowerOutputs, num_windows: Sequence[int]) -> Iterator[TowerOutputs]:
    """Of each clip its own, T that of its longest window.

    Args:
        outputs ([`TowerOutputs`]): Of all windows.
        num_windows (`Sequence[int]`): Of each clip.
    """
    start = 0
    for count in num_windows:
        clip = {name: outputs[name][start : start + count] for name in OUTPUTS if outputs.get(name) is not None}
        clip["frames"] = clip["frames"][:, : int(clip["lengths"].max())]
        start += count
        yield _outputs(clip)


def join_clips(clips: Sequence[TowerOutputs]) -> TowerOutputs:
    """The inverse of [`split_clips`], with zeros as padding."""
    windows = [window for clip in clips for window in clip["frames"]]
    joined = {"frames": torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)}
    for name in OUTPUTS[1:]:
        if name in clips[0]:
            joined[name] = torch.cat([clip[name] for clip in clips])
    return _outputs(joined)


def _outputs(tensors: Mapping[str, Tensor]) -> TowerOutputs:
    frames, lengths = tensors["frames"], tensors["lengths"]
    return TowerOutputs(frames, lengths, tensors.get("emotion_embedding"), tensors.get("dimensions"))


def _describe(tower: PreTrainedModel) -> dict[str, object]:
    weights = fingerprint(tower.state_dict().values())
    return {"weights": weights, "dtype": str(tower.dtype), "config": _architecture(tower.config.to_dict())}


def _architecture(fields: Mapping[str, object]) -> dict[str, object]:
    """A configuration without what depends on where it was loaded from."""
    return {
        name: _architecture(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in NO_ARCHITECTURE
    }


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _sizes(root: Path) -> Iterator[int]:
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith((".safetensors", ".partial")):
                try:
                    yield os.stat(os.path.join(folder, name)).st_size
                except FileNotFoundError:  # renamed since
                    continue


def _remove_leftover(partial: Path) -> None:
    try:
        if time.time() - partial.stat().st_mtime > LEFTOVER_S:
            partial.unlink()
    except FileNotFoundError:  # another process has renamed or removed it
        return


__all__ = ["TowerCache", "TowerCacheMixin", "TowerCacheSettings", "cache_settings", "clip_key"]
