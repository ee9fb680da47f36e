"""Augmentation of training clips: its settings, what each clip draws, and how the trainer brings it to its loader.

What lives here: which effect a clip gets, and how strong. What does not: the effects (`augmentation_effects.py`) and
where a waveform is read (the collators).

Design:
- Only the loader of training rows augments; evaluation and prediction have a collator without it.
- What a clip draws follows from the seed, the epoch, the row's id (without one: its samples) and the clip's place in
  the row, and from nothing else: not from the batch, the worker, the process, or what was drawn before. So a resumed
  run draws what an uninterrupted one would have, and two processes draw what one would.
- The epoch reaches the loader's workers in shared memory, because persistent ones keep their copy of the collator. It
  is set before the epoch's first row is asked for, when no worker is at work.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from relllm.processing.audio_relllm import MAX_DURATION_S, MIN_DURATION_S, SAMPLING_RATE, load_audio

from .augmentation_effects import (
    CODECS,
    add_noise,
    add_reverberation,
    change_gain,
    change_speed,
    draw_noise,
    pass_codec,
    pass_telephone,
)

# Smallest and largest value that a range may hold; outside, it was meant in another unit.
RANGES = {
    "augment_speed": (0.5, 2.0),
    "augment_reverb": (0.05, 5.0),
    "augment_noise_snr_db": (-20.0, 80.0),
    "augment_gain_db": (-60.0, 40.0),
}
NOISE_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_COMPRESSION = (0.5, 0.99)  # of MP3 about 50 to 27 kbit/s of mono speech, of Opus about 130 to 11


@dataclass
class AugmentationSettings:
    """The settings that a trainer's configuration inherits; all effects are off by default.

    They act in the order in which they stand here, each on its own share of the clips.

    Args:
        augment_speed (`list[float]`, *optional*): Slowest and fastest, for example `[0.9, 1.1]`. Changes pitch and
            duration together, and with them what emotion rides on.
        augment_reverb (`list[float]`, *optional*): Shortest and longest reverberation time (RT60) in seconds.
        augment_noise_snr_db (`list[float]`, *optional*): Lowest and highest signal-to-noise ratio in dB.
        augment_noise_dir (`str`, *optional*): Folder of noise recordings; by default white and pink noise.
        augment_gain_db (`list[float]`, *optional*): Lowest and highest gain in dB; never beyond full scale.
        augment_telephone (`bool`, *optional*, defaults to `False`): 300 to 3400 Hz.
        augment_codec (`list[str]`, *optional*): Any of `"mp3"`, `"opus"`, `"ulaw"`; a clip passes one of them.
        augment_probability (`float`, *optional*, defaults to 0.5): Of each effect, for each clip.
    """

    augment_speed: list[float] | None = field(
        default=None, metadata={"help": "Range of speed, say 0.9 1.1; changes pitch and duration. Off by default."}
    )
    augment_reverb: list[float] | None = field(
        default=None, metadata={"help": "Range of the reverberation time (RT60) in seconds, say 0.2 0.6."}
    )
    augment_noise_snr_db: list[float] | None = field(
        default=None, metadata={"help": "Range of the signal-to-noise ratio in dB, say 5 30."}
    )
    augment_noise_dir: str | None = field(
        default=None, metadata={"help": "Noise recordings; by default white and pink noise."}
    )
    augment_gain_db: list[float] | None = field(
        default=None, metadata={"help": "Range of gain in dB, say -10 6; never beyond full scale."}
    )
    augment_telephone: bool = field(default=False, metadata={"help": "A telephone's band: 300 to 3400 Hz."})
    augment_codec: list[str] | None = field(default=None, metadata={"help": f"Any of {', '.join(CODECS)}."})
    augment_probability: float = field(default=0.5, metadata={"help": "Of each effect, for each clip and epoch."})

    def check_augmentation(self) -> None:
        """
        Raises:
            ValueError: On a range that is none or holds impossible values, an unknown codec, a probability outside
                (0, 1], or a folder of noise without a signal-to-noise ratio.
        """
        for name, (smallest, largest) in RANGES.items():
            given = getattr(self, name)
            if given is None:
                continue
            if len(given) != 2 or not smallest <= given[0] <= given[1] <= largest:
                raise ValueError(
                    f"{name} must be a range [low, high] within [{smallest:g}, {largest:g}], got {given}."
                )
        if unknown := sorted(set(self.augment_codec or []) - set(CODECS)):
            raise ValueError(f"augment_codec has {unknown}; it takes any of {list(CODECS)}.")
        if not 0 < self.augment_probability <= 1:
            raise ValueError(
                f"augment_probability must be in (0, 1], got {self.augment_probability}. An effect that is not set is "
                "off."
            )
        if self.augment_noise_dir is not None and self.augment_noise_snr_db is None:
            raise ValueError(
                "augment_noise_dir says which noise and not how loud: set augment_noise_snr_db, for example [5, 30]."
            )

    @property
    def augments(self) -> bool:
        """Whether any effect is on."""
        ranges = any(getattr(self, name) is not None for name in RANGES)
        return ranges or self.augment_telephone or bool(self.augment_codec)


class Augmentation:
    """Gives each clip the effects that its row and the epoch draw.

    Args:
        settings ([`AugmentationSettings`]): Which effects, and their ranges.
        seed (`int`): The run's.
        sampling_rate (`int`, *optional*, defaults to 16000): Of every clip, in Hz.
        max_duration_s (`float`, *optional*, defaults to 600): A clip that slowing down would make longer keeps its
            speed; so does one that would become shorter than 25 ms.

    Raises:
        FileNotFoundError: If the folder of noise is not there, or holds no audio.
        ValueError: If one of its files cannot be read, or this libsndfile lacks a codec.
    """

    def __init__(
        self,
        settings: AugmentationSettings,
        *,
        seed: int,
        sampling_rate: int = SAMPLING_RATE,
        max_duration_s: float = MAX_DURATION_S,
    ) -> None:
        settings.check_augmentation()
        self.settings = settings
        self.seed = seed
        self.sampling_rate = sampling_rate
        self.max_duration_s = max_duration_s
        self.noise_files = _find_noise(settings.augment_noise_dir) if settings.augment_noise_dir else []
        for codec in settings.augment_codec or []:
            if not soundfile.check_format(*CODECS[codec]):
                raise ValueError(
                    f"augment_codec: {codec!r} needs libsndfile >= 1.1. Update soundfile, or leave it out."
                )
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose draws are made, from 0; the same in all workers."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Goes on to another epoch, in the workers as well."""
        self._epoch.fill_(epoch)

    def __call__(self, waveform: np.ndarray, *, row_id: object = None, clip: int = 0) -> np.ndarray:
        """
        Args:
            waveform (`np.ndarray` of shape `(samples,)`): float32 at `sampling_rate`; it stays as it is.
            row_id (*optional*): The row's `id`. Rows that share one draw alike; without one the samples say.
            clip (`int`, *optional*, defaults to 0): The clip's place among those of the row.

        Returns:
            `np.ndarray` of another shape `(samples,)` where the speed changed: float32, finite, and in [-1, 1] if any
            effect was drawn.
        """
        row = f"id {row_id}" if row_id is not None else hashlib.blake2b(waveform.tobytes()).hexdigest()
        settings, rate = self.settings, self.sampling_rate

        if settings.augment_speed and (rng := self._draw(row, clip, "speed")):
            waveform = self._at_speed(waveform, round(_uniform(rng, settings.augment_speed), 2))
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
        """The effect's own source of random numbers, or `None` where this clip is spared.

        One for each effect, so that switching one on leaves what the others draw as it was.
        """
        key = repr((self.seed, self.epoch, row, clip, effect))
        rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "big"))
        return rng if rng.random() < self.settings.augment_probability else None

    def _at_speed(self, waveform: np.ndarray, speed: float) -> np.ndarray:
        duration_s = math.ceil(len(waveform) / speed) / self.sampling_rate
        return change_speed(waveform, speed) if MIN_DURATION_S <= duration_s <= self.max_duration_s else waveform

    def _noise(self, rng: np.random.Generator, num_samples: int) -> np.ndarray:
        """Made noise, or a stretch of a recording, which begins again where it is too short."""
        if not self.noise_files:
            return draw_noise(rng, num_samples)
        path = self.noise_files[int(rng.integers(len(self.noise_files)))]
        with soundfile.SoundFile(path) as file:
            needed = math.ceil((num_samples + 1) * file.samplerate / self.sampling_rate)
            file.seek(int(rng.integers(max(file.frames - needed, 0) + 1)))
            frames, rate = file.read(needed, dtype="float32", always_2d=True), file.samplerate
        noise = load_audio(
            frames.mean(axis=1),
            sampling_rate=self.sampling_rate,
            source_rate=rate,
            max_duration_s=math.inf,
            name=str(path),
        )
        return np.resize(noise, num_samples)


class AugmentationMixin(Trainer):
    """For a trainer whose collator is a dataclass with a field `augmentation`, which is `None`."""

    _augmentation: Augmentation | None = None

    def augment(self, augmentation: Augmentation) -> None:
        """From now on the training loader augments, and no other does."""
        self._augmentation = augmentation
        self.add_callback(_EpochCallback(augmentation))

    def get_train_dataloader(self) -> DataLoader:
        """As in Transformers, with a collator that augments where [`augment`] was called."""
        if self._augmentation is None:
            return super().get_train_dataloader()
        plain = self.data_collator  # type: ignore[has-type]
        self.data_collator = dataclasses.replace(plain, augmentation=self._augmentation)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain


class _EpochCallback(TrainerCallback):
    """Counts the epochs for an [`Augmentation`]; the trainer asks for an epoch's first row after its beginning."""

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation
        self.next_epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.next_epoch = int(state.epoch or 0)  # of a resumed run 1.5, say: in the middle of the second epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.augmentation.set_epoch(self.next_epoch)
        self.next_epoch += 1


def _uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    low, high = bounds
    return float(rng.uniform(low, high))


def _find_noise(directory: str) -> Sequence[Path]:
    """The folder's audio files in the order of their names, so that every machine draws the same."""
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


__all__ = ["Augmentation", "AugmentationMixin", "AugmentationSettings"]
