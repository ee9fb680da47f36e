"""The settings of `relllm demo`; nothing heavy is imported, because the command line is made from them."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """The sizes and the place of a run; the defaults fit two CPU cores and a few minutes."""

    output_dir: Path = field(default=Path("runs/demo"), metadata={"help": "Folder of the run."})
    seed: int = field(default=0, metadata={"help": "Of the corpus and of every weight."})
    train_clips: int = field(default=180, metadata={"help": "Of each of the five emotions.", "min": 1})
    validation_clips: int = field(default=30, metadata={"help": "Of each of the five emotions.", "min": 1})
    test_clips: int = field(default=40, metadata={"help": "Of each of the five emotions.", "min": 1})
    text_epochs: float = field(default=3.0, metadata={"help": "Epochs of the LLM over the training rows."})
    emotion_epochs: float = field(default=6.0, metadata={"help": "The same of the emotion tower."})
    speech_epochs: float = field(default=3.0, metadata={"help": "The same of RE-LLM, and of its baseline."})
