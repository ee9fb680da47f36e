"""`relllm train` with recipes/reward_grpo.yaml, from the synthetic corpus on disk to a checkpoint that answers."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from empathy_scorers import save_scorers
from grpo_runs import NEEDS_TRL
from processes import ForkServer, launch
from typer.testing import CliRunner

from relllm import ReLLMForConditionalGeneration
from relllm.cli import app
from relllm.evaluation.fingerprints import folder_fingerprint
from relllm.preferences.grpo_config import GRPO_SETTINGS, ReLLMGRPOConfig
from relllm.preferences.preference_settings import RewardSettings

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"), NEEDS_TRL]
RECIPES = Path(__file__).parents[2] / "recipes"
ON_A_CPU = ("--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", "--gradient_checkpointing", "false")


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == status, result.output
    return result.output


def test_settings_of_the_rewards_are_those_of_score_replies() -> None:
    declared = {one.name: one for one in fields(ReLLMGRPOConfig)}
    for one in fields(RewardSettings):
        assert declared[one.name].default == one.default
        assert declared[one.name].metadata["help"] == one.metadata["help"]
    here = {"judge_endpoint", "judge_key_env"}  # of this machine, and no word for a card
    assert {one.name for one in fields(RewardSettings)} - set(GRPO_SETTINGS) == here


@pytest.mark.slow
def test_the_recipe_trains_on_the_synthetic_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork_server: ForkServer
) -> None:
    monkeypatch.chdir(tmp_path)
    run("prepare", "synthetic", "--out", "data/synthetic", "--train-clips", 4, "--validation-clips", 2)
    run("prepare", "tiny-towers", "--out", "data/tiny-towers")
    run("train", "--config", RECIPES / "smoke.yaml", "--max_steps", 2, *ON_A_CPU)
    words = ["train", "--config", RECIPES / "reward_grpo.yaml", "--model_name_or_path", "runs/smoke"]
    words += ["--data", "data/synthetic", "--held_out", "", "--output_dir", "runs/grpo", *ON_A_CPU]
    words += ["--max_steps", 2, "--save_steps", 1, "--eval_steps", 1, "--max_completion_length", 8]
    words += ["--load_best_model_at_end", "true", "--metric_for_best_model", "reward"]
    words += ["--scorers", ""]
    assert "The reward ER needs a scorer" in run(*words, status=1)
    first, second = save_scorers(tmp_path / "first", ("ER",)), save_scorers(tmp_path / "second", ("ER",), "roberta")
    words += ["--rewards", "ER=1,length=-0.1", "--num_generations", 4, "--per_device_train_batch_size", 4]
    words += ["--scorers", first]
    assert "The model and its processor are in runs/grpo." in run(*words)
    record = json.loads(Path("runs/grpo/training_settings.json").read_text())
    assert record["method"] == "grpo" and record["rewards"] == {"ER": 1.0, "length": -0.1}
    assert record["beta"] == 0.04 and record["steps_done"] == 2 and record["scorers"] == "a local folder"
    assert record["scorers_fingerprint"] == folder_fingerprint(first)
    results = json.loads(Path("runs/grpo/eval_results.json").read_text())
    assert {"eval_reward", "eval_rewards/length/mean", "eval_kl", "eval_emotion_loss"} <= results.keys()
    ReLLMForConditionalGeneration.from_pretrained("runs/grpo")
    assert "complete in runs/grpo" in run(*words)
    ddp = ("--config_file", RECIPES / "accelerate" / "ddp.yaml", "--num_processes=2", "--main_process_port=0")
    two = map(str, [*ddp, "-m", "relllm.cli", *words, "--out", "runs/two"])
    environment = {"PYTHONPATH": str(RECIPES.parent), "ACCELERATE_USE_CPU": "true"}
    done = fork_server.run(launch, *two, folder=tmp_path, **environment)
    assert done.stdout.count("The model and its processor are in") == 1
    checkpoint = Path("runs/two/checkpoint-2")
    assert {one.name for one in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    refused = run(*words, "--beta", 0.1, status=1)
    assert "with other settings (beta" in refused
    assert "with other settings (scorers_fingerprint" in run(*words, "--scorers", second, status=1)


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["train", "--method", "grpo", "--data", tmp_path, "--output_dir", tmp_path / "run", *ON_A_CPU]
    towers = ("--audio_tower", "x", "--text_model", "y", "--emotion_fusion", "none")
    assert "give model_name_or_path" in run(*words, *towers, status=1)
    assert "rewards is missing" in run(*words, "--model_name_or_path", tmp_path, status=1)
    assert "use_vllm is set" in run(*words, "--model_name_or_path", "x", "--use_vllm", "true", status=2)
