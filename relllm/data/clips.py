"""One recording on its way into a data set: read once, checked, measured, and encoded where it is to be embedded.

What lives here: what happens to the audio of a row. What does not: which rows there are (the parsers), and processes,
shards and reports (`preparing.py`).

Design:
- A clip that cannot be used is a `Dropped` with a reason; the rest goes on. Silent and clipped clips are marked and
  kept: people are silent, and microphones clip.
- A 16-bit mono file of 16 kHz is embedded as it is, byte for byte. Everything else is averaged to mono, resampled and
  stored as 16-bit FLAC, and turns of a recording as 16-bit WAV. Samples beyond full scale, from a resampling filter's
  overshoot or a floating-point file, are set to full scale. The clip is not made quieter: loudness carries emotion.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from relllm.processing.audio_relllm import MAX_DURATION_S, MIN_DURATION_S, SAMPLING_RATE, load_audio, resample

from .parsing import NO_AUDIO
from .rows import Dropped, Row

SILENT_PEAK = 1e-3  # -60 dBFS: below it, a clip counts as silent
CLIPPED_LEVEL = 0.999  # at or above it, so many samples in a row count as clipped
CLIPPED_SAMPLES = 3
MAX_TURN_S = 30.0  # a longer turn is cut at a pause: Whisper's window
MAX_RECORDING_S = 7200.0  # of a recording that is cut into turns: 460 MB of samples

# Reasons of `Dropped`, beside those of the parsers.
EMPTY = "empty audio"
TOO_SHORT = "too short"
TOO_LONG = "too long"
NOT_FINITE = "NaN or infinite samples"
TRUNCATED = "truncated audio"
NOT_AUDIO = "not readable as audio"
NO_SPEECH = "no speech found"

# What the errors of `load_audio` say, in the order in which they are looked for; the whole error is the detail.
_REASONS = {
    "No such audio file": NO_AUDIO,
    "is a directory": NO_AUDIO,
    "the file is empty": EMPTY,
    "the audio is empty": EMPTY,
    "the audio is too short": TOO_SHORT,
    "the audio lasts": TOO_LONG,
    "every sample must be finite": NOT_FINITE,
    "the file is truncated": TRUNCATED,
}
_UNTOUCHED = ("WAV", "WAVEX", "FLAC")  # containers whose bytes are embedded as they are


@dataclass(frozen=True)
class ClipSettings:
    """What is done with the audio of a row.

    Args:
        embed_audio (`bool`, *optional*, defaults to `False`): Whether the table holds the audio's bytes, at 16 kHz,
            instead of its path.
        min_duration_s (`float`, *optional*, defaults to 0.025): Shorter clips are dropped.
        max_duration_s (`float`, *optional*, defaults to 600): Longer clips are dropped; with `vad` longer turns.
        vad (`bool`, *optional*, defaults to `False`): Whether each row is a recording to be cut into turns.

    Raises:
        ValueError: If the durations leave nothing.
    """

    embed_audio: bool = False
    min_duration_s: float = MIN_DURATION_S
    max_duration_s: float = MAX_DURATION_S
    vad: bool = False

    def __post_init__(self) -> None:
        if not MIN_DURATION_S <= self.min_duration_s < self.max_duration_s:
            raise ValueError(
                f"Expected {MIN_DURATION_S} s <= the shortest clip < the longest, got {self.min_duration_s} s and "
                f"{self.max_duration_s} s."
            )


@dataclass(frozen=True)
class Clip:
    """One row of the data set, as it will be written.

    Attributes:
        id (`str`): Of the row; a turn has that of its recording and a number.
        audio (`str` or `dict`): A path, or with `embed_audio` `{"bytes", "path"}`.
        duration_s (`float`): By the samples that were decoded.
        silent, clipped, converted (`bool`): Marks for the report; converted: not the original's samples.
        num_overshoot (`int`): Samples that the conversion had to set to full scale.
    """

    id: str
    audio: str | dict[str, bytes | str]
    duration_s: float
    silent: bool
    clipped: bool
    converted: bool = False
    num_overshoot: int = 0


def read_row(row: Row, settings: ClipSettings, directory: Path, turns: str) -> Iterator[Clip | Dropped]:
    """Reads the audio of a row.

    Args:
        row (`Row`): With `audio` as a path, absolute or relative to `directory`.
        settings ([`ClipSettings`]): What is done with it.
        directory (`Path`): The data set in the making.
        turns (`str`): Folder for the turns of this recording, relative to `directory`.

    Yields:
        `Clip` or `Dropped`: One for the row, or one for each of its turns.
    """
    path = directory / str(row["audio"])
    limit = MAX_RECORDING_S if settings.vad else settings.max_duration_s
    header = _read_header(path)
    rate = SAMPLING_RATE if header is None or settings.vad else header.rate
    try:
        # At its own rate, because most clips need no other; what cannot be read fails here with a reason.
        waveform = load_audio(path, sampling_rate=rate, max_duration_s=limit)
    except (OSError, ValueError) as error:
        yield Dropped(row["id"], _reason_of(error), str(error))
        return
    if settings.vad:
        yield from _cut(row, waveform, settings, directory, turns)
    elif len(waveform) < rate * settings.min_duration_s:
        detail = f"{len(waveform) / rate:.3f} s, the limit is {settings.min_duration_s:g} s"
        yield Dropped(row["id"], TOO_SHORT, detail)
    elif not settings.embed_audio:
        yield _measure(row["id"], waveform, rate, str(row["audio"]))
    elif header is not None and header.untouched:
        content: str | dict[str, bytes | str] = {"bytes": path.read_bytes(), "path": path.name}
        yield _measure(row["id"], waveform, rate, content)
    else:
        samples, overshoot = to_16_bit(resample(waveform, rate, SAMPLING_RATE))
        content = {"bytes": _encode(samples, "FLAC"), "path": f"{path.stem}.flac"}
        yield _measure(row["id"], waveform, rate, content, converted=True, num_overshoot=overshoot)


def to_16_bit(waveform: np.ndarray) -> tuple[np.ndarray, int]:
    """Rounds samples to 16 bit; those beyond full scale become full scale.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): Floating point.

    Returns:
        `np.ndarray` of shape `(samples,)` and type `int16`, and `int`: how many samples were beyond full scale.
    """
    scaled = np.round(waveform * 32768)
    limited = np.clip(scaled, -32768, 32767)
    # 1.0 itself becomes 32767: an error of one step, which every 16-bit file has, and no overshoot.
    overshoot = np.count_nonzero((scaled < -32768) | (scaled > 32768))
    return limited.astype(np.int16), int(overshoot)


@dataclass(frozen=True)
class _Header:
    rate: int
    untouched: bool  # 16-bit mono at the rate of this package


def _read_header(path: Path) -> _Header | None:
    """`None` where there is none to read: `load_audio` then says why."""
    import soundfile

    try:
        with path.open("rb") as file:
            info = soundfile.info(file)
    except (OSError, soundfile.LibsndfileError):
        return None
    is_ours = (info.subtype, info.channels, info.samplerate) == ("PCM_16", 1, SAMPLING_RATE)
    return _Header(info.samplerate, is_ours and info.format in _UNTOUCHED)


def _reason_of(error: OSError | ValueError) -> str:
    return next((reason for words, reason in _REASONS.items() if words in str(error)), NOT_AUDIO)


def _measure(
    row_id: str,
    waveform: np.ndarray,
    rate: int,
    audio: str | dict[str, bytes | str],
    *,
    converted: bool = False,
    num_overshoot: int = 0,
) -> Clip:
    magnitude = np.abs(waveform)
    loud = magnitude >= CLIPPED_LEVEL
    return Clip(
        id=row_id,
        audio=audio,
        duration_s=len(waveform) / rate,
        silent=bool(magnitude.max() < SILENT_PEAK),
        clipped=bool(np.lib.stride_tricks.sliding_window_view(loud, CLIPPED_SAMPLES).all(axis=1).any()),
        converted=converted,
        num_overshoot=num_overshoot,
    )


def _cut(
    row: Row, waveform: np.ndarray, settings: ClipSettings, directory: Path, turns: str
) -> Iterator[Clip | Dropped]:
    """The turns of a recording: `<id>-0001` and so on, as files in the data set or embedded."""
    from .segmentation import cut_into_turns

    spans = cut_into_turns(waveform, max_turn_s=min(MAX_TURN_S, settings.max_duration_s))
    if not spans:
        yield Dropped(row["id"], NO_SPEECH, f"{len(waveform) / SAMPLING_RATE:.1f} s")
    for number, (start, end) in enumerate(spans, start=1):
        turn_id = f"{row['id']}-{number:04d}"
        turn = waveform[round(start * SAMPLING_RATE) : round(end * SAMPLING_RATE)]
        duration_s = len(turn) / SAMPLING_RATE
        if not settings.min_duration_s <= duration_s <= settings.max_duration_s:
            reason = TOO_SHORT if duration_s < settings.min_duration_s else TOO_LONG
            yield Dropped(turn_id, reason, f"{duration_s:.3f} s, {start:.2f} to {end:.2f} s of the recording")
            continue
        samples, overshoot = to_16_bit(turn)
        content = _encode(samples, "WAV")
        audio = _store(content, directory, f"{turns}-{number:04d}.wav", embed=settings.embed_audio)
        yield _measure(turn_id, turn, SAMPLING_RATE, audio, converted=True, num_overshoot=overshoot)


def _store(content: bytes, directory: Path, name: str, *, embed: bool) -> str | dict[str, bytes | str]:
    if embed:
        return {"bytes": content, "path": Path(name).name}
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(content)
    return name


def _encode(samples: np.ndarray, container: Literal["FLAC", "WAV"]) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLING_RATE, format=container, subtype="PCM_16")
    return buffer.getvalue()
