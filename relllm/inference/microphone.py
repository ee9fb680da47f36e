"""Recording from this machine's microphone, with the optional `sounddevice`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def record(until: Callable[[], object]) -> dict[str, object]:
    """Record, mono, at the device's own rate, until `until()` returns (`input`, for example).

    Return `{"array": (samples,), "sampling_rate": …}`; without a microphone that opens it is an `OSError`.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package is there, and the PortAudio library is not
        raise ImportError(
            f"Recording needs sounddevice and PortAudio ({error}). Install `pip install relllm[mic]`, and on Linux "
            "PortAudio: `apt install libportaudio2`."
        ) from error
    blocks: list[np.ndarray] = []
    try:
        rate = int(sounddevice.query_devices(kind="input")["default_samplerate"])
        options = {"samplerate": rate, "channels": 1, "dtype": "float32"}
        with sounddevice.InputStream(**options, callback=lambda block, *_: blocks.append(block[:, 0].copy())):
            until()
    except (sounddevice.PortAudioError, ValueError) as error:  # ValueError: no such device
        raise OSError(f"The microphone does not open: {error}. Is one there, and may this program use it?") from error
    return {"array": np.concatenate(blocks or [np.zeros(0, np.float32)]), "sampling_rate": rate}
