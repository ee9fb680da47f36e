"""A conversation with a bare LLM that reads words only, and who writes its spoken turns down for it."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relllm.modeling.checkpoint_relllm import find_ends
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.audio_relllm import SAMPLING_RATE, AudioSource, load_audio
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT
from relllm.processing.turns_relllm import build_chat_template

from .conversation import TurnTaking
from .replies import Heard
from .typed_text import encode_conversation


class NoWordsError(ValueError):
    """A spoken turn for a system that reads words, and nobody to write them down."""


class Transcriber:
    """Writes down what is said, with Whisper, or wav2vec2 and its like with a CTC head: a directory or a Hub id."""

    def __init__(self, model: str, *, device: str = "cpu"):
        from transformers import pipeline

        self.pipeline = pipeline("automatic-speech-recognition", model=model, device=device)
        # Whisper writes down more than its window of 30 s only with timestamps.
        self.options = {"return_timestamps": True} if self.pipeline.type == "seq2seq_whisper" else {}

    def __call__(self, audio: AudioSource) -> str:
        """Return the words of one clip; bad audio is a `ValueError` that names it."""
        clip = {"raw": load_audio(audio), "sampling_rate": SAMPLING_RATE}
        return self.pipeline(clip, **self.options)["text"].strip()


class TextConversation(TurnTaking):
    """A conversation with a causal LM. A spoken turn is its transcript, after the same instruction that RE-LLM gets.

    Each turn reads the whole conversation. The Jinja `chat_template` is by default the one that a ReLLM built on this
    LLM would have, so that only the hearing differs. Nothing is `heard`, and a spoken turn without words, or without a
    `transcriber`, is a [`NoWordsError`].
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        transcriber: Transcriber | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        instruction: str = SPEECH_PROMPT,
        **generation_options: object,
    ):
        self.model = llm
        self.tokenizer = tokenizer
        self.chat_template = chat_template or build_chat_template(tokenizer)
        self.transcriber = transcriber
        self.system_prompt = system_prompt
        self.instruction = instruction
        ends = find_ends(llm.generation_config, tokenizer, self.chat_template)
        self.generation_options = {"eos_token_id": ends, **generation_options}
        self.reset()

    @classmethod
    def inside(
        cls, model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, **options: object
    ) -> TextConversation:
        """Talk with the LLM inside a ReLLM: no audio, and no LoRA, which is off outside the model."""
        given = model.generation_config  # of the whole model; the LLM inside has none of its own
        own = {"eos_token_id": given.eos_token_id, "suppress_tokens": given.suppress_tokens}
        own |= {name: getattr(processor, name) for name in ("chat_template", "system_prompt", "instruction")}
        return cls(model.model.text_model, processor.tokenizer, **{**own, **options})

    def _listen(self, audio: AudioSource | None, text: str | None) -> tuple[object, Heard | None]:
        return text if audio is None else (text or self.instruction) + self._transcribe(audio), None

    def _render(self, messages: list[dict]) -> list[int]:
        return encode_conversation(self.tokenizer, messages, self.chat_template)

    def _transcribe(self, audio: AudioSource) -> str:
        if self.transcriber is None:
            raise NoWordsError("This LLM reads words, and has no words to read: give it a transcriber.")
        words = self.transcriber(audio)
        if not words:
            raise NoWordsError("The transcriber found no words in this clip.")
        return words
