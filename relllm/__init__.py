"""RE-LLM for Transformers: a speech LLM that hears how something is said (arXiv 2602.10716).

Importing this package registers its classes with the Auto classes of Transformers, and so loads both; `AutoModel`,
`AutoModelForMultimodalLM` and `AutoModelForSpeechSeq2Seq` all give [`ReLLMForConditionalGeneration`]. The other names
below are imported when they are first used.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import DIMENSIONS, EMOTIONS

if TYPE_CHECKING:
    from .conversion import convert_original_checkpoint
    from .data.loading import load_corpus
    from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
    from .modeling.emotion_tower_relllm import ReLLMEmotionModel
    from .modeling.modeling_relllm import ReLLMForConditionalGeneration, ReLLMModel
    from .preferences.dpo import ReLLMDPOConfig, ReLLMDPOTrainer
    from .preferences.grpo import ReLLMGRPOTrainer
    from .preferences.grpo_config import ReLLMGRPOConfig
    from .processing.audio_relllm import load_audio
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor
    from .training.config import ReLLMSFTConfig
    from .training.trainer import ReLLMSFTTrainer

__version__ = "0.1.0"

_LAZY = {
    "ReLLMConfig": ".modeling.configuration_relllm",
    "ReLLMDPOConfig": ".preferences.dpo",
    "ReLLMDPOTrainer": ".preferences.dpo",
    "ReLLMEmotionConfig": ".modeling.configuration_relllm",
    "ReLLMEmotionModel": ".modeling.emotion_tower_relllm",
    "ReLLMFeatureExtractor": ".processing.feature_extraction_relllm",
    "ReLLMForConditionalGeneration": ".modeling.modeling_relllm",
    "ReLLMGRPOConfig": ".preferences.grpo_config",
    "ReLLMGRPOTrainer": ".preferences.grpo",
    "ReLLMModel": ".modeling.modeling_relllm",
    "ReLLMProcessor": ".processing.processing_relllm",
    "ReLLMSFTConfig": ".training.config",
    "ReLLMSFTTrainer": ".training.trainer",
    "convert_original_checkpoint": ".conversion",
    "load_audio": ".processing.audio_relllm",
    "load_corpus": ".data.loading",
}


def register_with_transformers() -> None:
    """Make the Auto classes of Transformers know ours, and its pipelines and servers our models by name.

    Our names go into the tables of model classes that others read, and not into those of configurations and
    processors, where Transformers would look for a module of its own for them.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
    from .modeling.emotion_tower_relllm import ReLLMEmotionModel
    from .modeling.modeling_relllm import AUTO_CLASSES, ReLLMForConditionalGeneration
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor

    transformers.AutoConfig.register("relllm", ReLLMConfig, exist_ok=True)
    transformers.AutoConfig.register("relllm_emotion", ReLLMEmotionConfig, exist_ok=True)
    transformers.AutoModel.register(ReLLMEmotionConfig, ReLLMEmotionModel, exist_ok=True)
    for name in AUTO_CLASSES:
        getattr(transformers, name).register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
    transformers.AutoFeatureExtractor.register(ReLLMConfig, ReLLMFeatureExtractor, exist_ok=True)
    transformers.AutoProcessor.register(ReLLMConfig, ReLLMProcessor, exist_ok=True)
    for table in (
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        table["relllm"] = ReLLMForConditionalGeneration.__name__


def register_with_vllm() -> None:
    """Make vLLM know ReLLM checkpoints; it finds this by an entry point and calls it in each of its processes."""
    from .inference.vllm import register

    register_with_transformers()  # a child of `relllm …` has not
    register()


def register_for_auto_class(enabled: bool = True) -> None:
    """Have `save_pretrained` and `push_to_hub` write the code files too, for `trust_remote_code=True`.

    Such a checkpoint loads in a process that lacks this package. It holds for the rest of this process.

    Args:
        enabled (`bool`, *optional*, defaults to `True`): `False` switches it off again.
    """
    from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
    from .modeling.emotion_tower_relllm import ReLLMEmotionModel
    from .modeling.modeling_relllm import AUTO_CLASSES, ReLLMForConditionalGeneration
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor

    auto_classes: dict[Any, str] = {
        ReLLMConfig: "AutoConfig",
        ReLLMEmotionConfig: "AutoConfig",
        ReLLMEmotionModel: "AutoModel",
        ReLLMForConditionalGeneration: AUTO_CLASSES[0],
        ReLLMFeatureExtractor: "AutoFeatureExtractor",
        ReLLMProcessor: "AutoProcessor",
    }
    for cls, name in auto_classes.items():
        cls._auto_class = name if enabled else None


# `relllm …` and `python -m relllm.cli …` (which is still "-m" now) register when a command runs: help needs no model.
if Path(*sys.argv[:1]).stem not in ("relllm", "-m"):
    register_with_transformers()


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
    "ReLLMDPOConfig",
    "ReLLMDPOTrainer",
    "ReLLMEmotionConfig",
    "ReLLMEmotionModel",
    "ReLLMFeatureExtractor",
    "ReLLMForConditionalGeneration",
    "ReLLMGRPOConfig",
    "ReLLMGRPOTrainer",
    "ReLLMModel",
    "ReLLMProcessor",
    "ReLLMSFTConfig",
    "ReLLMSFTTrainer",
    "convert_original_checkpoint",
    "load_audio",
    "load_corpus",
    "register_for_auto_class",
    "register_with_transformers",
]
