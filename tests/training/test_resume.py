"""A run that is killed (SIGKILL) and taken up again ends with the weights of one that was not, to the bit."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from light_checkpoints import assert_same_weights, save_towers, saved_names, trained_names
from light_runs import SAVE_STEPS, STEPS, checkpoint, make_trainer, new_model
from processes import ForkServer
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoModel
from transformers.trainer_utils import get_last_checkpoint

import relllm.training.checkpoints as checkpoints


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: object, name: str, when: Callable[[], bool]) -> None:
    """Replace a function by one that kills this process when it is time, instead of doing its work."""
    work = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: die() if when() else work(*args, **kwargs))


def train(towers: Path, folder: Path, resume: bool = False, kill: str = "") -> None:
    """A run of its own process; `kill` says where it dies, always after the first checkpoint."""
    trainer = make_trainer(folder, new_model(towers, seed=7 if resume else 0))

    def saving() -> bool:
        return trainer.state.global_step == 2 * SAVE_STEPS

    micro_batches = iter(range(100))
    if kill == "within a step":
        die_before(trainer, "compute_loss", lambda: next(micro_batches) == 2 * (SAVE_STEPS + 1) + 1)
    elif kill == "saving: before the weights":
        die_before(trainer.model, "save_pretrained", saving)
    elif kill == "saving: before the optimizer":
        die_before(trainer, "_save_optimizer_and_scheduler", saving)
    elif kill == "saving: before the name":
        die_before(checkpoints.os, "rename", saving)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder / "end")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def uninterrupted(towers: Path, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fork_server.run(train, towers, folder)
    return folder


KILLS = (
    "within a step",
    "saving: before the weights",
    "saving: before the optimizer",
    "saving: before the name",
)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    kill: str, towers: Path, uninterrupted: Path, fork_server: ForkServer, tmp_path: Path
) -> None:
    assert fork_server.start(train, towers, tmp_path, False, kill).wait() == -signal.SIGKILL
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last is not None and Path(last).name == f"checkpoint-{SAVE_STEPS}"
    assert_same_weights(AutoModel.from_pretrained(last), AutoModel.from_pretrained(checkpoint(uninterrupted)))
    fork_server.run(train, towers, tmp_path, True)
    found = load_file(tmp_path / "end" / "model.safetensors")
    expected = load_file(uninterrupted / "end" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert names == {f"checkpoint-{step}" for step in (2, 4, 6)}  # nothing half written is left


def test_the_runs_did_train(uninterrupted: Path) -> None:
    first, last = (load_file(checkpoint(uninterrupted, step) / "model.safetensors") for step in (2, 6))
    assert first.keys() == last.keys() and not any(torch.equal(first[name], last[name]) for name in first)


def test_checkpoints_are_light_and_load_with_their_processor(towers: Path, uninterrupted: Path) -> None:
    model = new_model(towers)
    assert saved_names(checkpoint(uninterrupted)) == trained_names(model)
    names = {path.name for path in checkpoint(uninterrupted).iterdir()}
    assert {"config.json", "processor_config.json", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= names
    loaded = AutoModel.from_pretrained(checkpoint(uninterrupted, STEPS))
    end = load_file(uninterrupted / "end" / "model.safetensors")
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in end.items())


def test_what_trains_is_the_same_after_a_resume(towers: Path, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    trainer = make_trainer(tmp_path, new_model(towers), max_steps=STEPS + 1, save_strategy="no")
    expected = trained_names(trainer.model)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train(resume_from_checkpoint=True)
    assert trained_names(trainer.model) == expected
    assert all(torch.equal(trainer.model.get_parameter(name), weight) for name, weight in frozen.items())


def test_a_resume_with_another_tower_is_refused(uninterrupted: Path, towers: Path, tmp_path: Path) -> None:
    model = new_model(towers)
    with torch.no_grad():
        model.model.emotion_tower.classifier.dense.bias.add_(1)
    trainer = make_trainer(tmp_path, model)
    with pytest.raises(ValueError, match="model's emotion_tower is not the one"):
        trainer.train(resume_from_checkpoint=str(checkpoint(uninterrupted)))


def test_a_resume_that_trains_more_than_was_saved_is_refused(uninterrupted, towers: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, new_model(towers), unfreeze=["audio_tower"])
    with pytest.raises(ValueError, match=r"lacks \d+ weights that train, \['model.audio_tower"):
        trainer.train(resume_from_checkpoint=str(checkpoint(uninterrupted)))


def test_the_best_model_comes_back_from_its_light_checkpoint(towers: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        new_model(towers),
        max_steps=3,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "run" and best.name == f"checkpoint-{trainer.state.best_global_step}"
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(trainer.model.get_parameter(name), weight) for name, weight in saved.items())
    recorded = json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert recorded == str(best)
    kept = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert kept == {best.name}


def test_a_model_without_sources_is_saved_in_full_and_the_log_says_why(tmp_path: Path, monkeypatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning_once", logged.append)
    trainer = make_trainer(tmp_path, tiny_model(), max_steps=1, save_steps=1)
    trainer.train()
    assert "saved in full" in logged[0] and "not known where this model's audio_tower came from" in logged[0]
    assert saved_names(checkpoint(tmp_path, 1)) == set(trainer.model.state_dict())


def test_light_checkpoints_can_be_switched_off(towers: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, new_model(towers), max_steps=1, save_steps=1, light_checkpoints=False)
    trainer.train()
    assert saved_names(checkpoint(tmp_path, 1)) == set(trainer.model.state_dict())
