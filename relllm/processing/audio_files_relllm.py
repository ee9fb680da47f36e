"""From a path, a URL, bytes or a file object to the samples of an audio file.

What lives here: opening (with one clear error for each way it fails), decoding by soundfile, and noticing truncated
files, which libsndfile reads without a word in most formats. What does not: arrays, channels, rates
(`audio_relllm.py`).

Non-goals: repairing files. Formats that libsndfile does not know (MP4, WebM) are for `audio_containers_relllm.py`,
where PyAV is installed; without it the error says so. An MP3 without a Xing header states no length, so there a
missing end cannot be seen.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import re
import struct
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np

from .audio_checks_relllm import check_duration, check_rate
from .audio_containers_relllm import container_kind, decode_container, has_pyav

MAX_DOWNLOAD_BYTES = 512 * 1024**2
URL_TIMEOUT_S = 20.0

_CONVERT = "convert it with `ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`"
_UNKNOWN_FRAMES = 2**48  # libsndfile reports about 2**63 frames where the header leaves the length open
_UNKNOWN_BYTES = 0x7FFF_0000  # tools that write WAV to a pipe leave a size at or above this
_OGG_TAIL_BYTES = 128 * 1024  # holds the last page, which has at most 65,307 bytes


@runtime_checkable
class BinaryFile(Protocol):
    """Anything with `read()` that returns bytes: an open file, `io.BytesIO`, an upload, an fsspec file."""

    def read(self, size: int = -1, /) -> bytes: ...


def open_audio(source: object, name: str | None) -> tuple[BinaryIO, str]:
    """Path, URL, bytes or file object -> seekable binary stream and the name for errors."""
    if isinstance(source, (str, os.PathLike)):
        location = os.fspath(source)
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", location)
        if location.startswith("data:"):
            return io.BytesIO(_decode_data_url(location)), name or "data: URL"
        if scheme is None:
            return _open_path(Path(location).expanduser()), name or location
        if scheme[1].lower() == "file":
            path = urllib.request.url2pathname(urllib.parse.urlparse(location).path)
            return _open_path(Path(path)), name or location
        if scheme[1].lower() in ("http", "https"):
            return io.BytesIO(_download(location)), name or location
        raise ValueError(
            f"{location}: expected a path or an http, https, file or data URL, got the scheme {scheme[1]!r}. Open it "
            "with the library for that store and pass the bytes or the file object."
        )
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), name or f"audio bytes (length {len(source)})"
    if isinstance(source, BinaryFile):
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError(
                f"{source!r}: read() gave {type(data).__name__}, expected bytes. Open the file in mode 'rb'."
            )
        return io.BytesIO(data), name or f"audio file object {source!r}"
    raise TypeError(
        f"Cannot read audio from {type(source).__name__}. Pass a path, a URL, bytes, a binary file, a 1-D or 2-D "
        "array or tensor, or a dict with 'array' and 'sampling_rate'; for a `datasets` column use "
        "`Audio(decode=False)`."
    )


def _open_path(path: Path) -> BinaryIO:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected an audio file. Pass the files in it one by one.")
    if not path.exists():
        raise FileNotFoundError(f"No such audio file: {path}. Relative paths start at {Path.cwd()}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file. Read it yourself and pass the bytes.")
    return path.open("rb")


def _decode_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise ValueError(f"data: URL without a comma ({url[:40]!r}…); expected 'data:audio/wav;base64,…'.")
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"data: URL ({header!r}) does not hold valid base64: {error}. Encode the file again."
        ) from error


def _download(url: str) -> bytes:
    """The body of an http(s) URL; every failure becomes an OSError with the URL."""
    remedy = "Check the address, or download the file yourself and pass its path."
    request = urllib.request.Request(url, headers={"User-Agent": "relllm"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
            expected = response.headers.get("Content-Length")
            body = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"Could not download {url}: HTTP {error.code} {error.reason}. {remedy}") from error
    except TimeoutError as error:
        raise TimeoutError(f"Could not download {url}: no answer within {URL_TIMEOUT_S:g} s. {remedy}") from error
    except urllib.error.URLError as error:
        kind = TimeoutError if isinstance(error.reason, TimeoutError) else OSError
        raise kind(f"Could not download {url}: {error.reason}. {remedy}") from error
    except (http.client.HTTPException, OSError) as error:
        raise OSError(f"Could not download {url}: {type(error).__name__}: {error}. {remedy}") from error
    if len(body) > MAX_DOWNLOAD_BYTES:
        raise OSError(f"Could not download {url}: larger than {MAX_DOWNLOAD_BYTES // 1024**2} MiB. {remedy}")
    if expected is not None and len(body) < int(expected):
        raise OSError(
            f"Could not download {url}: the connection ended after {len(body)} of {expected} bytes. {remedy}"
        )
    return body


def decode_audio(stream: BinaryIO, name: str, max_duration_s: float) -> tuple[np.ndarray, int]:
    """Decodes an audio file; refuses what is too long before decoding it, and what is truncated after.

    Args:
        stream (`BinaryIO`): Seekable, at its beginning.
        name (`str`): What errors call it.
        max_duration_s (`float`): The longest audio accepted, in seconds.

    Returns:
        `tuple` of `np.ndarray` of shape `(samples, channels)`, float32 in [-1, 1] for PCM, and the rate in Hz (`int`).

    Raises:
        ValueError: Not audio, empty, too short, too long, truncated, or a rate that cannot be.
        ImportError: soundfile is missing.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its libsndfile
        raise ImportError(
            f"Decoding {name} needs soundfile ({error}). Install it: `pip install soundfile`."
        ) from error
    head = stream.read(64)
    if not head:
        raise ValueError(
            f"{name}: the file is empty (0 bytes). Fetch it again; a file object may need `seek(0)` first."
        )
    if missing := _missing_end(stream):
        raise _truncated(name, missing)
    stream.seek(0)
    try:
        # The wrapper hides the stream's name: soundfile would take the format from it before it looks at the content.
        with soundfile.SoundFile(_Nameless(stream)) as file:
            rate, num_frames = file.samplerate, file.frames
            check_rate(rate, "the rate in the header", name)
            if num_frames >= _UNKNOWN_FRAMES:
                raise ValueError(f"{name}: the header does not say how long the audio is; {_CONVERT}.")
            check_duration(num_frames, rate, name, max_duration_s)
            frames = file.read(num_frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if container_kind(head) is not None and has_pyav():
            stream.seek(0)
            return decode_container(stream, name, max_duration_s)
        raise _not_audio(name, head, error.error_string) from error
    if len(frames) < num_frames:
        raise _truncated(name, f"{len(frames)} of {num_frames} samples could be decoded")
    return frames, rate


class _Nameless:
    """A binary stream without the attribute `name`."""

    def __init__(self, stream: BinaryIO) -> None:
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell


def _truncated(name: str, missing: str) -> ValueError:
    return ValueError(
        f"{name}: the file is truncated: {missing}. Fetch it again, or keep what is there with "
        "`ffmpeg -i INPUT OUTPUT.wav`."
    )


def _not_audio(name: str, head: bytes, reason: str) -> ValueError:
    if (kind := container_kind(head)) is not None:
        return ValueError(
            f"{name}: {kind} is a container that soundfile cannot read; install PyAV, which can (`pip install "
            f"relllm[containers]`), or {_CONVERT}."
        )
    if head.startswith(b"version https://git-lfs"):
        return ValueError(f"{name}: this is a Git LFS pointer, not audio. Fetch the file itself with `git lfs pull`.")
    return ValueError(
        f"{name}: not an audio file that soundfile can read, or a damaged or truncated one ({reason.rstrip('.')}). It "
        f"starts with {head[:16]!r}. If it plays elsewhere, {_CONVERT}."
    )


def _missing_end(stream: BinaryIO) -> str:
    """Says what the end of the file lacks, by the sizes in its header; empty if nothing can be seen."""
    total = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(1024)
    if head[:4] == b"OggS":
        stream.seek(max(0, total - _OGG_TAIL_BYTES))
        return "" if _ends_with_last_ogg_page(stream.read()) else "the last Ogg page is missing or cut"
    end = 0
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        end = _wav_end(stream)
    elif head[:4] == b"FORM" and len(head) >= 8:  # AIFF
        end = 8 + struct.unpack(">I", head[4:8])[0]
    elif head[:4] == b".snd" and len(head) >= 12:  # AU
        offset, size = struct.unpack(">II", head[4:12])
        end = 0 if size >= _UNKNOWN_BYTES else offset + size
    elif head[:4] == b"riff" and len(head) >= 24:  # Wave64
        end = struct.unpack("<Q", head[16:24])[0]
    elif head[:7] == b"NIST_1A":  # SPHERE
        fields = dict(re.findall(rb"(sample_count|sample_n_bytes|channel_count) -i (\d+)", head))
        end = int(head[8:16]) + int(np.prod([int(value) for value in fields.values()])) if len(fields) == 3 else 0
    missing = end - total
    # A single byte is the pad that some writers leave out.
    return f"{missing} bytes at its end are missing" if missing > 1 else ""


def _wav_end(stream: BinaryIO) -> int:
    """Where the `data` chunk of a WAV file ends by its own account; 0 for a size left open, as in WAV from a pipe."""
    stream.seek(12)
    long_size = 0  # RF64 and BW64 keep the size of the data chunk in a 64-bit field
    while len(header := stream.read(8)) == 8:
        chunk, size = struct.unpack("<4sI", header)
        start = stream.tell()
        if chunk == b"ds64" and len(body := stream.read(16)) == 16:
            long_size = struct.unpack("<8xQ", body)[0]
        if chunk == b"data":
            if size == 0xFFFF_FFFF and long_size:
                return start + long_size
            return 0 if size >= _UNKNOWN_BYTES else start + size
        stream.seek(start + size + size % 2)
    return 0


def _ends_with_last_ogg_page(tail: bytes) -> bool:
    start = tail.rfind(b"OggS")
    if start < 0 or len(tail) < start + 27:
        return False
    num_segments = tail[start + 26]
    lengths = tail[start + 27 : start + 27 + num_segments]
    is_last = bool(tail[start + 5] & 0x04)
    return is_last and len(tail) >= start + 27 + num_segments + sum(lengths)
