"""From a request to what the engine takes. Clips are bytes that the client sent: no path or address is opened."""

import re
import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import BatchFeature

from relllm.processing.audio_relllm import decode_base64
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import RequestLimits
from .schema import ApiError, AudioPart, ChatRequest, EmotionRequest, ReplyOptions, TextPart
from .writing import Prompt

CHARACTERS_A_TOKEN = 16  # more than any language has on average


class PromptReader:
    """Reads requests, within the limits; may be called from several threads."""

    def __init__(self, processor: ReLLMProcessor, limits: RequestLimits) -> None:
        self.limits = limits
        self._processor = processor
        self._tokenizing = threading.Lock()  # a fast tokenizer's padding state is not for two threads

    def read_chat(self, request: ChatRequest) -> Prompt:
        """Return clips, tokens and settings of a chat; bad audio and exceeded limits are an [`ApiError`]."""
        parts = {
            f"messages.{index}.content.{position}": part
            for index, message in enumerate(request.messages)
            for position, part in enumerate(message.content)
        }
        self._check_texts({name: part.text for name, part in parts.items() if isinstance(part, TextPart)})
        clips = {name: part for name, part in parts.items() if isinstance(part, AudioPart)}
        prompt = self._read_clips(clips)
        prompt.clip_messages = [int(name.split(".")[1]) for name in clips]
        prompt.token_ids = self._tokenize(request, prompt.waveforms)
        prompt.audio_tokens = prompt.token_ids.count(self._processor.audio_token_id)
        prompt.options = self._read_options(request, len(prompt.token_ids))
        return prompt

    def read_emotion(self, request: EmotionRequest) -> Prompt:
        """Return the clips of a request to hear only; bad audio and exceeded limits are an [`ApiError`]."""
        return self._read_clips({f"input.{index}": part for index, part in enumerate(request.input)})

    def _check_texts(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            if (token := self._processor.audio_token) in text:
                message = f"{name}: {token!r} stands for a clip and cannot be in a text."
                raise ApiError(f"{message} Send the clip as an 'input_audio' part.", param=name)
        context, length = self.limits.max_context, sum(map(len, texts.values()))
        if context is not None and length > CHARACTERS_A_TOKEN * context:  # to tokenize it would keep others waiting
            message = f"The texts have {length} characters; the model's context is {context} tokens. Send fewer turns."
            raise ApiError(message, "context_length_exceeded", param="messages")

    def _read_clips(self, clips: Mapping[str, AudioPart]) -> Prompt:
        if len(clips) > self.limits.max_clips:
            message = f"{len(clips)} clips were sent; this server takes up to {self.limits.max_clips} a request."
            raise ApiError(message, "too_many_clips")
        extractor, most_s = self._processor.feature_extractor, self.limits.max_audio_seconds
        prompt = Prompt()
        for name, part in clips.items():
            try:
                data = decode_base64(re.sub(r"^data:[^,]{,200};base64,", "", part.input_audio.data))
                waveform = extractor.read_clip(data, max_duration_s=min(most_s, extractor.max_duration_s), name=name)
            except ValueError as error:  # addresses and paths are not base64
                message = f"{name}: " + str(error).removeprefix(f"{name}: ")
                raise ApiError(message, "invalid_audio", param=name) from None
            prompt.waveforms.append(waveform)
            prompt.audio_seconds += len(waveform) / extractor.sampling_rate
            if prompt.audio_seconds > most_s + 1e-3:  # sums, and resampling, round
                message = f"{name}: the clips last {prompt.audio_seconds:.1f} s up to here; all of a request may last"
                raise ApiError(f"{message} {most_s:g} s together. Send less.", "audio_too_long", param=name)
        return prompt

    def _tokenize(self, request: ChatRequest, waveforms: list[np.ndarray]) -> list[int]:
        """Return the prompt as `generate` gets it alone; the clips are only counted here."""
        clips = iter(waveforms)
        conversation = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": [
                    {"type": "audio", "waveform": next(clips)} if isinstance(part, AudioPart) else part.model_dump()
                    for part in message.content
                ],
            }
            for message in request.messages
        ]
        options = {"audio_kwargs": {"only_counted": [True] * len(waveforms)}} if waveforms else None
        form: dict[str, Any] = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        try:
            with self._tokenizing:
                inputs = self._processor.apply_chat_template([conversation], processor_kwargs=options, **form)
        except TemplateError as error:  # some want turns to alternate, or no system turn
            message = f"The model's chat template refuses the conversation: {error}"
            raise ApiError(message, param="messages") from None
        return cast(BatchFeature, inputs)["input_ids"][0].tolist()

    def _read_options(self, request: ChatRequest, prompt_tokens: int) -> ReplyOptions:
        limit, context = self.limits.max_tokens, self.limits.max_context
        room = limit if context is None else context - prompt_tokens
        asked = request.max_tokens or max(1, min(limit, room))
        if asked > min(limit, room):
            code = "max_tokens_too_large" if asked > limit else "context_length_exceeded"
            message = f"The conversation has {prompt_tokens} tokens and the reply may have {asked}; the context is "
            message += f"{context}, and this server writes up to {limit}. Ask for less, or send fewer turns."
            raise ApiError(message, code, param="max_tokens")
        options = request.model_dump(include=set(ReplyOptions.model_fields), exclude={"max_tokens"})
        return ReplyOptions(max_tokens=asked, **options)
