"""Audio in containers that libsndfile does not read (MP4 and M4A, WebM, AMR, WMA, …), decoded by FFmpeg through PyAV.

PyAV is optional (`pip install relllm[containers]`): phones and browsers record in these, corpora do not. What does not
live here: everything that soundfile reads (`audio_files_relllm.py`), which is asked first.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from .audio_checks_relllm import check_duration, check_rate

_STARTS = {b"\x1a\x45\xdf\xa3": "Matroska/WebM", b"#!AMR": "AMR", b"\x30\x26\xb2\x75": "WMA"}
_SHORT_BY_S = 0.1  # a container states its length to a packet or so; what lacks more is truncated


def container_kind(head: bytes) -> str | None:
    """The name of a container that is read here, by the first bytes of a file; `None` for anything else."""
    if head[4:8] == b"ftyp":
        return "MP4/M4A"
    return next((kind for start, kind in _STARTS.items() if head.startswith(start)), None)


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def decode_container(stream: BinaryIO, name: str, max_duration_s: float) -> tuple[np.ndarray, int]:
    """Decodes the first audio track.

    Args:
        stream (`BinaryIO`): Seekable, at its beginning.
        name (`str`): What errors call it.
        max_duration_s (`float`): The longest audio accepted, in seconds.

    Returns:
        `tuple` of `np.ndarray` of shape `(samples, channels)`, float32, and the rate in Hz (`int`).

    Raises:
        ValueError: No audio track, too long, truncated, or nothing that FFmpeg can read.
        ImportError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"Decoding {name} needs PyAV: `pip install relllm[containers]`.") from error
    try:
        with av.open(stream, mode="r") as container:
            if not container.streams.audio:
                raise ValueError(f"{name}: there is no audio track in it. Give a file with sound.")
            track = container.streams.audio[0]
            rate = track.codec_context.sample_rate
            check_rate(rate, "the rate in the header", name)
            stated_s = 0.0 if container.duration is None else container.duration / av.time_base
            if stated_s:  # before anything is decoded
                check_duration(round(stated_s * rate), rate, name, max_duration_s)
            frames = _decode(av.AudioResampler(format="fltp"), container, track, (rate, name, max_duration_s))
    except av.FFmpegError as error:
        raise ValueError(
            f"{name}: neither soundfile nor FFmpeg can read this as audio ({error.strerror}). Fetch it again."
        ) from error
    if stated_s - len(frames) / rate > _SHORT_BY_S:
        raise ValueError(
            f"{name}: the file is truncated: {len(frames) / rate:.2f} of {stated_s:.2f} s could be decoded. Fetch it "
            "again."
        )
    return frames, rate


def _decode(resampler: object, container: object, track: object, limit: tuple[int, str, float]) -> np.ndarray:
    """Floats `(samples, channels)`; the resampler changes the sample format only.

    `limit` is what `check_duration` takes: a recording that does not state its length, or less than it has, ends here.
    """
    blocks, samples = [], 0
    for frame in container.decode(track):  # type: ignore[attr-defined]
        for part in resampler.resample(frame):  # type: ignore[attr-defined]
            blocks.append(part.to_ndarray())
            samples += part.samples
            if samples > limit[0] * limit[2]:
                check_duration(samples, *limit)
    if not blocks:
        return np.zeros((0, 1), np.float32)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1).T, dtype=np.float32)


__all__ = ["container_kind", "decode_container", "has_pyav"]
