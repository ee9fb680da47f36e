"""A handful of spoken examples to talk with: one sentence in five emotions, and some others.

What lives here: which clips there are, writing and reading them. What does not: the synthesiser (`espeak.py`), the
prosody of an emotion and the corpus for training (`synthetic.py`). It is rule-made prosody, not human emotion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from relllm.labels import EMOTIONS

from .espeak import Utterance, speak
from .synthetic import MEAN_PROSODY, write_wav

INDEX = "examples.json"


@dataclass(frozen=True)
class Example:
    """One clip.

    Args:
        path (`str`): Of the WAV file (16 kHz, mono); in the index relative to it.
        text (`str`): The words.
        emotion (`str`): How they are said.
        voice (`str`): Of eSpeak NG.
    """

    path: str
    text: str
    emotion: str
    voice: str

    @property
    def title(self) -> str:
        """What a list shows."""
        return f"{self.emotion}: {self.text}"


def _example(text: str, emotion: str, voice: str) -> Example:
    name = f"{emotion}-{'-'.join(text.lower().strip('.').split())}.wav"
    return Example(name, text, emotion, voice)


EXAMPLES: tuple[Example, ...] = (
    *(_example("My mother is visiting next week.", emotion, "en-us+f3") for emotion in EMOTIONS),
    _example("I did not get the job.", "sad", "en-gb-x-rp+m7"),
    _example("We are getting married.", "happy", "en-us+m7"),
    _example("They cancelled the train again.", "angry", "en-gb-x-rp+f3"),
)


def write_examples(directory: str | Path) -> list[Example]:
    """Synthesise the examples. The same release writes the same bytes; what is there is written again.

    Args:
        directory (`str` or `Path`): Where the WAV files and their index `examples.json` go.

    Returns:
        `list[Example]`: As [`read_examples`] gives them.

    Raises:
        ImportError: eSpeak NG is missing (`pip install relllm[demo]`).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for example, (samples, rate) in zip(EXAMPLES, speak(map(_utterance, EXAMPLES)), strict=True):
        write_wav(directory / example.path, samples, rate, MEAN_PROSODY[example.emotion].gain)
    partial = directory / f"{INDEX}.partial"
    partial.write_text(json.dumps([asdict(example) for example in EXAMPLES], indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / INDEX)  # last: an index says that all its clips are there
    return read_examples(directory)


def read_examples(directory: str | Path) -> list[Example]:
    """The examples in a folder, with absolute paths.

    Args:
        directory (`str` or `Path`): Of [`write_examples`].

    Raises:
        FileNotFoundError: If there are none, or a clip of the index is gone; the message says how to write them.
    """
    directory = Path(directory).absolute()
    remedy = f"Write them with `relllm prepare examples --out {directory}`."
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"No examples in {directory}. {remedy}")
    entries: Sequence[dict[str, str]] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    examples = [Example(**{**entry, "path": str(directory / entry["path"])}) for entry in entries]
    if missing := [example.path for example in examples if not Path(example.path).is_file()]:
        raise FileNotFoundError(f"The index of {directory} names {missing[0]}, which is not there. {remedy}")
    return examples


def _utterance(example: Example) -> Utterance:
    prosody = MEAN_PROSODY[example.emotion]
    return Utterance(example.text, example.voice, int(prosody.pitch), int(prosody.pitch_range), int(prosody.rate))


__all__ = ["EXAMPLES", "Example", "read_examples", "write_examples"]
