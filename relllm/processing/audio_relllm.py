"""Reading audio: any container, channel count and rate -> one mono float32 waveform at one rate.

What lives here: `load_audio` and `resample`, with arrays and channels. Beside it: `audio_files_relllm.py` (opening and
decoding files) and `audio_checks_relllm.py` (limits and checks). What does not: features, windows and placeholders
(feature extraction, processor). The files travel to the Hub beside the processor, so they need nothing else of
the package.

Design:
- Decode with soundfile (libsndfile), average the channels, resample with torchaudio; both are imported on first use.
- 16-bit mono audio that has the target rate already comes back sample-exact (`int16 / 32768`).
- Bad audio is one built-in exception that names the input, what was expected and the remedy. Nothing is padded,
  clipped or repaired silently. Silence is no error: in a dialogue a silent turn is something the model has to answer.
- The duration limit is checked on the header, before anything is decoded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias, cast

import numpy as np
import torch

from .audio_checks_relllm import (
    MAX_DURATION_S,
    MIN_DURATION_S,
    SAMPLING_RATE,
    check_frames,
    check_rate,
    check_waveform,
)
from .audio_files_relllm import BinaryFile, decode_audio, open_audio

__all__ = [
    "MAX_DURATION_S",
    "MIN_DURATION_S",
    "SAMPLING_RATE",
    "AudioSource",
    "check_waveform",
    "load_audio",
    "resample",
]

MAX_CHANNELS = 64

AudioSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | BinaryFile | np.ndarray | torch.Tensor | Mapping[str, object]"
)


def load_audio(
    source: AudioSource,
    *,
    sampling_rate: int = SAMPLING_RATE,
    source_rate: int | None = None,
    max_duration_s: float = MAX_DURATION_S,
    name: str | None = None,
) -> np.ndarray:
    """Reads audio from wherever it is and returns it mono, float32, at `sampling_rate`.

    Args:
        source (`str`, `os.PathLike`, `bytes`, file-like, `np.ndarray`, `torch.Tensor` or `dict`):
            A path, an `http(s)://`, `file://` or `data:` URL, the bytes of an audio file, a binary file object (read
            from its current position), a waveform, or a row of `datasets`: `{"array", "sampling_rate"}` or
            `{"bytes", "path"}`. A waveform is `(samples,)`, `(channels, samples)` or `(samples, channels)`; the
            shorter axis is the channels. Integers are scaled by the range of their type, floats are taken as they are.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Rate of the result in Hz.
        source_rate (`int`, *optional*):
            Rate of a waveform in Hz; `None` says that it has `sampling_rate` already. A file states its own rate, and
            another one given here is an error.
        max_duration_s (`float`, *optional*, defaults to 600.0):
            The longest audio accepted, in seconds.
        name (`str`, *optional*):
            What errors call the input; defaults to the path, the URL or the kind of the source.

    Returns:
        `np.ndarray` of shape `(samples,)`: float32, writable, in [-1, 1] for PCM; silence included.

    Raises:
        FileNotFoundError: No such file.
        IsADirectoryError: The path is a directory.
        OSError: A URL could not be downloaded; the message holds the URL and the reason.
        ValueError: Empty, shorter than 25 ms, longer than `max_duration_s`, NaN or infinite, truncated, not audio, a
            rate or a shape that cannot be, or integers stored as floats.
        TypeError: `source` is none of the above.
        ImportError: soundfile (to decode) or torchaudio (to resample) is missing.
    """
    check_rate(sampling_rate, "sampling_rate", "the result")
    data: object = source
    if isinstance(data, Mapping):
        data, source_rate, name = _unpack_row(data, source_rate, name)
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    if isinstance(data, np.ndarray):
        name = name or f"audio array of shape {data.shape}"
        rate = sampling_rate if source_rate is None else source_rate
        check_rate(rate, "source_rate", name)
        frames = _array_frames(data, name)
    else:
        stream, name = open_audio(data, name)
        with stream:
            frames, rate = decode_audio(stream, name, max_duration_s)
        if source_rate not in (None, rate):
            raise ValueError(
                f"{name}: the file says {rate} Hz, but source_rate={source_rate} was passed. Leave source_rate out "
                "for files; pass it only with an array."
            )
    check_frames(frames, rate, name, max_duration_s)
    waveform = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1)
    if rate != sampling_rate:
        waveform = resample(waveform, rate, sampling_rate)
    return np.require(waveform, np.float32, ["C", "W"])


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Changes the sampling rate by band-limited (windowed sinc) interpolation.

    Args:
        waveform (`np.ndarray` of shape `(..., samples)`): Floating-point samples.
        source_rate (`int`): Rate of `waveform` in Hz.
        target_rate (`int`): Wanted rate in Hz.

    Returns:
        `np.ndarray` of shape `(..., ceil(samples * target_rate / source_rate))`: float32.

    Raises:
        ValueError: A rate outside 4 to 768 kHz.
        TypeError: `waveform` is not floating point.
        ImportError: torchaudio is missing or broken.
    """
    check_rate(source_rate, "source_rate", "waveform")
    check_rate(target_rate, "target_rate", "waveform")
    if waveform.dtype.kind != "f":
        raise TypeError(f"Expected a floating-point waveform, got {waveform.dtype}. Pass it through `load_audio`.")
    waveform = np.require(waveform, np.float32, ["C", "W"])
    if source_rate == target_rate:
        return waveform
    with torch.no_grad():
        return _resampler(source_rate, target_rate)(torch.from_numpy(waveform)).numpy()


def _unpack_row(
    row: Mapping[str, object], source_rate: int | None, name: str | None
) -> tuple[object, int | None, str | None]:
    """`{"array", "sampling_rate"}` or `{"bytes", "path"}` -> source, rate, name."""
    path = row.get("path")
    name = name or (str(path) if path is not None else None)
    if row.get("array") is not None:
        rate = cast("int | None", row.get("sampling_rate"))
        if rate is None:
            raise ValueError(f"{name or 'audio dict'}: 'array' came without 'sampling_rate'. Add the rate in Hz.")
        if source_rate not in (None, rate):
            raise ValueError(
                f"{name or 'audio dict'}: the dict says sampling_rate={rate}, but source_rate={source_rate} was "
                "passed. Pass one of them."
            )
        array = row["array"]
        return (array if isinstance(array, torch.Tensor) else np.asarray(array)), rate, name
    for key in ("bytes", "path"):
        if row.get(key) is not None:
            return row[key], source_rate, name
    raise ValueError(
        f"An audio dict needs 'array' and 'sampling_rate', or 'bytes', or 'path'; got the keys {sorted(row)}, none of "
        "these with a value."
    )


def _array_frames(array: np.ndarray, name: str) -> np.ndarray:
    """A waveform of any dtype, 1-D or 2-D -> float32 `(samples, channels)`."""
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{name}: expected 1 or 2 dimensions. Pass one clip at a time, (samples,) or (channels, samples)."
        )
    if array.ndim == 2 and array.size:
        channels = min(array.shape)
        if channels > MAX_CHANNELS or array.shape[0] == array.shape[1] > 1:
            raise ValueError(
                f"{name}: cannot tell channels from samples; one axis must be shorter and at most {MAX_CHANNELS}. "
                "Pass one clip at a time as (samples,) or (channels, samples)."
            )
        array = array.T if array.shape[0] == channels else array
    frames = array.reshape(array.shape[0], -1) if array.size else np.zeros((0, 1), np.float32)
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the checks report
            return frames.astype(np.float32, copy=False)
    if kind in "iu" and bits <= 32:
        half = float(2 ** (bits - 1))
        offset = half if kind == "u" else 0.0
        # float64 in between keeps 32-bit integers exact until the one rounding to float32.
        return ((frames.astype(np.float64) - offset) / half).astype(np.float32)
    raise ValueError(
        f"{name}: cannot scale samples of type {array.dtype}. Pass floats in [-1, 1], or integers in the type whose "
        "range they fill (int16 for 16-bit audio)."
    )


@functools.lru_cache(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torch.nn.Module:
    """torchaudio's resampler with its kernel, kept for the pair of rates."""
    try:
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:  # OSError: a torchaudio built for CUDA beside a torch without it
        raise ImportError(
            f"Resampling from {source_rate} to {target_rate} Hz needs torchaudio, whose import failed ({error}). "
            "Install the build that matches torch: `pip install torchaudio`."
        ) from error
    ratio = Fraction(int(target_rate), int(source_rate))
    # The kernel has numerator x denominator values. Rates without a common divisor (44,101 Hz) would take gigabytes:
    # the nearest ratio of small numbers differs by less than 1e-5, far below what a recorder's own clock is off by.
    if ratio.numerator * ratio.denominator > 4_000_000:
        ratio = ratio.limit_denominator(1000)
    return Resample(ratio.denominator, ratio.numerator)
