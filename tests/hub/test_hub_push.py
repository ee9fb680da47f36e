"""What a run sends to the Hub: whole checkpoints that load elsewhere, without the token."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers.utils.hub as transformers_hub
from fake_hub import FakeHub, serve_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from light_checkpoints import assert_same_weights, save_towers
from light_runs import checkpoint, make_trainer, new_model
from safetensors.torch import load
from transformers import AutoModel, AutoProcessor

import relllm
from relllm import ReLLMSFTTrainer
from relllm.training.checkpoints import why_not_shared

TOKEN = "hf_fake"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(transformers_hub, "_hf_api", HfApi(endpoint=server.url))
        yield server


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(relllm.training.checkpoints.logger, "warning_once", lines.append)
    return lines


def push_trainer(folder: Path, **settings: object) -> ReLLMSFTTrainer:
    """Two steps from towers that are folders, a checkpoint after each."""
    towers = save_towers(folder / "towers")
    settings = {"max_steps": 2, "save_steps": 1, "hub_token": TOKEN, "hub_model_id": "org/run", **settings}
    return make_trainer(folder, new_model(towers), **settings)


def is_light(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("light_checkpoint", False)


def assert_loads_elsewhere(hub: FakeHub, trainer: ReLLMSFTTrainer, towers: Path) -> None:
    towers.rename(towers.with_name("gone"))
    assert_same_weights(AutoModel.from_pretrained(hub.folder / "run"), trainer.model)
    AutoProcessor.from_pretrained(hub.folder / "run")


def test_every_save_sends_whole_full_checkpoints(hub: FakeHub, logged: list[str], tmp_path: Path) -> None:
    relllm.register_for_auto_class()
    try:
        trainer = push_trainer(tmp_path, push_to_hub=True, hub_strategy="every_save", hub_always_push=True)
        trainer.train()
    finally:
        relllm.register_for_auto_class(False)
    assert len(hub.commits) == 2 and "speech" in logged[0] and "saved in full" in logged[0]
    _, *pushed = hub.repositories["org/run"].commits.values()
    for step, files in enumerate(pushed, start=1):
        saved = {path.name: path.read_bytes() for path in checkpoint(tmp_path, step).iterdir()}
        same = {name for name in files if saved.get(name) == files[name]}
        assert {"model.safetensors", "config.json", "modeling_relllm.py", "processing_relllm.py"} <= same
        assert not [name for name in files if name.startswith(("_", "checkpoint-"))]
        assert load(files["model.safetensors"]).keys() == trainer.model.state_dict().keys()
        assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert_loads_elsewhere(hub, trainer, tmp_path / "towers")


@pytest.mark.parametrize("push", [True, False])
def test_the_end_sends_a_full_checkpoint_and_the_others_stay_light(
    push: bool, hub: FakeHub, logged: list[str], tmp_path: Path
) -> None:
    trainer = push_trainer(tmp_path, push_to_hub=push, hub_strategy="end")
    before = checkpoint(tmp_path, 2).parent / "model-00001-of-00002.safetensors"  # of an earlier end of the run
    before.parent.mkdir(parents=True, exist_ok=True)
    before.touch()
    trainer.train()
    assert before.exists()
    before.unlink()
    assert is_light(checkpoint(tmp_path, 2)) and not hub.commits and not logged
    trainer.push_to_hub()
    assert len(hub.commits) == 1 and "speech" in logged[0]
    assert not is_light(hub.folder / "run")
    assert_loads_elsewhere(hub, trainer, tmp_path / "towers")


OWN = ("README.md", "LICENSE", "adapters/mine/adapter_model.safetensors", ".gitattributes")
FORMS = {"one file": "5GB", "several": "50KB"}


def test_what_a_trainer_pushed_last_is_what_loads(
    hub: FakeHub, logged: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, by hand again, and from the checkpoint of a save while it trains."""
    trainer = push_trainer(tmp_path, push_to_hub=True, hub_strategy="every_save", hub_always_push=True, max_steps=1)
    HfApi(endpoint=hub.url).create_commit(
        "org/run", [CommitOperationAdd(name, b"mine") for name in OWN], commit_message="v0", token=TOKEN
    )
    save = trainer.model.save_pretrained
    for number, form in enumerate(("one file", "several", "one file")):
        monkeypatch.setattr(trainer.model, "save_pretrained", partial(save, max_shard_size=FORMS[form]))
        torch.nn.init.constant_(trainer.model.model.emotion_head.weight, number)
        if number < 2:
            trainer.push_to_hub()
        else:
            trainer.train()
            trainer._finish_current_push()
        assert len(hub.commits) == number + 2
        files = hub.repositories["org/run"].commits[hub.repositories["org/run"].branches["main"]]
        assert ("model.safetensors" in files) == (form == "one file"), files.keys()
        assert ("model.safetensors.index.json" in files) == (form == "several")
        assert all(files[name] == b"mine" for name in OWN)
        assert_same_weights(AutoModel.from_pretrained(hub.folder / "run"), trainer.model)


def test_towers_of_the_hub_or_trained_ones_may_be_sent_light(tmp_path: Path) -> None:
    model = new_model(save_towers(tmp_path))
    for tower in ("audio_tower", "text_model"):
        assert f"its {tower} comes from the folder" in why_not_shared(model)
        model.config.towers[tower]["name"] = "org/tower"
        model.model.emotion_tower.requires_grad_(True)
    assert why_not_shared(model) is None
