"""The rules that keep a written reply from being learned."""

import pytest

from relllm.data.replies.cleaning import CleaningRules, clean_reply
from relllm.processing.prompts_relllm import SYSTEM_PROMPT, WRITER_PROMPT

RULES = CleaningRules(prompts=(WRITER_PROMPT, SYSTEM_PROMPT))
GOOD = (
    "I'm sorry to hear that. What happened next?",
    "I can't help but smile with you! Tell me more.",
    "I cannot imagine how hard that was. Can you tell me more about it?",
    "Oh no! Are you all right?",
    "那一定很难过。你想聊聊吗？",
    "I can't help with the pain itself, but I can listen.",
)


@pytest.mark.parametrize("reply", GOOD)
def test_a_good_reply_passes(reply: str) -> None:
    transcript = "我今天很难过" if ord(reply[0]) > 0x3000 else "I failed the exam."
    assert clean_reply(f"  {reply}\n", transcript, finished=True, rules=RULES).text == reply
    assert clean_reply(reply, transcript, finished=True, rules=RULES).dropped is None


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("", "empty"),
        (" ...!? ", "empty"),
        ("As an AI language model, I do not have feelings.", "refusal"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m sorry, I’m unable to continue this sentence for you.", "refusal"),
        ("I am just a language model, so I cannot feel it.", "refusal"),
        ("作为一个AI，我没有感情。", "refusal"),
        ("That is sad.<|im_end|>\n<|im_start|>user", "role_marker"),
        ("That is sad.\nUser: what now?\nAssistant: I see.", "role_marker"),
        ("Continue the following sentence that reflects a 'sad' tone", "prompt_echo"),
        ("You are an empathetic listener. React to it.", "prompt_echo"),
        ("i failed the exam", "transcript_echo"),
        ("Oh no.", "too_short"),
        ("so " + " ".join(f"word{i}" for i in range(200)) + ".", "too_long"),
        ("I see that it is hard. " * 8, "repetition"),
        ("那一定很难过。你想聊聊吗？", "wrong_script"),
        ("<think>The user is sad, so", "unfinished"),
    ],
)
def test_each_rule_drops_what_it_names(reply: str, rule: str) -> None:
    assert clean_reply(reply, "I failed the exam.", finished=True, rules=RULES).dropped == rule


def test_a_reply_that_ran_into_the_limit_ends_at_its_last_sentence() -> None:
    cut = clean_reply("That sounds hard. How did you", "I fell.", finished=False, rules=RULES)
    assert (cut.text, cut.dropped, cut.mended) == ("That sounds hard.", None, ("cut_at_sentence",))
    assert clean_reply("That sounds hard and", "I fell.", finished=False, rules=RULES).dropped == "unfinished"


def test_limits_that_cannot_be_are_an_error() -> None:
    with pytest.raises(ValueError, match="min_words <= max_words"):
        CleaningRules(min_words=9, max_words=3)
