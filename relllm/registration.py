"""Registration with the Auto classes of Transformers, by name, at the moment when Transformers loads them.

`import relllm` must make `AutoModel.from_pretrained` know a ReLLM, and must cost nothing: the Auto classes import
torch, and so do our models. So each Auto module that is loaded later gets names of classes then, as it has them for
Transformers' own models, and imports a class when it is asked for. (Importing our classes at that moment would fail:
Transformers loads its Auto modules in the middle of others.) Auto modules that are loaded already get the classes.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

_AUTO = "transformers.models.auto."
# Auto module -> its dictionaries of names -> what they get.
_NAMES: dict[str, dict[str, dict[str, str]]] = {
    _AUTO + "configuration_auto": {
        "CONFIG_MAPPING_NAMES": {"relllm": "ReLLMConfig", "relllm_emotion": "ReLLMEmotionConfig"},
    },
    _AUTO + "modeling_auto": {
        "MODEL_MAPPING_NAMES": {"relllm": "ReLLMForConditionalGeneration", "relllm_emotion": "ReLLMEmotionModel"},
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": {"relllm": "ReLLMForConditionalGeneration"},
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": {"relllm": "ReLLMForConditionalGeneration"},
    },
    _AUTO + "feature_extraction_auto": {"FEATURE_EXTRACTOR_MAPPING_NAMES": {"relllm": "ReLLMFeatureExtractor"}},
    _AUTO + "processing_auto": {"PROCESSOR_MAPPING_NAMES": {"relllm": "ReLLMProcessor"}},
}


def register_with_transformers(package: ModuleType) -> None:
    """Has the Auto classes know ours.

    Args:
        package (`ModuleType`): `relllm`, where the names are found.
    """
    if any(name in sys.modules for name in _NAMES):
        _register_classes()
        return
    for model_type in ("relllm", "relllm_emotion"):  # where Transformers looks up the names of a model type
        sys.modules[f"transformers.models.{model_type}"] = package
    sys.meta_path[:0] = [_AddNames(name, names) for name, names in _NAMES.items()]


def _register_classes() -> None:
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForMultimodalLM,
        AutoModelForSpeechSeq2Seq,
        AutoProcessor,
    )

    from .modeling.configuration_relllm import ReLLMConfig, ReLLMEmotionConfig
    from .modeling.emotion_tower_relllm import ReLLMEmotionModel
    from .modeling.modeling_relllm import ReLLMForConditionalGeneration
    from .processing.feature_extraction_relllm import ReLLMFeatureExtractor
    from .processing.processing_relllm import ReLLMProcessor

    AutoConfig.register("relllm", ReLLMConfig, exist_ok=True)
    AutoConfig.register("relllm_emotion", ReLLMEmotionConfig, exist_ok=True)
    AutoModel.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
    AutoModel.register(ReLLMEmotionConfig, ReLLMEmotionModel, exist_ok=True)
    AutoModelForMultimodalLM.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(ReLLMConfig, ReLLMForConditionalGeneration, exist_ok=True)
    AutoFeatureExtractor.register(ReLLMConfig, ReLLMFeatureExtractor, exist_ok=True)
    AutoProcessor.register(ReLLMConfig, ReLLMProcessor, exist_ok=True)


class _AddNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as Python would, and adds names to its dictionaries once it is loaded."""

    def __init__(self, module: str, names: Mapping[str, Mapping[str, str]]) -> None:
        self.module = module
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self.loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        for dictionary, names in self.names.items():
            getattr(module, dictionary).update(names)


__all__ = ["register_with_transformers"]
