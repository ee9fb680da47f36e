"""Outputs of frozen towers, kept on the disk: computed once for a clip, read in later epochs, runs and evaluations.

A file is named by its clip's samples, its folder by all else that the outputs follow from, so another tower never
reads what this one wrote; the speech tower's outputs are kept apart, so that they serve beside any emotion tower and
beside none. Files are written under a name of their own and renamed: a kill leaves no half. A damaged file counts as
missing. Nothing is evicted; a full disk ends the writing.
"""

import contextlib
import errno
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMModel
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor

logger = logging.get_logger(__name__)

FORMAT = 3  # of a file, and of what our own code feeds a tower and takes from it: raise it when either changes
FEATURES = ("input_features", "input_features_mask", "input_values", "input_values_mask")
OF_SPEECH = ("frames", "lengths")
OUTPUTS = (*OF_SPEECH, "emotion_embedding", "dimensions")
# Of the feature extractor: what a window is, and how it becomes a tower's input.
FEATURE_SETTINGS = (
    *("sampling_rate", "feature_size", "n_fft", "hop_length", "n_samples", "dither"),
    *("speech_input", "speech_do_normalize", "full_window"),
)
NO_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of a configuration
LEFTOVER_S = 24 * 3600  # a temporary file as old as this is of a killed process


class TowerCache:
    """The outputs of one pair of towers, clip by clip, in files that several processes share.

    The `settings`, of [`cache_settings`], name the folder of these towers within `root`. Beside an emotion tower, the
    speech tower's outputs are in the folder of that tower alone.
    """

    def __init__(self, root: Path, settings: Mapping[str, object]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.root = root
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.is_full = False
        has_emotion = settings.get("emotion_tower") is not None
        self.speech = TowerCache(root, {**settings, "emotion_tower": None}) if has_emotion else None
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
        heard = None if self.speech is None else self.speech.get(key)
        if self.speech is not None and heard is None:
            return None
        try:
            stored: dict[str, Any] = load_file(path)
            if heard is not None:
                stored |= {name: heard[name] for name in OF_SPEECH}
            return TowerOutputs(**stored)
        except FileNotFoundError:
            return None
        except SafetensorError:
            logger.warning(f"{path} is damaged; it will be written again.")
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, outputs: TowerOutputs) -> None:
        """Write a clip's outputs, `(windows, …)`, unless the disk is full, which is logged once."""
        path = self._path(key)
        names: tuple[str, ...] = OUTPUTS
        if self.speech is not None:
            names = OUTPUTS[len(OF_SPEECH) :]
            if self.speech.get(key) is None:
                self.speech.put(key, TowerOutputs(**{name: outputs[name] for name in OF_SPEECH}))
        if self.is_full:
            return
        kept = {name: outputs[name].detach().cpu().contiguous() for name in names if outputs.get(name) is not None}
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

    def fill(self, inputs: dict, run_towers: Callable[..., TowerOutputs]) -> None:
        """Replace, in place, the features and entries of [`look_up`] by `tower_outputs`, cached, or computed by
        `run_towers` (of [`ReLLMModel`]) and kept.
        """
        known = inputs.pop("tower_known").tolist() if "tower_keys" in inputs else None
        given = {name: inputs.pop(f"tower_{name}") for name in OUTPUTS if f"tower_{name}" in inputs}
        if known is None:  # all are there; nothing waits for the device
            del inputs["tower_known"]
            inputs["tower_outputs"] = TowerOutputs(**given)
            return
        windows = list(zip(inputs["audio_num_windows"].tolist(), known, strict=True))
        features = {name: inputs.pop(name) for name in FEATURES if name in inputs}
        keys = [key.tobytes().hex() for key in inputs.pop("tower_keys").cpu().numpy()]
        device = inputs["audio_num_windows"].device
        heard = [] if self.speech is None else [self.speech.get(key) for key in keys]
        if found := [one for one in heard if one is not None]:  # as where only the emotion tower is another
            features["speech"] = send_to_device(join_clips(found), device) if len(found) == len(keys) else None
        outputs = send_to_device(run_towers(**features), device)  # of a spread model, from two
        computed = list(split_clips(outputs, [count for count, is_known in windows if not is_known]))
        for key, clip in zip(keys, computed, strict=True):
            self.put(key, clip)
        if given:
            stored = split_clips(TowerOutputs(**given), [count for count, is_known in windows if is_known])
            rest = iter(computed)
            outputs = join_clips([next(stored if is_known else rest) for _, is_known in windows])
        inputs["tower_outputs"] = outputs

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def cache_settings(
    model: ReLLMModel,
    extractor: ReLLMFeatureExtractor,
    *,
    mixed_precision: str = "no",
    tf32: bool | None = None,
    deepspeed: bool = False,
) -> dict[str, object]:
    """Return what the towers' outputs follow from beside the clip; JSON can hold it.

    The weights of the model's towers are hashed: a second or two for a GB. A clip's outputs must depend on no clip
    beside it, else it is a `ValueError`.
    """
    if not model.config.projector_masking:
        raise ValueError(
            "tower_cache_dir is set, and with projector_masking=False a clip's result depends on what the towers "
            "make of the padding beside it. Leave tower_cache_dir out."
        )
    return {
        "mixed_precision": mixed_precision,
        "tf32": tf32,
        "deepspeed": deepspeed,  # which casts the towers' weights later
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
    origin_free = _without_origin(tower.config.to_dict())
    return {"weights": digest.hexdigest(), "dtype": str(tower.dtype), "config": origin_free}


def _without_origin(fields: Mapping[str, object]) -> dict[str, object]:
    """Return a configuration without what depends on where it was loaded from."""
    return {
        name: _without_origin(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in NO_ARCHITECTURE
    }
