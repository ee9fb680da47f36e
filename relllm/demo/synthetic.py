"""A small corpus of synthetic speech in five emotions, for the demo and for tests.

This is rule-made prosody, not human emotion: a model that learns it shows that the pipeline learns from how something
is said. Results on it say nothing about people, and everything built on it should say so.

An emotion is a distribution of rate, pitch, pitch range and loudness; they overlap, so no rule gets all right. Every
emotion is said by the same voices in the same sentences, so neither gives it away. Splits share no voice and no
sentence. A clip depends on the seed and its own place only, never on the size of the corpus.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from relllm.data.clips import to_16_bit
from relllm.data.loading import load_corpus
from relllm.data.preparing import prepare_corpus
from relllm.data.rows import COLUMNS, LABEL_SOURCE, Corpus, CorpusFacts, Row, make_row
from relllm.labels import EMOTIONS
from relllm.processing.audio_relllm import SAMPLING_RATE, resample

from .demo_settings import SyntheticSettings
from .espeak import Utterance, speak
from .synthetic_text import REPLIES, SENTENCES, Sentence

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


SPLITS = ("train", "validation", "test")

FACTS = CorpusFacts(
    name="synthetic",
    title="Synthetic emotional speech",
    language="en",
    licence="apache-2.0",
    terms="Made by relllm with eSpeak NG: rule-made prosody, not human emotion. Results on it say nothing about "
    "people. It may be published.",
)

# Variants of eSpeak NG that sound clean. The test variants (m7, f3) are heard nowhere else; validation has an accent
# of its own.
ACCENTS = ("en-us", "en-gb-x-rp")
VOICES = {
    "train": tuple(f"{accent}{own}" for own in ("", "+m1", "+m3", "+f2", "+shelby") for accent in ACCENTS),
    "validation": ("en-gb-scotland", "en-gb-scotland+f2"),
    "test": ("en-us+m7", "en-gb-x-rp+m7", "en-us+f3", "en-gb-x-rp+f3"),
}


@dataclass(frozen=True)
class Prosody:
    """How a clip is said: pitch and pitch range (0 to 99), rate (words a minute), gain (factor on the samples)."""

    pitch: float
    pitch_range: float
    rate: float
    gain: float


MEAN_PROSODY = {
    "neutral": Prosody(50, 50, 175, 0.70),
    "happy": Prosody(62, 90, 195, 0.85),
    "angry": Prosody(46, 80, 225, 1.00),
    "sad": Prosody(40, 12, 125, 0.40),
    "surprise": Prosody(70, 99, 160, 0.85),
}
JITTER = Prosody(10, 16, 20, 0.15)  # standard deviations, the same for every emotion; draws beyond two are drawn again
LIMITS = {"pitch": (0, 99), "pitch_range": (0, 99), "rate": (80, 320), "gain": (0.1, 1.0)}

# dimension = mean of the emotion + sum of weight * (value - mean of the emotion) / jitter. Louder and faster is more
# aroused, louder and lower more dominant, higher and livelier more positive. With at most two deviations all stay
# inside [0, 1].
MEAN_DIMENSIONS = {
    "neutral": {"arousal": 0.40, "dominance": 0.50, "valence": 0.50},
    "happy": {"arousal": 0.70, "dominance": 0.62, "valence": 0.86},
    "angry": {"arousal": 0.84, "dominance": 0.84, "valence": 0.18},
    "sad": {"arousal": 0.20, "dominance": 0.24, "valence": 0.26},
    "surprise": {"arousal": 0.74, "dominance": 0.40, "valence": 0.66},
}
DIMENSION_WEIGHTS = {
    "arousal": {"rate": 0.035, "gain": 0.025, "pitch_range": 0.015},
    "dominance": {"gain": 0.040, "pitch": -0.025, "rate": 0.010},
    "valence": {"pitch": 0.030, "pitch_range": 0.030},
}


@dataclass(frozen=True)
class Clip:
    """One planned clip: the row (with a path relative to the corpus) and how it is said."""

    row: Row
    prosody: Prosody


def synthesize_corpus(settings: SyntheticSettings, *, progress: bool = True) -> DatasetDict:
    """Write the corpus (16 kHz, 16-bit mono WAV), or reuse the one that is there already, and return its splits.

    Its folder appears when it is complete; interrupted, the same call goes on. Errors are those of [`prepare_corpus`].
    """
    from datasets import DatasetDict

    prepare_synthetic(settings, progress=progress)
    return DatasetDict({split: load_synthetic_corpus(settings.directory, split) for split in SPLITS})


def prepare_synthetic(settings: SyntheticSettings, *, progress: bool = True) -> dict:
    """Do what [`synthesize_corpus`] does, and return the report in place of the rows."""
    counts = settings.clips_per_emotion
    rows = [clip.row for split in SPLITS for clip in plan_split(split, counts[split], seed=settings.seed)]
    return prepare_corpus(
        Corpus(FACTS, rows, dropped=[], notes=[]),
        settings,
        make_audio=functools.partial(speak_rows, seed=settings.seed),
        progress=progress,
    )


def load_synthetic_corpus(directory: str | Path, split: str) -> Dataset:
    """Return one split of a corpus that `synthesize_corpus` wrote, in the columns of `Row`; `audio` is a path."""
    if split not in SPLITS:
        raise ValueError(f"Expected a split of {', '.join(SPLITS)}, got {split!r}.")
    directory = Path(directory).absolute()
    if not (directory / "report.json").is_file():
        raise FileNotFoundError(f"No synthetic corpus in {directory}. Write it with `synthesize_corpus`.")
    return load_corpus(directory, split).select_columns(list(COLUMNS))


def plan_split(split: str, clips_per_emotion: int, *, seed: int = 0) -> Iterator[Clip]:
    """Plan what a split will hold, without synthesising it.

    The emotions take turns, and the five clips of a turn share voice and sentence; beyond voices x sentences, pairs
    come again with another prosody.
    """
    if clips_per_emotion < 1:
        raise ValueError(f"Expected at least 1 {split} clip for each emotion, got {clips_per_emotion}.")
    for number in range(clips_per_emotion * len(EMOTIONS)):
        yield plan_clip(split, number, seed=seed)


def plan_clip(split: str, number: int, *, seed: int = 0) -> Clip:
    """Plan one clip of [`plan_split`], by its place."""
    pairs = _ordered_pairs(split, seed)
    turn, index = divmod(number, len(EMOTIONS))
    voice, sentence = pairs[turn % len(pairs)]
    rng = np.random.default_rng([seed, SPLITS.index(split), turn, index])
    return make_clip(split, number, emotion=EMOTIONS[index], voice=voice, sentence=sentence, rng=rng)


def make_clip(
    split: str, number: int, *, emotion: str, voice: str, sentence: Sentence, rng: np.random.Generator
) -> Clip:
    """Plan the clip at a place of a split; `rng` draws its prosody, then its reply."""
    prosody = draw_prosody(emotion, rng)
    clip_id = f"{split}-{number:05d}"
    row = make_row(
        id=clip_id,
        audio=f"audio/{clip_id}.wav",
        text=sentence.text,
        response=REPLIES[emotion][rng.integers(len(REPLIES[emotion]))].format(topic=sentence.topic),
        emotion=emotion,
        **dimensions_of(emotion, prosody),
        dimension_source=LABEL_SOURCE,
        speaker=voice,
        split=split,
        language="en",
    )
    return Clip(row, prosody)


@functools.cache
def _ordered_pairs(split: str, seed: int) -> list[tuple[str, Sentence]]:
    """List voices and sentences of a split in the order of their turns."""
    pairs = list(itertools.product(VOICES[split], SENTENCES[split]))
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(pairs))
    return [pairs[place] for place in order]


def draw_prosody(emotion: str, rng: np.random.Generator) -> Prosody:
    """Draw prosody around the means of an emotion: normal, cut at two deviations and at `LIMITS`.

    Pitch, pitch range and rate are whole numbers, which is what eSpeak NG takes.
    """
    values = {}
    for name, (lowest, highest) in LIMITS.items():
        deviation = rng.normal()
        while abs(deviation) > 2:
            deviation = rng.normal()
        value = getattr(MEAN_PROSODY[emotion], name) + deviation * getattr(JITTER, name)
        value = min(max(value, lowest), highest)
        values[name] = round(value, 3) if name == "gain" else float(round(value))
    return Prosody(**values)


def dimensions_of(emotion: str, prosody: Prosody) -> dict[str, float]:
    """Compute a clip's dimensions in [0, 1], by name: the emotion's means, moved by how this clip is said."""
    mean, values = asdict(MEAN_PROSODY[emotion]), asdict(prosody)
    deviation = {name: (values[name] - mean[name]) / jitter for name, jitter in asdict(JITTER).items()}
    moved = {
        dimension: sum(weight * deviation[name] for name, weight in weights.items())
        for dimension, weights in DIMENSION_WEIGHTS.items()
    }
    return {name: round(MEAN_DIMENSIONS[emotion][name] + by, 4) for name, by in moved.items()}


def speak_rows(rows: Sequence[Row], directory: Path, *, seed: int) -> None:
    """Make the audio of rows of [`plan_split`] with the same seed; see [`speak_clips`]."""
    places = ((str(row["split"]), int(row["id"].rpartition("-")[2])) for row in rows)
    speak_clips([plan_clip(*place, seed=seed) for place in places], directory)


def speak_clips(clips: Sequence[Clip], directory: Path) -> None:
    """Make the audio of planned clips, as files in the `directory` that their paths are relative to."""
    (directory / "audio").mkdir(parents=True, exist_ok=True)
    for clip, (samples, rate) in zip(clips, speak(map(_utterance, clips)), strict=True):
        write_wav(directory / str(clip.row["audio"]), samples, rate, clip.prosody.gain)


def _utterance(clip: Clip) -> Utterance:
    said = clip.prosody
    text, voice = str(clip.row["text"]), str(clip.row["speaker"])
    return Utterance(text, voice, int(said.pitch), int(said.pitch_range), int(said.rate))


def write_wav(path: Path, samples: bytes, rate: int, gain: float) -> None:
    """Write what [`speak`] gave (16-bit mono samples, and their rate in Hz), times a gain, as WAV at 16 kHz."""
    waveform = gain * np.frombuffer(samples, "<i2").astype(np.float32) / 32768
    waveform = resample(waveform, rate, SAMPLING_RATE)
    samples_16_bit, _ = to_16_bit(waveform)  # the resampling filter may overshoot full scale by a little
    soundfile.write(path, samples_16_bit, SAMPLING_RATE, subtype="PCM_16")
