"""What a system says of each clip: recognition three ways, dimensions, the reply."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relllm.inference.replies import generate_answers, read_heard, score_answers
from relllm.modeling.checkpoint_relllm import find_ends
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.places_relllm import find_file
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.turns_relllm import build_chat_template
from relllm.tower_outputs import TowerCache, cache_settings

from . import asking
from .adapters import base_of, load_causal_lm, read_adapter, read_config
from .asking import Questions
from .evaluation_settings import NO_TRANSCRIPT, READERS, SYSTEMS, EvaluationSettings, System


class Predictor(ABC):
    """The two questions to a ReLLM or any causal LM; its kinds say what is asked about. `options` are `generate`'s."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, template: str, questions: Questions, **options: object
    ) -> None:
        self.model, self.tokenizer, self.template, self.questions = model, tokenizer, template, questions
        self.options = {"pad_token_id": tokenizer.pad_token_id, **options}
        self.label_tokens = [asking.answer_tokens(tokenizer, template, label) for label in questions.labels]

    @torch.no_grad()
    def predict(self, rows: Sequence[Mapping]) -> list[dict]:
        """Return the parts of each row's line in `predictions.jsonl`, or `{"error": …}` where it cannot be read."""
        results: list[dict] = [{} for _ in rows]
        subjects = []
        for row, result in zip(rows, results, strict=True):
            try:
                subjects.append(self.read(row, result))
            except (OSError, ValueError, TypeError) as error:
                result["error"] = f"{error}"
        read = [result for result in results if "error" not in result]
        for result, found in zip(read, self.answer(subjects) if subjects else [], strict=True):
            result |= found
        return results

    @abstractmethod
    def read(self, row: Mapping, result: dict) -> Any:
        """Return what is asked about; an error says why not, and `result` may take a part of the line."""

    @abstractmethod
    def answer(self, subjects: list) -> list[dict]:
        """Return the parts of the line of each subject."""

    def ask(self, prompts: Mapping[str, list[str]], audio: Any = None) -> list[dict]:
        """Return `recognition` and `reply`, those that are asked for, to the prompts of that name."""
        asked, labels = self.questions, self.questions.labels
        found: list[dict] = [{} for _ in prompts["reply"]]
        if asked.in_words and "generated" in asked.ways:
            answers = self.generate(prompts["recognition"], audio, asking.RECOGNITION_TOKENS)
            for part, text in zip(found, answers, strict=True):
                part["recognition"] = {"generated": {"text": text, "emotion": asking.parse_emotion(text, labels)}}
        if asked.in_words and "likelihood" in asked.ways:
            scores = self.score(prompts["recognition"], audio).softmax(-1).tolist()
            for part, values in zip(found, scores, strict=True):
                numbers = {name: asking.number(value) for name, value in zip(labels, values, strict=True)}
                part.setdefault("recognition", {})["likelihood"] = numbers
        if "empathy" in asked.tasks:
            for part, text in zip(found, self.generate(prompts["reply"], audio, asked.max_new_tokens), strict=True):
                part["reply"] = text
        return found

    def generate(self, prompts: list[str], audio: Any, limit: int) -> list[str]:
        """Return the greedy answer to each prompt."""
        inputs = asking.encode_prompts(self.tokenizer, prompts, self.model.device)
        answers = generate_answers(self.model, inputs, audio=audio, max_new_tokens=limit, **self.options)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def score(self, prompts: list[str], audio: Any) -> Tensor:
        """Return the log-probability of each label as the answer to each prompt, `(prompts, labels)`."""
        inputs = asking.encode_prompts(self.tokenizer, prompts, self.model.device)
        return score_answers(self.model, inputs, self.label_tokens, audio=audio)


class SpeechPredictor(Predictor):
    """A ReLLM that hears the clips, read and encoded once for every task: `re-llm`, or `speech-only`."""

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        processor: ReLLMProcessor,
        questions: Questions,
        tower_cache_dir: str | None = None,
        **options: object,
    ) -> None:
        super().__init__(model, processor.tokenizer, str(processor.chat_template), questions, **options)
        self.processor = processor
        self.cache: TowerCache | None = None
        if tower_cache_dir is not None:
            settings = cache_settings(model.base_model, processor.feature_extractor)
            self.cache = TowerCache(Path(tower_cache_dir).expanduser(), settings)
        self.prompts = asking.render_prompts(self.tokenizer, self.template, questions, audio=True)

    def read(self, row: Mapping, result: dict) -> Any:
        """Read the clip, whose duration is a part of the line."""
        extractor = self.processor.feature_extractor
        clip = extractor.read_clip(row["audio"])
        result["duration_s"] = round(len(clip) / extractor.sampling_rate, 3)
        return clip

    def answer(self, subjects: list) -> list[dict]:
        audio, counts = self.encode(subjects)
        token = self.processor.audio_token
        placed = {
            name: [text.replace(token, token * count) for count in counts] for name, text in self.prompts.items()
        }
        found = self.ask(placed, audio)
        for part, heard in zip(found, read_heard(self.model.config, self.hear(audio)), strict=True):
            # Probability is shared among the labels in use that the head has, if any; the others in use have 0.
            shares = {name: heard.probabilities.get(name, 0.0) for name in self.questions.labels}
            if "ser" in self.questions.tasks and "head" in self.questions.ways and (total := sum(shares.values())):
                own = {name: asking.number(share / total) for name, share in shares.items()}
                part.setdefault("recognition", {})["head"] = own
            if "dimensions" in self.questions.tasks:
                part["dimensions"] = {name: asking.number(value) for name, value in heard.dimensions.items()}
        return found

    def encode(self, clips: list) -> tuple[Any, list[int]]:
        """Return what is heard in each clip, and how many positions each takes; towers run for no cached clip."""
        known, entries = (None, {}) if self.cache is None else self.cache.look_up(clips)
        features = self.processor.feature_extractor.extract(clips, only_counted=known)
        counts = [int(count) for count in features.pop("num_audio_tokens")]
        inputs = send_to_device({**features, **entries}, self.model.device)
        if self.cache is not None:
            self.cache.fill(inputs, self.model.base_model.run_towers)
        return self.model.get_audio_features(**inputs, return_dict=True), counts

    def hear(self, audio: Any) -> ReLLMAudioOutput:
        """Return what the heads read in the clips that were encoded."""
        return audio


class TextPredictor(Predictor):
    """A causal LM, a ReLLM's `text_model` or another, that reads the transcripts: `text-only`. No audio is opened."""

    def __init__(self, *parts: Any, text_column: str = "text", **options: Any) -> None:
        super().__init__(*parts, **options)
        self.text_column = text_column

    def read(self, row: Mapping, result: dict) -> Any:
        text = (row.get(self.text_column) or "").strip()
        if not text:
            raise ValueError(NO_TRANSCRIPT)
        return row[self.text_column]

    def answer(self, subjects: list) -> list[dict]:
        asked = [asking.conversations(self.questions, {"type": "text", "text": text}) for text in subjects]
        form = (self.tokenizer, self.template)
        return self.ask({name: [asking.render(*form, one[name]) for one in asked] for name in asked[0]})


class _AskedInVllm(Predictor):
    """The same questions, answered by an `OfflineEngine` of vLLM in the place of the model."""

    def generate(self, prompts: list[str], audio: Any, limit: int) -> list[str]:
        ends = self.options["eos_token_id"]
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        answers = self.model.generate(self._encode(prompts), audio, max_tokens=limit, stop_token_ids=ends)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def score(self, prompts: list[str], audio: Any) -> Tensor:
        return self.model.score(self._encode(prompts), self.label_tokens, audio)

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer(prompts, add_special_tokens=False)["input_ids"]


class SpeechInVllm(_AskedInVllm, SpeechPredictor):
    """A ReLLM in vLLM, which makes each placeholder as long as its clip and keeps what it heard."""

    def encode(self, clips: list) -> tuple[Any, list[int]]:
        return [[clip] for clip in clips], [1] * len(clips)

    def hear(self, audio: Any) -> ReLLMAudioOutput:
        return self.model.hear([clip for (clip,) in audio])


class TextInVllm(_AskedInVllm, TextPredictor):
    """A causal LM in vLLM, or a ReLLM that hears nothing."""


def load_predictor(
    settings: EvaluationSettings, system: System, questions: Questions, device: str | torch.device
) -> Predictor:
    """Load the model of an evaluation, ready to be asked, as what [`resolve_system`] says."""
    model, place = settings.model, {"revision": settings.revision, "dtype": settings.dtype}
    tokenizer, template, processor = load_tokenizer(model, settings.revision)
    reads = processor is None or system in READERS
    loaded: Any
    speech, text = SpeechPredictor, TextPredictor
    if settings.engine == "vllm":
        speech, text = SpeechInVllm, TextInVllm
        loaded, given = _load_in_vllm(settings, reads=processor is not None and reads)
        options = {"eos_token_id": find_ends(given, tokenizer, template)}
    else:
        if processor is None:
            loaded = load_causal_lm(model, **place)
        else:
            loaded = AutoModel.from_pretrained(model, use_safetensors=True, **place)
        loaded = loaded.to(device).eval()
        given = loaded.generation_config  # of the whole model; the LLM inside has none of its own
        options = {"eos_token_id": find_ends(given, tokenizer, template), "suppress_tokens": given.suppress_tokens}
        loaded = loaded.model.text_model if processor is not None and reads else loaded
    if processor is None or reads:
        column = settings.text_column or "text"
        return text(loaded, tokenizer, template, questions, text_column=column, **options)
    return speech(loaded, processor, questions, settings.tower_cache_dir, **options)


def _load_in_vllm(settings: EvaluationSettings, *, reads: bool) -> tuple[Any, Any]:
    """Return the engine and the generation settings of a model; a ReLLM `reads` transcripts, or hears."""
    model, revision = settings.model, settings.revision
    if read_adapter(model, revision) is not None:
        raise ValueError(f"{model} is an adapter, which is not asked through vLLM. Leave --engine out, or merge it.")
    if reads and (scope := read_config(model, revision).lora_scope) != "audio":
        raise ValueError(f"{model} has lora_scope={scope!r}: in vLLM it acts on transcripts too. Leave --engine out.")
    from relllm.inference.vllm.vllm_engine import OfflineEngine, read_generation_settings

    engine = OfflineEngine(model, revision=revision, dtype=settings.dtype, arguments=settings.engine_args)
    return engine, read_generation_settings(model, revision)


def load_tokenizer(model: str, revision: str) -> tuple[Tokenizer, str, ReLLMProcessor | None]:
    """Load tokenizer and chat template, and a ReLLM's processor.

    A bare LLM gets the template that a ReLLM built on it has, so that only the hearing differs between the two.
    """
    if read_config(model, revision).model_type == "relllm":
        processor = AutoProcessor.from_pretrained(model, revision=revision)
        return processor.tokenizer, str(processor.chat_template), processor
    adapter = read_adapter(model, revision)
    place = {"pretrained_model_name_or_path": model, "revision": revision}
    if adapter is not None and find_file(model, "tokenizer_config.json", revision) is None:
        place = base_of(adapter)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, build_chat_template(tokenizer), None


def resolve_system(config: PreTrainedConfig, system: System | None, model: str, *, tuned: bool = False) -> System:
    """Return which system a checkpoint is, or the one asked for; `ValueError` says what to do if it is another.

    A causal LM that is `tuned` has an adapter on it; another may be told to be one that was fine-tuned.
    """
    if system is not None and system not in SYSTEMS:
        raise ValueError(f"Unknown system {system!r}; expected one of {', '.join(SYSTEMS)}.")
    if config.model_type == "relllm":
        is_speech_only = config.emotion_fusion == "none"
        own: System = "speech-only" if is_speech_only else "re-llm"
        if system in (None, "text-only", own):
            return system or own
        recipe = "recipes/stage2_emotion.yaml" if is_speech_only else "recipes/ablations/no_emotion_fusion.yaml"
        raise ValueError(
            f"{model} has emotion_fusion={config.emotion_fusion!r}, so it is the system {own!r}, and {system!r} was "
            f"asked for. Leave --system out to measure it as what it is, or train one with {recipe} and give that."
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{model} holds a {config.model_type!r} model; expected a ReLLM or a causal LM.")
    if system not in (None, *READERS):
        raise ValueError(
            f"{model} is a causal LM, which hears nothing: --system text-only, or give a ReLLM checkpoint."
        )
    if tuned and system == "text-only":
        raise ValueError(f"{model} is an adapter, and {system!r} is an LLM as it is. Leave --system out.")
    return "text-only-tuned" if tuned else system or "text-only"
