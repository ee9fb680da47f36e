"""What `relllm evaluate`, `compare`, `empathy train` and `empathy score` are told, and the words they share.

Nothing heavy is imported here: the command line is made from these classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from relllm.data.rows import LabelSet
from relllm.setting import DATA_SET, REQUIRED, check_engine, check_settings, setting

Task: TypeAlias = Literal["ser", "dimensions", "empathy"]
System: TypeAlias = Literal["text-only", "text-only-tuned", "speech-only", "re-llm"]
Way: TypeAlias = Literal["generated", "likelihood", "head"]  # of recognising an emotion
Mechanism: TypeAlias = Literal["ER", "IP", "EX"]  # of empathy, after EPITOME
Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Resampling: TypeAlias = Literal["auto", "clips", "speakers"]
Grouping: TypeAlias = Literal["system", "name"]

TASKS: tuple[Task, ...] = get_args(Task)
SYSTEMS: tuple[System, ...] = get_args(System)
READERS: tuple[System, ...] = ("text-only", "text-only-tuned")  # of the transcript, which hear nothing
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
LEVELS = 3  # of a mechanism: none, weak, strong
HELD_OUT: dict[str, str] = {name: f"{name}, held out" for name in MECHANISMS}  # by a scorer that rewarded no training
EMPATHY_PARTS = (*MECHANISMS, *HELD_OUT.values())
REPLY_PARTS = ("words", "repetition", "distinct_2")  # of the replies' wording
WAYS: tuple[Way, ...] = get_args(Way)
NO_TRANSCRIPT = "no transcript"  # why text-only has no answer for a clip
FORMAT, PREDICTIONS, METRICS = "relllm-run-1", "predictions.jsonl", "metrics.json"  # of a run's folder


@dataclass(frozen=True)
class EvaluationSettings:
    """One run of `relllm evaluate`. Raises `ValueError` on a task, a precision or a number that is none."""

    model: str = setting(
        REQUIRED,
        "A checkpoint, or any causal LM or LoRA on one, which read transcripts: a directory or Hub id.",
        argument=True,
        place="checkpoint or adapter",
    )
    data: str = setting(REQUIRED, DATA_SET, argument=True, place="dataset")
    output_dir: Path = setting(REQUIRED, "Folder for predictions, metrics and plots.")
    tasks: tuple[Task, ...] | None = setting(None, "Of ser,dimensions,empathy; by default all that can be measured.")
    ways: tuple[Way, ...] = setting(WAYS, "Of recognition: generated,likelihood,head; the head alone runs no LLM.")
    system: System | None = setting(None, "By default what the checkpoint is.")
    label_set: LabelSet | None = setting(None, "Emotions to choose from; by default the checkpoint's.")
    split: str = setting("test", "Split of the data; all, or empty, for all rows.")
    held_out: str | None = setting(None, "The test split made at reading, such as session=Ses05.")
    allow_seen: bool = setting(False, "Measure rows that the model was trained on or chosen by; its card says so.")
    text_column: str | None = setting(None, "What text-only reads, for example a recogniser's words; by default text.")
    tower_cache_dir: str | None = setting(
        None, "Where the towers' outputs are kept, by a training without autocast or by this run."
    )
    empathy_scorers: str | None = setting(None, "Folder of trained scorers of ER, IP, EX.")
    held_out_scorers: str | None = setting(None, "Further scorers, which rewarded no training, beside the first.")
    reply_windows: bool = setting(False, "Score a reply longer than scorers read in parts: the highest level counts.")
    allow_weak_scorers: bool = setting(False, "Score with scorers that never give a level, or lose to a bag of words.")
    batch_size: int = setting(16, "Clips at once, in each process.", min=1)
    max_new_tokens: int = setting(128, "Longest reply, in tokens.", min=1)
    limit: int | None = setting(None, "Only the first so many rows.", min=1)
    device: str = setting("auto", "cpu, cuda, cuda:1, … or auto.")
    engine: Literal["transformers", "vllm"] = setting("transformers", "What runs the model.")
    engine_args: str | None = setting(None, 'JSON: arguments of vllm.LLM, such as {"max_model_len": 4096}.')
    dtype: Precision = setting("auto", "Auto is the checkpoint's own.")
    revision: str = setting("main", "Of the model: branch, tag or commit on the Hub.")
    seed: int = setting(0, "Recorded; answers are greedy.")
    name: str | None = setting(None, "What tables call the run; by default the folder's name.")

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks or () if task not in TASKS]
        if unknown or self.tasks == ():
            raise ValueError(f"Unknown tasks {unknown}; expected some of {', '.join(TASKS)}.")
        check_settings(self)
        if self.held_out_scorers is not None and self.empathy_scorers is None:
            raise ValueError("--held-out-scorers stand beside --empathy-scorers, which are missing.")
        if not self.ways or set(self.ways) - set(WAYS):
            raise ValueError(f"ways must be some of {', '.join(WAYS)}, got {', '.join(self.ways) or 'none'}.")
        if self.engine == "vllm" and self.tower_cache_dir is not None:
            raise ValueError("vLLM runs the towers itself: leave tower_cache_dir out.")
        check_engine(self.engine, self.engine_args, self.device, ("model", "revision", "dtype"))


@dataclass(frozen=True)
class ComparisonSettings:
    """One run of `relllm compare`."""

    runs: list[Path] = setting(REQUIRED, "Folders that `relllm evaluate` wrote.", argument=True)
    baseline: list[str] = setting(REQUIRED, "What gains are over: a system, a run's name or its folder. Repeat it.")
    output_dir: Path = setting(Path("runs/comparison"), "Folder for the tables and plots.")
    resample: Resampling = setting("auto", "What is drawn; auto: speakers if there are 10.")
    group: Grouping | None = setting(
        None, "Make runs of one system, or name, one row: several seeds, mean and deviation."
    )
    seed: int = setting(0, "Of the bootstrap.")


@dataclass(frozen=True)
class EmpathySettings:
    """One scorer to train. Raises `ValueError` on an unknown mechanism or device, or a number outside its range."""

    data: Path = setting(REQUIRED, "EPITOME's CSV file of the mechanism.")
    mechanism: Mechanism = setting(REQUIRED, "Emotional reactions, interpretations or explorations.")
    encoder: str = setting("roberta-base", "Any encoder of Transformers: a Hub id or a directory.", place="checkpoint")
    output_dir: Path = setting(Path("runs/empathy"), "The scorer goes into a folder MECHANISM in it.")
    revision: str = setting("main", "Of the encoder: branch, tag or commit on the Hub.")
    max_length: int = setting(64, "Tokens of a post or response; the rest is cut.", min=3)
    learning_rate: float | None = setting(
        None, "Falls linearly to 0; by default by the encoder's size: 2e-5 for RoBERTa-base, more for smaller ones."
    )
    batch_size: int = setting(32, "Pairs a step.", min=1)
    epochs: int = setting(10, "At most; the best on the validation split is kept.", min=1)
    patience: int = setting(4, "Epochs without a better one that end the training.", min=1)
    level_weight: float = setting(1.0, "Of the level's loss.", min=0)
    rationale_weight: float = setting(0.5, "Of the rationale's loss.", min=0)
    validation_share: float = setting(0.1, "Of the seeker posts.")
    test_share: float = setting(0.2, "Of the seeker posts.")
    seed: int = setting(0, "Of the split, the fresh weights, the order and the dropout.")
    device: Literal["auto", "cpu"] = setting("auto", "Auto takes a GPU if there is one.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


@dataclass(frozen=True)
class ScoringSettings:
    """One table of `relllm empathy score`."""

    pairs: Path = setting(REQUIRED, "A .csv or .jsonl table with seeker_post and response_post.", argument=True)
    scorers: Path = setting(Path("runs/empathy"), "Folder of trained scorers, or of one.")
    out: Path | None = setting(None, "The table with levels; by default PAIRS.scored beside it.")
    batch_size: int = setting(32, "Pairs at once.", min=1)
    device: str = setting("auto", "cpu, cuda, cuda:1, … or auto.")

    @property
    def file(self) -> Path:
        """The table with levels."""
        return self.out or self.pairs.with_name(f"{self.pairs.stem}.scored{self.pairs.suffix}")
