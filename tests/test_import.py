"""Every Auto class knows a ReLLM, whatever was imported before, and the help of the command loads no model."""

import json
import resource
import subprocess
import sys

import pytest
from tiny_models import tiny_model, tiny_processor

import relllm

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
PUBLIC_NAMES = "import relllm\nfor name in relllm.__all__: assert name in dir(relllm); getattr(relllm, name)"
NO_ARGUMENTS = """
import sys
sys.argv = []
import relllm, transformers
transformers.AutoConfig.for_model("relllm")
"""
FORKING = """
import json, os, sys, traceback
import accelerate, sklearn.metrics, torch, torchaudio
assert not {"transformers", "relllm"} & set(sys.modules)
said = {}
for name, code in codes.items():
    read, write = os.pipe()
    if not os.fork():
        try:
            exec(code, {})
        except BaseException:
            os.write(write, traceback.format_exc()[-3000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said[name] = pipe.read()
    status = os.wait()[1]
    said[name] += f"exit status {status}" if status else ""
print(json.dumps(said))
"""


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


def test_the_settings_of_training_are_listed_within_two_seconds_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "relllm.cli", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--emotion_loss_weight" in done.stdout and not done.stderr, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.fixture(scope="module")
def said(checkpoint) -> dict[str, str]:
    """What went wrong in each order of imports and otherwise: each in a process of its own.

    They are forked from one that has imported PyTorch, which is most of the time, and neither Transformers nor relllm.
    """
    codes = {name: f"path = {str(checkpoint)!r}\n{imports}\n{LOAD}" for name, imports in BEFORE.items()}
    codes |= {"public names": PUBLIC_NAMES, "no arguments": NO_ARGUMENTS}
    command = [sys.executable, "-W", "error", "-c", f"codes = {codes!r}\n{FORKING}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("order", BEFORE)
def test_the_auto_classes_know_a_rellm_after(order, said):
    assert said[order] == ""


@pytest.mark.slow
def test_every_public_name_can_be_had(said):
    assert said["public names"] == ""


@pytest.mark.slow
def test_an_interpreter_without_arguments_imports_it(said):
    assert said["no arguments"] == ""


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'relllm' has no attribute 'ReLLMTrainer'"):
        relllm.ReLLMTrainer  # noqa: B018
