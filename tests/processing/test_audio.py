"""Reading audio: every container, type, rate and place it comes from, and a clear error for each kind of bad audio."""

import ast
import base64
import dataclasses
import http.server
import io
import socket
import struct
import sys
import threading
import urllib.parse
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from transformers.dynamic_module_utils import get_imports

from relllm.processing import audio_relllm
from relllm.processing.audio_relllm import decode_base64, load_audio, resample


def sine(rate: int, *, duration_s: float = 0.5, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(int(duration_s * rate)) / rate)


def wav_bytes(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16", container: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype=subtype, format=container)
    return buffer.getvalue()


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    path = tmp_path / "clip.wav"
    path.write_bytes(wav_bytes(sine(16_000)))
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_16_bit_mono_at_the_target_rate_is_sample_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 16_000, dtype=np.int16)
    samples[:2] = -32768, 32767
    path = tmp_path / "exact.wav"
    with wave.open(str(path), "wb") as file:  # the standard library writes, soundfile reads
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    waveform = load_audio(path)
    assert waveform.dtype == np.float32 and waveform.shape == (16_000,)
    assert np.array_equal((waveform * 32768).astype(np.int16), samples)
    assert np.array_equal(load_audio(samples), waveform)


@pytest.mark.parametrize(
    ("subtype", "tolerance"),
    [
        ("PCM_U8", 1 / 127),
        ("PCM_16", 1 / 32767),
        ("PCM_24", 1e-6),
        ("PCM_32", 1e-7),
        ("FLOAT", 1e-7),
        ("DOUBLE", 1e-7),
    ],
)
def test_every_sample_format_gives_the_same_wave(subtype: str, tolerance: float) -> None:
    expected = sine(16_000)
    assert np.abs(load_audio(wav_bytes(expected, subtype=subtype)) - expected).max() <= tolerance


@pytest.mark.parametrize("container", ["WAV", "FLAC", "AIFF", "AU", "CAF", "RF64", "W64", "NIST"])
def test_lossless_containers_give_the_same_samples(container: str) -> None:
    expected = sine(16_000)
    waveform = load_audio(wav_bytes(expected, container=container))
    assert np.abs(waveform - expected).max() <= 1 / 32767


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_containers_give_about_the_same_wave(container: str, subtype: str) -> None:
    expected = sine(16_000, duration_s=1.0)
    waveform = load_audio(wav_bytes(expected, container=container, subtype=subtype))
    assert len(waveform) == pytest.approx(16_000, abs=1600)
    spectrum = np.abs(np.fft.rfft(waveform[:16_000], 16_000))
    assert spectrum.argmax() == 440
    assert np.sqrt(np.mean(waveform**2)) == pytest.approx(np.sqrt(np.mean(expected**2)), rel=0.1)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels: int) -> None:
    samples = np.random.default_rng(1).uniform(-1, 1, (8_000, channels))
    waveform = load_audio(wav_bytes(samples, subtype="FLOAT"))
    assert np.abs(waveform - samples.mean(axis=1)).max() < 1e-6
    assert np.allclose(load_audio(samples), waveform, atol=1e-6)
    assert np.allclose(load_audio(samples.T), waveform, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 44_101])
def test_every_rate_gives_the_same_sine(rate: int) -> None:
    waveform = load_audio(wav_bytes(sine(rate, duration_s=1.0), rate, subtype="FLOAT"))
    assert len(waveform) == pytest.approx(16_000, abs=1)
    expected = sine(16_000, duration_s=1.0)
    middle = slice(1_000, 15_000)  # the filter sees zeros beyond both ends
    assert np.abs(waveform[middle] - expected[middle]).max() < 5e-3


def test_resampling_agrees_with_scipy_and_removes_what_would_alias() -> None:
    rng = np.random.default_rng(2)
    low_pass = scipy.signal.firwin(255, 6_000, fs=48_000)
    speech_band = scipy.signal.lfilter(low_pass, 1.0, rng.normal(0, 0.3, 48_000))
    expected = scipy.signal.resample_poly(speech_band, 1, 3, window=("kaiser", 12.0))
    got = resample(speech_band, 48_000, 16_000)
    assert np.abs(got - expected)[500:-500].max() < 5e-3
    assert np.abs(resample(sine(48_000, frequency=12_000), 48_000, 16_000)[100:-100]).max() < 5e-3


def test_resampling_keeps_leading_axes_and_the_ceiling_of_the_length() -> None:
    assert resample(np.zeros((2, 3, 1001)), 48_000, 16_000).shape == (2, 3, 334)
    with pytest.raises(TypeError, match="floating-point"):
        resample(np.zeros(1000, np.int16), 48_000, 16_000)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.int8, -128, 127),
        (np.uint8, 0, 255),
        (np.int16, -32768, 32767),
        (np.uint16, 0, 65535),
        (np.int32, -(2**31), 2**31 - 1),
    ],
)
def test_integer_arrays_are_scaled_by_the_range_of_their_type(dtype: type, low: int, high: int) -> None:
    array = np.full(1_000, low, dtype)
    array[1:] = high
    waveform = load_audio(array)
    assert waveform[0] == -1.0
    assert waveform[1] == pytest.approx(1.0, abs=0.01) and waveform.max() <= 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_are_read_like_arrays(dtype: torch.dtype) -> None:
    tensor = torch.from_numpy(sine(16_000)).to(dtype).requires_grad_()
    assert np.array_equal(load_audio(tensor), tensor.detach().float().numpy())
    assert np.array_equal(load_audio(tensor[None]), load_audio(tensor[:, None]))


def test_an_array_with_a_rate_is_resampled() -> None:
    waveform = load_audio(sine(48_000), source_rate=48_000)
    assert np.array_equal(waveform, resample(sine(48_000), 48_000, 16_000))


def test_the_result_is_writable_even_if_the_input_is_not() -> None:
    array = sine(16_000).astype(np.float32)[::-1]
    array.flags.writeable = False
    torch.from_numpy(load_audio(array)).mul_(0)


def test_rows_of_datasets_are_read(wav: Path) -> None:
    expected = load_audio(wav)
    assert np.array_equal(load_audio({"bytes": wav.read_bytes(), "path": None}), expected)
    assert np.array_equal(load_audio({"bytes": None, "path": str(wav)}), expected)
    assert np.array_equal(load_audio({"path": "x.wav", "array": expected.tolist(), "sampling_rate": 16_000}), expected)


def test_paths_bytes_files_and_urls_give_the_same_samples(wav: Path) -> None:
    expected = load_audio(wav)
    data_url = "data:audio/wav;base64," + base64.b64encode(wav.read_bytes()).decode()
    with wav.open("rb") as file:
        sources = [str(wav), wav.as_uri(), wav.read_bytes(), bytearray(wav.read_bytes()), file, data_url]
        for source in sources:
            assert np.array_equal(load_audio(source), expected)


@dataclasses.dataclass
class Decoder:
    """As torchcodec's: samples `(channels, samples)` and their rate."""

    data: torch.Tensor
    sample_rate: int

    def get_all_samples(self) -> "Decoder":
        return self


def test_an_array_with_its_rate_and_a_decoder_are_read() -> None:
    slow = torch.from_numpy(sine(8_000).astype(np.float32))
    expected = load_audio(slow, source_rate=8_000)
    assert np.array_equal(load_audio((slow, 8_000)), expected)
    assert np.array_equal(load_audio((slow.numpy(), np.int64(8_000))), expected)
    for rate in (8_000, 8_000.0, np.float32(8_000)):
        for samples in (slow, slow.numpy(), slow.tolist(), [slow.tolist()]):
            assert np.array_equal(load_audio((samples, rate)), expected)
            assert np.array_equal(load_audio((rate, samples)), expected)  # as Gradio has it
    with pytest.raises(ValueError, match=r"source_rate is 8000\.5, expected a whole number of Hz"):
        load_audio((slow, 8_000.5))
    assert np.array_equal(load_audio(Decoder(slow[None], 8_000)), expected)
    assert np.array_equal(load_audio(Decoder(torch.stack([slow, 0 * slow]), 8_000), channel="left"), expected)
    with pytest.raises(ValueError, match="the source says 8000 Hz"):
        load_audio((slow, 8_000), source_rate=16_000)


def test_base64_is_read_with_and_without_line_breaks_and_in_a_data_url(wav: Path) -> None:
    whole, broken = base64.b64encode(wav.read_bytes()).decode(), base64.encodebytes(wav.read_bytes()).decode()
    assert "\n" in broken[:-1] and "\n" not in whole
    noise = np.random.default_rng(0).integers(-20_000, 20_000, 8_000).astype(np.int16)  # has each of the 64 signs
    soundfile.write(wav, noise, 16_000)
    whole, broken = base64.b64encode(wav.read_bytes()).decode(), base64.encodebytes(wav.read_bytes()).decode()
    safe = base64.urlsafe_b64encode(wav.read_bytes()).decode()
    assert {*"+/"} <= {*whole} and {*"-_"} <= {*safe}
    for text in (whole, broken, safe):
        for source in (text, f"data:audio/wav;base64,{text}", f"DATA:audio/wav;BASE64,{text}"):
            assert np.array_equal(load_audio(source), load_audio(wav))
    assert np.array_equal(load_audio(f"data:,{urllib.parse.quote_from_bytes(wav.read_bytes())}"), load_audio(wav))


def test_a_wav_with_a_misleading_name_is_read_by_its_content(wav: Path) -> None:
    expected = load_audio(wav)
    for name in ("clip.raw", "clip.mp3", "clip"):
        renamed = wav.with_name(name)
        renamed.write_bytes(wav.read_bytes())
        assert np.array_equal(load_audio(renamed), expected)


def test_wav_from_a_pipe_with_a_dummy_size_is_read(wav: Path) -> None:
    data = bytearray(wav.read_bytes())
    start = data.index(b"data") + 4
    data[start : start + 4] = b"\xff" * 4
    assert np.array_equal(load_audio(bytes(data)), load_audio(wav))


def test_what_was_read_is_not_read_again() -> None:
    waveform = load_audio(sine(16_000))
    assert load_audio({"waveform": waveform}) is waveform


def test_silence_is_audio() -> None:
    assert np.array_equal(load_audio(wav_bytes(np.zeros(8_000))), np.zeros(8_000))


def test_soundfile_and_torchaudio_are_imported_on_use_only() -> None:
    body = ast.parse(Path(audio_relllm.__file__).read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert not {"av", "soundfile", "torchaudio", "relllm"} & {name.partition(".")[0] for name in names}
    # What Transformers would ask for before it loads the file from a checkpoint.
    assert not {"av", "soundfile", "torchaudio"} & set(get_imports(audio_relllm.__file__))


def test_without_soundfile_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match="pip install soundfile"):
        load_audio(b"RIFF")


def test_without_torchaudio_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    audio_relllm._resampler.cache_clear()
    monkeypatch.setitem(sys.modules, "torchaudio.transforms", None)
    with pytest.raises(ImportError, match="from 8000 to 16000 Hz needs torchaudio.*pip install torchaudio"):
        load_audio(sine(8_000), source_rate=8_000)


# --- bad audio -------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.wav"
    path.touch()
    with pytest.raises(ValueError, match=r"empty\.wav: the file is empty \(0 bytes\)"):
        load_audio(path)


@pytest.mark.parametrize("source", [np.zeros(0, np.float32), np.zeros((2, 0)), wav_bytes(np.zeros(0))])
def test_no_samples_is_an_error(source: np.ndarray | bytes) -> None:
    with pytest.raises(ValueError, match=r"is empty \(0 samples\)"):
        load_audio(source)


@pytest.mark.parametrize("source", [np.zeros(1), np.zeros((1, 1)), wav_bytes(np.zeros(1))])
def test_one_sample_is_too_short(source: np.ndarray | bytes) -> None:
    with pytest.raises(ValueError, match=r"too short: 1 sample at 16000 Hz .* at least 25 ms"):
        load_audio(source)


def test_the_shortest_clip_may_be_longer(wav: Path) -> None:
    read = load_audio(np.zeros(639))
    for source in (np.zeros(639), wav_bytes(np.zeros(639)), {"waveform": read}):
        with pytest.raises(ValueError, match=r"639 samples at 16000 Hz \(39.94 ms\); at least 40 ms are needed"):
            load_audio(source, min_duration_s=0.04)
    assert len(load_audio(np.zeros(1_920), source_rate=48_000, min_duration_s=0.04)) == 640


def test_the_shortest_clip_is_400_samples() -> None:
    assert load_audio(np.zeros(400)).shape == (400,)
    with pytest.raises(ValueError, match="399 samples"):
        load_audio(np.zeros(399))
    with pytest.raises(ValueError, match="too short: 400 samples at 48000 Hz"):
        load_audio(np.zeros(400), source_rate=48_000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_located(tmp_path: Path, value: float) -> None:
    samples = np.stack([sine(8_000), sine(8_000)], axis=1)
    samples[2_000, 1] = value
    path = tmp_path / "bad.wav"
    path.write_bytes(wav_bytes(samples, 8_000, subtype="DOUBLE"))
    with pytest.raises(ValueError, match=rf"bad\.wav: sample 2000 \(0\.2500 s, channel 1\) is {value}"):
        load_audio(path)
    with pytest.raises(ValueError, match="sample 2000"):
        load_audio(samples)


def test_a_float64_beyond_float32_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample 7 .* is inf"):
        load_audio(np.where(np.arange(1_000) == 7, 1e300, 0.0))


def test_integers_stored_as_floats_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"peak at 16000, expected floats in about \[-1, 1\].*32768"):
        load_audio(np.full(1_000, 16_000.0))


@pytest.mark.parametrize("array", [np.zeros(1_000, np.int64), np.zeros(1_000, bool), np.zeros(1_000, complex)])
def test_types_without_a_scale_are_an_error(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"cannot scale samples of type {array.dtype}"):
        load_audio(array)


@pytest.mark.parametrize("shape", [(), (2, 2, 500), (500, 500), (100, 500)])
def test_shapes_that_are_no_clip_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one clip at a time"):
        load_audio(np.zeros(shape))


@pytest.mark.parametrize("container", ["WAV", "FLAC", "CAF", "OGG", "MP3"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_file_is_an_error(container: str, kept: float) -> None:
    subtype = {"OGG": "OPUS", "MP3": "MPEG_LAYER_III"}.get(container, "PCM_16")
    samples = np.random.default_rng(3).normal(0, 0.1, 48_000)
    data = wav_bytes(samples, subtype=subtype, container=container)
    assert len(load_audio(data)) > 40_000
    with pytest.raises(ValueError, match="truncated"):
        load_audio(data[: int(kept * len(data))])


def test_a_truncated_wav_says_how_much_is_missing(tmp_path: Path, wav: Path) -> None:
    path = tmp_path / "cut.wav"
    path.write_bytes(wav.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.wav: the file is truncated: 1000 bytes .*ffmpeg"):
        load_audio(path)


@pytest.mark.parametrize("name", ["notes.wav", "notes.mp3", "notes.flac"])
def test_a_text_file_named_like_audio_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("Dear diary, this is not a recording. " * 100)
    with pytest.raises(ValueError, match=rf"{name}: not an audio file.*starts with b'Dear diary, this'.*ffmpeg"):
        load_audio(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_audio(path)


def test_mp4_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"clip\.m4a: MP4/M4A .*relllm\[containers\].*ffmpeg"):
        load_audio(struct.pack(">I4s4s", 24, b"ftyp", b"M4A ") + bytes(1_000), name="clip.m4a")


CONTAINERS = {"M4A": ("mp4", "aac", 44_100), "WebM": ("webm", "libopus", 48_000)}


def encode(waveform: np.ndarray, container: str, codec: str, rate: int, layout: str = "mono") -> bytes:
    av = pytest.importorskip("av", reason="containers need `pip install relllm[containers]`")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        track = output.add_stream(codec, rate=rate, layout=layout)
        samples = (waveform * 32767).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = rate
        fitting = av.AudioResampler(format=track.codec_context.format, frame_size=track.codec_context.frame_size)
        for part in [*fitting.resample(frame), *fitting.resample(None)]:
            output.mux(track.encode(part))
        output.mux(track.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_phones_and_browsers_record_is_read_where_pyav_is(kind: str) -> None:
    container, codec, rate = CONTAINERS[kind]
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    read = load_audio(encode(tone, container, codec, rate), name=kind)
    assert read.dtype == np.float32 and abs(len(read) / 16_000 - 1) < 0.1
    spectrum = np.abs(np.fft.rfft(read[4000:12_000]))
    assert abs(np.argmax(spectrum) * 2 - 440) <= 2  # 8,000 samples at 16 kHz: bins of 2 Hz
    assert np.sqrt(np.mean(read[4000:12_000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_a_cut_container_and_one_that_is_too_long_are_named() -> None:
    whole = encode(np.zeros(4 * 48_000, np.float32), "webm", "libopus", 48_000)
    with pytest.raises(ValueError, match="clip.webm: the audio lasts 4.0 s, the limit is 3.0 s"):
        load_audio(whole, name="clip.webm", max_duration_s=3.0)
    with pytest.raises(ValueError, match="clip.webm: the file is truncated: .* of 4.0"):
        load_audio(whole[: len(whole) // 2], name="clip.webm")
    with pytest.raises(ValueError, match="clip.m4a: neither soundfile nor FFmpeg"):
        load_audio(struct.pack(">I4s4s", 24, b"ftyp", b"M4A ") + bytes(1_000), name="clip.m4a")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such audio file: .*nowhere\.wav"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav"):
        load_audio((tmp_path / "nowhere.wav").as_uri())


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a directory, expected an audio file"):
        load_audio(tmp_path)


def test_a_two_hour_file_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lecture.wav"
    size = 2 * 3600 * 16_000 * 2
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", size
    )
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)  # a hole: two hours of silence that take no disk
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"lecture\.wav: the audio lasts 7200\.0 s, the limit is 600\.0 s"):
        load_audio(path)


@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("webm", "libopus")])
def test_a_file_has_no_more_samples_in_all_channels_than_the_longest_clip_may(
    container: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_relllm, "MAX_SOURCE_RATE", 50_000)

    def file_of(seconds: float) -> bytes:
        return encode(np.zeros((round(seconds * 48_000), 2)), container, codec, 48_000, "stereo")

    with pytest.raises(ValueError, match=r"0\.\d s of 2 channels at 48000 Hz are more than 1\.0 s may have"):
        load_audio(file_of(0.7), max_duration_s=1.0)
    assert len(load_audio(file_of(0.4), max_duration_s=1.0)) == pytest.approx(6_400, abs=400)


def test_the_limit_holds_for_arrays_and_can_be_raised() -> None:
    with pytest.raises(ValueError, match=r"lasts 2\.0 s, the limit is 1\.0 s"):
        load_audio(np.zeros(32_000), max_duration_s=1.0)
    assert load_audio(np.zeros(32_000), max_duration_s=2.0).shape == (32_000,)


def test_rates_that_contradict_or_cannot_be_are_errors(wav: Path) -> None:
    with pytest.raises(ValueError, match=r"clip\.wav: the source says 16000 Hz, but source_rate=8000"):
        load_audio(wav, source_rate=8_000)
    with pytest.raises(ValueError, match="the source says 16000 Hz, but source_rate=8000"):
        load_audio({"array": np.zeros(1_000), "sampling_rate": 16_000}, source_rate=8_000)
    with pytest.raises(ValueError, match="in Hz, not kHz"):
        load_audio(np.zeros(1_000), source_rate=16)
    with pytest.raises(ValueError, match="whole number of Hz"):
        load_audio(np.zeros(1_000), sampling_rate=16_000.5)


def test_dicts_and_objects_that_hold_no_audio_are_errors() -> None:
    with pytest.raises(ValueError, match="without 'sampling_rate'"):
        load_audio({"array": np.zeros(1_000)})
    with pytest.raises(ValueError, match="got the keys"):
        load_audio({"bytes": None, "path": None})
    with pytest.raises(TypeError, match="Cannot read audio from list"):
        load_audio([0.0, 1.0])
    with pytest.raises(TypeError, match="mode 'rb'"):
        load_audio(io.StringIO("text"))
    with pytest.raises(ValueError, match="scheme 's3'"):
        load_audio("s3://bucket/clip.wav")


@pytest.mark.parametrize("url", ["data:audio/wav;base64,a", "data:audio/wav;base64"])
def test_a_broken_data_url_is_an_error(url: str) -> None:
    with pytest.raises(ValueError, match="data: URL"):
        load_audio(url)


@pytest.mark.parametrize("text", ["UklG" * 20 + "!", "UklGR" * 13, "é" * 80])
def test_text_that_is_no_base64_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="is not base64"):
        decode_base64(text)


# --- channels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def call() -> np.ndarray:
    """Two speakers, one a channel: `(samples, 2)`."""
    return np.stack([sine(16_000), sine(16_000, frequency=700.0, amplitude=0.2)], axis=1)


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_a_channel_is_read_as_if_it_were_alone_in_its_file(call: np.ndarray, rate: int) -> None:
    data = wav_bytes(call, rate, subtype="FLOAT")
    left, right = (load_audio(wav_bytes(side, rate, subtype="FLOAT")) for side in call.T)
    assert np.array_equal(load_audio(data, channel="left"), left)
    assert np.array_equal(load_audio(data, channel="right"), right)
    assert np.allclose(load_audio(data, channel="each"), np.stack([left, right]), atol=1e-6)
    assert np.allclose(load_audio(data), (left + right) / 2, atol=1e-6)


def test_a_channel_that_is_not_there_and_a_word_that_is_none_are_errors(call: np.ndarray) -> None:
    for channel in ("left", "right"):
        with pytest.raises(ValueError, match=f"has one channel, so none is the {channel} one"):
            load_audio(sine(16_000), channel=channel)
    with pytest.raises(ValueError, match="'middle', expected one of 'mix', 'left', 'right', 'each'"):
        load_audio(call, channel="middle")
    assert load_audio(sine(16_000), channel="each").shape == (1, 8_000)


@pytest.mark.parametrize("remainder", [0.0, 0.05])
def test_channels_that_cancel_each_other_are_an_error(remainder: float) -> None:
    side = sine(16_000)
    antiphase = np.stack([side, (remainder - 1) * side], axis=1)
    with pytest.raises(ValueError, match="the 2 channels cancel each other.*channel='left'"):
        load_audio(antiphase)
    assert np.array_equal(load_audio(antiphase, channel="left"), side.astype(np.float32))


def test_one_channel_that_speaks_among_many_and_silence_are_no_antiphase() -> None:
    alone = np.zeros((8_000, 64))
    alone[:, 5] = sine(16_000)
    assert np.allclose(load_audio(alone), alone[:, 5] / 64, atol=1e-6)
    assert not load_audio(np.zeros((8_000, 2))).any()


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(wav: Path) -> Iterator[str]:
    body = wav.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:100] if "cut" in self.path else body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_url_is_read(server: str, wav: Path) -> None:
    assert np.array_equal(load_audio(f"{server}/clip.wav?download=true"), load_audio(wav))


def test_a_url_that_is_not_found_is_named(server: str) -> None:
    with pytest.raises(OSError, match=rf"Could not download {server}/missing\.wav: HTTP 404"):
        load_audio(f"{server}/missing.wav")


def test_a_connection_that_breaks_off_is_an_error(server: str) -> None:
    with pytest.raises(OSError, match=r"cut\.wav: the connection ended after 100 of|cut\.wav: IncompleteRead"):
        load_audio(f"{server}/cut.wav")


def test_a_download_over_the_limit_is_an_error(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_relllm, "MAX_DOWNLOAD_BYTES", 1_000)
    with pytest.raises(OSError, match=r"clip\.wav: larger than"):
        load_audio(f"{server}/clip.wav")


def test_a_refused_connection_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=rf"Could not download http://127\.0\.0\.1:{port}/clip\.wav: .*refused"):
        load_audio(f"http://127.0.0.1:{port}/clip.wav")


def test_a_server_that_never_answers_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_relllm, "URL_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/clip.wav"
        with pytest.raises(TimeoutError, match=rf"Could not download {url}: .*(time|answer)"):
            load_audio(url)
