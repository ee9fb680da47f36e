"""What was heard in each clip: kept in vLLM's workers, by the waveform, until the server asks for it."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from relllm.modeling.outputs_relllm import ReLLMAudioOutput

READ = ("emotion_logits", "dimensions", "tower_dimensions")
MOST_KEPT = 4096  # clips
AT_ONCE = 8  # clips that a worker hears between two steps of its engine

Reading = dict[str, list[float]]


def waveform_key(waveform: np.ndarray) -> int:
    """Hash a clip as `ReLLMFeatureExtractor.read_clip` gives it, to 63 bits."""
    digest = hashlib.sha256(np.ascontiguousarray(waveform, dtype=np.float32).tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class KeptReadings:
    """The heads' outputs for the clips that were heard last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Reading] = OrderedDict()

    def keep(self, keys: Sequence[int], heard: ReLLMAudioOutput) -> None:
        """Keep the outputs of clips by their keys; the oldest are forgotten."""
        rows = {name: heard[name].float().tolist() for name in READ if heard.get(name) is not None}
        for index, key in enumerate(keys):
            self._kept[key] = {name: values[index] for name, values in rows.items()}
            self._kept.move_to_end(key)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    def find(self, keys: Sequence[int]) -> list[Reading | None]:
        return [self._kept.get(key) for key in keys]


def gather_readings(readings: Sequence[Reading]) -> ReLLMAudioOutput:
    """Return readings as the model's `get_audio_features` gives them."""
    names = readings[0].keys() if readings else ()
    return ReLLMAudioOutput(**{name: torch.tensor([reading[name] for reading in readings]) for name in names})


def relllm_readings(worker: Any, keys: Sequence[int]) -> list[Reading | None]:
    """Return the readings of clips that a worker has heard; a method of vLLM's workers."""
    return worker.get_model().readings.find(keys)


def relllm_hear(worker: Any, clips: Sequence[bytes]) -> list[Reading | None]:
    """Return the readings of clips, float32 waveforms as bytes, for which the towers run now; a method likewise."""
    model = worker.get_model()
    waveforms = [np.frombuffer(clip, dtype=np.float32).copy() for clip in clips]
    features = model.extractor.extract(waveforms)
    features.pop("num_audio_tokens")
    keys = [waveform_key(waveform) for waveform in waveforms]
    with torch.inference_mode():
        model.readings.keep(keys, model.hearing.get_audio_features(**features.to(model.device), return_dict=True))
    return model.readings.find(keys)


def relllm_suppress(worker: Any, suppresses: bool) -> None:
    """Have the placeholder never an answer, which is the rule, or as likely as the LLM finds it; likewise."""
    worker.get_model().suppresses = suppresses
