"""RE-LLM as vLLM runs it: `relllm`'s hearing half, vLLM's LLM, and the scoped LoRA on its layers."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, has_inner_state
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.worker_base import WorkerBase

from relllm.modeling.configuration_relllm import ReLLMConfig
from relllm.modeling.hearing_relllm import ReLLMHearing
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

from .vllm_lora import StepScope, add_scoped_lora, rename_lora
from .vllm_processing import ReLLMDummyInputs, ReLLMMultiModalProcessor, ReLLMProcessingInfo
from .vllm_readings import KeptReadings, relllm_hear, relllm_readings, relllm_suppress

for method in (relllm_readings, relllm_hear, relllm_suppress):  # for `collective_rpc`
    setattr(WorkerBase, method.__name__, method)


class HearingHalf(ReLLMHearing):
    """Towers, projector and heads, each in the precision that it has in our own model."""

    def __init__(self, config: ReLLMConfig) -> None:
        super().__init__()
        self.config = config
        self.make_hearing(config)


@MULTIMODAL_REGISTRY.register_processor(
    ReLLMMultiModalProcessor, info=ReLLMProcessingInfo, dummy_inputs=ReLLMDummyInputs
)
class ReLLMInVllm(nn.Module, SupportsMultiModal):
    """What a checkpoint's architecture `ReLLMForConditionalGeneration` is in vLLM."""

    # The ids say where the LoRA acts. A later stage of a pipeline would not get them: hence no SupportsPP.
    requires_raw_input_tokens = True
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.text_model.": "language_model.", "model.": "hearing."}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<|audio|>" if modality == "audio" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        given = vllm_config.model_config
        config: ReLLMConfig = given.hf_config
        check_llm(config)
        self.config = config
        where = {"revision": given.revision, "cache_dir": vllm_config.load_config.download_dir}
        self.place = {"path": given.model, **where}
        mark: Any = self  # `SupportsMultiModal`, whose types are not read here
        with mark._mark_tower_model(vllm_config, "audio"):
            self.hearing = HearingHalf(config).eval()
        with mark._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[_text_architecture(config)],
            )
        self.step_scope = StepScope(vllm_config.scheduler_config.max_num_batched_tokens, given.dtype)
        if config.lora_config is not None:
            with torch.device("meta"):  # what PEFT makes of the configuration: layers, ranks, scales
                layers = ReLLMForConditionalGeneration(copy.deepcopy(config)).model.text_model.lora_layers
            packed = getattr(self.language_model, "packed_modules_mapping", {})
            add_scoped_lora(self.language_model, layers, self.step_scope, packed)
        self.readings, self.suppresses = KeptReadings(), True
        self.extractor = AutoFeatureExtractor.from_pretrained(given.model, revision=given.revision)

    @property
    def device(self) -> torch.device:
        return self.step_scope.mask.device

    def embed_multimodal(self, **audio: Any) -> list[Tensor]:
        """Return the positions of each clip, in the LLM's precision, and keep what was heard."""
        if (counts := audio.pop("num_audio_tokens", None)) is None:
            return []
        keys = audio.pop("clip_key").flatten().tolist()
        audio["audio_num_windows"] = audio["audio_num_windows"].flatten().to(self.device)
        heard = self.hearing.get_audio_features(**audio, return_dict=True)
        self.readings.keep(keys, heard)
        return list(heard.pooler_output.to(self.step_scope.mask.dtype).split(counts.flatten().tolist()))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        is_audio = input_ids == self.config.audio_token_id
        scope = self.config.lora_scope
        self.step_scope.set(is_audio if scope == "audio" else ~is_audio if scope == "text" else is_audio | True)
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.suppresses:
            logits[..., self.config.audio_token_id] = float("-inf")  # a placeholder is never an answer
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint; of a light one, what is left out comes from its towers."""
        if self.config.light_checkpoint:
            place = {name: value for name, value in self.place.items() if value is not None}
            weights = ReLLMForConditionalGeneration.full_state(**place, config=self.config)
        return AutoWeightsLoader(self).load_weights(rename_lora(weights), mapper=self.hf_to_vllm_mapper)


def check_llm(config: ReLLMConfig) -> None:
    """Raise a `ValueError` for an LLM that needs more of the model around it than embeddings and positions."""
    text: Any = config.text_config
    if getattr(text, "hidden_size_per_layer_input", 0):
        reason = "reads token ids in every layer"
    elif has_inner_state(ModelRegistry.models[_text_architecture(config)].load_model_cls()):
        reason = "keeps a state that is no cache of attention"
    else:
        return
    raise ValueError(f"{text.model_type} {reason}, which vLLM is not given here. Serve it with `relllm serve`.")


def _text_architecture(config: ReLLMConfig) -> str:
    """Name vLLM's own implementation of the LLM, or Transformers' on vLLM's layers where vLLM has none."""
    text: Any = config.text_config
    name = (text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]])[0]
    return name if name in ModelRegistry.get_supported_archs() else "TransformersForCausalLM"
