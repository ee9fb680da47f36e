"""The two questions to a language model (which emotion is this, and what do you reply?) and how answers are read."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from relllm.labels import find_emotion
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT, ask_about, recognition_prompt

from .evaluation_settings import WAYS, Task, Way

RECOGNITION_TOKENS = 16  # of an answer that names an emotion
DIGITS = 6  # of a number in the predictions; more would differ between machines
Turns: TypeAlias = "list[dict[str, object]]"

_CLAUSE_END = re.compile(r"[.,;:!?()\n]|\bbut\b")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_NEGATIONS = ("not", "no", "never", "neither", "nor", "cannot")
_SHORTEST = 3  # letters of a name: "a" and "s" are words, and corpora's codes


@dataclass(frozen=True)
class Questions:
    """What every clip is asked."""

    tasks: tuple[Task, ...]
    labels: tuple[str, ...]  # the emotions to choose from
    max_new_tokens: int = 128  # of the longest reply
    instruction: str = SPEECH_PROMPT  # before a clip that is to be replied to, and the system turn then
    system_prompt: str = SYSTEM_PROMPT
    ways: tuple[Way, ...] = WAYS  # of recognising an emotion

    @property
    def in_words(self) -> bool:
        """Tell whether the LLM is asked for the emotion."""
        return "ser" in self.tasks and set(self.ways) != {"head"}


def conversations(questions: Questions, turn: Mapping[str, str]) -> dict[str, Turns]:
    """Return the two requests about one turn, which is audio or text."""
    request = [{"type": "text", "text": questions.instruction}] if questions.instruction else []
    reply: Turns = [{"role": "user", "content": [*request, turn]}]
    if questions.system_prompt:
        reply.insert(0, {"role": "system", "content": questions.system_prompt})
    return {"recognition": ask_about(recognition_prompt(questions.labels), dict(turn)), "reply": reply}


def render_prompts(tokenizer: Tokenizer, template: str, questions: Questions, *, audio: bool) -> dict[str, str]:
    """Return the two prompts as the tokenizer gets them, about the audio's placeholder or a `{transcript}`."""
    turn = {"type": "audio"} if audio else {"type": "text", "text": "{transcript}"}
    return {name: render(tokenizer, template, turns) for name, turns in conversations(questions, turn).items()}


def answer_tokens(tokenizer: Tokenizer, template: str, answer: str) -> list[int]:
    """Return the token ids of an answer, and the one that ends the turn, as they follow a prompt."""
    user: Turns = [{"role": "user", "content": "?"}]
    prompt = render(tokenizer, template, user)
    whole = render(tokenizer, template, [*user, {"role": "assistant", "content": answer}], answered=True)
    said = whole.removeprefix(prompt)
    if not (whole.startswith(prompt) and said.lstrip().startswith(answer)):  # some begin with a blank
        raise ValueError(
            f"The chat template puts {said!r} behind a prompt for the answer {answer!r}, so the "
            "answer's likelihood is not known. Use the template of `build_chat_template`."
        )
    tokens = tokenizer(said.rstrip(), add_special_tokens=False)["input_ids"]
    ends = [place for place, token in enumerate(tokens, start=1) if token in tokenizer.added_tokens_decoder]
    return tokens[: ends[0]] if ends else tokens


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str], device: str | torch.device) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, padded on the left; a rendered prompt has its own BOS."""
    form = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    batch = tokenizer(list(texts), **form)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def render(tokenizer: Tokenizer, template: str, turns: Turns, *, answered: bool = False) -> str:
    """Return a conversation as text, with the header of the answer behind it unless it is `answered`."""
    form = {"chat_template": template, "tokenize": False, "add_generation_prompt": not answered}
    return tokenizer.apply_chat_template(turns, **form)


def number(value: float) -> float:
    """Round a number for the predictions; raise `ValueError` if it is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"The model's output is {value}: weights or precision are broken. Try --dtype float32.")
    return round(value, DIGITS)


def parse_emotion(answer: str, labels: Sequence[str]) -> str | None:
    """Return the one of `labels` that an answer names, or `None`.

    Every word of three letters or more that [`~relllm.labels.canonical_emotion`] knows is a mention ("anger" is angry,
    "joy" is happy), in upper or lower case. A mention behind a negation in the same clause ("not happy", "isn't sad or
    angry") does not count; punctuation or "but" ends a clause. The answer names an emotion if exactly one is left,
    however often, and it is one of `labels`.
    """
    found: set[str] = set()
    for clause in _CLAUSE_END.split(answer.lower().replace("\u2019", "'")):
        for word in _WORD.findall(clause):
            if word in _NEGATIONS or word.endswith("n't"):
                break  # what follows in this clause is what the speaker is not
            if len(word) >= _SHORTEST and (emotion := find_emotion(word, None)) is not None:
                found.add(emotion)
    (chosen,) = found if len(found) == 1 else (None,)
    return chosen if chosen in labels else None
