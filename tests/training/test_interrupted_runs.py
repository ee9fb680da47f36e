"""`relllm train` and `train-emotion`, killed (SIGKILL) at any stage and given again, end as if nothing had been."""

import json
import os
import signal
from pathlib import Path

import pytest
import soundfile
import torch
from light_checkpoints import save_towers
from processes import ForkServer
from safetensors.torch import load_file
from tiny_models import clip
from transformers import TrainerState

from relllm.training.checkpoints import RunComplete
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig
from relllm.training.emotion_training import (
    EmotionScriptArguments,
    EmotionTowerTrainer,
    EmotionTrainingConfig,
    run_emotion_training,
)
from relllm.training.run import run_training
from relllm.training.trainer import ReLLMSFTTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")]
STEPS = {"train": 3, "train-emotion": 3, "stopping early": 2}
KILLS = ("before the first save", "within a save", "after the last save", "in the final evaluation")
STOPPING = {  # at a learning rate of 0 the second evaluation is no better
    **{"learning_rate": 0.0, "max_steps": 9, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
}


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, place: Path, folder: Path, kill: str = "") -> None:
    """The whole run, of its own process; `kill` says where it dies."""
    owner = EmotionTowerTrainer if kind == "train-emotion" else ReLLMSFTTrainer
    save, evaluate, compute = TrainerState.save_to_json, owner.evaluate, owner.compute_loss
    if kill == "before the first save":
        owner.compute_loss = die
    elif kill == "within a save":  # all but the last file of a checkpoint is there
        TrainerState.save_to_json = lambda self, path: die() if "checkpoint-2" in path else save(self, path)
    elif kill == "in the third step":
        owner.compute_loss = lambda self, *a, **k: die() if self.state.global_step == 2 else compute(self, *a, **k)
    elif kill == "after the last save":
        owner.save_metrics = die
    elif kill == "in the final evaluation":
        saved = folder / "train_results.json"
        owner.evaluate = lambda *args, **kwargs: die() if saved.exists() else evaluate(*args, **kwargs)
    options = {
        **{"output_dir": str(folder), "max_steps": 3, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 0},
        **{"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_pin_memory": False},
    }
    rows = {"data": str(place / "rows.jsonl"), "eval_split": "validation"}
    if kind == "train-emotion":
        options |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
        script = EmotionScriptArguments(model_name_or_path=str(place / "emotion"), **rows)
        run_emotion_training(script, EmotionTrainingConfig(**options))
        return
    places = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    towers = {name: str(place / tower) for name, tower in places.items()}
    dropout = 0.0 if kind == "auto" else 0.2  # whose masks are drawn for each micro-batch
    sizes = {"projector_inner_dim": 16, "lora_r": 4, "lora_alpha": 8, "lora_dropout": dropout, "full_window": False}
    if kind == "auto":
        options |= {"per_device_train_batch_size": "auto", "rows_per_update": 4, "gradient_accumulation_steps": 8}
    stopping = {"early_stopping_patience": 1} if kind == "stopping early" else {}
    options |= STOPPING if stopping else {}
    script = ReLLMScriptArguments(**towers, **sizes, **rows, **stopping)
    run_training(script, ReLLMSFTConfig(**options, gradient_checkpointing=False, log_completions=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers and rows on disk."""
    folder = tmp_path_factory.mktemp("place")
    save_towers(folder)
    rows = []
    for index in range(10):
        soundfile.write(folder / f"{index}.wav", clip(0.3, seed=index), 16_000)
        labels = {"emotion": "sad", "arousal": 0.1 * index, "dominance": 0.5, "valence": 0.9 - 0.1 * index**0.5}
        row = {"id": f"{index}", "audio": f"{index}.wav", "response": "I am so sorry to hear that.", **labels}
        rows.append(row | {"dominance": 0.3 + 0.05 * index, "split": "train" if index < 8 else "validation"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place: Path, fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind in STEPS:
        fork_server.run(train, kind, place, folder / kind)
    return {kind: folder / kind for kind in STEPS}


@pytest.mark.parametrize(
    "kind, kill",
    [*((kind, kill) for kind in ("train", "train-emotion") for kill in KILLS), ("stopping early", KILLS[2])],
)
def test_a_run_ends_as_one_that_was_not_killed(
    kind: str, kill: str, place: Path, uninterrupted: dict[str, Path], fork_server: ForkServer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert fork_server.start(train, kind, place, run, kill).wait() == -signal.SIGKILL
    assert "steps_done" not in json.loads((run / "training_settings.json").read_text())
    fork_server.run(train, kind, place, run)
    expected = load_file(uninterrupted[kind] / "model.safetensors")
    found = load_file(run / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("eval_results.json", "training_settings.json"):
        records = [json.loads((one / name).read_text()) for one in (run, uninterrupted[kind])]
        # TRL counts the tokens that a process, not the run, was trained on
        of_process = ("runtime", "per_second", "num_tokens")
        found, expected = ({k: v for k, v in one.items() if not k.endswith(of_process)} for one in records)
        assert found == expected and len(found) > 3, name
    assert json.loads((run / "training_settings.json").read_text())["steps_done"] == STEPS[kind]
    assert not (run / "_unfinished").exists()


def test_a_run_goes_on_with_another_number_of_processes(place: Path, fork_server: ForkServer, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert fork_server.start(train, "auto", place, run, "in the third step").wait() == -signal.SIGKILL
    ranks = fork_server.run_ranks(train, "auto", place, run)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:] + ranks[1].stderr[-2000:]
    assert "Going on from" in ranks[0].stdout and "1 at once × 2 × 2" not in ranks[0].stdout
    assert "2 at once × 1 × 2 processes" in ranks[0].stdout
    fork_server.run(train, "auto", place, whole)
    found, expected = (load_file(one / "model.safetensors") for one in (run, whole))
    before = load_file(run / "checkpoint-2" / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(before[name], weight, atol=1e-4) for name, weight in expected.items())


def test_a_complete_run_is_left_alone(place: Path, uninterrupted: dict[str, Path]) -> None:
    for kind, steps in STEPS.items():
        before = {path: path.stat().st_mtime_ns for path in uninterrupted[kind].rglob("*")}
        with pytest.raises(RunComplete, match=f"{steps} steps"):
            train(kind, place, uninterrupted[kind])
        assert {path: path.stat().st_mtime_ns for path in uninterrupted[kind].rglob("*")} == before
