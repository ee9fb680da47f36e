"""The two questions to a language model: which emotion is this, and what do you reply?

What lives here: prompts as the tokenizer gets them, answers by generation and by likelihood. What does not: audio and
transcripts (`predicting.py`), the wording of the options and the reading of an answer (`answers.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relllm.inference.replies import generate_answers, score_answers
from relllm.modeling.modeling_relllm import ReLLMAudioOutput
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

from .answers import parse_emotion, recognition_prompt

Task: TypeAlias = Literal["ser", "dimensions", "empathy"]
TASKS: tuple[Task, ...] = ("ser", "dimensions", "empathy")
RECOGNITION_TOKENS = 16  # of an answer that names an emotion
DIGITS = 6  # of a number in the predictions; more would differ between machines
Turns: TypeAlias = "list[dict[str, object]]"


@dataclass(frozen=True)
class Questions:
    """What every clip is asked.

    Args:
        tasks (`tuple[str, ...]`): Of `TASKS`.
        labels (`tuple[str, ...]`): The emotions to choose from.
        max_new_tokens (`int`, *optional*, defaults to 128): Longest reply.
    """

    tasks: tuple[Task, ...]
    labels: tuple[str, ...]
    max_new_tokens: int = 128


class Asking:
    """The two questions to a language model, whatever the audio or text in them is.

    Args:
        model (`PreTrainedModel`): A ReLLM or any causal LM.
        tokenizer (`PreTrainedTokenizerBase`), template (`str`): Its own.
        questions ([`Questions`]): What to ask.
        options: Of `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        questions: Questions,
        **options: object,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.questions = questions
        self.options = {"pad_token_id": tokenizer.pad_token_id, **options}
        self.label_tokens = [answer_tokens(tokenizer, template, label) for label in questions.labels]

    def recognise(self, inputs: dict[str, Tensor], audio: ReLLMAudioOutput | None = None) -> list[dict]:
        """`generated` and `likelihood` of each prompt."""
        texts = self._generate(inputs, audio, RECOGNITION_TOKENS)
        scores = score_answers(self.model, inputs, self.label_tokens, audio=audio)
        labels = self.questions.labels
        return [
            {
                "generated": {"text": text, "emotion": parse_emotion(text, labels)},
                "likelihood": {name: number(value) for name, value in zip(labels, values, strict=True)},
            }
            for text, values in zip(texts, scores.softmax(-1).tolist(), strict=True)
        ]

    def reply(self, inputs: dict[str, Tensor], audio: ReLLMAudioOutput | None = None) -> list[str]:
        """A reply to each prompt."""
        return self._generate(inputs, audio, self.questions.max_new_tokens)

    def _generate(self, inputs: dict[str, Tensor], audio: ReLLMAudioOutput | None, limit: int) -> list[str]:
        answers = generate_answers(self.model, inputs, audio=audio, max_new_tokens=limit, **self.options)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def conversations(questions: Questions, turn: Mapping[str, str]) -> dict[str, Turns]:
    """The two requests about one turn, which is audio or text.

    Recognition has no system turn: ours asks for a reaction, and the question is for a name.
    """
    asked = {"type": "text", "text": recognition_prompt(questions.labels)}
    request = {"type": "text", "text": SPEECH_PROMPT}
    return {
        "recognition": [{"role": "user", "content": [asked, turn]}],
        "reply": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": [request, turn]}],
    }


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, template: str, questions: Questions, *, audio: bool
) -> dict[str, str]:
    """The two prompts as the tokenizer gets them, with the audio's placeholder or `{transcript}` in the turn."""
    turn = {"type": "audio"} if audio else {"type": "text", "text": "{transcript}"}
    return {name: render(tokenizer, template, turns) for name, turns in conversations(questions, turn).items()}


def answer_tokens(tokenizer: PreTrainedTokenizerBase, template: str, answer: str) -> list[int]:
    """Token ids of an answer up to and including the end of the turn, as they follow a prompt.

    Raises:
        ValueError: If the template does not put an answer right behind a prompt.
    """
    user: Turns = [{"role": "user", "content": "?"}]
    prompt = render(tokenizer, template, user)
    whole = render(tokenizer, template, [*user, {"role": "assistant", "content": answer}], answered=True)
    if not whole.startswith(prompt + answer):
        raise ValueError(
            f"The chat template puts {whole[len(prompt) :]!r} behind a prompt for the answer {answer!r}, so the "
            "answer's likelihood is not known. Use the template of `build_chat_template`."
        )
    return tokenizer(whole[len(prompt) :].rstrip(), add_special_tokens=False)["input_ids"]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: str | torch.device
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, padded on the left."""
    batch = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def render(tokenizer: PreTrainedTokenizerBase, template: str, turns: Turns, *, answered: bool = False) -> str:
    """A conversation as text, with the header of the answer behind it unless it is `answered`."""
    return tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=not answered
    )


def number(value: float) -> float:
    """A number for the predictions.

    Raises:
        ValueError: If it is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"The model's output is {value}: its weights or its precision are broken. Try --dtype float32."
        )
    return round(value, DIGITS)


__all__ = [
    "RECOGNITION_TOKENS",
    "TASKS",
    "Asking",
    "Questions",
    "Task",
    "answer_tokens",
    "conversations",
    "encode_texts",
    "number",
    "render",
    "render_prompts",
]
