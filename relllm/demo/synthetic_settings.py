"""What `relllm prepare synthetic` and `tiny-towers` can be told; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from relllm.data.data_settings import PrepareSettings

VERSION = 1  # of the plan of a synthetic corpus: raise it when the same settings would give other clips


@dataclass(frozen=True)
class SyntheticSettings(PrepareSettings):
    """How large the synthetic corpus is, and which one of them it is.

    Raises:
        ValueError: A number of clips below 1.
    """

    train_clips: int = field(default=180, metadata={"help": "Of each of the five emotions.", "min": 1})
    validation_clips: int = field(default=30, metadata={"help": "Of each of the five emotions.", "min": 1})
    test_clips: int = field(default=40, metadata={"help": "Of each of the five emotions.", "min": 1})
    seed: int = field(default=0, metadata={"help": "The same settings give the same bytes."})
    NAME: ClassVar[str] = "synthetic"

    def __post_init__(self) -> None:
        super().__post_init__()
        for split, count in self.clips_per_emotion.items():
            if count < 1:
                raise ValueError(f"Expected at least 1 {split} clip for each emotion, got {count}.")

    @property
    def clips_per_emotion(self) -> dict[str, int]:
        """By split."""
        return {"train": self.train_clips, "validation": self.validation_clips, "test": self.test_clips}

    @property
    def identity(self) -> dict[str, object]:
        """What two runs must share to make one data set."""
        return {"plan": VERSION, **super().identity}


@dataclass(frozen=True)
class TinyTowersSettings:
    """Where three random towers go."""

    output_dir: Path = field(default=Path("data/tiny-towers"), metadata={"help": "Folder of the three towers."})
    seed: int = field(default=0, metadata={"help": "Of the weights."})
