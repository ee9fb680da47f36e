"""From a request to what the engine takes. Clips are bytes that the client sent: no path or address is opened."""

import io
import re
import threading
from typing import Any, cast

import numpy as np
from jinja2 import TemplateError
from transformers import BatchFeature

from relllm.processing.audio_relllm import container_kind, decode_base64, has_pyav
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import RequestLimits
from .decoding import Prompt, ReplySampling
from .errors import bad_request
from .schema import AudioData, ChatRequest, EmotionRequest, TextPart

MAX_CHANNELS = 8  # a FLAC file's most; a few bytes of silence could hold a thousand
ROUNDING_S = 1e-3  # of sums of lengths, and of resampling
CHARACTERS_A_TOKEN = 16  # more than any language has on average
_UNKNOWN_FRAMES = 2**48  # libsndfile reports about 2**63 where a header leaves the length open


class PromptReader:
    """Reads requests, within the limits; may be called from several threads."""

    def __init__(self, processor: ReLLMProcessor, limits: RequestLimits) -> None:
        self.limits = limits
        self._processor = processor
        self._tokenizing = threading.Lock()  # a fast tokenizer's padding state is not for two threads

    def read_chat(self, request: ChatRequest) -> Prompt:
        """Return clips, tokens and settings of a chat; bad audio and exceeded limits are an [`ApiError`]."""
        conversation: list[dict] = []
        clips: list[tuple[str, AudioData]] = []
        for index, message in enumerate(request.messages):
            role = "system" if message.role == "developer" else message.role
            parts: list[dict] = []
            for position, part in enumerate(message.content):
                name = f"messages.{index}.content.{position}"
                if not isinstance(part, TextPart):
                    clips.append((name, part.input_audio))
                    parts.append({"type": "audio"})
                    continue
                if (token := self._processor.audio_token) in part.text:
                    found = f"{name}: {token!r} stands for a clip and cannot be in a text"
                    raise bad_request(f"{found}. Send the clip as an 'input_audio' part.", param=name)
                parts.append({"type": "text", "text": part.text})
            conversation.append({"role": role, "content": parts})
        self._check_length(conversation)
        prompt = self._read_clips(clips)
        prompt.clip_messages = [int(name.split(".")[1]) for name, _ in clips]
        waveforms = iter(prompt.waveforms)
        for turn in conversation:
            for part in turn["content"]:
                if part["type"] == "audio":
                    part["waveform"] = next(waveforms)
        prompt.token_ids = self._tokenize(conversation, len(prompt.waveforms))
        prompt.sampling = self._read_sampling(request, len(prompt.token_ids))
        return prompt

    def read_emotion(self, request: EmotionRequest) -> Prompt:
        """Return the clips of a request to hear only; bad audio and exceeded limits are an [`ApiError`]."""
        return self._read_clips([(f"input.{index}", part.input_audio) for index, part in enumerate(request.input)])

    def _check_length(self, conversation: list[dict]) -> None:
        """Refuse texts that no tokenizer needs to be asked about: it would keep the others waiting."""
        context = self.limits.max_context
        length = sum(len(part.get("text", "")) for turn in conversation for part in turn["content"])
        if context is not None and length > CHARACTERS_A_TOKEN * context:
            message = f"The texts have {length} characters; the model's context is {context} tokens. Send fewer turns."
            raise bad_request(message, "context_length_exceeded", param="messages")

    def _read_clips(self, clips: list[tuple[str, AudioData]]) -> Prompt:
        if len(clips) > self.limits.max_clips:
            message = f"{len(clips)} clips were sent; this server takes up to {self.limits.max_clips} a request."
            raise bad_request(message, "too_many_clips")
        extractor = self._processor.feature_extractor
        waveforms: list[np.ndarray] = []
        seconds = 0.0
        for name, clip in clips:
            waveform = self._read_clip(clip, name, self.limits.max_audio_seconds - seconds)
            seconds += len(waveform) / extractor.sampling_rate
            waveforms.append(waveform)
        windows = sum(len(extractor.cut_windows(waveform)) for waveform in waveforms)
        return Prompt(waveforms, num_windows=windows, audio_seconds=seconds)

    def _read_clip(self, clip: AudioData, name: str, seconds_left: float) -> np.ndarray:
        try:
            data = decode_base64(re.sub(r"^data:[^,]{,200};base64,", "", clip.data))
        except ValueError as error:
            message = f"{name}: {error} Addresses and paths are not read."
            raise bad_request(message, "invalid_audio", param=name) from None
        self._check_seconds(self._check_header(data, name) or 0.0, seconds_left, name)
        extractor = self._processor.feature_extractor
        longest_s = min(max(seconds_left, 0.0) + 0.1, extractor.max_duration_s)
        try:
            waveform = extractor.read_clip(data, max_duration_s=longest_s, name=name)
        except ValueError as error:
            raise bad_request(str(error), "invalid_audio", param=name) from None
        self._check_seconds(len(waveform) / extractor.sampling_rate, seconds_left, name)
        return waveform

    def _check_seconds(self, seconds: float, left: float, name: str) -> None:
        if seconds > left + ROUNDING_S:
            longest = f"all clips of a request may last {self.limits.max_audio_seconds:g} s together"
            message = f"{name}: the clip lasts {seconds:.1f} s; {longest}. Send less."
            raise bad_request(message, "audio_too_long", param=name)

    def _check_header(self, data: bytes, name: str) -> float | None:
        """Refuse rates and channels before anything is decoded; return the stated length in seconds if there is one.

        What no header can be read of is left to `read_clip`, whose error says what is wrong.
        """
        import soundfile

        try:
            header = soundfile.info(io.BytesIO(data))
            rate, channels = header.samplerate, header.channels
            seconds = header.frames / rate if 0 < header.frames < _UNKNOWN_FRAMES else None
        except soundfile.LibsndfileError:
            if container_kind(data[:64]) is None or not has_pyav():
                return None
            import av

            try:
                with av.open(io.BytesIO(data), mode="r") as container:
                    if not container.streams.audio:
                        return None
                    track = container.streams.audio[0].codec_context
                    rate, channels = track.sample_rate, track.channels
                    seconds = None if container.duration is None else container.duration / av.time_base
            except av.FFmpegError:
                return None
        low, high = self.limits.min_sampling_rate, self.limits.max_sampling_rate
        if not low <= rate <= high:
            message = f"{name}: the clip has {rate} Hz; this server takes {low} to {high} Hz. Resample it."
            raise bad_request(message, "unsupported_sampling_rate", param=name)
        if channels > MAX_CHANNELS:
            message = f"{name}: the clip has {channels} channels; this server takes up to {MAX_CHANNELS}."
            raise bad_request(message, "too_many_channels", param=name)
        return seconds

    def _tokenize(self, conversation: list[dict], num_clips: int) -> list[int]:
        """Return the prompt as `generate` gets it alone; the clips are only counted here."""
        options = {"audio_kwargs": {"only_counted": [True] * num_clips}} if num_clips else None
        try:
            with self._tokenizing:
                form: dict[str, Any] = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
                inputs = self._processor.apply_chat_template([conversation], processor_kwargs=options, **form)
        except TemplateError as error:  # some want turns to alternate, or no system turn
            message = f"The model's chat template refuses the conversation: {error}"
            raise bad_request(message, param="messages") from None
        return cast(BatchFeature, inputs)["input_ids"][0].tolist()

    def _read_sampling(self, request: ChatRequest, prompt_tokens: int) -> ReplySampling:
        limit, context = self.limits.max_tokens, self.limits.max_context
        room = limit if context is None else context - prompt_tokens
        asked = request.max_completion_tokens or request.max_tokens
        if asked is not None and asked > limit:
            message = f"max_tokens is {asked}; this server writes up to {limit} tokens. Ask for fewer."
            raise bad_request(message, "max_tokens_too_large", param="max_tokens")
        if room < (asked or 1):
            found = f"The conversation has {prompt_tokens} tokens and the reply may have {asked or 1}"
            remedy = "Send fewer turns or shorter clips, or ask for a shorter reply."
            message = f"{found}; the model's context is {context}. {remedy}"
            raise bad_request(message, "context_length_exceeded", param="messages")
        return ReplySampling(
            max_tokens=min(limit, room) if asked is None else asked,
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
        )
