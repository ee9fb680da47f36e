"""The settings of `relllm merge`, `card` and `push`; nothing heavy is imported, because flags are made of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Form = Literal["light", "full"]


@dataclass(frozen=True)
class MergeSettings:
    """A light checkpoint, and where the full one of it goes."""

    light: str = field(metadata={"help": "A light checkpoint: a directory or a Hub id.", "argument": True})
    output_dir: Path = field(metadata={"help": "Where the full checkpoint goes."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    audio_tower: str | None = field(default=None, metadata={"help": "Where the speech tower is, if it moved."})
    emotion_tower: str | None = field(default=None, metadata={"help": "Where the emotion tower is, if it moved."})
    text_model: str | None = field(default=None, metadata={"help": "Where the LLM is, if it moved."})


@dataclass(frozen=True)
class CardSettings:
    """A checkpoint's folder, and what its card is made of."""

    model: Path = field(metadata={"help": "The checkpoint's folder; the card goes into it."})
    runs: list[Path] = field(
        default_factory=list,
        metadata={"help": "Folders of `relllm evaluate` on this checkpoint; none: not evaluated.", "argument": True},
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "Where it will be: org/name; by default org/ and the folder's name."}
    )
    license: str | None = field(
        default=None, metadata={"help": "An id of the Hub, at least as strict as the towers'."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a README.md that is there."})


@dataclass(frozen=True)
class PushSettings:
    """A checkpoint's folder, and how it goes where."""

    model: Path = field(metadata={"help": "The checkpoint's folder, with a card.", "argument": True})
    repo_id: str = field(metadata={"help": "org/name; made if it is not there.", "argument": True})
    private: bool = field(default=False, metadata={"help": "The repository must be private."})
    with_code: bool = field(default=False, metadata={"help": "With the code files, for trust_remote_code=True."})
    light: bool = field(default=False, metadata={"help": "What was trained, and the towers' Hub ids."})
    full: bool = field(default=False, metadata={"help": "With the towers in it."})
    dry_run: bool = field(default=False, metadata={"help": "All checks and the list of files; nothing sent."})

    def __post_init__(self) -> None:
        if self.light and self.full:
            raise ValueError("--light and --full exclude each other. Without either it goes as it is.")

    @property
    def form(self) -> Form | None:
        """How it goes; `None`: as it is."""
        return "light" if self.light else "full" if self.full else None
