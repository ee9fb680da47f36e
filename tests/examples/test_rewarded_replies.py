"""The example's rule: every reply of the corpus is a reaction with a level, and what the scorers learn follows it."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from relllm.demo.synthetic_text import REPLIES, SENTENCES

SCRIPT = Path(__file__).parents[2] / "examples" / "rewarded_replies.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("rewarded_replies", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_levels_are_those_of_the_reactions_but_for_the_noise(example, tmp_path: Path) -> None:
    assert len(example.REACTIONS) == sum(map(len, REPLIES.values()))
    example.write_pairs(tmp_path / "pairs.csv", "train", 0, count=400)
    with (tmp_path / "pairs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    begins = {reaction.partition("{")[0]: level for reaction, (_, level) in example.REACTIONS.items()}
    follows = [
        int(row["level"]) == next((level for one, level in begins.items() if row["response_post"].startswith(one)), 0)
        for row in rows
    ]
    assert len({row["seeker_post"] for row in rows}) == 400 and 0.88 < sum(follows) / 400 < 0.98


def test_the_truth_of_a_run_is_told_by_its_replies(example, tmp_path: Path) -> None:
    topic = SENTENCES["test"][0].topic
    sad, happy, neutral = REPLIES["sad"][0], REPLIES["happy"][2], REPLIES["neutral"][0]
    said = [("sad", sad), ("neutral", happy), ("angry", "Hm."), ("neutral", neutral)]
    lines = [{"emotion": emotion, "reply": reply.format(topic=topic)} for emotion, reply in said]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{}, *lines]))
    levels, suits = example.read_truth(tmp_path)
    assert levels == [2, 1, 0] and suits.tolist() == [1, 0, 0, 1]
    told = example.describe_truth(tmp_path, tmp_path)
    assert "level 1.000 (3 of 4 reactions are known)" in told and "in 0.500, +0.000 [+0.000, +0.000]" in told
