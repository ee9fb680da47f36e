"""One recording on its way into a data set: read once, checked, measured, and encoded where it is to be embedded.

Silent and clipped clips are marked and kept. A 16-bit mono file of 16 kHz is embedded byte for byte, everything else
as 16-bit FLAC; samples beyond full scale are set to it, and never is a clip made quieter: loudness carries emotion.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from torch import Tensor

from relllm.processing.audio_relllm import SAMPLING_RATE, load_audio, resample

from .data_settings import PrepareSettings
from .parsing import NO_AUDIO
from .rows import Dropped, Row

SILENT_PEAK = 1e-3  # -60 dBFS: below it, a clip counts as silent
CLIPPED_LEVEL = 0.999  # at or above it, so many samples in a row count as clipped
CLIPPED_SAMPLES = 3

# What the errors of `load_audio` say, in the order in which they are looked for, and the reason of `Dropped`; all of
# it is the detail.
REASONS = {
    "No such audio file": NO_AUDIO,
    "is a directory": NO_AUDIO,
    "the file is empty": "empty audio",
    "the audio is empty": "empty audio",
    "the audio is too short": "too short",
    "the audio lasts": "too long",
    "every sample must be finite": "NaN or infinite samples",
    "the file is truncated": "truncated audio",
    "cancel each other": "channels that cancel each other",
    "the audio has one channel": "no such channel",
}
NOT_AUDIO = "not readable as audio"
_UNTOUCHED = ("WAV", "WAVEX", "FLAC")  # containers whose bytes are embedded as they are


@dataclass(frozen=True)
class ReadClip:
    """The audio of a row, as it will be written, and what the report says of it."""

    audio: str | dict[str, bytes | str]  # a path, or with `embed_audio` `{"bytes", "path"}`
    duration_s: float  # by the samples that were decoded
    silent: bool
    clipped: bool
    converted: bool  # not the original's samples
    num_overshoot: int  # samples that the conversion had to set to full scale


def read_row(row: Row, settings: PrepareSettings, directory: Path) -> dict[str, ReadClip] | Dropped:
    """Read the audio of a row, whose path may be relative to `directory`: several clips with channel `"each"`."""
    path = directory / str(row["audio"])
    info = read_header(path)
    rate = info.samplerate if info else SAMPLING_RATE
    try:
        # At its own rate, because most clips need no other; what cannot be read fails here with a reason.
        waveform = load_audio(path, sampling_rate=rate, channel=settings.channel, max_duration_s=settings.max_seconds)
    except (OSError, ValueError) as error:
        reason = next((reason for words, reason in REASONS.items() if words in str(error)), NOT_AUDIO)
        return Dropped(row["id"], reason, str(error))
    duration_s = waveform.shape[-1] / rate
    if duration_s < settings.min_seconds:
        return Dropped(row["id"], "too short", f"{duration_s:.3f} s, the limit is {settings.min_seconds:g} s")
    if waveform.ndim == 1 or len(waveform) == 1:
        ours = {(container, "PCM_16", 1, SAMPLING_RATE) for container in _UNTOUCHED}
        own = path if info and (info.format, info.subtype, info.channels, rate) in ours else None
        return {row["id"]: _make_clip(row, waveform.reshape(-1), rate, own, settings)}
    sides = ("left", "right") if len(waveform) == 2 else range(1, len(waveform) + 1)
    clips = zip(sides, waveform, strict=True)
    return {f"{row['id']}-{side}": _make_clip(row, own, rate, None, settings) for side, own in clips}


def _make_clip(row: Row, waveform: np.ndarray, rate: int, own: Path | None, settings: PrepareSettings) -> ReadClip:
    """Measure a clip and encode it, where it is embedded; a file that is its `own` is taken as it is."""
    path = Path(str(row["audio"]))
    audio: str | dict[str, bytes | str] = str(row["audio"])
    overshoot = 0
    if settings.embed_audio and own is not None:
        audio = {"bytes": own.read_bytes(), "path": path.name}
    elif settings.embed_audio:
        samples, overshoot = to_16_bit(resample(waveform, rate, SAMPLING_RATE))
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        audio = {"bytes": buffer.getvalue(), "path": f"{path.stem}.flac"}
    peak, full_scale_run = measure_loudness(waveform)
    is_silent, is_clipped = peak < SILENT_PEAK, full_scale_run >= CLIPPED_SAMPLES
    converted = settings.embed_audio and own is None
    return ReadClip(audio, len(waveform) / rate, is_silent, is_clipped, converted, overshoot)


def measure_loudness(waveform: np.ndarray) -> tuple[float, int]:
    """Return the largest magnitude, where 1 is full scale, and the most samples in a row at full scale."""
    magnitude = np.abs(waveform)
    # Where loud samples begin and end, in turns.
    edges = np.flatnonzero(np.diff(magnitude >= CLIPPED_LEVEL, prepend=False, append=False))
    return float(magnitude.max()), int((edges[1::2] - edges[::2]).max(initial=0))


def to_16_bit(waveform: np.ndarray) -> tuple[np.ndarray, int]:
    """Round floating-point samples of shape `(samples,)` to 16 bit, and count those that were beyond full scale."""
    scaled = np.round(waveform * 32768)
    limited = np.clip(scaled, -32768, 32767)
    # 1.0 itself becomes 32767: an error of one step, which every 16-bit file has, and no overshoot.
    overshoot = np.count_nonzero((scaled < -32768) | (scaled > 32768))
    return limited.astype(np.int16), int(overshoot)


def clip_duration(source: object, sampling_rate: int = SAMPLING_RATE) -> float:
    """Return the seconds of a clip: a path, bytes, a `datasets` dictionary, or an array at `sampling_rate` Hz."""
    if isinstance(source, Mapping):
        from relllm.processing.processing_relllm import AUDIO_KEYS  # Transformers is not loaded to prepare a corpus

        given = next((source[key] for key in ("bytes", "array", *AUDIO_KEYS) if source.get(key) is not None), None)
        return clip_duration(given, source.get("sampling_rate") or sampling_rate)
    if isinstance(source, (bytes, str)):
        info = soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else source.removeprefix("file://"))
        return info.frames / info.samplerate
    if isinstance(source, (np.ndarray, Tensor, Sequence)):
        return max(np.shape(source)) / sampling_rate  # channels are the other, shorter axis
    raise TypeError(f"no length of {type(source).__name__}")


def read_header(audio: object) -> soundfile._SoundFileInfo | None:
    """Return what a file, its bytes or a row's say of themselves; `None` where `load_audio` will say why not."""
    if isinstance(audio, Mapping):
        audio = audio["bytes"] if isinstance(audio.get("bytes"), bytes) else str(audio.get("path"))
    try:
        return soundfile.info(io.BytesIO(audio) if isinstance(audio, bytes) else audio)
    except (OSError, TypeError, soundfile.LibsndfileError):
        return None
