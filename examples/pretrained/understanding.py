"""How much of the words a ReLLM understands: what it repeats, and how likely it finds an answer to them.

Two measurements, neither of which an emotion can pass: the word error rate when asked to repeat, and the likelihood of
the LLM's own answer to the transcript, given the speech, the transcript, nothing, and another clip's speech.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from datasets import Dataset
from jiwer import wer
from transformers import BatchFeature, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from relllm.inference.replies import GREEDY
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.audio_relllm import load_audio
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT
from relllm.training.collator import ReLLMCollator
from relllm.training.losses import IGNORE_INDEX

REPEAT_PROMPT = "Repeat the following sentence: "
REPEAT_TOKENS, ANSWER_TOKENS = 20, 24
BATCH_SIZE = 10
Turns: TypeAlias = "list[dict[str, object]]"
words = BasicTextNormalizer()


@dataclass
class Understanding:
    """What [`measure_understanding`] found.

    Args:
        word_error_rate (`dict[str, float]`): Of what is repeated, by what was given: `speech`; `transcript`, which the
            same LLM reads; and what was repeated of speech against another clip's words (`other words`).
        log_likelihood (`dict[str, float]`): A token of the LLM's own answer to the transcript, in nats, by what was
            given: `transcript`, `speech`, `another clip's speech`, `nothing`.
        repeated (`list[tuple[str, str]]`): What was said and what was repeated.
    """

    word_error_rate: dict[str, float]
    log_likelihood: dict[str, float]
    repeated: list[tuple[str, str]]


def measure_understanding(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, rows: Dataset
) -> Understanding:
    """Measures a checkpoint on clips with transcripts.

    Args:
        model ([`ReLLMForConditionalGeneration`]), processor ([`ReLLMProcessor`]): Of one checkpoint; the LoRA acts at
            audio positions only, so what reads a transcript is the LLM alone.
        rows (`datasets.Dataset`): With `audio` and `text`, at least two different texts.
    """
    texts = list(rows["text"])
    others = _other_places(texts)
    audio = [{"type": "audio", "audio": path} for path in rows["audio"]]
    said = [{"type": "text", "text": text} for text in texts]
    heard = _answer(model, processor, [_turns(part, REPEAT_PROMPT) for part in audio], REPEAT_TOKENS)
    read = _answer(model, processor, [_turns(part, REPEAT_PROMPT) for part in said], REPEAT_TOKENS)
    errors = {
        "transcript": word_errors(texts, read),
        "speech": word_errors(texts, heard),
        "other words": word_errors([texts[other] for other in others], heard),
    }
    answers = _answer(model, processor, [_turns(part, SPEECH_PROMPT, SYSTEM_PROMPT) for part in said], ANSWER_TOKENS)
    given: dict[str, Sequence[dict | None]] = {
        "transcript": said,
        "speech": audio,
        "another clip's speech": [audio[other] for other in others],
        "nothing": [None] * len(texts),
    }
    likelihood = {
        name: _log_likelihood(
            model, processor, [_turns(part, SPEECH_PROMPT, SYSTEM_PROMPT) for part in parts], answers
        )
        for name, parts in given.items()
    }
    return Understanding(errors, likelihood, list(zip(texts, heard, strict=True)))


def whisper_word_errors(audio_model: str, rows: Dataset) -> float:
    """The word error rate of the whole Whisper that the speech tower is the encoder of: what could be understood.

    Args:
        audio_model (`str`): A directory or a Hub id.
        rows (`datasets.Dataset`): With `audio` and `text`.
    """
    processor = WhisperProcessor.from_pretrained(audio_model)
    model = WhisperForConditionalGeneration.from_pretrained(audio_model, dtype=torch.float32).eval()
    heard: list[str] = []
    for start in range(0, len(rows), BATCH_SIZE):
        clips = [load_audio(path) for path in rows[start : start + BATCH_SIZE]["audio"]]
        features = processor(clips, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            tokens = model.generate(features)
        heard += processor.batch_decode(tokens, skip_special_tokens=True)
    return word_errors(list(rows["text"]), heard)


def word_errors(said: Sequence[str], heard: Sequence[str]) -> float:
    """Word error rate without case and punctuation; above 1 where more words are inserted than were said."""
    rate: float = wer([words(text) for text in said], [words(text) or "-" for text in heard])
    return rate


def _turns(part: dict | None, instruction: str, system_prompt: str = "") -> Turns:
    content = [{"type": "text", "text": instruction}, *([part] if part is not None else [])]
    system: Turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": content}]


def _other_places(texts: Sequence[str]) -> list[int]:
    """For each text the place of the next one that is another."""
    count = len(texts)
    return [next((i + k) % count for k in range(1, count) if texts[(i + k) % count] != texts[i]) for i in range(count)]


def _answer(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, conversations: list[Turns], limit: int
) -> list[str]:
    """Greedy answers."""
    answers: list[str] = []
    for start in range(0, len(conversations), BATCH_SIZE):
        features = processor.apply_chat_template(
            conversations[start : start + BATCH_SIZE], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        inputs = cast(BatchFeature, features).to(model.device)
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=limit, **GREEDY)
        answers += [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)]
    return answers


@torch.no_grad()
def _log_likelihood(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, asked: list[Turns], answers: Sequence[str]
) -> float:
    """Mean over all tokens of the answers, without the end of the turn: an answer was cut where it was long."""
    collate = ReLLMCollator(processor, model.config.emotion_labels)
    total, count = 0.0, 0
    for start in range(0, len(asked), BATCH_SIZE):
        rows = [
            {"messages": [*turns, {"role": "assistant", "content": answer}]}
            for turns, answer in zip(asked[start : start + BATCH_SIZE], answers[start:], strict=False)
        ]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        labels = batch.pop("labels")
        for name in ("emotion_labels", "dimension_labels", "clips_per_row"):
            del batch[name]
        logits = model(**batch).logits[:, :-1].float()
        targets = labels[:, 1:]
        is_word = (targets != IGNORE_INDEX) & (targets != processor.tokenizer.eos_token_id)
        scores = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        total += float(scores[is_word].sum())
        count += int(is_word.sum())
    return total / count
