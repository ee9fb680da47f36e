"""What vLLM asks of a model's processor, answered by `ReLLMProcessor`'s feature extractor."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.inputs import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    TimingContext,
)

from relllm.modeling.configuration_relllm import ReLLMConfig
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.processing.processing_relllm import ReLLMProcessor

from .vllm_readings import waveform_key

CLIPS = "relllm_clips"  # in what a request becomes: its waveforms, for the readings; vLLM passes it by
COUNTS = ("audio_num_windows", "num_audio_tokens", "clip_key")


class ClipParser(MultiModalDataParser):
    """Reads clips as `relllm` does it, with its checks: mono, at the model's rate."""

    def __init__(self, extractor: ReLLMFeatureExtractor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor = extractor

    def _get_audio_with_sr(self, audio: Any) -> tuple[np.ndarray, None]:
        waveform, rate = super()._get_audio_with_sr(audio)
        return self.extractor.read_clip(np.asarray(waveform), None if rate is None else int(rate)), None


class ReLLMProcessingInfo(BaseProcessingInfo):
    """Says what a checkpoint takes, and how long its clips are in the sequence."""

    def get_hf_config(self) -> ReLLMConfig:
        return self.ctx.get_hf_config(ReLLMConfig)

    def get_hf_processor(self, **kwargs: object) -> ReLLMProcessor:
        return self.ctx.get_hf_processor(ReLLMProcessor, **kwargs)

    @property
    def extractor(self) -> ReLLMFeatureExtractor:
        return self.get_hf_processor().feature_extractor

    def get_data_parser(self) -> MultiModalDataParser:
        return ClipParser(self.extractor, expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def longest_clip(self, seq_len: int) -> int:
        """Count the samples of the longest clip, in whole seconds, that is allowed and fits into so many positions."""
        extractor = self.extractor
        seconds = int(min(extractor.max_duration_s, seq_len))  # a second takes a position or more
        while seconds > 1 and extractor.count_clip(seconds * extractor.sampling_rate) > seq_len:
            seconds -= 1
        return seconds * extractor.sampling_rate

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"audio": self.extractor.count_clip(self.longest_clip(seq_len))}


class ReLLMDummyInputs(BaseDummyInputsBuilder[ReLLMProcessingInfo]):
    """The clips that vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().audio_token * mm_counts.get("audio", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict:
        count, length = mm_counts.get("audio", 0), self.info.longest_clip(seq_len)
        return {"audio": self._get_dummy_audios(length=length, num_audios=count, overrides=mm_options.get("audio"))}


class ReLLMMultiModalProcessor(BaseMultiModalProcessor[ReLLMProcessingInfo]):
    """Makes features of clips, and of each placeholder as many as its clip has positions."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        clips = list(hf_data["audio"])  # vLLM's own call would round the features to the LLM's precision
        features = self.info.extractor.extract(clips)
        features["num_audio_tokens"] = torch.as_tensor(features["num_audio_tokens"])
        features["clip_key"] = torch.tensor([waveform_key(clip) for clip in clips])
        return features

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        placeholders = inputs.prompt.count(self.info.get_hf_config().audio_token_id)
        clips = inputs.mm_data_items.get_all_counts().get("audio", 0)
        if placeholders != clips:  # a user's text has one as well: vLLM would put the clip there
            raise ValueError(f"The prompt has {placeholders} audio placeholders, and {clips} clips came with it.")
        made: Any = super().apply(inputs, timing_ctx)
        heard = inputs.mm_data_items["audio"].get_all() if clips else []
        made[CLIPS] = [clip for clip in heard if clip is not None]  # one that a client only names is in vLLM's cache
        return made

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        windows = hf_inputs.get("audio_num_windows", torch.zeros(0, dtype=torch.long))
        names = ReLLMFeatureExtractor.model_input_names
        fields = {name: MultiModalFieldConfig.flat_from_sizes("audio", windows) for name in names}
        return fields | {name: MultiModalFieldConfig.batched("audio", keep_on_cpu=True) for name in COUNTS}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().audio_token_id
        counts = out_mm_kwargs.get_data().get("num_audio_tokens", [])
        return [PromptReplacement("audio", [token], lambda index: [token] * int(counts[index]))]
