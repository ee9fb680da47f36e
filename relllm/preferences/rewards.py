"""Rewards: numbers for replies to spoken turns, each by a name, weighted and added up (table in docs/preferences.md).

A scorer reads what it was trained on, the beginning of a reply (64 tokens), so that a longer one gains nothing by
length alone. A weight of 0 measures and does not reward.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
        """Score the reply to each row, as many replies as rows; `ValueError` for a row without what the reward needs.

        A row is the data set's, with `id`, `text` and `emotion` where known; `heard`, the emotion that the model heard
        in the clip, stands in for an `emotion` that is not.
        """

    def known(self, row: Mapping) -> str:
        """Return the first of the columns that the reward needs which the row has; `ValueError` without any."""
        if (text := first_text(row, self.needs)) is None:
            raise ValueError(
                f"The row {row.get('id')!r} has no {' or '.join(self.needs)}, which the reward {self.name} needs. "
                f"Leave such rows out, or give {self.name} no weight."
            )
        return text


class EmpathyReward(Reward):
    """The level of one mechanism of empathy that its scorer expects, 0 to 2: the sum of level × probability."""

    needs = ("text",)

    def __init__(self, name: str, scorer: LoadedScorer, device: str | torch.device) -> None:
        self.name, self.scorer, self.device = name, scorer, device

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        pairs = [(self.known(row), reply) for row, reply in zip(rows, replies, strict=True)]
        scored = score_pairs({self.name: self.scorer}, pairs, device=self.device)
        return [sum(level * p for level, p in enumerate(one[self.name]["probabilities"])) for one in scored]


class EmotionReward(Reward):
    """1 where the emotion that a reply names is the clip's, -1 where it names another alone, else 0."""

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
    """Which share of a reply's runs of three words were in it before."""

    name = "repetition"

    def __call__(self, rows: Sequence[Mapping], replies: Sequence[str]) -> list[float]:
        return list(map(repeated_share, replies))


class JudgeReward(Reward):
    """What an LLM behind an OpenAI-compatible endpoint says, as a share of 10; NaN where it says no number."""

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
    if "judge" in weights:
        _make_judge(settings)  # its address, key and client


def load_rewards(
    weights: Mapping[str, float], *, device: str | torch.device = "cpu", **settings: Any
) -> WeightedRewards:
    """Load rewards by name, each with its weight, such as `{"ER": 1, "EX": 1, "emotion": 0.5, "length": -0.1}`.

    `settings` are those of [`RewardSettings`], such as `scorers="runs/scorers"`. A name that is none, and a scorer or
    judge that is missing, is a `ValueError` before anything is loaded.
    """
    given = RewardSettings(**settings)
    check_rewards(weights, given)
    makers: dict[str, Callable[[], Reward]] = {
        "emotion": EmotionReward,
        "length": partial(LengthReward, given.min_words, given.max_words),
        "repetition": RepetitionReward,
        "judge": partial(_make_judge, given),
    }
    if given.scorers is not None and set(weights) & set(MECHANISMS):
        for name, scorer in load_scorers(given.scorers).items():
            makers[name] = partial(EmpathyReward, name, scorer, device)
    return [(makers[name](), weight) for name, weight in weights.items()]


def _make_judge(settings: RewardSettings) -> JudgeReward:
    if settings.judge_endpoint is None or settings.judge_model is None:
        raise ValueError("The reward judge needs judge_endpoint, such as http://host:8000/v1, and judge_model.")
    place = (settings.judge_endpoint, settings.judge_model, Sampling(max_new_tokens=16))
    return JudgeReward(EndpointWriter(*place, api_key_env=settings.judge_key_env))


def weigh_replies(rewards: WeightedRewards, rows: Sequence[Mapping], replies: Sequence[str]) -> list[dict[str, float]]:
    """Return each reply's scores by name and, as `total`, their weighted sum, without those of weight 0."""
    columns = {reward.name: reward(rows, replies) for reward, _ in rewards}
    scored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for one in scored:
        one["total"] = sum(weight * one[reward.name] for reward, weight in rewards if weight)
    return scored
