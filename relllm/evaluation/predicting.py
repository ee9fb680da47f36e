"""What a system says of each clip: recognition three ways, dimensions, the reply."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relllm.labels import DIMENSIONS
from relllm.modeling.modeling_relllm import ReLLMAudioOutput, ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import build_chat_template

from .asking import Asking, Questions, conversations, encode_prompts, number, render, render_prompts
from .evaluation_settings import SYSTEMS, System


class Predictor(Protocol):
    """A loaded system."""

    def predict(self, rows: Sequence[Mapping]) -> list[dict]:
        """Return the parts of each row's line in `predictions.jsonl`, or `{"error": …}` where it cannot be read."""
        ...


class SpeechPredictor:
    """A ReLLM that hears the clips: system `re-llm`, or `speech-only` without an emotion tower.

    A batch of clips is read once and encoded once, for every task.

    Args:
        model ([`ReLLMForConditionalGeneration`]): In evaluation.
        processor ([`ReLLMProcessor`]): Of the same checkpoint.
        questions ([`Questions`]): What to ask.
    """

    def __init__(self, model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, questions: Questions) -> None:
        self.model = model
        self.processor = processor
        self.questions = questions
        self.prompts = render_prompts(processor.tokenizer, _template_of(processor), questions, audio=True)
        self.asking = Asking(model, processor.tokenizer, _template_of(processor), questions)

    def predict(self, rows: Sequence[Mapping]) -> list[dict]:
        """Answer as [`Predictor.predict`] says."""
        results: list[dict] = []
        clips = []
        for row in rows:
            try:
                clips.append(self.processor.feature_extractor.read_clip(row["audio"]))
                results.append(
                    {"duration_s": round(len(clips[-1]) / self.processor.feature_extractor.sampling_rate, 3)}
                )
            except (OSError, ValueError, TypeError) as error:
                results.append({"error": f"{error}"})
        read = [result for result in results if "error" not in result]
        for result, found in zip(read, self._hear(clips) if clips else [], strict=True):
            result |= found
        return results

    @torch.no_grad()
    def _hear(self, clips: list) -> list[dict]:
        heard, counts = encode_clips(self.model, self.processor, clips)
        found: list[dict] = [{} for _ in clips]
        if "ser" in self.questions.tasks:
            inputs = self._inputs("recognition", counts)
            heads = self._head_probabilities(heard)
            for index, part in enumerate(self.asking.recognise(inputs, heard)):
                found[index]["recognition"] = {**part, **({"head": heads[index]} if heads else {})}
        if "dimensions" in self.questions.tasks:
            assert heard.dimensions is not None  # the heads always run
            for part, values in zip(found, heard.dimensions.float().tolist(), strict=True):
                part["dimensions"] = {name: number(value) for name, value in zip(DIMENSIONS, values, strict=True)}
        if "empathy" in self.questions.tasks:
            for part, text in zip(found, self.asking.reply(self._inputs("reply", counts), heard), strict=True):
                part["reply"] = text
        return found

    def _inputs(self, prompt: str, counts: Sequence[int]) -> dict[str, Tensor]:
        token = self.processor.audio_token
        texts = [self.prompts[prompt].replace(token, token * count) for count in counts]
        return encode_prompts(self.processor.tokenizer, texts, self.model.device)

    def _head_probabilities(self, heard: ReLLMAudioOutput) -> list[dict[str, float]]:
        """Over the labels in use: those that the head lacks have probability 0, those it has beside them no share."""
        assert heard.emotion_logits is not None  # the heads always run
        classes = list(self.model.config.emotion_labels)
        known = [name for name in self.questions.labels if name in classes]
        if not known:
            return []
        logits = heard.emotion_logits.float()[:, [classes.index(name) for name in known]]
        rows = [dict(zip(known, row, strict=True)) for row in logits.softmax(-1).tolist()]
        return [{name: number(row.get(name, 0.0)) for name in self.questions.labels} for row in rows]


class TextPredictor:
    """A causal LM that reads the transcripts: system `text-only`. No audio is opened.

    Args:
        llm (`PreTrainedModel`): Any causal LM; of a ReLLM its `text_model`, whose LoRA is off outside the ReLLM.
        tokenizer (`PreTrainedTokenizerBase`): Its own.
        template (`str`): As in the ReLLM, or of [`build_chat_template`].
        questions ([`Questions`]): What to ask.
        options: Of `generate`.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        questions: Questions,
        **options: object,
    ) -> None:
        self.llm = llm
        self.tokenizer = tokenizer
        self.template = template
        self.questions = questions
        self.asking = Asking(llm, tokenizer, template, questions, **options)

    @torch.no_grad()
    def predict(self, rows: Sequence[Mapping]) -> list[dict]:
        """Answer as [`Predictor.predict`] says."""
        results: list[dict] = [{} if _has_text(row) else {"error": "no transcript"} for row in rows]
        texts = [row["text"] for row in rows if _has_text(row)]
        read = [result for result in results if "error" not in result]
        if texts and "ser" in self.questions.tasks:
            for result, part in zip(read, self.asking.recognise(self._inputs("recognition", texts)), strict=True):
                result["recognition"] = part
        if texts and "empathy" in self.questions.tasks:
            for result, text in zip(read, self.asking.reply(self._inputs("reply", texts)), strict=True):
                result["reply"] = text
        return results

    def _inputs(self, prompt: str, transcripts: Sequence[str]) -> dict[str, Tensor]:
        turns = [conversations(self.questions, {"type": "text", "text": text})[prompt] for text in transcripts]
        texts = [render(self.tokenizer, self.template, one) for one in turns]
        return encode_prompts(self.tokenizer, texts, self.llm.device)


def load_predictor(
    model: str, system: System, questions: Questions, *, revision: str, dtype: str, device: str | torch.device
) -> Predictor:
    """Load a system, ready to be asked, as [`resolve_system`] names it.

    `dtype` is `"auto"`, for the one of the checkpoint, or a name such as `"bfloat16"`.
    """
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    loader = AutoModel if _is_relllm(load_config(model, revision)) else AutoModelForCausalLM
    loaded = loader.from_pretrained(model, revision=revision, dtype=precision, use_safetensors=True).to(device).eval()
    tokenizer, template, processor = load_tokenizer(model, revision)
    if processor is not None and system != "text-only":
        return SpeechPredictor(loaded, processor, questions)
    if processor is None:
        return TextPredictor(loaded, tokenizer, template, questions)
    given = loaded.generation_config  # of the whole model; the LLM inside has none of its own
    options = {"eos_token_id": given.eos_token_id, "suppress_tokens": given.suppress_tokens}
    return TextPredictor(loaded.model.text_model, tokenizer, template, questions, **options)


def load_tokenizer(model: str, revision: str) -> tuple[PreTrainedTokenizerBase, str, ReLLMProcessor | None]:
    """Load tokenizer and chat template, and a ReLLM's processor.

    A bare LLM gets the template that a ReLLM built on it has, so that only the hearing differs between the two.
    """
    if _is_relllm(load_config(model, revision)):
        processor = AutoProcessor.from_pretrained(model, revision=revision)
        return processor.tokenizer, _template_of(processor), processor
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, build_chat_template(tokenizer.get_vocab(), tokenizer.eos_token or ""), None


def load_config(model: str, revision: str) -> PreTrainedConfig:
    """Load the configuration of a checkpoint."""
    return AutoConfig.from_pretrained(model, revision=revision)


def resolve_system(config: PreTrainedConfig, system: System | None, model: str) -> System:
    """Return which system a checkpoint is, or the one asked for if the checkpoint can be that.

    Raises:
        ValueError: If the checkpoint is something else, with what to do; it calls the checkpoint `model`.
    """
    if system is not None and system not in SYSTEMS:
        raise ValueError(f"Unknown system {system!r}; expected one of {', '.join(SYSTEMS)}.")
    if not _is_relllm(config):
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"{model} holds a {config.model_type!r} model; expected a ReLLM or a causal LM.")
        if system not in (None, "text-only"):
            raise ValueError(
                f"{model} is a causal LM ({config.model_type}), which hears nothing, and system {system!r} was asked "
                "for. Use --system text-only, or give a ReLLM checkpoint."
            )
        return "text-only"
    is_speech_only = config.emotion_fusion == "none"
    own: System = "speech-only" if is_speech_only else "re-llm"
    if system not in (None, "text-only", own):
        remedy = (
            "train one with recipes/stage2_emotion.yaml"
            if is_speech_only
            else "train the baseline with recipes/ablations/no_emotion_fusion.yaml"
        )
        raise ValueError(
            f"{model} has emotion_fusion={config.emotion_fusion!r}, so it is the system {own!r}, and {system!r} was "
            f"asked for. Leave --system out to measure it as what it is, or {remedy} and give that checkpoint."
        )
    return system or own


def encode_clips(
    model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, clips: list
) -> tuple[ReLLMAudioOutput, list[int]]:
    """What the model hears in each clip, and how many positions each takes."""
    features = processor.feature_extractor.extract(clips)
    counts = [int(count) for count in features.pop("num_audio_tokens")]
    return model.get_audio_features(**features.to(model.device), return_dict=True), counts


def _template_of(processor: ReLLMProcessor) -> str:
    assert isinstance(processor.chat_template, str)  # the processor makes one if none is given
    return processor.chat_template


def _is_relllm(config: PreTrainedConfig) -> bool:
    return config.model_type == "relllm"


def _has_text(row: Mapping) -> bool:
    return bool((row.get("text") or "").strip())
