"""Limits of what counts as audio here, and the checks that hold to them.

What lives here: the limits and the errors for a rate, a duration or samples outside them. What does not: reading files
(`audio_files_relllm.py`) and everything that changes samples (`audio_relllm.py`).
"""

from __future__ import annotations

import math

import numpy as np

SAMPLING_RATE = 16_000  # Hz; what Whisper, wav2vec2 and the emotion tower were trained on
MIN_DURATION_S = 0.025  # one analysis window of Whisper and of wav2vec2 (400 samples at 16 kHz)
MAX_DURATION_S = 600.0
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 4_000, 768_000  # Hz; outside, the header or the argument is wrong
MAX_FLOAT_PEAK = 16.0  # float audio may peak a little above 1; far above, it holds unscaled integers


def check_waveform(
    waveform: np.ndarray,
    sampling_rate: int = SAMPLING_RATE,
    *,
    max_duration_s: float = MAX_DURATION_S,
    name: str = "waveform",
) -> None:
    """Raises for a waveform that no tower could hear; returns nothing for a good one.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): Floating-point samples.
        sampling_rate (`int`, *optional*, defaults to 16000): Rate of the samples in Hz.
        max_duration_s (`float`, *optional*, defaults to 600.0): The longest waveform accepted, in seconds.
        name (`str`, *optional*, defaults to `"waveform"`): What the error calls it.

    Raises:
        ValueError: Not 1-D, empty, shorter than 25 ms, longer than `max_duration_s`, NaN or infinite values (with the
            first position and time), or values far outside [-1, 1].
        TypeError: Not floating point.
    """
    if waveform.dtype.kind != "f":
        raise TypeError(
            f"{name}: expected floating-point samples, got {waveform.dtype}. Pass it through `load_audio`."
        )
    if waveform.ndim != 1:
        raise ValueError(f"{name}: expected shape (samples,), got {waveform.shape}. Pass it through `load_audio`.")
    check_frames(waveform[:, None], sampling_rate, name, max_duration_s)


def check_rate(rate: int, argument: str, name: str) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise ValueError(f"{name}: {argument} must be a whole number of Hz, got {rate!r}.")
    if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise ValueError(
            f"{name}: {argument} is {rate} Hz, expected {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz. "
            "Check the header of the file or the argument (it is in Hz, not kHz)."
        )


def check_duration(num_frames: int, rate: int, name: str, max_duration_s: float) -> None:
    duration_s = num_frames / rate
    if num_frames == 0:
        raise ValueError(f"{name}: the audio is empty (0 samples). Leave the clip out or record it again.")
    if duration_s < MIN_DURATION_S:
        raise ValueError(
            f"{name}: the audio is too short: {num_frames} sample{'s' * (num_frames > 1)} at {rate} Hz "
            f"({1000 * duration_s:.4g} ms); at least {1000 * MIN_DURATION_S:g} ms are needed. Leave the clip out or "
            "pad it."
        )
    if duration_s > max_duration_s:
        raise ValueError(
            f"{name}: the audio lasts {duration_s:.1f} s, the limit is {max_duration_s:.1f} s. Cut it into shorter "
            "clips, or raise `max_duration_s`."
        )


def check_frames(frames: np.ndarray, rate: int, name: str, max_duration_s: float) -> None:
    """Checks `(samples, channels)`: before channels are averaged, where a bad value can still be located."""
    check_duration(frames.shape[0], rate, name, max_duration_s)
    # The sum of a float32 array could overflow; the extremes cannot, and NaN passes through both.
    peak = max(float(frames.max()), -float(frames.min()))
    if not math.isfinite(peak):
        position, channel = np.argwhere(~np.isfinite(frames))[0]
        raise ValueError(
            f"{name}: sample {position} ({position / rate:.4f} s, channel {channel}) is {frames[position, channel]}; "
            "every sample must be finite. Decode or record the clip again, or leave it out."
        )
    if peak > MAX_FLOAT_PEAK:
        raise ValueError(
            f"{name}: the samples peak at {peak:g}, expected floats in about [-1, 1]. If they are integers stored as "
            "floats, divide by the full scale (32768 for 16 bit), or pass the integer array itself."
        )
