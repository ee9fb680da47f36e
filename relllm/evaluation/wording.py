"""How long, how repetitive and how various replies are: what a gain in empathy must not be bought with."""

from __future__ import annotations

from collections.abc import Sequence

from relllm.data.replies.cleaning import split_words, word_runs

from .evaluation_settings import REPLY_PARTS

REPEATED = 3  # words of the n-grams whose repetition within a reply counts


def count_words(text: str) -> int:
    """Count the words of a text; a Chinese or Japanese character is one."""
    return len(split_words(text))


def repeated_share(text: str) -> float:
    """Return which share of the runs of three words in a text were in it before: 0 for a text that repeats nothing."""
    return 1 - distinct_share([text], REPEATED)


def describe_wording(replies: Sequence[str]) -> dict[str, float]:
    """Return the mean number of words and share of repetition, and distinct-2 over all replies, by `REPLY_PARTS`."""
    words, repeated = [count_words(one) for one in replies], [repeated_share(one) for one in replies]
    values = (sum(words) / len(words), sum(repeated) / len(repeated), distinct_share(replies, 2))
    return dict(zip(REPLY_PARTS, values, strict=True))


def distinct_share(texts: Sequence[str], length: int) -> float:
    """Return distinct-n (Li et al. 2016): different runs of `length` words by all such runs, over all texts at once.

    Texts too short for any have 1. The share falls with the number of texts: compare it between systems on the same
    clips alone.
    """
    runs = [run for text in texts for run in word_runs(split_words(text), length)]
    return len(set(runs)) / len(runs) if runs else 1.0
