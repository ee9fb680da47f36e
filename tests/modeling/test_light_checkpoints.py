"""Light checkpoints: the same model as a full one, the size of what was trained, and a tower that is gone is named."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from light_checkpoints import assert_same_model, assert_same_weights, build, save_towers, saved_names, trained_names
from tiny_models import (
    tiny_llm,
    tiny_model,
    tiny_processor,
)
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from relllm import ReLLMForConditionalGeneration, ReLLMModel, register_for_auto_class
from relllm.cli import app
from relllm.modeling.checkpoint_relllm import source_fingerprint

BYTES_OF_HEADER = 20_000


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def model(towers: Path) -> ReLLMForConditionalGeneration:
    return build(towers)


@pytest.fixture(scope="module")
def light(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light")
    model.save_pretrained(folder, light=True)
    return folder


@pytest.mark.parametrize("form", ["full", "light"])
def test_its_full_state_is_the_whole_model_weight_by_weight(model, light: Path, tmp_path: Path, form: str) -> None:
    if form == "full":
        model.save_pretrained(light := tmp_path, max_shard_size="50KB")
    found = ReLLMForConditionalGeneration.full_state(light)
    assert iter(found) is found  # nothing is read before it is asked for
    state = dict(found)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_its_full_state_takes_a_tower_from_elsewhere_and_only_the_one_of_the_training(
    model, light: Path, towers: Path, tmp_path: Path
) -> None:
    shutil.copytree(towers / "llm", tmp_path / "moved")
    places = {"text_model": str(tmp_path / "moved")}
    name = "model.text_model.model.norm.weight"
    state = dict(ReLLMForConditionalGeneration.full_state(light, towers=places))
    assert torch.equal(state[name], model.state_dict()[name])
    tiny_llm(vocab_size=320).to(torch.bfloat16).save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="text_model at .*moved is not the one"):
        dict(ReLLMForConditionalGeneration.full_state(light, towers=places))


# --- what is in one --------------------------------------------------------------------------------------------------


def test_it_holds_what_was_trained_and_nothing_else(model, light: Path) -> None:
    assert saved_names(light) == trained_names(model)
    trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    size = (light / "model.safetensors").stat().st_size
    assert trained_bytes <= size < trained_bytes + BYTES_OF_HEADER


def test_its_configuration_says_where_the_towers_are(light: Path, towers: Path) -> None:
    config = json.loads((light / "config.json").read_text())
    assert config["light_checkpoint"] is True
    places = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    assert {name: tower["name"] for name, tower in config["towers"].items()} == {
        name: str(towers / place) for name, place in places.items()
    }
    assert all(len(tower["fingerprint"]) == 64 and tower["dtype"] == "float32" for tower in config["towers"].values())


def test_a_full_save_afterwards_is_full(model, light: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["light_checkpoint"] is False
    assert saved_names(tmp_path) > saved_names(light)


def test_a_trained_tower_is_in_it_and_a_later_light_save_keeps_it(towers: Path, tmp_path: Path) -> None:
    model = build(towers)
    model.model.audio_tower.requires_grad_(True)
    with torch.no_grad():
        model.model.audio_tower.layers[0].fc1.weight.add_(1)
    model.save_pretrained(tmp_path / "one", light=True)
    assert any("audio_tower" in name for name in saved_names(tmp_path / "one"))
    again = AutoModel.from_pretrained(tmp_path / "one")  # its towers are frozen now
    again.save_pretrained(tmp_path / "two", light=True)
    found = AutoModel.from_pretrained(tmp_path / "two")
    assert_same_model(found, again)
    assert torch.equal(found.model.audio_tower.layers[0].fc1.weight, model.model.audio_tower.layers[0].fc1.weight)
    own = {name for name in saved_names(tmp_path / "two") if "audio_tower" in name}
    assert own == {"model.audio_tower.layers.0.fc1.weight"}  # the rest is the source's, to the bit


def test_a_frozen_weight_that_was_changed_by_hand_is_in_it(towers: Path, tmp_path: Path) -> None:
    model = build(towers)
    model.save_pretrained(tmp_path / "one", light=True)
    with torch.no_grad():
        model.model.emotion_tower.classifier.dense.bias.add_(1)
    model.save_pretrained(tmp_path / "two", light=True)  # after the hashes of the first save
    assert_same_model(AutoModel.from_pretrained(tmp_path / "two"), model)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AutoModel, ReLLMForConditionalGeneration, ReLLMModel], ids=lambda cls: cls.__name__)
def test_a_light_checkpoint_loads_as_the_full_one_does(cls: type, model, light: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    found, info = cls.from_pretrained(light, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = cls.from_pretrained(tmp_path)
    assert_same_model(found, expected)
    if cls is not ReLLMModel:
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize(
    "towers_options, options",
    [
        ({"tied": True, "vocab_size": 200}, {}),  # resized embeddings
        ({"vocab_size": 200}, {}),
        ({"speech": "wav2vec2"}, {}),
        ({"tied": True}, {"dtype": torch.bfloat16}),
        ({}, {"emotion_fusion": "token"}),
    ],
    ids=["tied and resized", "resized", "wav2vec2", "tied in bfloat16", "token fusion"],
)
def test_so_does_one_of_other_towers(towers_options: dict, options: dict, tmp_path: Path) -> None:
    model = build(save_towers(tmp_path, **towers_options), **options)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    found = AutoModel.from_pretrained(tmp_path / "light")
    assert_same_model(found, AutoModel.from_pretrained(tmp_path / "full"))
    assert_same_model(found, model)


def test_trained_waveform_towers_come_back(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path, speech="wav2vec2"))
    for tower in (model.model.audio_tower, model.model.emotion_tower):
        tower.requires_grad_(True)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "light", light=True)
    shutil.rmtree(tmp_path / "speech")  # nothing of it is needed
    model.model.freeze()
    assert_same_model(AutoModel.from_pretrained(tmp_path / "light"), model)


def test_float32_training_over_bfloat16_towers_loads_as_the_full_one_does(towers: Path, tmp_path: Path) -> None:
    model = build(towers, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    for options in ({}, {"dtype": torch.float32}):
        found, expected = (AutoModel.from_pretrained(tmp_path / kind, **options) for kind in ("light", "full"))
        assert_same_model(found, expected)


def test_shards_of_a_light_checkpoint_are_read(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, light=True, max_shard_size="100KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_model(AutoModel.from_pretrained(tmp_path), model)


def test_it_loads_from_the_hub_cache_with_its_towers_there_at_their_revisions(
    model, light: Path, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, source in (("re-llm", light), *((place, towers / place) for place in ("speech", "emotion", "llm"))):
        repository = tmp_path / f"models--org--{name}"
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    cache = {"cache_dir": str(tmp_path)}
    moved = {"audio_tower": "org/speech", "emotion_tower": "org/emotion", "text_model": "org/llm"}
    found = AutoModel.from_pretrained("org/re-llm", towers=moved, **cache)
    assert_same_weights(found, model)


def test_towers_that_moved_can_be_named(model, towers: Path, light: Path, tmp_path: Path) -> None:
    shutil.copytree(towers, tmp_path / "moved")
    place = tmp_path / "moved" / "llm"
    for cls in (AutoModel, ReLLMForConditionalGeneration):
        found = cls.from_pretrained(light, towers={"text_model": str(place)})
        assert_same_weights(found, model)
        assert found.config.towers["text_model"]["name"] == str(place)


def test_the_code_files_are_written_beside_a_light_checkpoint(model, tmp_path: Path) -> None:
    register_for_auto_class()
    try:
        model.save_pretrained(tmp_path, light=True)
    finally:
        register_for_auto_class(False)
    assert (tmp_path / "checkpoint_relllm.py").exists()
    found = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert_same_weights(found, model)
    assert trained_names(found) == trained_names(model)


def test_layers_that_are_kept_whole_are_those_of_the_model(model) -> None:
    """Accelerate's FSDP looks each of them up, and Whisper's encoder names a layer of its decoder."""
    present = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "WhisperEncoderLayer"} <= set(model._no_split_modules) <= present


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_tower_that_is_gone_is_named_with_the_remedy(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path))
    model.save_pretrained(tmp_path / "light", light=True)
    shutil.rmtree(tmp_path / "emotion")
    with pytest.raises(OSError, match=r"needs its emotion_tower, and .*emotion did not load.*towers=") as caught:
        AutoModel.from_pretrained(tmp_path / "light")
    assert str(tmp_path / "emotion") in str(caught.value)


def test_a_tower_that_changed_is_named_with_the_remedy(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path))
    model.save_pretrained(tmp_path / "light", light=True)
    changed = tiny_llm()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-3
    changed.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"text_model at .*llm is not the one .* fingerprint .*towers="):
        AutoModel.from_pretrained(tmp_path / "light")


def test_another_kind_of_tower_is_refused(light: Path, towers: Path) -> None:
    with pytest.raises((OSError, ValueError), match="text_model"):
        AutoModel.from_pretrained(light, towers={"text_model": str(towers / "speech")})


def test_a_model_whose_towers_have_no_source_cannot_be_saved_light(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not known where this model's audio_tower came from.*Save that tower"):
        tiny_model().save_pretrained(tmp_path, light=True)


def test_towers_are_refused_with_a_full_checkpoint_and_where_they_are_none(model, light, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for cls in (AutoModel, ReLLMForConditionalGeneration):
        with pytest.raises(ValueError, match="is a full one"):
            cls.from_pretrained(tmp_path, towers={"text_model": "org/llm"})
        with pytest.raises(ValueError, match=r"towers has \['projector'\]"):
            cls.from_pretrained(light, towers={"projector": "org/llm"})


def test_a_fingerprint_tells_a_byte_apart_and_neither_a_place_nor_the_hubs_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("here", "there", "changed"):
        tiny_llm().save_pretrained(tmp_path / name)
    found = source_fingerprint({"name": str(tmp_path / "here")})
    assert source_fingerprint({"name": str(tmp_path / "there")}) == found
    weights = tmp_path / "changed" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert source_fingerprint({"name": str(tmp_path / "changed")}) != found
    here = tmp_path / "here" / "model.safetensors"
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(b"")  # the name is enough: nothing is read
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / digest)
    assert source_fingerprint({"name": str(tmp_path / "snapshot")}) == found


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merge_writes_a_full_checkpoint_that_needs_no_towers(tmp_path: Path) -> None:
    model = build(save_towers(tmp_path))
    model.save_pretrained(tmp_path / "light", light=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "light")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "light"), "--out", str(tmp_path / "full")])
    assert done.exit_code == 0, done.output
    for name in ("speech", "emotion", "llm"):
        shutil.rmtree(tmp_path / name)
    assert_same_model(AutoModel.from_pretrained(tmp_path / "full"), model)
    assert AutoProcessor.from_pretrained(tmp_path / "full").tokenizer.get_vocab()
