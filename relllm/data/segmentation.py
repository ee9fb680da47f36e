"""Long recordings into turns: where somebody speaks, by Silero VAD, and where a long turn is best cut.

What lives here: times in seconds. What does not: who speaks (there is no diarisation: a turn may hold two voices), and
cutting and writing the audio (`clips.py`). The model comes with the package `silero-vad`; nothing is downloaded.
"""

import functools
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from relllm.processing.audio_relllm import MIN_DURATION_S, SAMPLING_RATE, check_waveform, resample

PAUSE_S = 0.2  # the stretch whose quietness counts where a long turn is cut


class _Silero(Protocol):
    """What is used of Silero VAD: the function, and the model bound to it."""

    def __call__(self, audio: Tensor, **options: float) -> list[dict[str, int]]: ...


def cut_into_turns(
    waveform: np.ndarray,
    *,
    sampling_rate: int = SAMPLING_RATE,
    threshold: float = 0.5,
    min_speech_s: float = 0.25,
    max_turn_s: float = 30.0,
    min_silence_s: float = 0.5,
    padding_s: float = 0.1,
) -> list[tuple[float, float]]:
    """Finds the turns of a recording: stretches of speech between pauses.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): Mono, floating point in [-1, 1].
        sampling_rate (`int`, *optional*, defaults to 16000): In Hz; other rates are resampled for the detector.
        threshold (`float`, *optional*, defaults to 0.5): Probability of speech, in (0, 1), from which on it is speech.
        min_speech_s (`float`, *optional*, defaults to 0.25): Shorter speech is no turn.
        max_turn_s (`float`, *optional*, defaults to 30): A longer turn is cut at its quietest pause, as often as
            needed; no part but the last is shorter than half of it.
        min_silence_s (`float`, *optional*, defaults to 0.5): A shorter pause does not end a turn.
        padding_s (`float`, *optional*, defaults to 0.1): Kept before and after a turn, but never of a neighbour.

    Returns:
        `list[tuple[float, float]]`: Start and end of each turn in seconds, in order, without overlap; empty where
        nobody speaks.

    Raises:
        ImportError: silero-vad is missing.
        ValueError: If the waveform is none (see [`~relllm.processing.audio_relllm.check_waveform`]), or a setting is out of range.
    """
    check_waveform(waveform, sampling_rate, max_duration_s=float("inf"))
    _check_settings(threshold, min_speech_s, max_turn_s, min_silence_s, padding_s)
    detect = load_detector()
    heard = resample(waveform, sampling_rate, SAMPLING_RATE)
    spans = detect(
        torch.from_numpy(heard),
        sampling_rate=SAMPLING_RATE,
        threshold=threshold,
        min_speech_duration_ms=1000 * min_speech_s,
        min_silence_duration_ms=1000 * min_silence_s,
        speech_pad_ms=1000 * padding_s,
    )
    turns = [part for span in spans for part in _cut_long(heard, span["start"], span["end"], max_turn_s)]
    duration_s = len(waveform) / sampling_rate
    return [(start / SAMPLING_RATE, min(end / SAMPLING_RATE, duration_s)) for start, end in turns]


def _check_settings(
    threshold: float, min_speech_s: float, max_turn_s: float, min_silence_s: float, padding_s: float
) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}: it is a probability of speech.")
    if min(min_speech_s, min_silence_s, padding_s) < 0:
        raise ValueError(
            "min_speech_s, min_silence_s and padding_s must be >= 0, got "
            f"{min_speech_s}, {min_silence_s} and {padding_s}."
        )
    if max_turn_s < max(1.0, min_speech_s):
        raise ValueError(f"max_turn_s must be at least 1 s and min_speech_s ({min_speech_s}), got {max_turn_s}.")


def _cut_long(waveform: np.ndarray, start: int, end: int, max_turn_s: float) -> list[tuple[int, int]]:
    """A turn in parts of at most `max_turn_s`, all in samples of `waveform`."""
    longest = int(max_turn_s * SAMPLING_RATE)
    parts = []
    while end - start > longest:
        # What is left after the cut must itself be a clip.
        latest = min(start + longest, end - round(MIN_DURATION_S * SAMPLING_RATE))
        cut = _quietest(waveform, start + longest // 2, latest)
        parts.append((start, cut))
        start = cut
    return [*parts, (start, end)]


def _quietest(waveform: np.ndarray, earliest: int, latest: int) -> int:
    """The middle of the quietest `PAUSE_S` that lies between two samples."""
    width = min(round(PAUSE_S * SAMPLING_RATE), latest - earliest)
    energy = np.cumsum(np.concatenate([[0.0], waveform[earliest:latest].astype(np.float64) ** 2]))
    return earliest + int(np.argmin(energy[width:] - energy[:-width])) + width // 2


@functools.cache
def load_detector() -> _Silero:
    """The detector, loaded once a process."""
    num_threads = torch.get_num_threads()
    try:
        import silero_vad
    except ImportError as error:
        raise ImportError("Cutting recordings into turns needs silero-vad: `pip install relllm[vad]`.") from error
    finally:
        torch.set_num_threads(num_threads)  # its import sets one thread for the whole process
    detect = cast("Callable[..., list[dict[str, int]]]", silero_vad.get_speech_timestamps)
    return functools.partial(detect, model=silero_vad.load_silero_vad())


__all__ = ["cut_into_turns", "load_detector"]
