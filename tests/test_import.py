"""Every Auto class knows a ReLLM, whatever was imported before, and the help of the command loads no model."""

import json
import resource
import subprocess
import sys

import pytest
from tiny_models import tiny_model, tiny_processor

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


def test_the_help_takes_less_than_a_second_of_processor_time():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "relllm.cli", "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and "evaluate" in done.stdout, done.stderr
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1


@pytest.mark.parametrize("imports", BEFORE.values(), ids=BEFORE.keys())
def test_the_auto_classes_know_a_rellm_after(imports, checkpoint):
    done = run(f"path = {str(checkpoint)!r}\n{imports}\n{LOAD}")
    assert done.returncode == 0, done.stderr


TABLES = """
import importlib, json, sys
names, classes = {}, {}
for module in ("auto_mappings", "configuration_auto", "modeling_auto", "feature_extraction_auto", "processing_auto"):
    for name, table in vars(importlib.import_module(f"transformers.models.auto.{module}")).items():
        if name.endswith("_MAPPING_NAMES"):
            names[f"{module}.{name}"] = {key: str(value) for key, value in table.items()}
        elif name.endswith("_MAPPING"):
            classes[name] = sorted(map(str, getattr(table, "_extra_content", {}).items()))
ours = sorted(key for key, value in sys.modules.items() if "relllm" in key and getattr(value, "__name__", key) != key)
finders = [str(finder) for finder in sys.meta_path if getattr(finder, "__module__", "").split(".")[0] == "relllm"]
print(json.dumps([names, classes, ours, finders]))
"""


def test_the_auto_classes_are_the_same_in_every_order():
    orders = ("import relllm; import transformers", "from transformers import AutoModel, AutoProcessor; import relllm")
    found = []
    for imports in orders:
        done = run(f"{imports}\n{TABLES}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    names, classes, fakes, finders = found[0]
    assert found[1] == found[0] and not fakes and not finders
    assert names["modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"]["relllm"] == "ReLLMForConditionalGeneration"
    assert "ReLLMProcessor" in str(classes["PROCESSOR_MAPPING"]) and "ReLLMConfig" in str(classes["CONFIG_MAPPING"])


def test_every_public_name_can_be_had():
    code = "import relllm\nfor name in relllm.__all__: assert name in dir(relllm); getattr(relllm, name)"
    assert run(code).returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    done = run("import relllm; relllm.ReLLMTrainer")
    assert "module 'relllm' has no attribute 'ReLLMTrainer'" in done.stderr
