"""Reading audio, for use from Python: `from relllm.audio import load_audio`.

The code lives in `relllm/processing/audio_relllm.py` and its siblings, because it travels to the Hub with the
processor: a checkpoint loaded with `trust_remote_code=True`, in a process without this package, must decode and check
audio in the same way.
"""

from relllm.processing.audio_relllm import (
    MAX_DURATION_S,
    MIN_DURATION_S,
    SAMPLING_RATE,
    AudioSource,
    check_waveform,
    load_audio,
    resample,
)

__all__ = [
    "MAX_DURATION_S",
    "MIN_DURATION_S",
    "SAMPLING_RATE",
    "AudioSource",
    "check_waveform",
    "load_audio",
    "resample",
]
