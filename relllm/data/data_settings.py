"""What each command of this folder can be told, declared once; nothing heavy is imported for `relllm --help`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

from relllm.labels import DIMENSIONS
from relllm.processing.prompts_relllm import SYSTEM_PROMPT, WRITER_PROMPT
from relllm.setting import DATA_SET, REQUIRED, check_engine, check_settings, read_object, setting

from .rows import PSEUDO_SOURCE, LabelSet

SHORTEST_S, LONGEST_S = 0.025, 600.0  # what `load_audio` accepts


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Where a data set goes and what is done with its audio."""

    output_dir: Path | None = setting(None, "Folder of the data set; by default data/NAME.")
    embed_audio: bool = setting(False, "Put the audio into the Parquet files, at 16 kHz, instead of its path.")
    min_seconds: float = setting(SHORTEST_S, "Shorter clips are left out.")
    max_seconds: float = setting(LONGEST_S, "Longer clips are left out.")
    channel: Literal["mix", "left", "right", "each"] = setting(
        "mix", "Of files with several; each is a row of its own. All but mix need --embed-audio."
    )
    num_proc: int | None = setting(None, "Processes of one thread each; by default one for each core.", min=1)
    NAME: ClassVar[str] = "data-set"

    def __post_init__(self) -> None:
        check_settings(self)
        if not SHORTEST_S <= self.min_seconds < self.max_seconds:
            given = f"{self.min_seconds} s and {self.max_seconds} s"
            raise ValueError(f"Expected {SHORTEST_S} s <= the shortest clip < the longest, got {given}.")
        if self.channel != "mix" and not self.embed_audio:
            raise ValueError(f"channel={self.channel!r} needs embed_audio: what is named by path is read as the mix.")

    @property
    def directory(self) -> Path:
        """Return where the data set goes."""
        return (self.output_dir or Path("data") / self.NAME).expanduser().absolute()

    @property
    def identity(self) -> dict[str, object]:
        """Return what two runs must share to make one data set."""
        elsewhere = ("root", "output_dir", "num_proc", "name")  # the name is that of the corpus
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}


@dataclass(frozen=True)
class CorpusSettings(PrepareSettings):
    """What the parsers of corpora share."""

    root: Path = setting(REQUIRED, "Where the corpus was unpacked.", argument=True)
    label_set: LabelSet = setting("5", "4: neutral, happy, angry, sad; 5: and surprise; all: every name.")


@dataclass(frozen=True)
class IemocapSettings(CorpusSettings):
    """IEMOCAP's; label set 4 with excited as happy is the usual task of 5,531 utterances."""

    label_set: LabelSet = field(default="4", metadata=CorpusSettings.__dataclass_fields__["label_set"].metadata)
    merge_excited: bool = setting(True, "Excited counts as happy.")
    improvised_only: bool = setting(False, "Without the scripted half, whose sentences are the same in all sessions.")
    # The paper's files hold out session 5.
    held_out_session: int = setting(5, "The split test; 0 for none.", min=0, max=5)
    validation_session: int | None = setting(None, "The split validation.", min=1, max=5)
    NAME: ClassVar[str] = "iemocap"


@dataclass(frozen=True)
class EsdSettings(CorpusSettings):
    """ESD's; English are the speakers 0011 to 0020, as in the paper, and Mandarin are 0001 to 0010."""

    language: Literal["en", "zh", "all"] = setting("en", "Whose speakers.")
    splits: Literal["auto", "numbers", "folders"] = setting("auto", "Auto: a clip's folder if any, else its number.")
    leave_speakers_out: tuple[str, ...] = setting((), "Speakers of the split test, for example 0019,0020.")
    NAME: ClassVar[str] = "esd"


@dataclass(frozen=True)
class MspPodcastSettings(CorpusSettings):
    """MSP-Podcast's; with label set `all` "other" and "no agreement" stay, without an emotion."""

    NAME: ClassVar[str] = "msp-podcast"


@dataclass(frozen=True)
class LabelSettings(CorpusSettings):
    """How to read labels that a table or a file's name has."""

    label_set: LabelSet = field(default="all", metadata=CorpusSettings.__dataclass_fields__["label_set"].metadata)
    emotions: tuple[str, ...] = setting((), "What its names mean: A=fear,F=happy,calm=neutral,odd=other.")
    unknown_emotions: Literal["stop", "keep", "drop"] = setting(
        "stop", "Names that are neither known nor in --emotions: stop and list them, keep them, drop their rows."
    )
    scale: str | None = setting(None, "Of dimensions not in [0, 1]: 1,5 or arousal=1,7;valence=-1,1.")
    columns: tuple[str, ...] = setting((), "What its columns are: emotion=mood,audio=clip.")
    splits: tuple[str, ...] = setting((), "What its splits are: train-clean-100=train,dev-other=validation.")
    split: str | None = setting(None, "Of the rows that name none.")
    language: str | None = setting(None, "Of the rows that name none, for example en.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("emotions", "columns", "splits"):
            read_words(getattr(self, name), name)
        read_scales(self.scale)


def read_words(pairs: Sequence[str], name: str, example: str = "A=fear,F=happy") -> dict[str, str]:
    """Return `("A=fear", "F=happy")` as a dict; `name` is the setting's, for its errors."""
    if odd := [pair for pair in pairs if not pair.partition("=")[2].strip()]:
        raise ValueError(f"{name} has {odd[0]!r}, expected pairs such as {example}.")
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}


def read_scales(scale: str | None) -> dict[str, tuple[float, float]]:
    """Return lowest and highest rating of each dimension that a scale names, `"1,5"` of all three."""
    found: dict[str, tuple[float, float]] = {}
    for part in (scale or "").split(";") if scale else ():
        name, _, limits = part.rpartition("=")
        try:
            low, high = (float(limit) for limit in limits.split(","))
        except ValueError:
            low = high = 0.0
        if low >= high or name.strip() not in ("", *DIMENSIONS):
            raise ValueError(f"scale is {scale!r}, expected for example 1,5 or arousal=1,7;valence=-1,1.")
        found |= dict.fromkeys([name.strip()] if name else DIMENSIONS, (low, high))
    return found


@dataclass(frozen=True)
class FolderSettings(LabelSettings):
    """Those of one's own speech."""

    root: Path = setting(REQUIRED, "A .csv or .jsonl table with paths, or a folder of audio files.", argument=True)
    pattern: str | None = setting(None, "What paths say: a regular expression with named groups, or a .yaml file.")
    unlabelled: bool = setting(False, "The table has no emotions.")
    name: str | None = setting(None, "What cards and comparisons call the corpus; by default the folder's name.")
    NAME: ClassVar[str] = "folder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name is {self.name!r}, expected letters, digits, '.', '_' and '-' only.")

    @property
    def directory(self) -> Path:
        """Return where the data set goes."""
        return (self.output_dir or Path("data") / (self.name or self.root.absolute().stem)).expanduser().absolute()


@dataclass(frozen=True)
class InspectSettings:
    """What a look at a data set reads, finds and shows."""

    data: str = setting(REQUIRED, DATA_SET, argument=True, place="dataset")
    output_dir: Path | None = setting(None, "Folder of report and plot; else runs/inspect/NAME.")
    audio: bool = setting(True, "Decode every clip; --no-audio looks at the table alone.")
    num_proc: int | None = setting(None, "Processes that decode; else one for each core.", min=1)
    # Whisper's window: longer clips are cut into several.
    max_seconds: float = setting(30.0, "Longer clips are a finding.", min=0)
    show: int = setting(5, "Rows to show, from all over the data set.", min=0)
    strict: bool = setting(False, "Exit with 1 if there is a finding.")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the commands that add a column to a data set share."""

    data: str = setting(REQUIRED, DATA_SET, argument=True, place="dataset")
    out: Path = setting(REQUIRED, "The rows with what is added: .jsonl or .parquet.")
    split: str | None = setting(None, "Split of the data; by default every one.")
    batch_size: int = setting(16, "Clips read, or replies written by a local LLM, at once.", min=1)
    device: str = setting("auto", "Of a local model: cpu, cuda, cuda:1, … or auto.")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn."""

    max_new_tokens: int = setting(128, "Longest reply, in tokens.", min=1)
    temperature: float = setting(0.0, "0 takes the most probable token.", min=0)
    seed: int = setting(0, "Of the draws, with a temperature.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class TargetSettings(Sampling):
    """What makes the replies of one file comparable; a resumed run must have the same."""

    text_model: str = setting(REQUIRED, "The chat LLM that writes: an id, a path, or its name at the endpoint.")
    revision: str = setting("main", "Of a local LLM: branch, tag or commit on the Hub.")
    prompt: str = setting(WRITER_PROMPT, "Before the transcript; {emotion} may stand in it.")
    system_prompt: str = setting(SYSTEM_PROMPT, "System turn of the writer; empty for none.")
    extra_body: str | None = setting(None, "JSON: further fields of the endpoint's requests.")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.prompt.format(emotion="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"The prompt may hold {{emotion}} and no other field, got {self.prompt!r}.") from error
        read_object(self.extra_body, "extra_body", '{"top_k": 5}')

    @property
    def identity(self) -> dict[str, object]:
        """Return what two runs must share to make one file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(TargetSettings)}

    @property
    def columns(self) -> tuple[str, ...]:
        """Return what a row needs for its request."""
        return ("text", "emotion") if self.prompt.format(emotion="A") != self.prompt.format(emotion="B") else ("text",)


@dataclass(frozen=True)
class WriteTargetsSettings(TargetSettings, RunSettings):
    """Where replies come from, and what becomes of them."""

    endpoint: str | None = setting(None, "OpenAI-compatible, such as http://host:8000/v1.")
    api_key_env: str | None = setting(None, "Environment variable with the endpoint's key.")
    concurrency: int = setting(16, "Requests to the endpoint at once.", min=1)
    engine: Literal["transformers", "vllm"] = setting("transformers", "What runs a local LLM.")
    engine_args: str | None = setting(None, 'JSON: arguments of vllm.LLM, such as {"max_model_len": 4096}.')
    min_words: int = setting(3, "Shorter replies are dropped.", min=1)
    max_words: int = setting(150, "Longer replies are dropped.", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_engine(self.engine, self.engine_args, self.device, ("model", "revision"))
        if self.endpoint is not None and self.engine == "vllm":
            raise ValueError("An endpoint runs its own LLM: leave --engine vllm out, or the endpoint.")


@dataclass(frozen=True)
class AnnotationSettings:
    """What makes the readings of one file comparable; a resumed run must have the same."""

    emotion_model: str = setting(REQUIRED, "The emotion tower: an id or a path.", place="checkpoint")
    revision: str = setting("main", "Of the tower: branch, tag or commit on the Hub.")
    overwrite: bool = setting(False, "Replace numbers that are there.")

    @property
    def identity(self) -> dict[str, object]:
        """Return what two runs must share to make one file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(AnnotationSettings)}

    @property
    def source(self) -> str:
        """Return what `dimension_source` says of a reading."""
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PSEUDO_SOURCE}{self.emotion_model}{revision}"


@dataclass(frozen=True)
class AnnotateSettings(AnnotationSettings, RunSettings):
    """What the dimensions are read from, and where they go."""
