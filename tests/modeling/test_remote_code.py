"""`trust_remote_code=True` in a fresh process that lacks the package, offline; and what a push sends to the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from fake_hub import COMMIT, serve_hub
from light_checkpoints import build, save_towers, trained_names
from safetensors.torch import load_file
from tiny_models import (
    RATE,
    audio_part,
    clip,
    conversation_inputs,
    tiny_emotion_tower,
    tiny_model,
    tiny_processor,
    user_turn,
)
from transformers import AutoModel, AutoProcessor

import relllm

WITHOUT_THE_PACKAGE = """
import importlib.abc, json, os, sys, traceback

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "relllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer)

torch.set_num_threads(1)
remote = {"trust_remote_code": True}
"""
CHILD = (
    WITHOUT_THE_PACKAGE
    + """
wav, *cases = sys.argv[1:]

def load(where, out, again):
    processor = AutoProcessor.from_pretrained(where, **remote)
    content = [{"type": "text", "text": "Listen: "}, {"type": "audio", "path": wav}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True)
    tensors, classes = {}, {}
    for auto_class in (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq):
        model = auto_class.from_pretrained(where, **remote)
        name = auto_class.__name__
        classes[name] = type(model).__name__
        with torch.no_grad():
            tensors[name + ".logits"] = model(**inputs).logits
        tensors[name + ".reply"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        tensors[name + ".beams"] = model.generate(**inputs, max_new_tokens=6, num_beams=2)
    for auto_class in (AutoConfig, AutoFeatureExtractor, AutoTokenizer, AutoProcessor):
        classes[auto_class.__name__] = type(auto_class.from_pretrained(where, **remote)).__name__
    tensors["trained"] = torch.tensor(sum(p.requires_grad for p in model.parameters()))
    tensors["lora"] = torch.tensor(sum(bool(p.any()) for n, p in model.named_parameters() if "lora_B" in n))
    model.save_pretrained(again)
    processor.save_pretrained(again)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    assert not [name for name in sys.modules if name.partition(".")[0] == "relllm"]
    print(json.dumps(classes), flush=True)

# Each in a process of its own, forked from this one, which has imported Transformers.
for case in zip(cases[::3], cases[1::3], cases[2::3]):
    if not os.fork():
        try:
            load(*case)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, case
"""
)
# The towers by themselves, and checkpoints that lean on them.
PARTS = (
    WITHOUT_THE_PACKAGE
    + """
wav, emotion, hub_emotion, folder, *places = sys.argv[1:]
tensors = {}
with torch.no_grad():
    for name, where in (("directory", emotion), ("hub", hub_emotion)):
        tower = AutoModel.from_pretrained(where, **remote)
        tensors["emotion " + name] = tower(torch.linspace(-1, 1, 8000)[None]).dimensions
    tower.save_pretrained(folder + "/emotion again")
    for where in places:
        name = os.path.basename(where)
        inputs = AutoProcessor.from_pretrained(where, **remote).apply_request(wav)
        model = AutoModel.from_pretrained(where, **remote)
        tensors[name] = model(**inputs).logits
        model.save_pretrained(folder + "/" + name + " again")
        with torch.enable_grad():
            model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            if parameter.grad is not None:  # the heads have another loss
                parameter -= 0.1 * parameter.grad
        tensors[name + " trained"] = model.eval()(**inputs).logits
        model.save_pretrained(folder + "/" + name + " trained")
save_file(tensors, folder + "/parts.safetensors")
assert not [name for name in sys.modules if name.partition(".")[0] == "relllm"]
"""
)
PUSH = """
import sys
import relllm
from transformers import AutoModel, AutoProcessor
parts = [auto_class.from_pretrained(sys.argv[1]) for auto_class in (AutoModel, AutoProcessor)]
for kind in ("plain", "code"):
    relllm.register_for_auto_class(kind == "code")
    for part in parts:
        part.push_to_hub("org/" + kind, token="hf_fake")
"""


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wav") / "clip.wav"
    soundfile.write(path, clip(2.7), RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its code files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    relllm.register_for_auto_class()
    try:
        tiny_model().save_pretrained(folder)
        tiny_processor().save_pretrained(folder)
    finally:
        relllm.register_for_auto_class(False)
    return folder


@pytest.fixture(scope="module")
def expected(wav: Path) -> dict[str, torch.Tensor]:
    """What this process, with the package, computes."""
    model = tiny_model()
    inputs = conversation_inputs(tiny_processor(), [user_turn("Listen: ", audio_part(str(wav)))])
    with torch.no_grad():
        logits = model(**inputs).logits
    return {
        "logits": logits,
        "reply": model.generate(**inputs, max_new_tokens=6, do_sample=False),
        "beams": model.generate(**inputs, max_new_tokens=6, num_beams=2),
    }


def hub_cache(checkpoint: Path, home: Path) -> None:
    """Lay a checkpoint out as a download from the Hub leaves it."""
    repository = home / "hub" / "models--org--re-llm"
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for index, path in enumerate(sorted(checkpoint.iterdir())):
        (repository / "blobs" / f"{index:040x}").write_bytes(path.read_bytes())
        (repository / "snapshots" / COMMIT / path.name).symlink_to(f"../../blobs/{index:040x}")


def run_fresh(code: str, *arguments: object, folder: Path, isolated: bool = True, **environment: str) -> str:
    """Standard output of a fresh process with a Hugging Face home of its own; its errors fail the test."""
    variables = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


pytestmark = pytest.mark.slow
PLACES = ("directory", "hub-cache", "saved again")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, wav: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Classes and tensors of processes without the package, and what each saved, which the last one loads."""
    folder = tmp_path_factory.mktemp("fresh")
    hub_cache(checkpoint, folder / "home")
    where = dict(zip(PLACES, (checkpoint, "org/re-llm", folder / "again hub-cache"), strict=True))
    cases = [part for name in PLACES for part in (where[name], folder / f"out {name}", folder / f"again {name}")]
    classes = [
        json.loads(line) for line in run_fresh(CHILD, wav, *cases, folder=folder).splitlines() if line.startswith("{")
    ]
    return {
        name: (found, load_file(folder / f"out {name}"), folder / f"again {name}")
        for name, found in zip(PLACES, classes, strict=True)
    }


@pytest.fixture(params=PLACES)
def fresh(request, loaded) -> tuple:
    return loaded[request.param]


def assert_equal_replies(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for auto_class in ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForSpeechSeq2Seq"):
        for name, tensor in expected.items():
            assert torch.equal(tensors[f"{auto_class}.{name}"], tensor)


def test_every_auto_class_works_without_the_package(fresh) -> None:
    classes = dict(fresh[0])
    tokenizer = classes.pop("AutoTokenizer")
    assert "Tokenizer" in tokenizer
    assert classes == {
        "AutoConfig": "ReLLMConfig",
        "AutoModel": "ReLLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "ReLLMForConditionalGeneration",
        "AutoModelForSpeechSeq2Seq": "ReLLMForConditionalGeneration",
        "AutoProcessor": "ReLLMProcessor",
        "AutoFeatureExtractor": "ReLLMFeatureExtractor",
    }


def test_logits_and_replies_equal_those_of_the_package(fresh, expected) -> None:
    assert_equal_replies(fresh[1], expected)


def test_the_lora_and_the_frozen_towers_come_along(fresh) -> None:
    tensors = fresh[1]
    assert int(tensors["lora"]) == 2 * 7
    assert int(tensors["trained"]) == sum(parameter.requires_grad for parameter in tiny_model().parameters())


def test_what_it_saves_has_the_code_and_loads_here_too(fresh, checkpoint: Path, wav: Path, expected) -> None:
    again = fresh[2]
    code = {path.name for path in checkpoint.glob("*.py")}
    assert code and {path.name for path in again.glob("*.py")} == code
    model, processor = AutoModel.from_pretrained(again), AutoProcessor.from_pretrained(again)
    assert type(model) is relllm.ReLLMForConditionalGeneration
    inputs = conversation_inputs(processor, [user_turn("Listen: ", audio_part(str(wav)))])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected["logits"])


# --- towers, and checkpoints that lean on them ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(wav: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emotion tower, a light and a bfloat16 checkpoint, and what a process without the package made of them."""
    folder = tmp_path_factory.mktemp("parts")
    save_towers(folder, text_dtype=torch.bfloat16)  # these towers have no code with them
    relllm.register_for_auto_class()
    try:
        tiny_emotion_tower().save_pretrained(folder / "tower")
        for name, dtype in (("light", torch.float32), ("half", torch.bfloat16)):
            model = build(folder, dtype=dtype)
            model.save_pretrained(folder / name, light=name == "light")
            tiny_processor(model.config).save_pretrained(folder / name)
    finally:
        relllm.register_for_auto_class(False)
    hub_cache(folder / "tower", folder / "home")
    places = (folder / "tower", "org/re-llm", folder, folder / "light", folder / "half")
    run_fresh(PARTS, wav, *places, folder=folder)
    return folder


@pytest.mark.parametrize("place", ["directory", "hub"])
def test_an_emotion_tower_loads_without_the_package(place: str, parts: Path) -> None:
    values = torch.linspace(-1, 1, 8000)[None]
    found = load_file(parts / "parts.safetensors")[f"emotion {place}"]
    for tower in (tiny_emotion_tower(), AutoModel.from_pretrained(parts / "emotion again")):
        with torch.no_grad():
            assert torch.equal(tower.eval()(values).dimensions, found)
    assert {path.name for path in (parts / "emotion again").glob("*.py")} >= {"emotion_tower_relllm.py"}
    assert "auto_map" not in json.loads((parts / "emotion" / "config.json").read_text())


@pytest.mark.parametrize("name", ["light", "half"])
def test_a_checkpoint_and_its_towers_load_without_the_package(name: str, parts: Path, wav: Path) -> None:
    found = load_file(parts / "parts.safetensors")[name]
    inputs = AutoProcessor.from_pretrained(parts / name).apply_request(wav)
    for where in (name, f"{name} again"):
        with torch.no_grad():
            assert torch.equal(AutoModel.from_pretrained(parts / where)(**inputs).logits, found)


@pytest.mark.parametrize("name", ["light", "half"])
def test_a_training_step_without_the_package_is_saved_to_the_bit(name: str, parts: Path, wav: Path) -> None:
    found = load_file(parts / "parts.safetensors")
    inputs = AutoProcessor.from_pretrained(parts / name).apply_request(wav)
    before, after = (AutoModel.from_pretrained(parts / where) for where in (name, f"{name} trained"))
    assert after.dtype == before.dtype == (torch.bfloat16 if name == "half" else torch.float32)
    with torch.no_grad():
        assert torch.equal(after(**inputs).logits, found[f"{name} trained"])
    moved = {key for key, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(key))}
    assert moved and {after.get_parameter(key).dtype for key in moved} == {torch.float32}
    assert moved <= trained_names(before) and any(".lora_B." in key for key in moved)


def test_a_later_save_of_a_tower_without_the_code_points_at_none(parts: Path, tmp_path: Path) -> None:
    tower = tiny_emotion_tower()
    relllm.register_for_auto_class()
    try:
        tower.save_pretrained(tmp_path / "code")
    finally:
        relllm.register_for_auto_class(False)
    tower.save_pretrained(tmp_path / "plain")
    assert "auto_map" in json.loads((tmp_path / "code" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


# --- push_to_hub -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two repositories that a process with the package pushed: `plain` and `code`."""
    folder = tmp_path_factory.mktemp("push")
    tiny_model().save_pretrained(folder / "source")
    tiny_processor().save_pretrained(folder / "source")
    package = str(Path(relllm.__file__).parent.parent)
    with serve_hub(folder) as server:
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        run_fresh(PUSH, folder / "source", folder=folder, isolated=False, PYTHONPATH=package, **hub)
    return folder


@pytest.mark.parametrize("kind", ["plain", "code"])
def test_push_to_hub_sends_a_checkpoint_that_loads(kind: str, pushed: Path, checkpoint: Path) -> None:
    folder = pushed / kind
    code = {path.name for path in checkpoint.glob("*.py")}
    assert code and {path.name for path in folder.glob("*.py")} == (code if kind == "code" else set())
    assert ("auto_map" in json.loads((folder / "config.json").read_text())) == (kind == "code")
    inputs = conversation_inputs(AutoProcessor.from_pretrained(folder), [user_turn(clip(0.5))])
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(folder)(**inputs).logits, tiny_model()(**inputs).logits)
