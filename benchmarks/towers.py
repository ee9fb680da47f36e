"""The towers: a short clip against a whole window, and what that changes; a batch against clip by clip twice."""

import numpy as np
import torch
from harness import figure, interleave, report
from reference import RATE, build_model, build_processor, clips, original_emotion
from torch import Tensor

from relllm import ReLLMForConditionalGeneration
from relllm.modeling.audio_tower_relllm import encode_audio


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    model = build_model(quick=quick)
    rows = [_window(model, quick), *_quality(model, quick), *_emotion(model, quick)]
    report("towers", rows, about="reference sizes, random weights, float32")


def _window(model: ReLLMForConditionalGeneration, quick: bool) -> dict[str, object]:
    tower = model.model.audio_tower
    cheap = build_processor(model, full_window=False).feature_extractor(clips(1, 5.0))
    full = build_processor(model, full_window=True).feature_extractor(clips(1, 5.0))
    seconds = interleave(
        {
            "5 s": lambda: encode_audio(tower, cheap["input_features"], cheap["input_features_mask"]),
            "window": lambda: encode_audio(tower, full["input_features"], full["input_features_mask"]),
        },
        rounds=1 if quick else 15,
    )
    return figure("speech tower: a 5 s clip / a 30 s window", seconds["5 s"] / seconds["window"], "<= 0.22")


def _quality(model: ReLLMForConditionalGeneration, quick: bool) -> list[dict[str, object]]:
    """How far the cheap mode's outputs are from the full window's, over their own spread between clips.

    With random weights, whose attention is nearly even, so that the window's silence weighs as much as the clip.
    """
    durations = (1.0, 5.0) if quick else (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 29.0)
    waveforms = [_voice(seconds, pitch_hz=80.0 + 20.0 * index) for index, seconds in enumerate(durations)]
    cheap, full = (
        model.get_audio_features(**build_processor(model, full_window=window).feature_extractor(waveforms))
        for window in (False, True)
    )
    names = {"pooler_output": "projected positions", "emotion_logits": "emotion logits", "dimensions": "dimensions"}
    return [
        figure(f"cheap mode: relative change of {what}", _relative(getattr(cheap, name), getattr(full, name)))
        for name, what in names.items()
    ]


def _voice(seconds: float, *, pitch_hz: float) -> np.ndarray:
    """Harmonics of a pitch, rising and falling in loudness: clips that differ from each other, as noise does not."""
    time_s = np.arange(round(seconds * RATE)) / RATE
    harmonics = sum(np.sin(2 * np.pi * pitch_hz * k * time_s) / k for k in range(1, 12))
    return (0.1 * harmonics * np.sin(np.pi * time_s * pitch_hz / 50) ** 2).astype(np.float32)


def _relative(values: Tensor, reference: Tensor) -> float:
    spread = reference - reference.mean(0)
    return float((values - reference).norm() / spread.norm())


def _emotion(model: ReLLMForConditionalGeneration, quick: bool) -> list[dict[str, object]]:
    """The original's side is Transformers' modules as they are, clip by clip, each twice."""
    tower = model.model.emotion_tower
    batch = build_processor(model, full_window=False).feature_extractor(clips(2 if quick else 8, 5.0))
    values, mask = batch["input_values"], batch["input_values_mask"]
    seconds = interleave(
        {
            "batch": lambda: tower(values, mask),
            "twice": lambda: [original_emotion(tower, row[None]) for row in values for _ in range(2)],
            "once": lambda: [original_emotion(tower, row[None]) for row in values],
            "one by one": lambda: [tower(row[None]) for row in values],
        },
        rounds=1 if quick else 5,
    )
    return [
        figure("emotion tower: clip by clip twice / batch of 8", seconds["twice"] / seconds["batch"], ">= 4"),
        figure("emotion tower: clip by clip once / batch of 8", seconds["once"] / seconds["batch"]),
        figure("emotion tower: clip by clip once / ours clip by clip", seconds["once"] / seconds["one by one"]),
        figure("emotion tower: batch of 8, s a clip", seconds["batch"] / len(values)),
    ]


if __name__ == "__main__":
    main()
