"""`import relllm` loads nothing heavy, and still every Auto class knows a ReLLM, whatever was imported before."""

import subprocess
import sys

import pytest
from tiny_models import tiny_model, tiny_processor

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy")
LOAD = """
model = transformers.AutoModel.from_pretrained(path)
assert type(model).__module__ == "relllm.modeling.modeling_relllm", type(model)
assert transformers.AutoModelForMultimodalLM.from_pretrained(path).__class__ is type(model)
assert transformers.AutoModelForSpeechSeq2Seq.from_pretrained(path).__class__ is type(model)
assert type(transformers.AutoConfig.from_pretrained(path)).__name__ == "ReLLMConfig"
assert type(transformers.AutoProcessor.from_pretrained(path)).__name__ == "ReLLMProcessor"
assert type(transformers.AutoFeatureExtractor.from_pretrained(path)).__name__ == "ReLLMFeatureExtractor"
assert transformers.AutoModel.from_config(model.config.emotion_config).__class__.__name__ == "ReLLMEmotionModel"
"""
BEFORE = {
    "nothing else": "import relllm, transformers",
    "the Auto classes": "from transformers import AutoModel, AutoProcessor; import relllm, transformers",
    "the configurations alone": "from transformers import AutoConfig; import relllm, transformers",
    "a module that loads the Auto classes in its middle": "import relllm, transformers.generation.utils, transformers",
    "a class of ours": "from relllm.modeling.modeling_relllm import ReLLMModel; import transformers",
    "a configuration of ours": "import relllm; relllm.ReLLMConfig(); import transformers",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.mark.parametrize("module", ["relllm", "relllm.cli"])
def test_importing_loads_nothing_heavy(module):
    done = run(f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("imports", BEFORE.values(), ids=BEFORE.keys())
def test_the_auto_classes_know_a_rellm_after(imports, checkpoint):
    done = run(f"path = {str(checkpoint)!r}\n{imports}\n{LOAD}")
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_had():
    code = "import relllm\nfor name in relllm.__all__: assert name in dir(relllm); getattr(relllm, name)"
    assert run(code).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    done = run("import relllm; relllm.ReLLMTrainer")
    assert "module 'relllm' has no attribute 'ReLLMTrainer'" in done.stderr
