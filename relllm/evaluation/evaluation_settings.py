"""What `relllm evaluate`, `compare`, `empathy train` and `empathy score` are told, and the words they share.

Nothing heavy is imported here: the command line is made from these classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

Task: TypeAlias = Literal["ser", "dimensions", "empathy"]
System: TypeAlias = Literal["text-only", "speech-only", "re-llm"]
Mechanism: TypeAlias = Literal["ER", "IP", "EX"]  # of empathy, after EPITOME
LabelSetName: TypeAlias = Literal["4", "5", "all"]
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

TASKS: tuple[Task, ...] = get_args(Task)
SYSTEMS: tuple[System, ...] = get_args(System)
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
LEVELS = 3  # of a mechanism: none, weak, strong
WAYS = ("generated", "likelihood", "head")  # of recognising an emotion
FORMAT, PREDICTIONS, METRICS = "relllm-run-1", "predictions.jsonl", "metrics.json"  # of a run's folder


@dataclass(frozen=True)
class EvaluationSettings:
    """One run of `relllm evaluate`. Raises `ValueError` on a task, a precision or a number that is none."""

    model: str = field(
        metadata={"argument": True, "help": "A checkpoint, or for text-only any causal LM: a directory or Hub id."}
    )
    data: str = field(
        metadata={"argument": True, "help": "A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id."}
    )
    output_dir: Path = field(metadata={"help": "Folder for predictions, metrics and plots."})
    tasks: tuple[Task, ...] | None = field(
        default=None,
        metadata={"help": "Of ser, dimensions, empathy, with commas; by default all that can be measured."},
    )
    system: System | None = field(default=None, metadata={"help": "By default what the checkpoint is."})
    label_set: LabelSetName | None = field(
        default=None, metadata={"help": "Emotions to choose from; by default the checkpoint's."}
    )
    split: str = field(default="test", metadata={"help": "Split of the data; all, or empty, for all rows."})
    held_out: str | None = field(
        default=None, metadata={"help": "The test split made at reading, such as session=Ses05."}
    )
    empathy_scorers: str | None = field(default=None, metadata={"help": "Folder of trained scorers of ER, IP, EX."})
    batch_size: int = field(default=16, metadata={"min": 1, "help": "Clips at once, in each process."})
    max_new_tokens: int = field(default=128, metadata={"min": 1, "help": "Longest reply, in tokens."})
    limit: int | None = field(default=None, metadata={"min": 1, "help": "Only the first so many rows."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, … or auto."})
    dtype: Precision = field(default="auto", metadata={"help": "Auto is the checkpoint's own."})
    revision: str = field(default="main", metadata={"help": "Of the model: branch, tag or commit on the Hub."})
    seed: int = field(default=0, metadata={"help": "Recorded; answers are greedy."})
    name: str | None = field(
        default=None, metadata={"help": "What tables call the run; by default the folder's name."}
    )

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks or () if task not in TASKS]
        if unknown or self.tasks == ():
            raise ValueError(f"Unknown tasks {unknown}; expected some of {', '.join(TASKS)}.")
        if self.dtype not in get_args(Precision):
            raise ValueError(f"dtype must be one of {', '.join(get_args(Precision))}, got {self.dtype!r}.")
        if self.label_set not in (None, *get_args(LabelSetName)):
            raise ValueError(f"label_set must be one of {', '.join(get_args(LabelSetName))}, got {self.label_set!r}.")
        for name, value in (("batch_size", self.batch_size), ("limit", self.limit or 1)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class ComparisonSettings:
    """One run of `relllm compare`."""

    runs: list[Path] = field(metadata={"argument": True, "help": "Folders that `relllm evaluate` wrote."})
    baseline: list[str] = field(
        metadata={"help": "What gains are over: a system, a run's name or its folder. May be repeated."}
    )
    output_dir: Path = field(default=Path("runs/comparison"), metadata={"help": "Folder for the tables and plots."})
    resample: Literal["auto", "clips", "speakers"] = field(
        default="auto", metadata={"help": "What the bootstrap draws; auto: speakers where there are 10."}
    )
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})


@dataclass(frozen=True)
class EmpathySettings:
    """One scorer to train. Raises `ValueError` on an unknown mechanism or device, or a number outside its range."""

    data: Path = field(metadata={"help": "EPITOME's CSV file of the mechanism."})
    mechanism: Mechanism = field(metadata={"help": "Emotional reactions, interpretations or explorations."})
    encoder: str = field(
        default="roberta-base", metadata={"help": "Any encoder of Transformers: a Hub id or a directory."}
    )
    output_dir: Path = field(
        default=Path("runs/empathy"), metadata={"help": "The scorer goes into a folder MECHANISM in it."}
    )
    revision: str = field(default="main", metadata={"help": "Of the encoder: branch, tag or commit on the Hub."})
    max_length: int = field(default=64, metadata={"min": 3, "help": "Tokens of a post or response; the rest is cut."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Falls linearly to 0."})
    batch_size: int = field(default=32, metadata={"min": 1, "help": "Pairs a step."})
    epochs: int = field(default=4, metadata={"min": 1, "help": "The best on the validation split is kept."})
    level_weight: float = field(default=1.0, metadata={"min": 0, "help": "Of the level's loss."})
    rationale_weight: float = field(default=0.5, metadata={"min": 0, "help": "Of the rationale's loss."})
    validation_share: float = field(default=0.1, metadata={"help": "Of the seeker posts."})
    test_share: float = field(default=0.2, metadata={"help": "Of the seeker posts."})
    seed: int = field(default=0, metadata={"help": "Of the split, the fresh weights, the order and the dropout."})
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "Auto takes a GPU if there is one."})

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {self.mechanism!r}.")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device must be 'auto' or 'cpu', got {self.device!r}.")
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


@dataclass(frozen=True)
class ScoringSettings:
    """One table of `relllm empathy score`."""

    pairs: Path = field(
        metadata={"argument": True, "help": "A .csv or .jsonl table with seeker_post and response_post."}
    )
    scorers: Path = field(default=Path("runs/empathy"), metadata={"help": "Folder of trained scorers, or of one."})
    out: Path | None = field(
        default=None, metadata={"help": "The table with levels; by default PAIRS.scored beside it."}
    )
    batch_size: int = field(default=32, metadata={"min": 1, "help": "Pairs at once."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1, … or auto."})
