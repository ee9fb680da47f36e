"""Augmentation of training clips: the settings, the effects, which of them a clip gets, and the trainer's part.

What a clip draws follows from the seed, the epoch, the row's id (without one: its samples) and the clip's place in the
row alone: a resumed run draws what an uninterrupted one would have. The epoch reaches the loader's workers in shared
memory, because persistent ones keep their copy of the collator.

Effects take waveforms `(samples,)`, float32, in [-1, 1]. One whose result would exceed full scale scales the whole
clip down to it: clipping would add a distortion. Every effect but speed keeps the length.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from relllm.processing.audio_relllm import MAX_DURATION_S, MIN_DURATION_S, SAMPLING_RATE, load_audio, resample
from relllm.setting import check_limits, setting

# Smallest and largest value that a range may hold; outside, it was meant in another unit.
RANGES = {
    "augment_speed": (0.5, 2.0),
    "augment_reverb": (0.05, 5.0),
    "augment_noise_snr_db": (-20.0, 80.0),
    "augment_gain_db": (-60.0, 40.0),
}
NOISE_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
TELEPHONE_BAND_HZ = (300.0, 3400.0)
_TELEPHONE_TAPS = 511  # at 16 kHz: the edges of the band are about 110 Hz wide
_KAISER_BETA = 6.0  # some 60 dB down outside the band
CODECS = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "ulaw": ("WAV", "ULAW")}  # libsndfile's names
_COMPRESSION = (0.5, 0.99)  # of MP3 about 50 to 27 kbit/s of mono speech, of Opus about 130 to 11


@dataclass
class AugmentationSettings:
    """The settings that a trainer's configuration inherits: effects, all off, in the order in which they act."""

    augment_speed: list[float] | None = setting(None, "Range of speed, say 0.9 1.1; changes pitch and duration.")
    augment_reverb: list[float] | None = setting(None, "Range of reverberation time (RT60) in seconds, say 0.2 0.6.")
    augment_noise_snr_db: list[float] | None = setting(None, "Range of the signal-to-noise ratio in dB, say 5 30.")
    augment_noise_dir: str | None = setting(None, "Noise recordings; by default white and pink noise.")
    augment_gain_db: list[float] | None = setting(None, "Range of gain in dB, say -10 6; never beyond full scale.")
    augment_telephone: bool = setting(False, "A telephone's band: 300 to 3400 Hz.")
    augment_codec: list[str] | None = setting(None, "Any of mp3, opus, ulaw.")
    augment_probability: float = setting(0.5, "Of each effect, for each clip and epoch.")

    def check_augmentation(self) -> None:
        """Raise `ValueError` on a setting that cannot be, naming it; called when the configuration is made."""
        for name, (least, most) in RANGES.items():
            given = getattr(self, name)
            if given is not None and (len(given) != 2 or not least <= given[0] <= given[1] <= most):
                raise ValueError(f"{name} must be a range [low, high] within [{least:g}, {most:g}], got {given}.")
        if unknown := sorted(set(self.augment_codec or []) - set(CODECS)):
            raise ValueError(f"augment_codec has {unknown}; it takes any of {list(CODECS)}.")
        check_limits(self, {"augment_probability": "(0, 1]"})
        if self.augment_noise_dir is not None and self.augment_noise_snr_db is None:
            raise ValueError("augment_noise_dir is not all: set augment_noise_snr_db too, for example to [5, 30].")

    @property
    def augments(self) -> bool:
        """Tell whether any effect is on."""
        return any(getattr(self, name) for name in (*RANGES, "augment_telephone", "augment_codec"))


class SharedEpoch:
    """Something whose draws differ from epoch to epoch, also in workers that have a copy of it."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    epoch = property(lambda self: int(self._epoch), lambda self, epoch: self._epoch.fill_(epoch))  # from 0


class Augmentation(SharedEpoch):
    """Gives each clip the effects that its row and the epoch draw.

    A clip that another speed would make shorter than `min_duration_s` or longer than `max_duration_s` keeps its speed.
    """

    def __init__(
        self,
        settings: AugmentationSettings,
        *,
        seed: int,
        sampling_rate: int = SAMPLING_RATE,
        min_duration_s: float = MIN_DURATION_S,
        max_duration_s: float = MAX_DURATION_S,
    ) -> None:
        super().__init__()
        self.settings, self.seed, self.sampling_rate = settings, seed, sampling_rate
        self.min_duration_s, self.max_duration_s = min_duration_s, max_duration_s
        self.noise_files = _find_noise(settings.augment_noise_dir) if settings.augment_noise_dir else []
        for codec in settings.augment_codec or []:
            if not soundfile.check_format(*CODECS[codec]):
                raise ValueError(f"augment_codec: {codec!r} needs libsndfile >= 1.1. Update soundfile, or leave it.")

    def __call__(self, waveform: np.ndarray, *, row_id: object = None, clip: int = 0) -> np.ndarray:
        """Return a copy of the clip, `(samples,)`, with what its row (without an id: its samples) and place draw."""
        row = f"id {row_id}" if row_id is not None else hashlib.blake2b(waveform.tobytes()).hexdigest()
        settings, rate = self.settings, self.sampling_rate

        if settings.augment_speed and (rng := self._draw(row, clip, "speed")):
            speed = round(_uniform(rng, settings.augment_speed), 2)
            if self.min_duration_s <= math.ceil(len(waveform) / speed) / rate <= self.max_duration_s:
                waveform = change_speed(waveform, speed)
        if settings.augment_reverb and (rng := self._draw(row, clip, "reverb")):
            waveform = add_reverberation(waveform, rng, _uniform(rng, settings.augment_reverb), rate)
        if settings.augment_noise_snr_db and (rng := self._draw(row, clip, "noise")):
            snr_db = _uniform(rng, settings.augment_noise_snr_db)
            waveform = add_noise(waveform, self._noise(rng, len(waveform)), snr_db)
        if settings.augment_gain_db and (rng := self._draw(row, clip, "gain")):
            waveform = change_gain(waveform, _uniform(rng, settings.augment_gain_db))
        if settings.augment_telephone and self._draw(row, clip, "telephone"):
            waveform = pass_telephone(waveform, rate)
        if settings.augment_codec and (rng := self._draw(row, clip, "codec")):
            codec = settings.augment_codec[int(rng.integers(len(settings.augment_codec)))]
            waveform = pass_codec(waveform, codec, _uniform(rng, _COMPRESSION), rate)
        return waveform

    def _draw(self, row: str, clip: int, effect: str) -> np.random.Generator | None:
        """Return the effect's own source, so that the others draw as without it, or `None` where a clip is spared."""
        key = repr((self.seed, self.epoch, row, clip, effect))
        rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big"))
        return rng if rng.random() < self.settings.augment_probability else None

    def _noise(self, rng: np.random.Generator, num_samples: int) -> np.ndarray:
        """Return made noise, or a stretch of a recording, which begins again where it is too short."""
        if not self.noise_files:
            return draw_noise(rng, num_samples)
        path = self.noise_files[int(rng.integers(len(self.noise_files)))]
        info = soundfile.info(path)
        needed = math.ceil((num_samples + 1) * info.samplerate / self.sampling_rate)
        start = int(rng.integers(max(info.frames - needed, 0) + 1))
        frames, rate = soundfile.read(path, needed, start, dtype="float32", always_2d=True)
        rates = {"sampling_rate": self.sampling_rate, "source_rate": rate}
        noise = load_audio(frames.mean(axis=1), **rates, max_duration_s=math.inf, name=str(path))
        return np.resize(noise, num_samples)


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Play a clip faster or slower, like a tape, to `ceil(samples / speed)` samples; `speed` counts to 0.01."""
    percent = round(100 * speed)  # a whole number keeps the resampling filter small
    return within_full_scale(resample(waveform, percent * SAMPLING_RATE // 100, SAMPLING_RATE))


def add_reverberation(waveform: np.ndarray, rng: np.random.Generator, rt60_s: float, sampling_rate: int) -> np.ndarray:
    """Put a clip into a room of late reverberation alone: it decays by 60 dB in `rt60_s`, as strong as direct sound.

    The clip is as loud (RMS) as before; the echo after its end is cut off.
    """
    num_samples = max(round(rt60_s * sampling_rate), 2)
    response = rng.standard_normal(num_samples) * 10 ** (-3 * np.arange(num_samples) / num_samples)
    response[0] = 0
    response /= np.linalg.norm(response)
    response[0] = 1
    wet = _convolve(waveform, response)[: len(waveform)]
    if (power := np.mean(wet**2)) > 0:
        wet *= np.sqrt(np.mean(waveform.astype(np.float64) ** 2) / power)
    return within_full_scale(wet.astype(np.float32))


def draw_noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Draw Gaussian noise of variance about 1: white, or half of the time pink (power falls with 1 / frequency)."""
    is_pink, noise = rng.random() < 0.5, rng.standard_normal(num_samples)
    if is_pink:
        spectrum = np.fft.rfft(noise)
        spectrum[0] = 0
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        noise = np.fft.irfft(spectrum, num_samples)
        noise /= noise.std()
    return noise.astype(np.float32)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise of equal length at a ratio of the mean powers; return the clip itself where one of them is silent."""
    signal_power, noise_power = (np.mean(values.astype(np.float64) ** 2) for values in (waveform, noise))
    if signal_power == 0 or noise_power == 0:
        return waveform
    scale = np.sqrt(signal_power / noise_power) * 10 ** (-snr_db / 20)
    return within_full_scale((waveform + scale * noise).astype(np.float32))


def change_gain(waveform: np.ndarray, gain_db: float) -> np.ndarray:
    """Make a clip louder or quieter by dB of amplitude; no louder than full scale."""
    return within_full_scale((waveform * 10 ** (gain_db / 20)).astype(np.float32))


def pass_telephone(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Keep what a telephone line leaves, 300 to 3400 Hz, without delay."""
    time = np.arange(_TELEPHONE_TAPS) - _TELEPHONE_TAPS // 2
    low, high = (2 * edge / sampling_rate for edge in TELEPHONE_BAND_HZ)
    band = high * np.sinc(high * time) - low * np.sinc(low * time)  # a difference of two low passes, of linear phase
    narrow = _convolve(waveform, band * np.kaiser(_TELEPHONE_TAPS, _KAISER_BETA))[_TELEPHONE_TAPS // 2 :]
    return within_full_scale(narrow[: len(waveform)].astype(np.float32))


def pass_codec(waveform: np.ndarray, codec: str, compression: float, sampling_rate: int) -> np.ndarray:
    """Encode and decode a clip in memory with libsndfile; Opus takes 8, 12, 16, 24 and 48 kHz.

    `"ulaw"` is the 8 bit of digital telephony. For MP3 and Opus, `compression` goes from 0 (best quality) to 0.99.
    """
    container, encoding = CODECS[codec]
    buffer = io.BytesIO()
    options = {} if codec == "ulaw" else {"compression_level": compression}
    soundfile.write(buffer, within_full_scale(waveform), sampling_rate, format=container, subtype=encoding, **options)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    fitted = np.pad(decoded[: len(waveform)], (0, max(len(waveform) - len(decoded), 0)))  # codecs work in blocks
    return within_full_scale(fitted)


def within_full_scale(waveform: np.ndarray) -> np.ndarray:
    """Return the clip, scaled down as a whole where it exceeds [-1, 1]."""
    peak = float(np.abs(waveform).max())
    # Divided in float64 and rounded to float32, the peak is 1 exactly.
    return waveform if peak <= 1 else (waveform.astype(np.float64) / peak).astype(np.float32)


def _convolve(waveform: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return the full convolution, by FFT, `(samples + taps - 1,)` in float64."""
    num_samples = len(waveform) + len(kernel) - 1
    size = 1 << (num_samples - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(kernel, size), size)[:num_samples]


class AugmentationMixin(Trainer):
    """For a trainer whose collator is a dataclass with a field `augmentation`, which is `None`."""

    _augmentation: Augmentation | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Do as Transformers, with a collator that augments where an augmentation is set."""
        if self._augmentation is None:
            return super().get_train_dataloader()
        plain = self.data_collator  # type: ignore[has-type]
        self.data_collator = dataclasses.replace(plain, augmentation=self._augmentation)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain


class EpochCallback(TrainerCallback):
    """Counts the epochs for what draws by them in a collator, before the first row of each is asked for."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: object) -> None:
        self.next_epoch = int(state.epoch or 0)  # of a resumed run 1.5, say: in the middle of the second epoch

    def on_epoch_begin(self, *_: object, train_dataloader: DataLoader, **kwargs: object) -> None:
        for name in ("augmentation", "mix"):
            if (drawn := getattr(train_dataloader.collate_fn, name, None)) is not None:
                drawn.epoch = self.next_epoch
        self.next_epoch += 1


def _uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    return float(rng.uniform(bounds[0], bounds[1]))


def _find_noise(directory: str) -> Sequence[Path]:
    """Return the folder's audio files in the order of their names, so that every machine draws the same."""
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"augment_noise_dir: no such folder: {root}.")
    files = [path for path in root.rglob("*") if path.suffix.lower() in NOISE_SUFFIXES and path.name[0] != "."]
    if not files:
        raise FileNotFoundError(f"augment_noise_dir: {root} holds no file that ends in {', '.join(NOISE_SUFFIXES)}.")
    for path in files:
        try:
            duration_s = soundfile.info(path).duration
        except soundfile.LibsndfileError as error:
            raise ValueError(f"augment_noise_dir: {path} cannot be read ({error}). Convert or remove it.") from error
        if duration_s < MIN_DURATION_S:
            raise ValueError(f"augment_noise_dir: {path} lasts {duration_s:.3f} s, too short. Remove it.")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())
