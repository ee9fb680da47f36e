"""What a model is asked to recognise an emotion, and the emotion that its answer names.

What lives here: the options in the frozen prompt, and the rules of reading an answer. What does not: asking
(`predicting.py`), counting (`recognition.py`).
"""

import re
from collections.abc import Sequence

from relllm.labels import canonical_emotion
from relllm.processing.prompts_relllm import RECOGNITION_PROMPT

_OPTIONS = "neutral, sad, angry, happy, or surprise"  # as the frozen prompt has them, which sets their order
_ORDER = ("neutral", "sad", "angry", "happy", "surprise")
_CLAUSE_END = re.compile(r"[.,;:!?()\n]|\bbut\b")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_NEGATIONS = ("not", "no", "never", "neither", "nor", "cannot")
_SHORTEST = 3  # letters of a name: "a" and "s" are words, and corpora's codes


def recognition_prompt(labels: Sequence[str]) -> str:
    """The frozen prompt with the labels in use as its options; with the original's five it is the original's prompt.

    Args:
        labels (`Sequence[str]`): Canonical names, at least two.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(labels) < 2:
        raise ValueError(f"Recognition needs at least two labels to choose from, got {list(labels)}.")
    options = [name for name in _ORDER if name in labels] + [name for name in labels if name not in _ORDER]
    comma = "," if len(options) > 2 else ""
    return RECOGNITION_PROMPT.replace(_OPTIONS, f"{', '.join(options[:-1])}{comma} or {options[-1]}")


def parse_emotion(answer: str, labels: Sequence[str]) -> str | None:
    """The emotion that an answer names.

    The rules: upper and lower case and punctuation do not matter. Every word of three letters or more that
    [`~relllm.labels.canonical_emotion`] knows is a mention ("anger" is angry, "joy" is happy). A mention behind a
    negation in the same clause ("not happy", "isn't sad or angry") does not count; a comma, a full stop or "but" ends
    a clause. The answer names an emotion if exactly one is left, however often: one that lists several has not chosen,
    and an emotion outside `labels` is no answer to the question.

    Args:
        answer (`str`): As the model wrote it.
        labels (`Sequence[str]`): The canonical names that were to choose from.

    Returns:
        `str` or `None`: One of `labels`; `None` where the answer names none of them, or several.
    """
    found: set[str] = set()
    for clause in _CLAUSE_END.split(answer.lower().replace("\u2019", "'")):
        for word in _WORD.findall(clause):
            if word in _NEGATIONS or word.endswith("n't"):
                break  # what follows in this clause is what the speaker is not
            if (emotion := _named(word)) is not None:
                found.add(emotion)
    (chosen,) = found if len(found) == 1 else (None,)
    return chosen if chosen in labels else None


def _named(word: str) -> str | None:
    if len(word) < _SHORTEST:
        return None
    try:
        return canonical_emotion(word)
    except ValueError:
        return None


__all__ = ["parse_emotion", "recognition_prompt"]
