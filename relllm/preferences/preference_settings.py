"""What rewards are, and what `relllm score-replies` is told. Nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from relllm.evaluation.evaluation_settings import MECHANISMS
from relllm.setting import setting

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


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise a `ValueError` on a reward that is none, a weight that is no number, or weights that are all 0."""
    for name, weight in weights.items():
        if name not in REWARDS:
            raise ValueError(f"Unknown reward {name!r}; expected some of {', '.join(REWARDS)}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"The weight of the reward {name} is {weight!r}, expected a number such as 1 or -0.1.")
    if not any(weights.values()):
        raise ValueError(f"No reward has a weight ({dict(weights)}): give for example ER=1, EX=1, length=-0.1.")
