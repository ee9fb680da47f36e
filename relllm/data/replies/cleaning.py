"""Rules that keep a written reply from being learned: refusals, echoes, junk. Each has a name, which the report uses.

A rule fires on what no good reply contains: "I can't help but smile" passes, and so does a reply without empathy.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from .prefaces import COMMENTARY, LEFT_DIRECTION, strip_prefaces

REFUSALS = re.compile(
    r"""
    \bas\s+an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model)\b
    | \bI(?:'m|\s+am)\s+(?:just\s+|only\s+)?an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model)\b
    | \bI\s*(?:can(?:no|')t|can\s+not|won't|(?:'m|\s+am)\s+(?:not\s+able|unable)\s+to)\s+
      (?:
        (?:assist|help)\s+(?:you\s+)?with\s+(?:that|this|your\s+request)
        | (?:fulfill?|comply\s+with|complete|process)\s+(?:that|this|your|the)\s+(?:request|task|sentence)
        | (?:continue|generate|provide|create|write)\s+(?:(?:that|this|the|such|any|a|with)\s+)*
          (?:sentence|content|response|continuation|text|prompt)
      )
    | 作为(?:一个|一名)?\s*(?:AI|人工智能|语言模型)
    """,
    re.IGNORECASE | re.VERBOSE,
)
ROLE_MARKERS = re.compile(r"(?im)<\|[a-z_]+\|>|<(?:start|end)_of_turn>|^\s*(?:user|human|assistant|system)\s*:")
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)]*(?=\s|$|[^\x00-\x7f])")
ECHO_WORDS = 5  # so many words of a prompt in a row are no coincidence
LOOP_WORDS, LOOP_TIMES = 4, 5  # the same four words five times over


@dataclass(frozen=True)
class CleaningRules:
    """The limits of the rules; a Chinese or Japanese character counts as a word."""

    min_words: int = 3
    max_words: int = 150
    prompts: tuple[str, ...] = ()  # what a reply must not repeat

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(f"Expected 1 <= min_words <= max_words, got {self.min_words} and {self.max_words}.")


@dataclass(frozen=True)
class CleanedReply:
    """A reply, mended where a mend applies."""

    text: str
    dropped: str | None  # the first rule that speaks against it; None for a good one
    mended: tuple[str, ...] = ()  # "thinking_removed", "cut_at_sentence", and those of `prefaces.py`


def clean_reply(text: str, transcript: str, *, finished: bool, rules: CleaningRules) -> CleanedReply:
    """Mend a reply to a transcript, and say whether it may be learned; `finished`: the LLM ended it, not the limit.

    A reasoning block `<think>…</think>` goes; a reply that ran into the token limit ends at its last sentence; what
    stands around it goes as [`~relllm.data.replies.prefaces.strip_prefaces`] says.
    """
    mended = []
    reply = THINKING.sub("", text)
    if reply != text:
        mended.append("thinking_removed")
    if not finished and "<think>" not in reply and (ends := list(SENTENCE_END.finditer(reply))):
        if reply[ends[-1].end() :].strip():
            mended.append("cut_at_sentence")
        reply, finished = reply[: ends[-1].end()], True
    reply, prefaces = strip_prefaces(reply.strip())
    return CleanedReply(reply, _broken_rule(reply, transcript, finished, rules), (*mended, *prefaces))


def _broken_rule(reply: str, transcript: str, finished: bool, rules: CleaningRules) -> str | None:
    words = split_words(reply)
    runs = set(word_runs(words, ECHO_WORDS))
    of_transcript, of_reply = _scripts(transcript), _scripts(reply)
    foreign = sum(count for script, count in of_reply.items() if script not in of_transcript)
    checks = {
        "empty": not words,
        "unfinished": not finished or "<think>" in reply,  # within its first sentence, or its reasoning
        "refusal": REFUSALS.search(reply.replace("’", "'")) is not None,
        "role_marker": ROLE_MARKERS.search(reply) is not None,
        "prompt_echo": any(runs.intersection(word_runs(split_words(prompt), ECHO_WORDS)) for prompt in rules.prompts),
        "transcript_echo": words == split_words(transcript),
        "stage_direction": LEFT_DIRECTION.search(reply) is not None,
        "commentary": COMMENTARY.search(reply) is not None,
        "too_short": len(words) < rules.min_words,
        "too_long": len(words) > rules.max_words,
        "repetition": max(Counter(word_runs(words, LOOP_WORDS)).values(), default=0) >= LOOP_TIMES,
        "wrong_script": bool(of_transcript) and 2 * foreign > of_reply.total(),
    }
    return next((name for name, broken in checks.items() if broken), None)


def split_words(text: str) -> list[str]:
    """Return the words in lower case; each character of a script without spaces is one."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.lower())


def word_runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    """Return each `length` words that stand in a row."""
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _scripts(text: str) -> Counter[str]:
    """Letters of each script, by the first word of their Unicode names: LATIN, CYRILLIC, CJK (kana with it), …"""
    scripts = (unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return Counter("CJK" if script in ("HIRAGANA", "KATAKANA") else script for script in scripts)
