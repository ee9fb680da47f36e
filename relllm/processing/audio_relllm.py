"""Reading audio: any container, channel count and rate -> one mono float32 waveform at one rate.

Three steps, in the order of the file: open (a path, URL, bytes or file object becomes a stream), decode (a stream
becomes samples), normalise (checks, the channel, one rate). soundfile decodes, or PyAV where a phone's or a browser's
container needs it; torchaudio resamples; each is imported on first use.

16-bit mono audio at the target rate comes back sample-exact (`int16 / 32768`). The duration limit is checked on the
header. Bad audio is one built-in exception that names the input, what was expected and the remedy; nothing is padded,
clipped or repaired silently. Silence is no error: in a dialogue a silent turn is something the model has to answer.
"""

from __future__ import annotations

import base64
import functools
import http.client
import importlib.util
import io
import math
import os
import re
import struct
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch

SAMPLING_RATE = 16_000  # Hz; what Whisper, wav2vec2 and the emotion tower were trained on
MIN_DURATION_S = 0.025  # one analysis window of Whisper (400 samples at 16 kHz); a model's towers may need more
MAX_DURATION_S = 600.0
MIN_SOURCE_RATE, MAX_SOURCE_RATE = 4_000, 768_000  # Hz; outside, the header or the argument is wrong
MAX_FLOAT_PEAK = 16.0  # float audio may peak a little above 1; far above, it holds unscaled integers
CHANNELS = ("mix", "left", "right", "each")
MAX_CHANNELS = 64
CANCELLED = 0.01  # energy of the mix as a share of the channels' mean; 1 / MAX_CHANNELS if one of them alone speaks
MAX_DOWNLOAD_BYTES = 512 * 1024**2
URL_TIMEOUT_S = 20.0

NUMBERS = (int, float, np.integer, np.floating)

_CONVERT = "convert it with `ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`"
_UNKNOWN_FRAMES = 2**48  # libsndfile reports about 2**63 frames where the header leaves the length open
_UNKNOWN_BYTES = 0x7FFF_0000  # tools that write WAV to a pipe state a size at or above this
_CONTAINERS = {b"\x1a\x45\xdf\xa3": "Matroska/WebM", b"#!AMR": "AMR", b"\x30\x26\xb2\x75": "WMA"}
# Also url-safe; no dot, so no file name with a suffix; a WAV header alone has 60.
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{60,}=*\s*")
_SHORT_BY_S = 0.1  # a container states its length to a packet or so; what lacks more is truncated


@runtime_checkable
class BinaryFile(Protocol):
    """Anything with `read()` that returns bytes: an open file, `io.BytesIO`, an upload, an fsspec file."""

    def read(self, size: int = -1, /) -> bytes: ...


@runtime_checkable
class AudioDecoder(Protocol):
    """What torchcodec decodes with, and `datasets` gives for a column of audio: samples and rate of a file."""

    def get_all_samples(self) -> Any: ...


Array: TypeAlias = "np.ndarray | torch.Tensor"
AudioSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | BinaryFile | AudioDecoder | Array | tuple[Array, float] | "
    "tuple[float, Array] | Mapping[str, object]"
)


def load_audio(
    source: AudioSource,
    *,
    sampling_rate: int = SAMPLING_RATE,
    source_rate: int | None = None,
    channel: str = "mix",
    min_duration_s: float = MIN_DURATION_S,
    max_duration_s: float = MAX_DURATION_S,
    name: str | None = None,
) -> np.ndarray:
    """Read audio from wherever it is and return it mono, float32, at `sampling_rate`.

    Args:
        source: A path, an `http(s)://`, `file://` or `data:` URL, base64, the bytes of an audio file, a binary file
            object (read from where it is), an array or tensor, alone or with its rate (in either order, then also a
            list), a row of `datasets` or its decoder. Arrays are `(samples,)` or 2-D, where the shorter axis is the
            channels; integers are scaled by the range of their type, floats taken as they are. `{"waveform": samples}`
            holds what this function returned, and is not read again.
        sampling_rate (`int`, *optional*, defaults to 16000): Rate of the result in Hz.
        source_rate (`int`, *optional*): Rate of a waveform in Hz; `None` says that it has `sampling_rate` already.
            Files and rows state their own rate, and another one given here is an error.
        channel (`str`, *optional*, defaults to `"mix"`): The mean of the channels, or `"left"`, `"right"`, `"each"`.
        min_duration_s, max_duration_s (`float`, *optional*): The shortest and the longest audio accepted, in seconds.
        name (`str`, *optional*): What errors call the input; by default the path, the URL or the kind of the source.

    Returns:
        `np.ndarray` of shape `(samples,)`, with `"each"` `(channels, samples)`: float32, writable, in [-1, 1] for
        PCM; silence included.

    Raises:
        OSError: No such file, a directory, or a URL that could not be downloaded.
        ValueError: Empty, too short or too long, NaN or infinite, truncated, not audio, a rate or a shape that cannot
            be, integers stored as floats, channels that cancel each other, or a channel that is not there.
    """
    limits = (min_duration_s, max_duration_s)
    if isinstance(source, Mapping) and isinstance(read := source.get("waveform"), np.ndarray):
        _check_duration(read.shape[-1], sampling_rate, name or "waveform", (min_duration_s, math.inf))
        return read
    _check_rate(sampling_rate, "sampling_rate", "the result")
    data, stated_rate, name = _unpack(source, name)
    if isinstance(data, np.ndarray):
        name = name or f"audio array of shape {data.shape}"
        rate = next(given for given in (stated_rate, source_rate, sampling_rate) if given is not None)
        _check_rate(rate, "source_rate", name)
        samples = _scale(data, name)
    else:
        stream, name = _open(data, name)
        with stream:
            samples, rate = _decode(stream, name, limits)
        stated_rate = rate
    if stated_rate is not None and source_rate not in (None, stated_rate):
        raise ValueError(
            f"{name}: the source says {stated_rate} Hz, but source_rate={source_rate} was passed. Pass source_rate "
            "only with an array that comes without a rate."
        )
    _check_samples(samples, rate, name, limits)
    waveform = _pick(samples, channel, name)
    if rate != sampling_rate:
        waveform = resample(waveform, rate, sampling_rate)
    return np.require(waveform, np.float32, ["C", "W"])


def states_rate(source: object) -> bool:
    """Tell whether a source is samples and their rate, or, as Gradio has it, the rate and the samples."""
    if not (isinstance(source, tuple) and len(source) == 2):
        return False
    is_rate = [isinstance(part, NUMBERS) for part in source]
    return any(is_rate) and not all(is_rate) and _holds_numbers(source[is_rate.index(False)])


def _holds_numbers(source: object) -> bool:
    while isinstance(source, (list, tuple)) and source:
        source = source[0]
    return isinstance(source, (np.ndarray, torch.Tensor, *NUMBERS))


# --- open ------------------------------------------------------------------------------------------------------------


def _unpack(source: object, name: str | None) -> tuple[object, int | None, str | None]:
    """Return what holds the audio, the rate that stands beside it, and the name; rows are unpacked, tensors arrays."""
    rate = None
    if isinstance(source, Mapping):
        row = source
        name = name or (str(row["path"]) if row.get("path") is not None else None)
        source = next((row[key] for key in ("array", "bytes", "path") if row.get(key) is not None), None)
        if source is None:
            raise ValueError(
                f"An audio dict needs 'array' and 'sampling_rate', or 'bytes', or 'path'; got the keys {sorted(row)}, "
                "none of these with a value."
            )
        if row.get("array") is not None:
            rate = cast("int | None", row.get("sampling_rate"))
            if rate is None:
                raise ValueError(f"{name or 'audio dict'}: 'array' came without 'sampling_rate'. Add the rate in Hz.")
            source = source if isinstance(source, torch.Tensor) else np.asarray(source)
    elif states_rate(source):
        samples, rate = cast("tuple[Any, Any]", source)
        if isinstance(samples, NUMBERS):
            samples, rate = rate, samples
        source = np.asarray(samples, np.float32) if isinstance(samples, (list, tuple)) else samples
    elif isinstance(source, AudioDecoder):
        decoded = source.get_all_samples()
        source, rate = decoded.data, decoded.sample_rate
    if isinstance(rate, (float, np.floating)) and float(rate).is_integer():
        rate = int(rate)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    return source, rate, name


def _open(source: object, name: str | None) -> tuple[BinaryIO, str]:
    """Return a seekable binary stream of a path, URL, bytes or file object, and the name for errors."""
    if isinstance(source, (str, os.PathLike)):
        location = os.fspath(source)
        scheme = re.match(r"(?:([A-Za-z][A-Za-z0-9+.-]+)://|([Dd][Aa][Tt][Aa]):)", location)
        kind = (scheme[1] or scheme[2]).lower() if scheme else ""
        if kind == "data":
            head, comma, body = location.partition(",")
            try:
                if not comma:
                    raise ValueError("no comma")
                is_base64 = head.lower().endswith(";base64")
                read = decode_base64(urllib.parse.unquote(body)) if is_base64 else urllib.parse.unquote_to_bytes(body)
                return io.BytesIO(read), name or "data: URL"
            except ValueError as error:
                raise ValueError(
                    f"data: URL {location[:40]!r}… cannot be read ({error}); expected 'data:audio/wav;base64,…'."
                ) from error
        if not kind and _BASE64.fullmatch(location) and not os.path.exists(location):
            return io.BytesIO(decode_base64(location)), name or f"base64 (length {len(location)})"
        if kind in ("http", "https"):
            return io.BytesIO(_download(location)), name or location
        if kind not in ("", "file"):
            raise ValueError(
                f"{location}: expected a path or an http, https, file or data URL, got the scheme {kind!r}. Open it "
                "with the library for that store and pass the bytes or the file object."
            )
        path = urllib.request.url2pathname(urllib.parse.urlparse(location).path) if kind else location
        return _open_path(Path(os.path.expanduser(path))), name or location
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), name or f"audio bytes (length {len(source)})"
    if isinstance(source, BinaryFile):
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError(f"{source!r}: read() gave {type(data).__name__}, not bytes. Open the file in mode 'rb'.")
        return io.BytesIO(data), name or f"audio file object {source!r}"
    raise TypeError(
        f"Cannot read audio from {type(source).__name__}. Pass a path, a URL, bytes, a binary file, a 1-D or 2-D "
        "array or tensor, (array, rate), a dict with 'array' and 'sampling_rate', or a decoder of `datasets`."
    )


def decode_base64(text: str) -> bytes:
    """Return the bytes that base64 stands for, also url-safe or with line breaks; a `ValueError` for anything else."""
    try:
        return base64.b64decode("".join(text.split()).replace("-", "+").replace("_", "/"), validate=True)
    except ValueError as error:  # of binascii, or not ASCII
        raise ValueError(f"{text[:40]!r}… is not base64 ({error}). Encode the bytes of an audio file.") from error


def _open_path(path: Path) -> BinaryIO:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, expected an audio file. Pass the files in it one by one.")
    if not path.exists():
        raise FileNotFoundError(f"No such audio file: {path}. Relative paths start at {Path.cwd()}.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file. Read it yourself and pass the bytes.")
    # By its descriptor, without a name: soundfile takes the format from that before it looks at the content.
    return os.fdopen(os.open(path, os.O_RDONLY), "rb")


def _download(url: str) -> bytes:
    """Return the body of an http(s) URL; every failure becomes an OSError with the URL."""

    def failure(reason: object, kind: type[OSError] = OSError) -> OSError:
        return kind(f"Could not download {url}: {reason}. Check the address, or download the file and pass its path.")

    request = urllib.request.Request(url, headers={"User-Agent": "relllm"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_S) as response:
            expected = response.headers.get("Content-Length")
            body = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise failure(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)  # what a URLError is about
        if isinstance(reason, TimeoutError):
            raise failure(f"no answer within {URL_TIMEOUT_S:g} s", TimeoutError) from error
        raise failure(f"{type(error).__name__}: {reason}") from error
    if len(body) > MAX_DOWNLOAD_BYTES:
        raise failure(f"larger than {MAX_DOWNLOAD_BYTES // 1024**2} MiB")
    if expected is not None and len(body) < int(expected):
        raise failure(f"the connection ended after {len(body)} of {expected} bytes")
    return body


# --- decode ----------------------------------------------------------------------------------------------------------


def _decode(stream: BinaryIO, name: str, limits: tuple[float, float]) -> tuple[np.ndarray, int]:
    """Decode a file to float32 `(samples, channels)` and its rate; what is too long is refused by its header."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its libsndfile
        raise ImportError(f"Decoding {name} needs soundfile ({error}): `pip install soundfile`.") from error
    head = stream.read(64)
    if not head:
        raise ValueError(f"{name}: the file is empty (0 bytes). Fetch it again; a file object may need `seek(0)`.")
    if missing := _missing_bytes_of_wav(stream):
        raise _truncated(name, f"{missing} bytes at its end are missing")
    stream.seek(0)
    try:
        with soundfile.SoundFile(stream) as file:
            rate, length = file.samplerate, file.frames
            _check_rate(rate, "the rate in the header", name)
            if length >= _UNKNOWN_FRAMES:
                raise ValueError(f"{name}: the header does not say how long the audio is; {_CONVERT}.")
            _check_duration(length, rate, name, limits, file.channels)
            samples, log = file.read(length, dtype="float32", always_2d=True), file.extra_info
    except soundfile.LibsndfileError as error:
        if container_kind(head) is not None and has_pyav():
            stream.seek(0)
            return _decode_container(stream, name, limits)
        raise _not_audio(name, head, error.error_string) from error
    if len(samples) < length:
        raise _truncated(name, f"{len(samples)} of {length} samples could be decoded")
    if "without an End-Of-Stream flag" in log:
        raise _truncated(name, "its Ogg stream has no end")
    return samples, rate


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


def _missing_bytes_of_wav(stream: BinaryIO) -> int:
    """Count what a WAV file lacks of its `data` chunk, which libsndfile reads without a word; 0 for other files."""
    total = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return 0
    while len(header := stream.read(8)) == 8:
        chunk, size = struct.unpack("<4sI", header)
        if chunk == b"data":
            missing = stream.tell() + size - total
            # A single byte is the pad that some writers leave out, and a huge size was left open, as by a pipe.
            return missing if missing > 1 and size < _UNKNOWN_BYTES else 0
        stream.seek(size + size % 2, os.SEEK_CUR)
    return 0


def container_kind(head: bytes) -> str | None:
    """Name the container that PyAV reads, by the first bytes of a file; `None` for anything else."""
    if head[4:8] == b"ftyp":
        return "MP4/M4A"
    return next((kind for start, kind in _CONTAINERS.items() if head.startswith(start)), None)


def has_pyav() -> bool:
    """Return whether PyAV is installed (`pip install relllm[containers]`)."""
    return importlib.util.find_spec("av") is not None


def _decode_container(stream: BinaryIO, name: str, limits: tuple[float, float]) -> tuple[np.ndarray, int]:
    """Decode the first audio track by FFmpeg, as `_decode` does."""
    av = importlib.import_module("av")  # no statement: Transformers asks for what the files of a checkpoint import
    try:
        with av.open(stream, mode="r") as container:
            if not container.streams.audio:
                raise ValueError(f"{name}: there is no audio track in it. Give a file with sound.")
            track = container.streams.audio[0]
            rate = track.codec_context.sample_rate
            _check_rate(rate, "the rate in the header", name)
            stated_s = 0.0 if container.duration is None else container.duration / av.time_base
            if stated_s:
                _check_duration(round(stated_s * rate), rate, name, limits)
            blocks, length = [], 0
            resampler = av.AudioResampler(format="fltp")  # changes the sample format only
            for part in (part for frame in container.decode(track) for part in resampler.resample(frame)):
                blocks.append(part.to_ndarray())
                length += part.samples
                channels = len(part.planes)
                if length * max(1 / rate, channels / MAX_SOURCE_RATE) > limits[1]:  # which no header has said
                    _check_duration(length, rate, name, limits, channels)
    except av.FFmpegError as error:
        raise ValueError(
            f"{name}: neither soundfile nor FFmpeg can read this as audio ({error.strerror}). Fetch it again."
        ) from error
    if stated_s - length / rate > _SHORT_BY_S:
        raise _truncated(name, f"{length / rate:.2f} of {stated_s:.2f} s could be decoded")
    samples = np.concatenate(blocks, axis=1).T if blocks else np.zeros((0, 1))
    return np.ascontiguousarray(samples, dtype=np.float32), rate


# --- normalise -------------------------------------------------------------------------------------------------------


def _scale(array: np.ndarray, name: str) -> np.ndarray:
    """Turn a waveform of any type, 1-D or 2-D, into float32 `(samples, channels)`."""
    is_flat = array.ndim == 2 and array.size > 0
    channels = min(array.shape) if is_flat else 1
    if array.ndim not in (1, 2) or channels > MAX_CHANNELS or (is_flat and array.shape[0] == array.shape[1] > 1):
        raise ValueError(
            f"{name}: expected (samples,), (channels, samples) or (samples, channels), with at most {MAX_CHANNELS} "
            "channels and more samples than those. Pass one clip at a time."
        )
    if is_flat and array.shape[0] == channels:
        array = array.T
    samples = array.reshape(array.shape[0], -1) if array.size else np.zeros((0, 1), np.float32)
    kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which the checks report
            return samples.astype(np.float32, copy=False)
    if kind in "iu" and bits <= 32:
        half = float(2 ** (bits - 1))
        # float64 in between keeps 32-bit integers exact until the one rounding to float32.
        return ((samples.astype(np.float64) - half * (kind == "u")) / half).astype(np.float32)
    raise ValueError(
        f"{name}: cannot scale samples of type {array.dtype}. Pass floats in [-1, 1], or integers in the type whose "
        "range they fill (int16 for 16-bit audio)."
    )


def _pick(samples: np.ndarray, channel: str, name: str) -> np.ndarray:
    """Turn `(samples, channels)` into `(samples,)`, or into `(channels, samples)` for each."""
    if channel == "each":
        return samples.T
    count = samples.shape[1]
    if channel in ("left", "right"):
        if count < 2:
            raise ValueError(f"{name}: the audio has one channel, so none is the {channel} one. Leave `channel` out.")
        return samples[:, int(channel == "right")]
    if channel != "mix":
        raise ValueError(f"channel is {channel!r}, expected one of {', '.join(map(repr, CHANNELS))}.")
    if count == 1:
        return samples[:, 0]
    mixed = samples.mean(axis=1)
    if np.square(mixed).mean() < CANCELLED * np.square(samples).mean():
        raise ValueError(
            f"{name}: the {count} channels cancel each other when they are mixed (antiphase). Take one with "
            "channel='left' or 'right', or mend the recording."
        )
    return mixed


def _check_rate(rate: int, argument: str, name: str) -> None:
    is_whole = isinstance(rate, (int, np.integer)) and not isinstance(rate, bool)
    if not is_whole or not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise ValueError(
            f"{name}: {argument} is {rate!r}, expected a whole number of Hz from {MIN_SOURCE_RATE} to "
            f"{MAX_SOURCE_RATE}. Check the header of the file or the argument (it is in Hz, not kHz)."
        )


def _check_duration(length: int, rate: int, name: str, limits: tuple[float, float], channels: int = 1) -> None:
    duration_s, (shortest_s, longest_s) = length / rate, limits
    if length == 0:
        raise ValueError(f"{name}: the audio is empty (0 samples). Leave the clip out or record it again.")
    if duration_s < shortest_s:
        raise ValueError(
            f"{name}: the audio is too short: {length} sample{'s' * (length > 1)} at {rate} Hz "
            f"({1000 * duration_s:.4g} ms); at least {1000 * shortest_s:.4g} ms are needed. Leave the clip out or "
            "pad it."
        )
    if duration_s > longest_s:
        raise ValueError(
            f"{name}: the audio lasts {duration_s:.1f} s, the limit is {longest_s:.1f} s. Cut it into shorter clips."
        )
    if length * channels > longest_s * MAX_SOURCE_RATE:  # as many as the longest clip of one channel may have
        raise ValueError(
            f"{name}: {duration_s:.1f} s of {channels} channels at {rate} Hz are more than {longest_s:.1f} s may have "
            f"({MAX_SOURCE_RATE} samples a second, all channels together). Mix or resample it first."
        )


def _check_samples(samples: np.ndarray, rate: int, name: str, limits: tuple[float, float]) -> None:
    """Check `(samples, channels)`, before channels are averaged: there a bad value can still be located."""
    _check_duration(samples.shape[0], rate, name, limits)
    # The sum of a float32 array could overflow; the extremes cannot, and NaN passes through both.
    peak = max(float(samples.max()), -float(samples.min()))
    if not math.isfinite(peak):
        position, channel = np.argwhere(~np.isfinite(samples))[0]
        raise ValueError(
            f"{name}: sample {position} ({position / rate:.4f} s, channel {channel}) is {samples[position, channel]}; "
            "every sample must be finite. Decode or record the clip again, or leave it out."
        )
    if peak > MAX_FLOAT_PEAK:
        raise ValueError(
            f"{name}: the samples peak at {peak:g}, expected floats in about [-1, 1]. If they are integers stored as "
            "floats, divide by the full scale (32768 for 16 bit), or pass the integer array itself."
        )


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Change the sampling rate by band-limited (windowed sinc) interpolation.

    Args:
        waveform (`np.ndarray` of shape `(..., samples)`): Floating-point samples.
        source_rate, target_rate (`int`): 4,000 to 768,000 Hz.

    Returns:
        `np.ndarray` of shape `(..., ceil(samples * target_rate / source_rate))`: float32.
    """
    _check_rate(source_rate, "source_rate", "waveform")
    _check_rate(target_rate, "target_rate", "waveform")
    if waveform.dtype.kind != "f":
        raise TypeError(f"Expected a floating-point waveform, got {waveform.dtype}. Pass it through `load_audio`.")
    waveform = np.require(waveform, np.float32, ["C", "W"])
    if source_rate == target_rate:
        return waveform
    with torch.no_grad():
        return _resampler(source_rate, target_rate)(torch.from_numpy(waveform)).numpy()


@functools.lru_cache(maxsize=16)
def _resampler(source_rate: int, target_rate: int) -> torch.nn.Module:
    """Return torchaudio's resampler with its kernel, kept for the pair of rates."""
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
