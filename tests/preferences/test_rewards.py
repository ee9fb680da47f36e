"""Rewards by name: each against a hand-written value, and what is refused before anything is loaded."""

import math
from pathlib import Path

import pytest
import torch
from empathy_scorers import save_scorers
from transformers import AutoTokenizer

from relllm.evaluation.empathy.scorer import EmpathyScorer
from relllm.preferences.preference_settings import RewardSettings
from relllm.preferences.rewards import JudgeReward, check_rewards, load_rewards, weigh_replies

ROWS = [
    {"id": "a", "text": "i feel sad today", "emotion": "sad"},
    {"id": "b", "text": "ok fine", "emotion": None, "heard": "happy"},
]
REPLIES = ["so sorry . that is hard", "tell me more ?"]


def test_the_reward_of_a_mechanism_is_the_level_that_its_scorer_expects(tmp_path: Path) -> None:
    scorers = save_scorers(tmp_path)
    scored = weigh_replies(load_rewards({"ER": 1, "EX": -0.5, "length": 0}, scorers=str(scorers)), ROWS, REPLIES)
    for name in ("ER", "EX"):
        model = EmpathyScorer.from_pretrained(scorers / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(scorers / name)
        for row, reply, one in zip(ROWS, REPLIES, scored, strict=True):
            seeker, response = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (row["text"], reply))
            with torch.no_grad():
                p = model(seeker, response).level_logits[0].softmax(-1)
            assert one[name] == pytest.approx(float(p[1] + 2 * p[2]), abs=1e-5)
    assert [one["total"] for one in scored] == pytest.approx([one["ER"] - 0.5 * one["EX"] for one in scored])


@pytest.mark.parametrize(
    ("name", "reply", "value"),
    [
        ("length", "one two", 1),
        ("length", "one two three", 0),
        ("length", "one two three four, five six!", 2),
        ("length", "", 3),
        ("length", "我很难过", 0),
        ("repetition", "a b c d", 0),
        ("repetition", "a b c a b c", 0.25),  # abc bca cab abc: one of four was there
        ("repetition", "no no no no no", 2 / 3),
        ("repetition", "hm", 0),
        ("emotion", "You sound sad.", 1),
        ("emotion", "You sound happy.", -1),
        ("emotion", "You are not happy.", 0),
        ("emotion", "Sad or angry?", 0),
        ("emotion", "Tell me more.", 0),
    ],
)
def test_a_reward_without_a_model_is_the_hand_written_value(name: str, reply: str, value: float) -> None:
    ((reward, _),) = load_rewards({name: -0.1}, min_words=3, max_words=4)
    assert reward(ROWS[:1], [reply]) == [pytest.approx(value)]


def test_without_a_label_the_emotion_is_what_the_model_heard() -> None:
    ((reward, weight),) = load_rewards({"emotion": 0.5})
    assert reward(ROWS[1:], ["What a joy!"]) == [1.0] and weight == 0.5
    with pytest.raises(ValueError, match="'c' has no emotion or heard, which the reward emotion needs"):
        reward([{"id": "c", "emotion": ""}], ["Hello."])


def test_the_judges_number_is_read_of_ten_and_anything_else_is_unknown() -> None:
    class Writer:
        def write(self, requests, done):
            from relllm.data.replies.writers import Written

            self.asked = [request.user for request in requests]
            yield [Written(request.id, text, True) for request, text in zip(requests, ANSWERS, strict=True)][::-1]

    ANSWERS = ["7", " 10/10.", "Great: 9", "0", "70"]
    writer = Writer()
    found = JudgeReward(writer)([ROWS[0]] * 5, list("abcde"))  # type: ignore[arg-type]
    assert [None if math.isnan(value) else value for value in found] == [0.7, 1.0, None, 0.0, None]
    assert '"i feel sad today"' in writer.asked[0] and "sounding sad" in writer.asked[0] and '"a"' in writer.asked[0]


def test_what_cannot_be_rewarded_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    scorers = str(save_scorers(tmp_path / "good", ("ER",)))
    weak = str(save_scorers(tmp_path / "weak", ("ER",), recall={"0": 1, "1": 0.5, "2": 0}))
    for folder in ("good", "weak"):
        (tmp_path / folder / "ER" / "model.safetensors").unlink()  # what is loaded fails otherwise
    for weights, settings, message in [
        ({"empathy": 1}, {}, "Unknown reward 'empathy'; expected some of ER, IP, EX, emotion, length"),
        ({"length": "much"}, {}, "weight of the reward length is 'much'"),
        ({"length": math.nan}, {}, "weight of the reward length is nan"),
        ({"length": 0}, {}, "No reward has a weight"),
        ({}, {}, "No reward has a weight"),
        ({"ER": 1}, {}, "reward ER needs a scorer"),
        ({"ER": 1, "EX": 1}, {"scorers": scorers}, "has no scorer of EX, but of ER"),
        ({"ER": 1}, {"scorers": weak}, r"too weak to measure by.*level 2"),
        ({"judge": 1}, {"judge_model": "m"}, "needs judge_endpoint"),
        ({"judge": 1}, {"judge_model": "m", "judge_endpoint": "localhost"}, "must start with http"),
        ({"length": -1}, {"min_words": 9, "max_words": 3}, "got 9 and 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_rewards(weights, RewardSettings(**settings))
    with pytest.raises(OSError, match=r"model\.safetensors"):  # weak scorers are taken where that is allowed
        load_rewards({"ER": 1}, scorers=weak, allow_weak_scorers=True)
