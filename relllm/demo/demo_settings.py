"""The settings of `relllm demo`, `prepare synthetic` and `prepare tiny-towers`; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from relllm.data.data_settings import PrepareSettings
from relllm.setting import setting

VERSION = 1  # of the plan of a synthetic corpus: raise it when the same settings would give other clips


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """How large the synthetic corpus is, and which one of them it is."""

    train_clips: int = setting(180, "Of each of the five emotions.", min=1)
    validation_clips: int = setting(30, "Of each of the five emotions.", min=1)
    test_clips: int = setting(40, "Of each of the five emotions.", min=1)
    seed: int = setting(0, "The same settings give the same bytes.")

    @property
    def clips_per_emotion(self) -> dict[str, int]:
        """By split."""
        return {"train": self.train_clips, "validation": self.validation_clips, "test": self.test_clips}


@dataclass(frozen=True, kw_only=True)
class DemoSettings(CorpusSize):
    """The sizes and the place of a run; the defaults fit two CPU cores and a few minutes."""

    output_dir: Path = setting(Path("runs/demo"), "Folder of the run.")
    test_clips: int = setting(400, "Of each of the five emotions; docs/evaluation.md has the reason.", min=1)
    text_epochs: float = setting(3.0, "Epochs of the LLM over the training rows.")
    emotion_epochs: float = setting(6.0, "The same of the emotion tower.")
    speech_epochs: float = setting(3.0, "The same of RE-LLM, and of its baseline.")


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings(CorpusSize, PrepareSettings):
    """Those of a synthetic corpus by itself."""

    NAME: ClassVar[str] = "synthetic"

    @property
    def identity(self) -> dict[str, object]:
        """Return what two runs must share to make one data set."""
        return {"plan": VERSION, **super().identity}


@dataclass(frozen=True)
class TinyTowersSettings:
    """Where three random towers go."""

    output_dir: Path = setting(Path("data/tiny-towers"), "Folder of the three towers.")
    seed: int = setting(0, "Of the weights.")
