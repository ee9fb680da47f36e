"""The recipes: each parses, gives the architecture that it says, and leaves the paper's only where it says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from processes import ForkServer, run_command
from tiny_models import tiny_emotion_tower, tiny_llm, tiny_speech_tower, tiny_tokenizer
from typer.testing import CliRunner

from relllm import ReLLMConfig
from relllm.cli import app
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT
from relllm.training.building import build_config
from relllm.training.run import parse_arguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml"))
RUNS = [str(path) for path in RECIPES if path.parts[0] != "accelerate"]
ABLATIONS = {
    "no_emotion_fusion": {"emotion_tower": None, "emotion_fusion": "none"},
    "no_auxiliary_losses": {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0},
    "token_fusion": {"emotion_fusion": "token"},
    "lora_text": {"lora_scope": "text"},
    "lora_global": {"lora_scope": "global"},
}
ON_A_CPU = ["--bf16", "false", "--use_cpu", "true", "--optim", "adamw_torch"]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    tiny_speech_tower("whisper").save_pretrained(folder / "speech")
    tiny_emotion_tower().save_pretrained(folder / "emotion")
    tiny_llm().save_pretrained(folder / "llm")
    tiny_tokenizer(audio_token=False).save_pretrained(folder / "llm")
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    return {setting: str(folder / name) for setting, name in names.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_gives_the_architecture_that_it_says(name: str, towers: dict[str, str], tmp_path: Path) -> None:
    recipe = read(name)
    local = [part for setting, path in towers.items() if setting in recipe for part in (f"--{setting}", path)]
    output = ["--output_dir", str(tmp_path)]
    script, args = parse_arguments(["--config", str(ROOT / "recipes" / name), *local, *output, *ON_A_CPU])
    config = build_config(script)
    assert isinstance(config, ReLLMConfig)
    assert config.emotion_fusion == recipe["emotion_fusion"]
    assert (config.emotion_config is None) == (recipe["emotion_fusion"] == "none")
    assert config.lora_scope == recipe.get("lora_scope", "audio")
    assert (config.lora_config or {"r": 0})["r"] == recipe["lora_r"]
    for setting, value in recipe.items():
        if setting not in towers and setting not in ("output_dir", "bf16", "optim", "report_to"):
            assert getattr(script if hasattr(script, setting) else args, setting) == value, setting


def test_stage_two_is_the_papers(tmp_path: Path) -> None:
    """The numbers of the paper's recipe, written here once more by hand."""
    arguments = ["--config", str(ROOT / "recipes" / "stage2_emotion.yaml"), "--output_dir", str(tmp_path), *ON_A_CPU]
    script, args = parse_arguments(arguments)
    assert (args.learning_rate, args.weight_decay, args.warmup_steps) == (2e-5, 0.05, 200)
    assert (args.num_train_epochs, args.max_grad_norm) == (3, 1.0)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 8)
    weights = (args.response_loss_weight, args.emotion_loss_weight, args.dimension_loss_weight)
    assert weights == (1, 1, 1) and args.response_kl_weight == 0
    assert args.dimension_loss == "mse" and args.unfreeze == []
    assert script.lora == {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05} and script.lora_scope == "audio"
    assert script.emotion_fusion == "concat" and script.audio_tower == "openai/whisper-large-v2"
    assert (args.instruction, args.system_prompt) == (SPEECH_PROMPT, SYSTEM_PROMPT)


def test_stage_one_learns_from_the_transcript_alone(tmp_path: Path) -> None:
    arguments = ["--config", str(ROOT / "recipes" / "stage1_semantic.yaml"), "--output_dir", str(tmp_path), *ON_A_CPU]
    script, args = parse_arguments(arguments)
    assert script.lora is None and args.response_kl_weight == 1 and args.kl_temperature == 2
    assert (args.response_loss_weight, args.emotion_loss_weight, args.dimension_loss_weight) == (0, 0, 0)
    assert 4 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 768
    assert (args.learning_rate, args.warmup_steps, args.num_train_epochs) == (1e-4, 1000, 1)
    assert args.instruction.endswith(": ") and args.system_prompt == ""


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_what_it_says_alone(name: str) -> None:
    paper, ablation = read("stage2_emotion.yaml"), read(f"ablations/{name}.yaml")
    expected = paper | ABLATIONS[name] | {"output_dir": f"runs/ablations/{name}"}
    assert ablation == {setting: value for setting, value in expected.items() if value is not None}
    assert {path.stem for path in RECIPES if path.parts[0] == "ablations"} == set(ABLATIONS)


@pytest.mark.parametrize(
    "name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")]
)
def test_accelerate_reads_its_configurations(name: str, kind: str) -> None:
    config = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_machines == 1
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


@pytest.fixture(scope="module")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke recipe runs: its corpus and towers, made as its header says."""
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("smoke")
    sizes = ["--train-clips", "4", "--validation-clips", "1", "--test-clips", "1", "--num-proc", "1"]
    for arguments in (["tiny-towers", "--out", "tiny-towers"], ["synthetic", "--out", "synthetic", *sizes]):
        arguments[2] = str(folder / "data" / arguments[2])
        assert CliRunner().invoke(app, ["prepare", *arguments]).exit_code == 0
    return folder


def test_the_smoke_recipe_runs_as_its_header_says(smoke_folder: Path, fork_server: ForkServer) -> None:
    arguments = ["train", "--config", str(ROOT / "recipes" / "smoke.yaml"), "--use_cpu", "true"]
    said = fork_server.run(run_command, *arguments, folder=smoke_folder).stdout
    out = smoke_folder / "runs" / "smoke"
    assert "runs/smoke" in said
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
    assert (out / "eval_results.json").exists() and (out / "model.safetensors").exists()


@pytest.mark.slow
def test_accelerate_launches_it_on_two_processes(smoke_folder: Path) -> None:
    ddp = str(ROOT / "recipes" / "accelerate" / "ddp.yaml")  # `--cpu` in its place would start one process
    options = ("--config_file", ddp, "--num_processes=2", "--main_process_port=0")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "relllm.cli"]
    settings = ["--use_cpu", "true", "--max_steps", "2", "--save_steps", "2", "--output_dir", "runs/two"]
    command = [*launcher, "train", "--config", str(ROOT / "recipes" / "smoke.yaml"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=smoke_folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The model and its processor are in") == 1
    checkpoint = smoke_folder / "runs" / "two" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
