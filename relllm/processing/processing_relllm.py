"""The processor: text and audio in, model inputs out.

One `<|audio|>` in the text stands for one clip, and becomes as many of the same token as the clip has positions.
Clips are read in `read_audio` if they come in a conversation, else in `prepare_inputs_layout`; behind these two there
are waveforms only.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import AudioKwargs, ProcessingKwargs

from .audio_relllm import MAX_DURATION_S, AudioSource
from .feature_extraction_relllm import ReLLMFeatureExtractor, extractor_settings
from .prompts_relllm import AUDIO_TOKEN, SPEECH_PROMPT, SYSTEM_PROMPT
from .turns_relllm import build_chat_template

SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
AUDIO_KEYS = ("audio", "url", "path", "bytes", "waveform")  # of an audio part; a `waveform` has been read
AUDIO_INPUTS = (*ReLLMFeatureExtractor.model_input_names, "audio_num_windows")


class _Read(np.ndarray):
    """A waveform that was read, on its way through Transformers' `apply_chat_template`, which passes arrays on."""


class ReLLMInputs(BatchFeature):
    """Model inputs, also for the batches that Transformers' pipelines make of single prompts.

    They pad tensors as if each row were a prompt, and rows of audio are windows. A pipeline marks a prompt's inputs by
    `inputs["text"] = prompt`: from then on the audio is one entry, `audio_items`, which is no tensor. They hand it on
    as it is, and the model's `generate` takes it.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "text":
            self.data["audio_items"] = [{name: self.data.pop(name) for name in AUDIO_INPUTS if name in self.data}]
        super().__setitem__(name, value)


class ReLLMAudioKwargs(AudioKwargs, total=False):  # type: ignore[call-arg]
    channel: str | None  # of each clip; see `ReLLMFeatureExtractor.read_clips`
    only_counted: list[bool] | None  # clips that get no features; see `ReLLMFeatureExtractor.extract`


class ReLLMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    # Newer releases read defaults from the processor's attributes; all releases read them from here.
    _defaults = {"text_kwargs": {"padding": True, "padding_side": "left", "return_tensors": "pt"}}

    audio_kwargs: ReLLMAudioKwargs


class ReLLMProcessor(ProcessorMixin):
    """Tokenizer and feature extractor of RE-LLM in one.

    Args:
        feature_extractor ([`ReLLMFeatureExtractor`]): For both towers.
        tokenizer (`PreTrainedTokenizerBase`): The LLM's; it must know `audio_token`.
        chat_template (`str`, *optional*): Jinja; by default [`build_chat_template`] of the tokenizer.
        audio_token (`str`, *optional*, defaults to `"<|audio|>"`): The placeholder of one clip.
        instruction (`str`, *optional*): Text before the clip of a request; a training run leaves its own here.
        system_prompt (`str`, *optional*): System turn of a request, likewise; empty for none.
    """

    valid_processor_kwargs = ReLLMProcessorKwargs

    def __init__(
        self,
        feature_extractor: ReLLMFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        audio_token: str = AUDIO_TOKEN,
        instruction: str = SPEECH_PROMPT,
        system_prompt: str = SYSTEM_PROMPT,
    ):
        vocabulary = tokenizer.get_vocab()
        if audio_token not in vocabulary:
            raise ValueError(
                f"The tokenizer does not know {audio_token!r}. Add it with "
                f"`tokenizer.add_tokens([{audio_token!r}], special_tokens=True)` or use ReLLMProcessor.from_config."
            )
        self.audio_token = audio_token
        self.audio_token_id = vocabulary[audio_token]
        self.instruction = instruction
        self.system_prompt = system_prompt
        if chat_template is None:
            chat_template = build_chat_template(tokenizer, audio_token)
        # Transformers lets what a tokenizer was loaded with win over `_defaults`, and a saved tokenizer remembers how
        # its last batch was padded, in training on the right: prompts are padded on the left nevertheless, also by
        # pipelines, which ask the tokenizer.
        for name in ("padding_side", "pad_to_multiple_of"):
            tokenizer.init_kwargs.pop(name, None)
        tokenizer.padding_side = "left"
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: "AudioSource | list[AudioSource] | None" = None,
        **kwargs: Any,
    ) -> ReLLMInputs:
        """Return model inputs of prompts and the clips that their placeholders stand for, as in Transformers.

        `sampling_rate` is that of arrays; `channel` is `"mix"` (the default), `"left"`, `"right"` or `"each"`, which
        makes each channel a clip with a placeholder of its own.
        """
        seen = {kwargs.pop(name, None) is not None for name in ("images", "videos")}  # `apply_chat_template` says None
        if any(seen):
            raise ValueError("RE-LLM reads text and audio, and was given images or videos. Leave them out.")
        return ReLLMInputs(super().__call__(text=text, audio=audio, **kwargs).data)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        full_window: bool = True,
        speech_do_normalize: bool = True,
        max_duration_s: float = MAX_DURATION_S,
    ) -> "ReLLMProcessor":
        """Make the processor that fits a model.

        Args:
            config ([`ReLLMConfig`]): `model.config`.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`): The LLM's; `<|audio|>` is added if missing,
                and must be `config.audio_token_id`.
            chat_template (`str`, *optional*): Jinja; by default [`build_chat_template`] of the tokenizer.
            full_window, speech_do_normalize, max_duration_s: See [`ReLLMFeatureExtractor`]; a waveform speech tower's
                `preprocessor_config.json` says whether it was trained on normalised waveforms.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if AUDIO_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        settings = extractor_settings(config, speech_do_normalize)
        extractor = ReLLMFeatureExtractor(full_window=full_window, max_duration_s=max_duration_s, **settings)
        processor = cls(extractor, tokenizer, chat_template=chat_template)
        if processor.audio_token_id != config.audio_token_id:
            raise ValueError(
                f"{AUDIO_TOKEN} is token {processor.audio_token_id} in the tokenizer and {config.audio_token_id} in "
                "the model's config. Give from_towers the same tokenizer."
            )
        return processor

    def build_conversation(
        self,
        audio: AudioSource,
        *,
        instruction: str | None = None,
        system_prompt: str | None = None,
        response: str | None = None,
    ) -> list[dict]:
        """Return one spoken turn as the model is trained on it, with the reply in training.

        Args:
            audio: What [`~ReLLMFeatureExtractor.read_clip`] takes.
            instruction (`str`, *optional*): Text before the audio; empty for none; by default the processor's.
            system_prompt (`str`, *optional*): Empty for no system turn; by default the processor's.
            response (`str`, *optional*): The assistant's turn.
        """
        instruction = self.instruction if instruction is None else instruction
        system_prompt = self.system_prompt if system_prompt is None else system_prompt
        content = [{"type": "text", "text": instruction}] if instruction else []
        conversation = [{"role": "user", "content": [*content, {"type": "audio", "audio": audio}]}]
        if system_prompt:
            conversation.insert(0, {"role": "system", "content": system_prompt})
        if response is not None:
            conversation.append({"role": "assistant", "content": response})
        return conversation

    def apply_request(
        self, audio: "AudioSource | list[AudioSource]", *, channel: str = "mix", **kwargs: str
    ) -> BatchFeature:
        """Return model inputs that ask for a reply to a clip, or to each of a list of clips.

        With `channel="each"`, each channel is a request. `kwargs` are the `instruction` and the `system_prompt` of
        [`~ReLLMProcessor.build_conversation`].
        """
        clips = self.feature_extractor.read_clips(audio if isinstance(audio, list) else [audio], channel=channel)
        conversations = [self.build_conversation({"waveform": clip}, **kwargs) for clip in clips]
        return self.apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> "str | list[str] | BatchFeature":
        """Render a conversation, or a batch of them, as in Transformers; `tokenize=True` reads the clips.

        An audio part holds one of `"audio"` (anything that [`~ReLLMFeatureExtractor.read_clip`] takes), `"path"`,
        `"url"`, `"bytes"` and `"waveform"` (what `read_clip` returned: it is taken as it is). An array that is not at
        16 kHz has its rate in the part's `"sampling_rate"`, or all have it in the keyword `sampling_rate`. A part's
        `"channel"` is `"mix"` (the default), `"left"` or `"right"`.
        """
        if kwargs.get("sanitize_control_tokens") and not SANITIZES:  # there it would be a variable of the template
            raise ValueError("sanitize_control_tokens needs Transformers 5.23. Update it, or leave the option out.")
        if tokenize:
            # A copy, because Transformers writes to it.
            given = kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {})
            rate = _audio_option(kwargs, "sampling_rate") or _audio_option(given, "sampling_rate")
            kwargs.pop("sampling_rate", None)
            conversation = self.read_audio(conversation, rate)
            for part in audio_parts(conversation):  # of the copy
                part["audio"] = part.pop("waveform").view(_Read)
            given["add_special_tokens"] = False  # the template has written the BOS
        return super().apply_chat_template(conversation, chat_template=chat_template, tokenize=tokenize, **kwargs)

    def _adjust_assistant_masks_indices(self, processed_dict: dict[str, Any], *args: Any) -> dict[str, Any]:
        if not isinstance(places := processed_dict["offset_mapping"], list):  # each number is compared by itself
            processed_dict["offset_mapping"] = places.tolist()
        return super()._adjust_assistant_masks_indices(processed_dict, *args)

    def read_audio(
        self, conversation: list[dict] | list[list[dict]], sampling_rate: int | None = None
    ) -> list[dict] | list[list[dict]]:
        """Return a copy in which every audio part is `{"type": "audio", "waveform": samples}`.

        Conversations and `sampling_rate` are those of [`~ReLLMProcessor.apply_chat_template`].
        """
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        copies: list[list[dict]] = []
        for messages in cast("list[list[dict]]", conversation if batched else [conversation]):
            copies.append([])
            for message in messages:
                content = message.get("content")
                if not isinstance(content, str):
                    content = [dict(part) for part in content or []]
                copies[-1].append({**message, "content": content})
        for index, part in enumerate(audio_parts(copies)):
            given = [key for key in AUDIO_KEYS if part.get(key) is not None]  # Arrow structs have keys with None
            if len(given) != 1:
                raise ValueError(f"An audio part needs exactly one of the keys {AUDIO_KEYS}, got {sorted(part)}.")
            source = {"waveform": part["waveform"]} if given == ["waveform"] else part[given[0]]
            rate, channel = part.get("sampling_rate") or sampling_rate, part.get("channel") or "mix"
            if channel == "each":
                raise ValueError(f"Audio {index}: channel='each' makes several clips of one part. Give each its own.")
            waveform = self.feature_extractor.read_clip(source, rate, index=index, channel=channel)
            part.clear()
            part.update(type="audio", waveform=waveform)
        return copies if batched else copies[0]

    def prepare_inputs_layout(
        self,
        images: object = None,
        text: str | list[str] | None = None,
        videos: object = None,
        audio: "AudioSource | list[AudioSource] | None" = None,
        **kwargs: Any,
    ) -> tuple[object, list[str] | None, object, list[np.ndarray] | None]:
        """Read the audio of a call, unless `apply_chat_template` has: it becomes a flat list of waveforms."""
        clips: list[np.ndarray] | None = None
        if isinstance(audio, list) and all(isinstance(clip, _Read) for clip in audio):
            clips = [clip.view(np.ndarray) for clip in cast("list[_Read]", audio)]
        elif audio is not None:
            channel = _audio_option(kwargs, "channel") or "mix"
            clips = self.feature_extractor.read_clips(audio, _audio_option(kwargs, "sampling_rate"), channel)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(row, str) for row in text):
                raise ValueError("The text of a prompt must be a string. Pass clips as `audio=`.")
            placeholders, count = sum(row.count(self.audio_token) for row in text), len(clips or [])
            if placeholders != count and not kwargs.get("sanitize_control_tokens"):  # then some are the user's words
                raise ValueError(
                    f"The number of {self.audio_token} tokens in the prompts should be the same as the number of "
                    f"audio inputs passed. Found {placeholders} tokens and {count} audio inputs."
                )
        return images, text, videos, clips

    def _process_audio(self, audio: list[np.ndarray], **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        features = self.feature_extractor.extract(audio, only_counted=kwargs.get("only_counted"))
        return features, [self.audio_token * int(count) for count in features["num_audio_tokens"]]

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of everything that the model's `forward` takes from here."""
        names = [*self.tokenizer.model_input_names, *self.feature_extractor.model_input_names, "audio_num_windows"]
        return list(dict.fromkeys(names))

    @property
    def unused_input_names(self) -> list[str]:
        """Return the names of what is made on the way, and is not for the model."""
        return ["num_audio_tokens"]


def audio_parts(conversation: Sequence) -> list[dict]:
    """Return the audio parts of a conversation, or of a batch of conversations, in order."""
    if conversation and isinstance(conversation[0], (list, tuple)):
        return [part for messages in conversation for part in audio_parts(messages)]
    contents = [content for message in conversation if not isinstance(content := message.get("content"), str)]
    return [part for content in contents for part in content or [] if part["type"] == "audio"]


def _audio_option(kwargs: Mapping[str, Any], name: str) -> Any:
    """Return an option of audio among the keywords of a call, which Transformers takes in two places."""
    return kwargs.get(name) or (kwargs.get("audio_kwargs") or {}).get(name)
