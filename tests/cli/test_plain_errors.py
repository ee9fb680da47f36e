"""A wrong path or setting is one line on stderr: the value, what was expected, the remedy; 2 for wrong use."""

import sys
from pathlib import Path

import pytest
from target_rows import make_rows, write_lines
from tiny_models import tiny_emotion_tower, tiny_llm, tiny_model, tiny_processor, tiny_speech_tower, tiny_tokenizer
from typer.testing import CliRunner

import relllm
from relllm.cli import app


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: towers, data, a recipe."""
    folder = tmp_path_factory.mktemp("here")
    tiny_speech_tower("whisper").save_pretrained(folder / "towers" / "speech")
    tiny_emotion_tower().save_pretrained(folder / "towers" / "emotion")
    tiny_llm().save_pretrained(folder / "towers" / "llm")
    tiny_tokenizer(audio_token=False).save_pretrained(folder / "towers" / "llm")
    (folder / "data" / "ours").mkdir(parents=True)
    write_lines(folder / "data" / "ours" / "metadata.jsonl", make_rows(3))
    labels = {"emotion": "sad", "arousal": 0.3, "dominance": 0.4, "valence": 0.5, "duration_s": 1}
    rows = [{"id": f"{i}", "audio": f"{i}.wav", "response": "I am sorry.", **labels} for i in range(4)]
    (folder / "data" / "taught").mkdir()
    write_lines(folder / "data" / "taught" / "metadata.jsonl", rows)
    model = tiny_model(fusion="none")
    model.save_pretrained(folder / "data" / "deaf")
    tiny_processor(model.config).save_pretrained(folder / "data" / "deaf")
    places = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    lines = [f"{name}: towers/{place}" for name, place in places.items()]
    (folder / "recipe.yaml").write_text("\n".join([*lines, "output_dir: runs/x", "use_cpu: true", ""]))
    return folder


def said(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.exit_code, result.stderr


MISTYPED = {
    "train": (["train", "--config", "recipe.yaml", "--data", "data/our"], "there is data/ours"),
    "train, tower": (
        ["train", "--config", "recipe.yaml", "--data", "data/ours", "--text_model", "towers/lm"],
        "No folder towers/lm; there is towers/llm",
    ),
    "train-emotion": (
        ["train-emotion", "--model_name_or_path", "towers/emotoin", "--data", "data/ours", "--output_dir", "o"],
        "there is towers/emotion",
    ),
    "plan": (["plan", "--config", "recipe.yaml", "--data", "x", "--audio_tower", "tower/speech"], "towers/speech"),
    "inspect": (["inspect", "data/ousr"], "No file or folder data/ousr; there is data/ours"),
    "annotate": (["annotate", "data/ours", "--emotion-model", "towers/emotio", "--out", "o.jsonl"], "towers/emotion"),
    "write-targets": (
        ["write-targets", "data/ours", "--text-model", "towers/llmm", "--out", "o.jsonl"],
        "towers/llm",
    ),
    "a folder above": (
        ["reply", "towers", "a.wav"],
        "no folder with a config.json; there is towers/emotion",
    ),
    "evaluate": (["evaluate", "towers/lm", "data/ours", "--out", "o"], "there is towers/llm"),
    "merge": (["merge", "towers/lm", "--out", "o"], "there is towers/llm"),
    "nothing near": (["inspect", "./gone/away.csv"], "holds data, recipe.yaml, towers"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTYPED.values(), ids=MISTYPED.keys())
def test_a_mistyped_path_is_no_hub_id_and_the_nearest_is_named(here: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(here)
    status, line = said(*arguments)
    assert status == 2 and message in line


WRONG = {
    "a tab": ("data:\tours\n\tx: 1", "no YAML"),
    "a list for a name": ("eval_split: [a, b]", "eval_split is ['a', 'b'], a list; it takes one value"),
    "a name for a list": (
        "unfreeze: audio_tower",
        "unfreeze is 'audio_tower', a str; it takes a list, such as [",
    ),
    "a mapping for a number": ("lora_r: {a: 1}", "lora_r is {'a': 1}, a dict; it takes one value"),
    "a switch for a number": ("learning_rate: true", "learning_rate is True, a bool"),
    "a name for a number": ("lora_r: many", "lora_r"),
    "no mapping": ("- data", "YAML mapping"),
}


OF_ALL = [(command, case) for command in ("train", "train-emotion", "plan") for case in WRONG]
OF_ALL.remove(("train-emotion", "a name for a list"))  # none of its settings is a list of its own


@pytest.mark.parametrize(("command", "case"), OF_ALL)
def test_a_recipe_with_a_wrong_line_is_named(tmp_path: Path, command: str, case: str) -> None:
    recipe, message = WRONG[case]
    if command == "train-emotion":
        recipe, message = recipe.replace("lora_r", "num_layers"), message.replace("lora_r", "num_layers")
    (tmp_path / "recipe.yaml").write_text(recipe + "\n")
    status, line = said(command, "--config", str(tmp_path / "recipe.yaml"))
    assert status == 2 and message in line and f"relllm {command}: " in line


def test_wrong_flags_are_one_line_of_status_2(here: Path, monkeypatch) -> None:
    monkeypatch.chdir(here)
    for arguments, message in (
        (["inspect"], "Missing argument"),
        (["inspect", "data/ours", "--sow", "3"], "--sow"),
        (["inspect", "data/ours", "--show", "-1"], "--show"),
        (["inspct"], "inspct"),
        (["write-targets", "data/ours", "--text-model", "m", "--out", "o.jsonl", "--extra-body", "{"], "JSON object"),
    ):
        status, line = said(*arguments)
        assert status == 2 and message in line and "--help" in line


@pytest.mark.parametrize("out", ["o.txt", "data"])
@pytest.mark.parametrize("command", ["annotate", "write-targets"])
def test_the_output_is_checked_before_a_model_is_loaded(here: Path, monkeypatch, command: str, out: str) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    model = ["--emotion-model", "towers/emotion"] if command == "annotate" else ["--text-model", "towers/llm"]
    status, line = said(command, "data/ours", *model, "--out", out)
    assert status == 1 and f"--out {out}" in line


def test_what_fails_is_one_line_of_status_1(here: Path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(here)
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    status, line = said("inspect", str(tmp_path / "rows.jsonl"))
    assert status == 1 and line.startswith("stopped: ") and "line 1 is not JSON" in line


EVALUATED = ["--train_split", "all", "--eval_split", "all", "--eval_strategy", "steps", "--eval_steps", "1"]
BEST = [*EVALUATED, "--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end", "true"]
EARLY = {  # settings of `train`, and of `train-emotion` where they are its too, and what is said
    "attention": (["--attn_implementation", "sdpaa"], 'attn_implementation="sdpaa"` is not supported'),
    "attention, not here": (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
    "a schedule's arguments": (["--lr_scheduler_kwargs", '{"x": 1}'], "unexpected keyword argument 'x'"),
    "a schedule that needs some": (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
    "optimizer": (["--optim", "adamw_anyprecision"], "torchdistx"),
    "report": (["--report_to", "wandb"], "WandbCallback requires wandb"),
    "report to nothing known": (["--report_to", "wandbb"], "wandbb is not supported"),
    "metric": ([*BEST, "--metric_for_best_model", "eval_lss"], "no evaluation of this run has 'lss', but loss, "),
    "a metric's beginning": ([*BEST, "--metric_for_best_model", "ccc"], "has 'ccc', but loss, "),
    "more than a metric": ([*BEST, "--metric_for_best_model", "loss_typo"], "has 'loss_typo', but loss, "),
    "a task's metric": (
        [*BEST, "--metric_for_best_model", "recognition_accuracy"],
        "has 'recognition_accuracy', but ",
    ),
    "a head that does not train": (
        [*BEST, "--metric_for_best_model", "eval_ua", "--emotion_loss_weight", "0"],
        "has 'ua', but loss, response_loss, dimension_loss, ccc_arousal, ccc_dominance, ccc_valence, entropy, mean_t",
    ),
    "a task that no row feeds": (
        [*BEST, "--metric_for_best_model", "transcription_loss", "--tasks", "reply=1,transcription=1"],
        "The task 'transcription' is given",
    ),
    "checkpoint": (["--resume_from_checkpoint", "runs/none"], "runs/none is no checkpoint"),
    "layers": (["--lora_target_modules", "q_prj"], "lora_config names ['q_prj']"),
    "an LLM that hears": (["--audio_tower", "towers/llm"], "audio_config must be of one of the kinds"),
    "an LLM that feels": (["--emotion_tower", "towers/llm"], "encoder_config must be of one of the kinds"),
    "batch": (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1, got 0."),
    "accumulation": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
    "rows of an update": (["--rows_per_update", "0"], "rows_per_update must be at least 1, got 0."),
    "checkpoints to keep": (["--save_total_limit", "0"], "save_total_limit must be at least 1, got 0."),
    "no checkpoint": (["--save_strategy", "steps", "--save_steps", "0"], "save_steps is 0"),
    "rate": (["--learning_rate", "-1"], "learning_rate must be at least 0, got -1.0."),
    "endless rate": (["--learning_rate", "inf"], "learning_rate must be finite and at least 0, got inf."),
    "beta": (["--adam_beta2", "1"], "adam_beta2 must be in [0, 1), got 1.0."),
    "optimizer's arguments": (["--optim_args", "momentum=0.9"], "optim_args has ['momentum'], which optim: adamw_"),
    "optimizer's arguments, no pair": (["--optim_args", "momentum"], "expected name=value"),
    "width": (["--projector_inner_dim", "0"], "projector_inner_dim must be at least 1, got 0."),
    "patience": (["--early_stopping_patience", "0"], "early_stopping_patience must be at least 1, got 0."),
    "rank": (["--lora_r", "-1"], "lora_r must be at least 0, got -1."),
    "alpha": (["--lora_alpha", "0"], "lora_alpha must be > 0, got 0. For no LoRA set lora_r to 0."),
    "dropout": (["--lora_dropout", "1.5"], "lora_dropout must be in [0, 1), got 1.5."),
    "loss": (["--loss_type", "nnl"], "loss_type must be one of nll, dft, got 'nnl'."),
    "kernels": (["--use_liger_kernel", "true"], "use_liger_kernel"),
    "compiler": (["--torch_compile_backend", "inducter"], "Invalid backend: 'inducter'"),
    "compiler's mode": (["--torch_compile_mode", "fast"], "Unrecognized mode=fast, should be one of: default, "),
    "template": (["--chat_template_path", "gone.jinja"], "chat_template_path "),
    "end": (["--eos_token", "<end>"], "eos_token is '<end>', which is no token of towers/llm."),
    "cache": (["--tower_cache_dir", "recipe.yaml"], "tower_cache_dir must be a folder"),
    "long clips": (
        ["--max_duration_s", "0.5"],
        "4 clips do not last 0.025 to 0.5 s, which the model takes (rows 0, 1",
    ),
    "no epoch": (["--num_train_epochs", "0"], "num_train_epochs is 0.0, and no max_steps is given"),
    "a tower that is not there": (
        ["--model_name_or_path", "data/deaf", "--unfreeze", "emotion_tower"],
        "unfreeze has 'emotion_tower', and this model has none",
    ),
}
OF_ALL = {"report", "batch", "no epoch", "checkpoint", "optimizer", "checkpoints to keep", "beta", "compiler"}
OF_ALL |= {"optimizer's arguments", "metric"}
OF_TEXT = OF_ALL | {"rank", "alpha", "dropout", "loss", "kernels", "template", "end"}


@pytest.mark.parametrize("case", EARLY)
def test_what_needs_no_weights_is_said_before_they_are_read(here: Path, monkeypatch, tmp_path, case: str) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    for module in ("run", "baselines.text_training") if "metric" in case else ():
        monkeypatch.setattr(f"relllm.training.{module}.load_rows", None)  # nor are rows
    monkeypatch.setattr("relllm.training.emotion_training._load_labelled", None)
    given, message = EARLY[case]
    common = ["--data", "data/taught", "--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"]
    out = ["--output_dir", str(tmp_path / "run")]
    status, line = said("train", "--config", "recipe.yaml", *common, *out, *given)
    assert status in (1, 2) and message in line, line
    if case in OF_TEXT:
        status, line = said("train-text", "--text_model", "towers/llm", *common, *out, *given)
        assert status in (1, 2) and message in line, line
    if case in OF_ALL:
        common += ["--model_name_or_path", "towers/emotion", "--eval_split", "", "--eval_strategy", "no"]
        status, line = said("train-emotion", *common, *out, "--load_best_model_at_end", "false", *given)
        assert status in (1, 2) and message in line, line


def test_a_device_that_is_not_there_is_said_at_once(here: Path, monkeypatch) -> None:
    monkeypatch.chdir(here)
    for count, device, message in (
        (0, "gpu", "expected cpu, cuda, cuda:1"),
        (0, "meta", "expected cpu, cuda, cuda:1"),
        (0, "cuda:1", "PyTorch finds no such device (no GPU)"),
        (2, "cuda:5", "PyTorch finds 2 of that kind"),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        command = ["annotate", "data/ours", "--emotion-model", "towers/emotion", "--out", "o.jsonl"]
        status, line = said(*command, "--device", device)
        assert status == 2 and f"device is '{device}'" in line and message in line


def test_debug_shows_the_traceback(here: Path, monkeypatch) -> None:
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, ["--debug", "inspect", "data/ousr"])
    first, *others = result.stderr.splitlines()
    assert result.exit_code == 2 and "there is data/ours" in first
    assert others[0].startswith("Traceback") and "PlaceError" in others[-1]


def test_the_version_and_the_completion_are_there() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.startswith(f"relllm {relllm.__version__}, transformers ")
    asked = {"_RELLLM_COMPLETE": "complete_bash", "COMP_WORDS": "relllm he", "COMP_CWORD": "1"}
    shown = CliRunner().invoke(app, [], env=asked, prog_name="relllm")
    assert shown.stdout.split() == ["hear"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "vllm"], 'vLLM is not installed here: `pip install "relllm[vllm]"`'),
        (["--engine", "vllm", "--device", "cpu"], "vLLM finds the device itself"),
        (["--engine-args", "{}"], "give --engine vllm"),
        (["--engine", "vllm", "--engine-args", "[1]"], "expected a JSON object"),
        (["--engine", "vllm", "--engine-args", '{"revision": "v2"}'], "engine_args has revision, which the command"),
    ],
)
def test_an_engine_that_is_not_there_or_not_asked_for_is_named_first(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "vllm", None)
    for command in (
        ["evaluate", "data/deaf", "data/taught", "--out", "runs/e"],
        ["write-targets", "data/ours", "--text-model", "towers/llm", "--out", "o.jsonl"],
    ):
        code, said_so = said(*command, *arguments)
        assert code != 0 and sentence in said_so
    code, said_so = said(*command, "--engine", "vllm", "--endpoint", "http://localhost:1/v1")
    assert code != 0 and "An endpoint runs its own LLM" in said_so
