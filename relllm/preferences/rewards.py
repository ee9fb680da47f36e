"""Rewards: numbers for replies to spoken turns, each by a name, weighted and added up.

- `ER`, `IP`, `EX`: the level of the mechanism that a trained scorer expects, 0 to 2: the sum of level × probability,
  which still moves where the most probable level does not.
- `emotion`: 1 where the reply names the clip's emotion (its label, else what the model heard) and no other, -1 where
  it names another alone, else 0.
- `length`: how many words the reply is below or above a range, 0 inside. Its weight is to be below 0.
- `repetition`: which share of the reply's runs of three words were in it before, 0 to 1. Weight below 0.
- `judge`: what an OpenAI-compatible LLM says, as a share of 10; NaN where it says no number.

A scorer reads what it was trained on, the beginning of a reply (64 tokens), so that a longer one gains nothing by
length alone. A weight of 0 measures and does not reward.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from relllm.data.data_settings import Sampling
from relllm.data.replies.writers import EndpointWriter, Request
from relllm.evaluation.asking import parse_emotion
from relllm.evaluation.empathy.quality import check_scorers, read_quality
from relllm.evaluation.empathy.scoring import LoadedScorer, load_scorers, score_pairs
from relllm.evaluation.evaluation_settings import MECHANISMS
from relllm.evaluation.wording import count_words, repeated_share
from relllm.labels import EMOTIONS, FURTHER_EMOTIONS

from .preference_settings import RewardSettings, check_weights

JUDGE_PROMPT = """Somebody said{manner}: "{text}"

This was replied: "{reply}"

How well does the reply react to what the speaker feels, show that it was understood, and ask about it, without \
flattery and without padding? Answer with one whole number from 0 (not at all) to 10 (as well as a good listener), \
and nothing else."""
JUDGED = re.compile(r"\s*(10|\d)(?:\.0)?(?:\s*/\s*10)?\s*\.?\s*")


class Reward(ABC):
    """A number for each reply; `needs` are the columns of which a row must have one."""

    name: str
    needs: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        """Score the reply to each row.

        Args:
            rows: Of the data set, with `id`, `text` and `emotion` where known; `heard`, the emotion that the model
                heard in the clip, stands in for an `emotion` that is not.
            replies: As many.

        Raises:
            ValueError: If a row has none of the columns that the reward needs.
        """

    def find(self, row: Mapping) -> str | None:
        """Return the first of the columns that the reward needs which the row has; `None` without any."""
        return first_text(row, self.needs)

    def known(self, row: Mapping) -> str:
        """Return what [`~Reward.find`] does, or raise the error."""
        if (text := self.find(row)) is None:
            raise ValueError(
                f"The row {row.get('id')!r} has no {' or '.join(self.needs)}, which the reward {self.name} needs. "
                f"Leave such rows out, or give {self.name} no weight."
            )
        return text


class EmpathyReward(Reward):
    """The level of one mechanism of empathy that its scorer expects."""

    needs = ("text",)

    def __init__(self, name: str, scorer: LoadedScorer, device: str | torch.device, batch_size: int) -> None:
        self.name, self.scorer, self.device, self.batch_size = name, scorer, device, batch_size

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        pairs = [(self.known(row), reply) for row, reply in zip(rows, replies, strict=True)]
        scored = score_pairs({self.name: self.scorer}, pairs, batch_size=self.batch_size, device=self.device)
        return [sum(level * p for level, p in enumerate(one[self.name]["probabilities"])) for one in scored]


class EmotionReward(Reward):
    """Whether the emotion that a reply names is the clip's."""

    name, needs = "emotion", ("emotion", "heard")

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        names = (*EMOTIONS, *FURTHER_EMOTIONS)
        named = [(parse_emotion(reply, names), self.known(row)) for row, reply in zip(rows, replies, strict=True)]
        return [0.0 if emotion is None else 1.0 if emotion == true else -1.0 for emotion, true in named]


class LengthReward(Reward):
    """How many words a reply is below or above a range."""

    name = "length"

    def __init__(self, min_words: int, max_words: int) -> None:
        self.min_words, self.max_words = min_words, max_words

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        counts = map(count_words, replies)
        return [float(max(self.min_words - count, count - self.max_words, 0)) for count in counts]


class RepetitionReward(Reward):
    """How much of a reply it has said before."""

    name = "repetition"

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        return [repeated_share(reply) for reply in replies]


class JudgeReward(Reward):
    """What an LLM behind an OpenAI-compatible endpoint says of a reply, beside transcript and emotion."""

    name, needs = "judge", ("text",)

    def __init__(self, writer: EndpointWriter) -> None:
        self.writer = writer

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        asked = []
        for number, (row, reply) in enumerate(zip(rows, replies, strict=True)):
            manner = f" (sounding {row['emotion']})" if row.get("emotion") else ""
            prompt = JUDGE_PROMPT.format(manner=manner, text=self.known(row), reply=reply)
            asked.append(Request(str(number), "", prompt))
        answers = {written.id: written.text for batch in self.writer.write(asked, ()) for written in batch}
        found = [JUDGED.fullmatch(answers[request.id]) for request in asked]
        return [float("nan") if match is None else int(match[1]) / 10 for match in found]


WeightedRewards: TypeAlias = "list[tuple[Reward, float]]"
KINDS: dict[str, type[Reward]] = {
    **dict.fromkeys(MECHANISMS, EmpathyReward),
    **{"emotion": EmotionReward, "length": LengthReward, "repetition": RepetitionReward, "judge": JudgeReward},
}


def first_text(row: Mapping, columns: Sequence[str]) -> str | None:
    """Return the first text that a row has in some columns; `None` without any."""
    texts = (row.get(column) for column in columns)
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def of_last_clip(row: Mapping) -> dict[str, Any]:
    """Return a row with the text and the emotion of its last clip, where it has a list of one for each clip."""
    last = {name: of[-1] for name in ("text", "emotion") if isinstance(of := row.get(name), list) and of}
    return {**row, **last}


def check_rewards(weights: Mapping[str, float], settings: RewardSettings) -> None:
    """Say as a `ValueError` what is wrong with rewards before a model is loaded: a name, a scorer or judge missing."""
    check_weights(weights)
    wanted = [name for name in weights if name in MECHANISMS]
    if wanted and settings.scorers is None:
        raise ValueError(f"The reward {wanted[0]} needs a scorer: give `scorers`, a folder of `relllm empathy train`.")
    if wanted and settings.scorers is not None:
        present = list(read_quality(settings.scorers))
        if lacking := [name for name in wanted if name not in present]:
            raise ValueError(
                f"{settings.scorers} has no scorer of {', '.join(lacking)}, but of {', '.join(present) or 'nothing'}. "
                f"Train one (`relllm empathy train --mechanism {lacking[0]}`), or leave the reward out."
            )
        if not settings.allow_weak_scorers:
            check_scorers(settings.scorers, wanted)
    if "judge" in weights and (settings.judge_endpoint is None or settings.judge_model is None):
        raise ValueError("The reward judge needs judge_endpoint, such as http://host:8000/v1, and judge_model.")
    if "judge" in weights:
        _make_reward("judge", settings, {}, "cpu", 1)  # its address, key and client


def load_rewards(
    weights: Mapping[str, float], *, device: str | torch.device = "cpu", batch_size: int = 32, **settings: Any
) -> WeightedRewards:
    """Load rewards by name, each with its weight, such as `{"ER": 1, "EX": 1, "emotion": 0.5, "length": -0.1}`.

    `settings` are those of [`RewardSettings`], such as `scorers="runs/scorers"`.

    Raises:
        ValueError: If a name is none, or a scorer or the judge is missing; before anything is loaded.
    """
    given = RewardSettings(**settings)
    check_rewards(weights, given)
    scorers: dict[str, LoadedScorer] = {}
    if given.scorers is not None and set(weights) & set(MECHANISMS):
        scorers = load_scorers(Path(given.scorers))
    return [(_make_reward(name, given, scorers, device, batch_size), weight) for name, weight in weights.items()]


def _make_reward(
    name: str, settings: RewardSettings, scorers: Mapping[str, LoadedScorer], device: str | torch.device, size: int
) -> Reward:
    if name == "emotion":
        return EmotionReward()
    if name == "length":
        return LengthReward(settings.min_words, settings.max_words)
    if name == "repetition":
        return RepetitionReward()
    if name == "judge":
        assert settings.judge_endpoint is not None and settings.judge_model is not None  # it has been checked
        place = (settings.judge_endpoint, settings.judge_model, Sampling(max_new_tokens=16))
        return JudgeReward(EndpointWriter(*place, api_key_env=settings.judge_key_env))
    return EmpathyReward(name, scorers[name], device, size)


def weigh_replies(rewards: WeightedRewards, rows: Sequence[Mapping], replies: Sequence[str]) -> list[dict[str, float]]:
    """Return each reply's scores by name and, as `total`, their weighted sum, without those of weight 0."""
    columns = {reward.name: reward(rows, replies) for reward, _ in rewards}
    scored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for one in scored:
        one["total"] = sum(weight * one[reward.name] for reward, weight in rewards if weight)
    return scored
