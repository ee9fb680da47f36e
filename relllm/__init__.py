"""RE-LLM for Transformers: a speech LLM that hears how something is said (arXiv 2602.10716).

Importing this package registers its classes with the Auto classes of Transformers; `AutoModel`,
`AutoModelForMultimodalLM` and `AutoModelForSpeechSeq2Seq` all give [`ReLLMForConditionalGeneration`]. It loads nothing
by itself: every name below is imported when it is first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .labels import DIMENSIONS, EMOTIONS
from .registration import register_with_transformers

if TYPE_CHECKING:
    from .conversion import convert_original_checkpoint
    from .data.loading import load_corpus
    from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
    from .modeling.emotion_tower_relllm import ReLLMEmotionModel
    from .modeling.modeling_relllm import ReLLMForConditionalGeneration, ReLLMModel
    from .processing.audio_relllm import load_audio
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor
    from .training.config import ReLLMSFTConfig
    from .training.trainer import ReLLMSFTTrainer

__version__ = "0.1.0"

_LAZY = {
    "ReLLMConfig": ".modeling.configuration_relllm",
    "ReLLMEmotionConfig": ".modeling.configuration_relllm",
    "ReLLMEmotionModel": ".modeling.emotion_tower_relllm",
    "ReLLMFeatureExtractor": ".processing.feature_extraction_relllm",
    "ReLLMForConditionalGeneration": ".modeling.modeling_relllm",
    "ReLLMModel": ".modeling.modeling_relllm",
    "ReLLMProcessor": ".processing.processing_relllm",
    "ReLLMSFTConfig": ".training.config",
    "ReLLMSFTTrainer": ".training.trainer",
    "convert_original_checkpoint": ".conversion",
    "load_audio": ".processing.audio_relllm",
    "load_corpus": ".data.loading",
}

register_with_transformers(sys.modules[__name__])


def register_for_auto_class(enabled: bool = True) -> None:
    """Have `save_pretrained` and `push_to_hub` write the code files too, for `trust_remote_code=True`.

    Such a checkpoint loads in a process that lacks this package. It holds for the rest of this process.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): `False` switches it off again.
    """
    from .modeling.configuration_relllm import ReLLMConfig
    from .modeling.modeling_relllm import AUTO_CLASSES, ReLLMForConditionalGeneration
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor

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
    "load_corpus",
    "register_for_auto_class",
]
