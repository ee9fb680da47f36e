"""The settings of `relllm merge`, `card` and `push`; nothing heavy is imported, because flags are made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relllm.setting import REQUIRED, setting

Form = Literal["light", "full"]


@dataclass(frozen=True)
class MergeSettings:
    """A light checkpoint, and where the full one of it goes."""

    light: str = setting(REQUIRED, "A light checkpoint: a directory or a Hub id.", argument=True, place="checkpoint")
    output_dir: Path = setting(REQUIRED, "Where the full checkpoint goes.")
    revision: str = setting("main", "Branch, tag or commit on the Hub.")
    audio_tower: str | None = setting(None, "Where the speech tower is, if it moved.", place="checkpoint")
    emotion_tower: str | None = setting(None, "Where the emotion tower is, if it moved.", place="checkpoint")
    text_model: str | None = setting(None, "Where the LLM is, if it moved.", place="checkpoint")


@dataclass(frozen=True)
class CardSettings:
    """A checkpoint's folder, and what its card is made of."""

    model: Path = setting(REQUIRED, "The checkpoint's folder; the card goes into it.")
    runs: list[Path] = setting([], "Folders of `relllm evaluate` on this checkpoint, if any.", argument=True)
    repo_id: str | None = setting(None, "Where it will be: org/name; by default org/ and the folder's name.")
    license: str | None = setting(None, "An id of the Hub that is known to carry the towers' licences; or other.")
    license_name: str | None = setting(None, "Of a licence that is other.")
    license_link: str | None = setting(None, "To a licence that is other; by default to the card's own section.")
    tower_license: list[str] = setting([], "The licence of a tower that says none: text_model=apache-2.0. Repeat it.")
    language: list[str] = setting([], "Languages that it was trained on, where the data do not say: en. Repeat it.")
    overwrite: bool = setting(False, "Replace a README.md that is there.")


@dataclass(frozen=True)
class PushSettings:
    """A checkpoint's folder, and how it goes where."""

    model: Path = setting(REQUIRED, "The checkpoint's folder, with a card.", argument=True)
    repo_id: str = setting(REQUIRED, "org/name; made if it is not there.", argument=True)
    private: bool = setting(False, "The repository must be private.")
    with_code: bool = setting(False, "With the code files, for trust_remote_code=True.")
    light: bool = setting(False, "What was trained, and the towers' Hub ids.")
    full: bool = setting(False, "With the towers in it.")
    row_digests: bool = setting(False, "With the digests of the rows that trained it, also of unpublished corpora.")
    revision: str = setting("main", "The branch; made if it is not there.")
    create_pr: bool = setting(False, "As a pull request, which a person merges.")
    message: str = setting("Upload a ReLLM with relllm", "Of the commit.")
    tag: str | None = setting(None, "Name the commit, as in v1; a tag that is there already is an error.")
    dry_run: bool = setting(False, "All checks, and the lists of files that come and go; nothing sent.")
    no_load: bool = setting(False, "Without loading the model as a check, which a large one takes long for.")

    def __post_init__(self) -> None:
        if self.tag and self.create_pr:
            raise ValueError("--tag and --create-pr exclude each other: tag what is merged.")
        if self.light and self.full:
            raise ValueError("--light and --full exclude each other. Without either it goes as it is.")

    @property
    def form(self) -> Form | None:
        """Return how it goes; `None`: as it is."""
        return "light" if self.light else "full" if self.full else None
