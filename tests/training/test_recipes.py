"""The recipes: each parses, gives the architecture that it says, and leaves the paper's only where it says so."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from light_checkpoints import tower_settings
from pictures import blank_pictures
from processes import ForkServer, launch, run_command
from typer.testing import CliRunner

from relllm import ReLLMConfig
from relllm.cli import app
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT
from relllm.setting import read_recipe
from relllm.training.building import build_config
from relllm.training.run import parse_arguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml"))
OF_OTHERS = ("text_only", "preference_dpo", "reward_grpo")  # commands, or methods of `relllm train`
RUNS = [str(path) for path in RECIPES if path.parts[0] != "accelerate" and path.stem not in OF_OTHERS]
DIFFERENCES = {  # of stage2_emotion.yaml
    "ablations/no_emotion_fusion": {"emotion_tower": None, "emotion_fusion": "none"},
    "ablations/no_auxiliary_losses": {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0},
    "ablations/token_fusion": {"emotion_fusion": "token"},
    "ablations/lora_text": {"lora_scope": "text"},
    "ablations/lora_global": {"lora_scope": "global"},
    "stage2_multitask": {"tasks": {"reply": 1, "recognition": 0.5, "transcription": 0.25}},
    "stage2_emotion_kl": {"response_kl_weight": 1.0, "kl_temperature": 2.0},
    "qlora_7b": {
        **{"load_in_4bit": True, "light_checkpoints": False, "save_total_limit": 1, "optim": "paged_adamw_8bit"},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    },
}
ON_A_CPU = ["--bf16", "false", "--use_cpu", "true", "--optim", "adamw_torch"]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def read(name: str) -> dict:
    return read_recipe(ROOT / "recipes" / name)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tower_settings(tmp_path_factory.mktemp("towers"))


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
        if value == "auto":
            assert setting in args.automatic
        elif setting not in towers and setting not in ("output_dir", "bf16", "optim", "report_to"):
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


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_on_another_differs_in_what_it_says_alone(name: str, tmp_path: Path) -> None:
    expected = read("stage2_emotion.yaml") | DIFFERENCES[name] | {"output_dir": f"runs/{name}"}
    assert read(f"{name}.yaml") == expected
    ablations = {f"ablations/{path.stem}" for path in RECIPES if path.parts[0] == "ablations"}
    assert ablations == {one for one in DIFFERENCES if one.startswith("ablations/")}
    if name == "ablations/no_emotion_fusion":  # a line of the base is taken back
        arguments = ["--config", str(ROOT / "recipes" / f"{name}.yaml"), *ON_A_CPU]
        script, _ = parse_arguments([*arguments, "--output_dir", str(tmp_path)])
        assert script.emotion_tower is None and script.audio_tower == "openai/whisper-large-v2"


def test_recipes_stand_on_each_other_in_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_WORD", raising=False)
    monkeypatch.setenv("ANOTHER", "kept")  # which is put back after the test, whatever the recipe sets
    (tmp_path / "above").mkdir()
    for name, text in {
        "paper.yaml": "data: d\nmodel_name_or_path: m\nlora_r: 2\nlora_alpha: 4\nseed: 3",
        "above/mine.yaml": "base: ../paper.yaml\nlora_r: 8\nenv: {ANOTHER: one}",
        "fold.yaml": "base: above/mine.yaml\nseed: 5\nheld_out: session=Ses05",
    }.items():
        (tmp_path / name).write_text(text)
    flags = ["--config", str(tmp_path / "fold.yaml"), "--output_dir", str(tmp_path), "--lora_alpha", "16"]
    script, args = parse_arguments([*flags, *ON_A_CPU])
    assert (script.data, script.lora_r, script.lora_alpha, args.seed) == ("d", 8, 16, 5)
    assert script.held_out == "session=Ses05" and os.environ["ANOTHER"] == "one"


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, "base leads in a circle: {a} → {b} → {a}. Take one"),
        ({"a": "base: a.yaml"}, "base leads in a circle: {a} → {a}."),
        ({"a": "base: b.yaml", "b": "base: gone.yaml"}, "{b} has the base {gone}, and no such file is there."),
        ({"a": "base: [b.yaml]"}, "base of {a} is ['b.yaml']; it takes the path of one recipe."),
        ({"a": "base: b.yaml", "b": ""}, "{b} must be a YAML mapping"),
        ({"a": "base: b.yaml", "b": "learnin_rate: 1"}, "learnin_rate, a line of the recipe, is no setting. Did you"),
        ({"a": "env: A"}, "env is 'A', a str; it takes a mapping."),
    ],
)
def test_a_base_that_cannot_be_is_one_line(files: dict[str, str], message: str, tmp_path: Path, capsys) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(SystemExit) as raised:
        parse_arguments(["--config", str(tmp_path / "a.yaml")])
    said = capsys.readouterr().err
    places = {name: str(tmp_path / f"{name}.yaml") for name in ("a", "b", "gone")}
    assert raised.value.code == 2 and message.format(**places) in said and len(said.splitlines()) == 1


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
        with blank_pictures():
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
def test_accelerate_launches_it_on_two_processes(smoke_folder: Path, fork_server: ForkServer) -> None:
    ddp = str(ROOT / "recipes" / "accelerate" / "ddp.yaml")  # `--cpu` in its place would start one process
    options = ("--config_file", ddp, "--num_processes=2", "--main_process_port=0")
    settings = ["--use_cpu", "true", "--max_steps", "2", "--save_steps", "2", "--output_dir", "runs/two"]
    command = ["-m", "relllm.cli", "train", "--config", str(ROOT / "recipes" / "smoke.yaml"), *settings]
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = fork_server.run(launch, *options, *command, folder=smoke_folder, **environment)
    assert done.stdout.count("The model and its processor are in") == 1
    checkpoint = smoke_folder / "runs" / "two" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
