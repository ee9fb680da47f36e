"""RE-LLM for Transformers: a speech LLM that hears how something is said (arXiv 2602.10716).

Importing this package registers its classes with the Auto classes of Transformers; `AutoModel`,
`AutoModelForMultimodalLM` and `AutoModelForSpeechSeq2Seq` all give [`ReLLMForConditionalGeneration`]. What needs TRL
is imported when it is first used.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
)

from .audio import load_audio
from .labels import DIMENSIONS, EMOTIONS
from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
from .modeling.emotion_tower_relllm import ReLLMEmotionModel
from .modeling.modeling_relllm import AUTO_CLASSES, ReLLMForConditionalGeneration, ReLLMModel
from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
from .processing.processing_relllm import ReLLMProcessor

__version__ = "0.1.0"

_LAZY = {
    "ReLLMSFTConfig": ".training.config",
    "ReLLMSFTTrainer": ".training.trainer",
    "convert_original_checkpoint": ".conversion",
}

AutoConfig.register("relllm", ReLLMConfig, exist_ok=True)
AutoConfig.register("relllm_emotion", ReLLMEmotionConfig, exist_ok=True)
AutoModel.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
AutoModel.register(ReLLMEmotionConfig, ReLLMEmotionModel, exist_ok=True)
AutoModelForMultimodalLM.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
AutoFeatureExtractor.register(ReLLMConfig, ReLLMFeatureExtractor, exist_ok=True)
AutoProcessor.register(ReLLMConfig, ReLLMProcessor, exist_ok=True)


def register_for_auto_class(enabled: bool = True) -> None:
    """Have `save_pretrained` and `push_to_hub` write the code files too, for `trust_remote_code=True`.

    Such a checkpoint loads in a process that lacks this package. It holds for the rest of this process.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): `False` switches it off again.
    """
    auto_classes: dict[Any, str] = {
        ReLLMConfig: "AutoConfig",
        ReLLMForConditionalGeneration: AUTO_CLASSES[0],
        ReLLMFeatureExtractor: "AutoFeatureExtractor",
        ReLLMProcessor: "AutoProcessor",
    }
    for cls, name in auto_classes.items():
        cls._auto_class = name if enabled else None


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "DIMENSIONS",
    "EMOTIONS",
    "ReLLMConfig",
    "ReLLMEmotionConfig",
    "ReLLMEmotionModel",
    "ReLLMFeatureExtractor",
    "ReLLMForConditionalGeneration",
    "ReLLMModel",
    "ReLLMProcessor",
    "ReLLMSFTConfig",
    "ReLLMSFTTrainer",
    "convert_original_checkpoint",
    "load_audio",
    "register_for_auto_class",
]
