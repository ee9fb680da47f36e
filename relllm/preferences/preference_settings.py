"""What rewards are, and what `relllm score-replies` is told. Nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relllm.data.data_settings import RunSettings
from relllm.evaluation.evaluation_settings import MECHANISMS, Precision
from relllm.setting import REQUIRED, setting

REWARDS = (*MECHANISMS, "emotion", "length", "repetition", "judge")


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What rewards need beside their weights. Raises `ValueError` on a range of words that is none."""

    scorers: str | None = setting(None, "Folder of trained scorers, for ER, IP and EX (`relllm empathy train`).")
    allow_weak_scorers: bool = setting(False, "Take scorers that never give a level, or are below a bag of words.")
    min_words: int = setting(5, "Of a reply; the reward length counts the words below.", min=0)
    max_words: int = setting(60, "Of a reply; the reward length counts the words above.", min=1)
    judge_endpoint: str | None = setting(None, "OpenAI-compatible, such as http://host:8000/v1, for the reward judge.")
    judge_model: str | None = setting(None, "The judge's name at the endpoint.")
    judge_key_env: str | None = setting(None, "Environment variable with the endpoint's key.")

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(f"Expected 0 <= min_words <= max_words, got {self.min_words} and {self.max_words}.")


@dataclass(frozen=True, kw_only=True)
class ScoreRepliesSettings(RewardSettings, RunSettings):
    """Which replies are sampled, how they are scored, and where the pairs go."""

    out: Path = setting(REQUIRED, "The pairs: .jsonl or .parquet, or a folder for metadata.jsonl.")
    model: str = setting(REQUIRED, "The ReLLM that replies: a directory or a Hub id.", place="checkpoint")
    rewards: str = setting("ER=1,EX=1,length=-0.1,repetition=-1", f"Of {', '.join(REWARDS)}, each with its weight.")
    samples: int = setting(8, "Replies to each clip.", min=2)
    margin: float = setting(0.1, "Least difference of the weighted scores of a pair.", min=0)
    temperature: float = setting(1.0, "Of the draws.", min=0.01, max=2)
    top_p: float = setting(1.0, "Draw from the fewest tokens that have this probability together.", min=0.01, max=1)
    max_new_tokens: int = setting(128, "Longest reply, in tokens.", min=1)
    seed: int = setting(0, "Of the draws, together with a row's id.")
    dtype: Precision = setting("auto", "Auto is the checkpoint's own.")
    revision: str = setting("main", "Branch, tag or commit of the model on the Hub.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward."""
        return parse_rewards(self.rewards)

    @property
    def file(self) -> Path:
        """The file of the pairs."""
        return self.out if self.out.suffix else self.out / "metadata.jsonl"


def parse_rewards(given: str) -> dict[str, float]:
    """Return `{"ER": 1.0, "length": -0.1}` of `"ER=1,length=-0.1"`."""
    try:
        pairs = [(name.strip(), float(weight)) for name, weight in (part.split("=") for part in given.split(","))]
    except ValueError as error:
        raise ValueError(f"rewards is {given!r}, expected names with weights, as in ER=1,length=-0.1.") from error
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"rewards is {given!r}, expected each name once.")
    return dict(pairs)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise a `ValueError` on a reward that is none, a weight that is no number, or weights that are all 0."""
    for name, weight in weights.items():
        if name not in REWARDS:
            raise ValueError(f"Unknown reward {name!r}; expected some of {', '.join(REWARDS)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"The weight of the reward {name} is {weight!r}, expected a number such as 1 or -0.1.")
    if not any(weights.values()):
        raise ValueError(f"No reward has a weight ({dict(weights)}): give for example ER=1, EX=1, length=-0.1.")
