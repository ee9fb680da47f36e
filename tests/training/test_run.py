"""`relllm train`: settings from file and flags, the model they give, and what a run writes, resumes and refuses."""

import hashlib
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset, disable_progress_bars
from light_checkpoints import tower_settings
from safetensors.torch import load_file
from tiny_models import (
    clip,
    tiny_config,
    tiny_llm,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed
from typer.testing import CliRunner

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.cli import app
from relllm.data.journal import rows_fingerprint
from relllm.data.loading import load_corpus
from relllm.demo.tiny_towers import make_tiny_towers
from relllm.evaluation.evaluating import _plan_run
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.inference.conversation import Conversation
from relllm.inference.text_conversation import TextConversation
from relllm.modeling.checkpoint_relllm import quantize_llm_alone
from relllm.training.building import build_config, build_model, four_bit_config
from relllm.training.checkpoints import RECORD_NAME, RunComplete, begin_run, checkpoint_to_resume
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig
from relllm.training.freezing import lora_counts_as_adapter
from relllm.training.lengths import check_clip_limits
from relllm.training.run import parse_arguments, run_training
from relllm.training.settings import _is_read
from relllm.training.trainer import ReLLMSFTTrainer

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
REPLIES = ("I am so sorry to hear that.", "That is wonderful news!")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tower_settings(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight labelled clips to train on, four to evaluate on."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for index in range(12):
        soundfile.write(folder / f"{index}.wav", clip(0.3 + 0.02 * index, seed=index), 16_000)
        labels = {"emotion": ("sad", "happy", None)[index % 3], "arousal": 0.3, "dominance": None, "valence": 0.5}
        row = {
            "id": f"{index}",
            "audio": f"{index}.wav",
            "response": REPLIES[index % 2],
            "session": f"{index % 2 + 1}",
        }
        rows.append(row | labels | {"response": REPLIES[index % 2], "split": "train" if index < 8 else "validation"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def one_fold(towers: dict[str, str], corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on session 2, with session 1 held out."""
    folder = tmp_path_factory.mktemp("fold") / "run"
    run_training(settings_of(towers, corpus, held_out="session=1"), args_of(folder))
    return folder


def settings_of(towers: dict[str, str], corpus: str, **changes: object) -> ReLLMScriptArguments:
    tiny = {"projector_inner_dim": 16, "lora_r": 4, "lora_alpha": 8, "full_window": False}
    return ReLLMScriptArguments(**{**towers, "data": corpus, **tiny, **changes})


def args_of(folder: Path, **changes: object) -> ReLLMSFTConfig:
    quick = {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_completions": 0,
        "dataloader_pin_memory": False,
    }
    return ReLLMSFTConfig(output_dir=str(folder), **{**quick, **changes})


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path, towers: dict[str, str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [f"{name}: {path}" for name, path in towers.items()]
    lines += ["data: corpus", "learning_rate: 3e-4", "lora_r: 8", "resume: true", "unfreeze: [audio_tower]"]
    recipe.write_text("\n".join([*lines, "eval_strategy: 'no'", f"output_dir: {tmp_path}"]))
    for flag in (["--config", str(recipe)], [f"--config={recipe}"]):
        script, args = parse_arguments([*flag, "--lora_r", "2", "--emotion-fusion", "token"])
        assert (script.lora_r, script.emotion_fusion, script.lora_alpha) == (2, "token", 16)
        assert (script.resume, args.learning_rate, args.weight_decay) == ("true", 3e-4, 0.05)
        assert args.unfreeze == ["audio_tower"]


@pytest.mark.parametrize("flag", ["--cache-dir", "--tower_cache_dir", "--tower-cache-dir"])
def test_the_cache_of_tower_outputs_is_off_until_a_flag_names_its_folder(flag, tmp_path: Path, towers) -> None:
    given = ["--data", "corpus", "--output_dir", str(tmp_path)]
    given += [part for name, path in towers.items() for part in (f"--{name}", path)]
    assert parse_arguments(given)[1].tower_cache_dir is None
    assert parse_arguments([*given, flag, "kept"])[1].tower_cache_dir == "kept"


@pytest.mark.parametrize("flag", [["--output_dir", "d"], ["--output-dir", "d"], ["--out", "d"], ["--out=d"]])
def test_a_flag_may_be_spelt_with_hyphens_and_the_folder_with_out(flag: list[str], tmp_path: Path, towers) -> None:
    given = ["--data", "corpus", "--lora-r", "2"] + [p for name, path in towers.items() for p in (f"--{name}", path)]
    script, args = parse_arguments([*given, *flag])
    assert args.output_dir == "d" and script.lora_r == 2


def test_the_help_page_puts_what_matters_first(capsys: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["train", "--help"])
    page = result.stdout
    assert result.exit_code == 0
    order = [
        "--config",
        "model and data:",
        "--emotion_fusion concat|token|none",
        "--emotion_loss_weight",
        "--adam_beta1",
    ]
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    for name in ReLLMScriptArguments.__dataclass_fields__:
        assert page.count(f"  --{name} ") == 1, name
    assert max(len(line) for line in page.splitlines()) <= 119


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--audio_tower", "a", "--text_model", "b"], "data is missing"),
        (["--data", "d"], "Nothing to start from"),
        (["--data", "d", "--audio_tower", "a", "--text_model", "b"], "needs an emotion_tower"),
        (["--data", "d", "--model_name_or_path", "m", "--resume", "maybe"], "resume must be one of"),
        (["--data", "d", "--model_name_or_path", "m", "--lora_scope", "all"], "lora_scope"),
        (["--config", "empty.yaml"], "dimension_loss must be one of mse, ccc, got None"),
        (["--data", "d", "--model_name_or_path", "m", "--lora_dropout", "1"], "lora_dropout must be in [0, 1)"),
        (["--data", "d", "--model_name_or_path", "m", "--learnin_rate", "1"], "unknown: ['--learnin_rate', '1']"),
        (["--data", "d", "--model_name_or_path", "m", "--emotion_loss_weight", "-1"], "emotion_loss_weight"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config"], "--config needs a file"),
    ],
)
def test_a_wrong_setting_is_refused_in_two_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("data: d\nmodel_name_or_path: m\ndimension_loss:\noutput_dir: d\n")
    with pytest.raises(SystemExit) as raised:
        parse_arguments(arguments)
    said = capsys.readouterr().err
    assert raised.value.code == 2 and message in said and len(said.splitlines()) <= 4


def test_an_unknown_line_of_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("data: d\nmodel_name_or_path: m\nlearnin_rate: 1\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "recipe.yaml")])
    assert "learnin_rate, a line of the recipe, is no setting. Did you mean learning_rate?" in capsys.readouterr().err


@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
def test_the_configuration_is_that_of_the_model_which_is_built(
    towers: dict[str, str], corpus: str, fusion: str
) -> None:
    script = settings_of(towers, corpus, emotion_fusion=fusion, lora_scope="text", lora_dropout=0.0)
    model, processor = build_model(script)
    foreseen = build_config(script)
    meta = ReLLMForConditionalGeneration._from_config(foreseen) if fusion == "none" else None
    assert {
        k: v for k, v in foreseen.to_dict().items() if k in ("emotion_fusion", "lora_scope", "audio_token_id")
    } == {
        "emotion_fusion": fusion,
        "lora_scope": "text",
        "audio_token_id": processor.audio_token_id,
    }
    assert model.config.lora_config["r"] == 4 and model.config.lora_scope == "text"
    assert (model.model.emotion_tower is None) == (fusion == "none")
    if meta is not None:
        shapes = {name: weight.shape for name, weight in model.state_dict().items() if "embed" not in name}
        assert {name: weight.shape for name, weight in meta.state_dict().items() if "embed" not in name} == shapes


def test_a_run_trains_evaluates_saves_what_loads_and_sends_it_once(
    towers: dict[str, str], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, sent = settings_of(towers, corpus, eval_split="validation"), []
    monkeypatch.setattr(ReLLMSFTTrainer, "init_hf_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(ReLLMSFTTrainer, "push_to_hub", lambda *args, **kwargs: sent.append(kwargs))
    sends = {"push_to_hub": True, "hub_strategy": "end"}
    trainer = run_training(script, args_of(tmp_path / "run", eval_strategy="steps", eval_steps=2, **sends))
    assert len(sent) == 1
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_loss"] > 0 and results["eval_response_loss"] > 0 and "eval_emotion_loss" in results
    loaded = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    processor = ReLLMProcessor.from_pretrained(tmp_path / "run")
    assert processor.apply_request(clip(0.3))["input_ids"].shape[0] == 1


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_one_that_is_complete_does_nothing(
    towers: dict[str, str], corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, folder = settings_of(towers, corpus), tmp_path / "run"
    whole = run_training(script, args_of(tmp_path / "whole", max_steps=3))
    run_training(script, args_of(folder, max_steps=3, save_steps=2))
    record = json.loads((folder / RECORD_NAME).read_text())
    assert (record.pop("steps_done"), record.pop("epochs_done")) == (3, 0.75)
    (folder / RECORD_NAME).write_text(json.dumps(record))  # as if it had been killed in step 3, and while saving
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"global_step":')
    assert checkpoint_to_resume(folder, "auto") == str(folder / "checkpoint-2")
    again = run_training(script, args_of(folder, max_steps=3, save_steps=2))
    assert f"Going on from {folder / 'checkpoint-2'}." in capsys.readouterr().out
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RunComplete, match="complete in .*: 3 steps"):
        run_training(script, args_of(folder, max_steps=3, save_steps=2))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_takes_no_further_one(
    towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    first = run_training(settings_of(towers, corpus), args_of(tmp_path, max_steps=3))
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({name: record[name] for name in record if "_done" not in name}))
    again = run_training(settings_of(towers, corpus), args_of(tmp_path, max_steps=3))
    assert again.state.global_step == 3
    for name, weight in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name
    assert json.loads((tmp_path / RECORD_NAME).read_text()) == record


@pytest.mark.parametrize(
    "script, args, named",
    [
        ({"held_out": "session=2"}, {}, r"held_out: 'session=1', now 'session=2'.*train_rows_fingerprint"),
        ({}, {"seed": 5}, "seed: 42, now 5"),
        ({"lora_scope": "global"}, {}, "lora_scope: 'audio', now 'global'"),
        ({}, {"emotion_loss_weight": 0.5}, r"emotion_loss_weight: 1\.0, now 0\.5"),
        ({}, {"max_steps": 3}, "max_steps: 2, now 3"),
    ],
)
def test_another_run_is_not_taken_for_this_one(
    one_fold: Path, script: dict, args: dict, named: str, towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(one_fold, tmp_path / "run")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for of_what in ("a complete run", "checkpoint-2"):
        with pytest.raises(ValueError, match=f"holds {of_what} with other settings .*{named}"):
            run_training(settings_of(towers, corpus, **{"held_out": "session=1", **script}), args_of(folder, **args))
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files
        record = json.loads(files[RECORD_NAME])
        (folder / RECORD_NAME).write_text(json.dumps({name: record[name] for name in record if "_done" not in name}))
        files[RECORD_NAME] = (folder / RECORD_NAME).read_bytes()


def test_other_rows_and_other_weights_are_another_run(one_fold: Path, towers, corpus: str, tmp_path: Path) -> None:
    other = shutil.copytree(corpus, tmp_path / Path(corpus).name)
    table = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(table.replace(REPLIES[1], "That is good news!"))
    with pytest.raises(ValueError, match=r"settings \(train_rows_fingerprint: [^;]*\)"):
        run_training(settings_of(towers, str(other), held_out="session=1"), args_of(one_fold))
    tiny_llm("gpt2").save_pretrained(tmp_path / "llm")
    tiny_tokenizer(audio_token=False).save_pretrained(tmp_path / "llm")
    script = settings_of({**towers, "text_model": str(tmp_path / "llm")}, corpus, held_out="session=1")
    with pytest.raises(ValueError, match="text_model_fingerprint: "):
        run_training(script, args_of(one_fold))


def test_what_does_not_decide_may_change(one_fold: Path, towers: dict[str, str], corpus: str) -> None:
    script = settings_of(towers, corpus, held_out="session=1")
    with pytest.raises(RunComplete):
        run_training(script, args_of(one_fold, gradient_checkpointing=True, logging_steps=7, dataloader_num_workers=1))


@pytest.mark.parametrize("loss", ["mse", "ccc"])
def test_how_an_update_is_divided_decides_for_a_concordance_alone(loss: str, tmp_path: Path) -> None:
    one = {"rows_per_update": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    one |= {"dimension_loss": loss}
    begin_run(tmp_path, one, "auto")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-1" / "optimizer.pt").touch()
    two = one | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # and two processes
    if loss == "mse":
        assert begin_run(tmp_path, two, "auto") == str(tmp_path / "checkpoint-1")
    else:
        with pytest.raises(ValueError, match="per_device_train_batch_size: 2, now 4"):
            begin_run(tmp_path, two, "auto")
    with pytest.raises(ValueError, match="rows_per_update: 16, now 32"):
        begin_run(tmp_path, one | {"rows_per_update": 32}, "auto")
    grouped = {"train_sampling_strategy": "group_by_length"}  # in the order of what each process takes at once
    begin_run(tmp_path / "grouped", one | grouped, "auto")
    for name in ("trainer_state.json", "optimizer.pt"):
        (tmp_path / "grouped" / "checkpoint-1").mkdir(exist_ok=True)
        (tmp_path / "grouped" / "checkpoint-1" / name).write_text("{}")
    with pytest.raises(ValueError, match="per_device_train_batch_size: 2, now 4"):
        begin_run(tmp_path / "grouped", two | grouped, "auto")


def test_a_choice_beside_a_text_is_none_of_the_choices(tmp_path: Path) -> None:
    args = ReLLMSFTConfig(output_dir=str(tmp_path), trackio_static_space_id="org/space")
    assert args.trackio_static_space_id == "org/space"


def test_a_setting_of_an_optimizer_that_is_true_or_false_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def optimizer(args: TrainingArguments) -> tuple[None, dict[str, object]]:
        return None, {"kahan_sum": "kahan_sum" in (args.optim_args or "")}

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(optimizer))
    args = TrainingArguments()
    assert _is_read(args, "kahan_sum") and not _is_read(args, "other")


def test_a_checkpoint_of_an_unknown_run_or_without_its_optimiser_is_refused(
    one_fold: Path, towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    folder, script = shutil.copytree(one_fold, tmp_path / "run"), settings_of(towers, corpus, held_out="session=1")
    (folder / RECORD_NAME).unlink()
    with pytest.raises(ValueError, match="not known.*--resume_from_checkpoint .*checkpoint-2"):
        run_training(script, args_of(folder))
    (folder / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="without its optimiser"):
        run_training(script, args_of(folder))


def test_the_record_of_a_run_says_what_it_read(one_fold: Path, towers: dict[str, str], corpus: str) -> None:
    record = json.loads((one_fold / RECORD_NAME).read_text())
    assert record["data"] == Path(corpus).name and record["held_out"] == "session=1" and record["train_rows"] == 6
    rows = load_corpus(corpus, "train", held_out="session=1").remove_columns("audio")
    assert record["train_rows_fingerprint"] == rows_fingerprint(rows, rows.column_names)
    llm = hashlib.sha256((Path(towers["text_model"]) / "model.safetensors").read_bytes()).hexdigest()
    assert record["text_model_fingerprint"] == hashlib.sha256(llm.encode()).hexdigest()
    assert corpus not in json.dumps(record) and towers["text_model"] not in json.dumps(record)


def test_resume_demands_or_refuses_a_checkpoint(towers: dict[str, str], corpus: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        run_training(settings_of(towers, corpus, resume="true"), args_of(tmp_path))
    (tmp_path / "checkpoint-7").mkdir()
    assert checkpoint_to_resume(tmp_path, "auto") is None
    for name in ("checkpoint-7", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "trainer_state.json").write_text("{}")
        (tmp_path / name / "optimizer.pt").touch()
    assert checkpoint_to_resume(tmp_path, "true") == str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="holds checkpoint-10 of an earlier run"):
        run_training(settings_of(towers, corpus, resume="false"), args_of(tmp_path))


CHOOSING = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize(
    "script, args, message",
    [
        ({"streaming": True}, {"max_steps": -1}, "streaming=True needs max_steps"),
        ({}, {"eval_strategy": "steps"}, "needs an eval_split"),
        ({"early_stopping_patience": 2}, {}, "needs load_best_model_at_end"),
        ({"train_split": "dev"}, {}, "no rows of the split 'dev'"),
        (
            {"eval_split": "test"},
            CHOOSING,
            "choose the checkpoint by",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    script: dict, args: dict, message: str, towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(settings_of(towers, corpus, **script), args_of(tmp_path, **args))


def test_the_classes_are_those_of_the_data_and_are_checked_before_a_model_is_loaded(
    towers: dict[str, str], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    trainer = run_training(settings_of(towers, corpus), args_of(tmp_path / "run", max_steps=1, disable_tqdm=False))
    assert trainer.model.config.emotion_labels == ["happy", "sad"]
    assert "What the rows teach" in capsys.readouterr().err
    run, labels = str(tmp_path / "run"), ["sad", "happy", "bored"]
    script = settings_of(towers, corpus, emotion_labels=labels)
    assert run_training(script, args_of(tmp_path / "b", max_steps=1)).model.config.emotion_labels == labels
    with pytest.raises(ValueError, match=r"has emotion_labels: \['happy', 'sad'\]; the run asks for"):
        run_training(settings_of({"model_name_or_path": run}, corpus, emotion_labels=labels), args_of(tmp_path / "c"))
    monkeypatch.setattr("relllm.training.run.build_model", lambda _: pytest.fail("loaded a model"))
    other = shutil.copytree(corpus, tmp_path / "other")
    table = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(table.replace('"sad"', '"fear"'))
    with pytest.raises(ValueError, match="'fear' in 3 .rows 0, 3, 6"):
        run_training(settings_of({"model_name_or_path": run}, str(other)), args_of(tmp_path / "d"))


def test_a_duration_that_is_no_number_is_not_known() -> None:
    numbers = Dataset.from_dict({"id": ["a", "b", "c"], "duration_s": [1.0, None, float("nan")]})
    check_clip_limits([numbers, Dataset.from_dict({"duration_s": ["900", ""]}), None], 0.1, 600)
    for time in (0.05, 900.0):
        with pytest.raises(ValueError, match=r"1 clips do not last 0.1 to 600 s, .*rows 0"):
            check_clip_limits([Dataset.from_dict({"duration_s": [time, 1.0]})], 0.1, 600)


def test_an_evaluation_in_half_precision_rounds_nothing_that_is_saved_and_no_card_is_written(
    towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    script, quick = settings_of(towers, corpus, eval_split="validation"), {"max_steps": 1, "eval_strategy": "no"}
    run_training(script, args_of(tmp_path / "plain", **quick))
    run_training(script, args_of(tmp_path / "rounded", bf16_full_eval=True, **quick))
    plain, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "rounded"))
    for name, weight in plain.items():
        assert torch.equal(rounded[name], weight), name
    assert not list(tmp_path.rglob("README.md"))  # `relllm card` writes one from what was measured


def test_what_a_run_asked_with_is_asked_by_whoever_loads_it(towers, corpus: str, tmp_path: Path) -> None:
    own = {"instruction": "Answer what you hear: ", "system_prompt": ""}
    run_training(settings_of(towers, corpus), args_of(tmp_path / "first", max_steps=1, **own))
    # A second run goes on with it, and says otherwise only where it is told to.
    script = settings_of({"model_name_or_path": str(tmp_path / "first")}, corpus)
    run_training(script, args_of(tmp_path / "run", max_steps=1, system_prompt="Be kind."))
    model, processor = (
        ReLLMForConditionalGeneration.from_pretrained(tmp_path / "run"),
        ReLLMProcessor.from_pretrained(tmp_path / "run"),
    )
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Answer what you hear: <|audio|>"}]
    expected = processor.apply_chat_template(asked, add_generation_prompt=True)
    request = processor.apply_chat_template(processor.build_conversation("a.wav"), add_generation_prompt=True)
    assert request == expected
    for conversation in (Conversation(model, processor), TextConversation.inside(model, processor)):
        assert (conversation.system_prompt, conversation.instruction) == ("Be kind.", "Answer what you hear: ")
    settings = EvaluationSettings(str(tmp_path / "run"), corpus, tmp_path / "out", tasks=("ser",), split="validation")
    plan = _plan_run(settings)
    assert plan.prompts["reply"] == expected


def test_early_stopping_and_streaming_run(towers: dict[str, str], corpus: str, tmp_path: Path) -> None:
    stopping = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.0}
    script = settings_of(towers, corpus, streaming=True, eval_split="validation", early_stopping_patience=1)
    trainer = run_training(script, args_of(tmp_path, max_steps=6, metric_for_best_model="eval_loss", **stopping))
    assert trainer.state.global_step == 2  # nothing learnt, so the second evaluation was no better


@pytest.mark.slow
def test_a_checkpoint_without_a_lora_is_given_one_that_changes_nothing(
    towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    first = run_training(settings_of(towers, corpus, lora_r=0), args_of(tmp_path / "first", max_steps=1))
    script = settings_of(towers, corpus, model_name_or_path=str(tmp_path / "first"))
    model, processor = build_model(script)
    assert model.config.lora_config["r"] == 4 and build_config(script).lora_config["r"] == 4
    inputs = processor.apply_request(clip(0.4))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, first.model.eval()(**inputs).logits)
    second = run_training(script, args_of(tmp_path / "second"))
    trained = {name for name, weight in second.model.named_parameters() if weight.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any(weight.any() for name, weight in second.model.named_parameters() if "lora_B" in name)


def test_under_zero3_models_and_sources_of_a_light_checkpoint_come_whole(
    towers: dict[str, str], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would make them spread over the processes, for which it imports DeepSpeed."""
    script = settings_of(towers, corpus)
    running = types.SimpleNamespace(is_zero3=lambda: True, config={})
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: running)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model, _ = build_model(script)
    model.save_pretrained(tmp_path, light=True)
    assert deepspeed.is_deepspeed_zero3_enabled()
    with pytest.raises(ImportError):
        ReLLMForConditionalGeneration.from_pretrained(tmp_path)
    monkeypatch.undo()
    found = ReLLMForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "named, expected",
    [
        (None, 14),
        (["q_proj", "v_proj"], 4),
        ([r".*layers\.0\.self_attn\.(q|v)_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
    ],
)
def test_a_run_gives_a_checkpoint_without_a_lora_one_and_keeps_every_weight(
    named: list[str] | None, expected: int, corpus: str, tmp_path: Path
) -> None:
    model = tiny_model(lora=None, layers=2)
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    options = {"model_name_or_path": str(tmp_path), "lora_scope": "global", "lora_target_modules": named}
    grown, _ = build_model(settings_of({}, corpus, **options))
    after = {name.replace(".base_layer.", "."): weight for name, weight in grown.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in model.state_dict().items())
    assert grown.config.lora_scope == "global" and sum("lora_A" in name for name in after) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"emotion_fusion": "none"}, "has emotion_fusion: concat; the run asks for emotion_fusion: none"),
        ({"lora_r": 8}, "has lora_r: 4; the run asks for lora_r: 8"),
        ({"lora_r": 0}, "has lora_r: 4; the run asks for lora_r: 0"),
        ({"lora_scope": "global"}, "has lora_scope: audio"),
    ],
)
def test_an_architecture_that_the_checkpoint_has_not_is_refused(
    change: dict, message: str, corpus: str, tmp_path: Path
) -> None:
    tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.05}).save_pretrained(tmp_path)
    script = settings_of({}, corpus, model_name_or_path=str(tmp_path), **change)
    with pytest.raises(ValueError, match=message):
        build_model(script)


def test_a_checkpoint_has_its_own_architecture_where_nothing_is_set(corpus: str, tmp_path: Path) -> None:
    config = tiny_config(lora={"r": 3, "lora_alpha": 5}, lora_scope="text", fusion="token")
    tiny_model(config).save_pretrained(tmp_path)
    tiny_processor(config, full_window=False, max_duration_s=7.0).save_pretrained(tmp_path)
    alone = {"model_name_or_path": str(tmp_path), "data": corpus}
    model, processor = build_model(ReLLMScriptArguments(**alone))
    assert (model.config.lora_scope, model.config.lora_config["r"]) == ("text", 3)
    extractor = processor.feature_extractor
    assert (extractor.full_window, extractor.max_duration_s) == (False, 7.0)
    # What is said of clips is done, and not passed over.
    script = ReLLMScriptArguments(**alone, full_window=True, max_duration_s=float("inf"))
    extractor = build_model(script)[1].feature_extractor
    assert (extractor.full_window, extractor.max_duration_s) == (True, float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["concat", "token"])
def test_a_second_stage_sets_an_emotion_tower_beside_the_first(
    fusion: str, towers: dict[str, str], corpus: str, tmp_path: Path
) -> None:
    off = {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0}
    first = settings_of(towers, corpus, emotion_fusion="none", lora_r=0)
    run_training(first, args_of(tmp_path / "stage1", max_steps=1, **off))
    stage1 = {"model_name_or_path": str(tmp_path / "stage1"), "emotion_tower": towers["emotion_tower"]}
    second = ReLLMScriptArguments(**stage1, data=corpus, emotion_fusion=fusion, lora_r=4)
    model, processor = build_model(second)
    assert build_config(second).to_dict()["emotion_config"] == model.config.to_dict()["emotion_config"]
    heard = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    before = ReLLMProcessor.from_pretrained(tmp_path / "stage1")
    if fusion == "concat":  # it hears as before until it is trained
        for seconds in (0.3, 0.9):
            inputs, more = (one.apply_request(clip(seconds)) for one in (before, processor))
            with torch.no_grad():
                logits, grown = heard(**inputs).logits, model.eval()(**more).logits
            torch.testing.assert_close(grown, logits, rtol=1e-4, atol=1e-5)
    run = run_training(second, args_of(tmp_path / "stage2", max_steps=1))
    emotion = load_file(Path(towers["emotion_tower"]) / "model.safetensors")
    assert torch.equal(run.model.model.emotion_tower.classifier.out_proj.weight, emotion["classifier.out_proj.weight"])
    loaded = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "stage2")
    for name, weight in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert "emotion_tower_fingerprint" in json.loads((tmp_path / "stage2" / RECORD_NAME).read_text())
    with pytest.raises(ValueError, match="has emotion_fusion: none; the run asks for emotion_fusion: concat"):
        build_model(
            ReLLMScriptArguments(model_name_or_path=str(tmp_path / "stage1"), data=corpus, emotion_fusion="concat")
        )


def test_a_tower_is_not_taken_for_a_rellm(towers: dict[str, str], corpus: str) -> None:
    with pytest.raises(ValueError, match="is a llama, not a ReLLM. Give towers"):
        build_model(settings_of({}, corpus, model_name_or_path=towers["text_model"]))


def test_four_bit_without_bitsandbytes_says_what_to_install(
    towers: dict[str, str], corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        build_model(settings_of(towers, corpus, load_in_4bit=True))


def test_four_bit_takes_the_linear_layers_of_the_llm_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    models = [tiny_model(fusion=fusion) for fusion in ("concat", "token")]  # before PEFT could meet the stand-in
    stand_in = types.ModuleType("bitsandbytes")
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: stand_in.__spec__)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.49.0")
    config = quantize_llm_alone(four_bit_config())
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    for model in (*models, models[1].model):
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        taken = {name for name in linear if should_convert_module(name, config.llm_int8_skip_modules)}
        body = {name for name in linear if "text_model.model.layers." in name and "lora_" not in name}
        assert taken == body and len(body) == 7


def test_the_tiny_towers_make_a_model(tmp_path: Path, corpus: str) -> None:
    make_tiny_towers(tmp_path)
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    towers = {setting: str(tmp_path / name) for setting, name in names.items()}
    model, processor = build_model(settings_of(towers, corpus))
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    inputs = processor.apply_request(clip(0.5))
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_quantised_model_passes_for_one_with_an_adapter_only_while_the_trainer_is_made() -> None:
    with_lora, without = tiny_model(), tiny_model(lora=None)
    for model, expected in ((with_lora, True), (without, False)):
        with lora_counts_as_adapter(model):
            assert model._hf_peft_config_loaded is expected
        assert model._hf_peft_config_loaded is False


@pytest.mark.slow
def test_a_run_in_four_bit_trains_in_float32_and_resumes(corpus: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_tiny_towers(tmp_path / "towers")  # whose widths fit bitsandbytes' blocks of 64
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    towers = {setting: str(tmp_path / "towers" / name) for setting, name in names.items()}
    script = settings_of(towers, corpus, load_in_4bit=True, dtype="bfloat16", eval_split="validation")
    evaluates = {"eval_strategy": "steps", "eval_steps": 1}  # between two steps, when bitsandbytes may pack weights
    settings = {"max_steps": 2, "light_checkpoints": False, "logging_steps": 1, **evaluates}
    whole = run_training(script, args_of(tmp_path, **settings)).model.state_dict()
    assert torch.load(tmp_path / "checkpoint-1" / "optimizer.pt")["state"][0]["exp_avg"].dtype is torch.float32
    shutil.rmtree(tmp_path / "checkpoint-2")
    record = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({name: record[name] for name in record if "_done" not in name}))
    again = run_training(script, args_of(tmp_path, **settings)).model.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    loaded = ReLLMForConditionalGeneration.from_pretrained(tmp_path)
    trained = {name: weight for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trained and all(torch.equal(weight, again[name]) for name, weight in trained.items())
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    processor = ReLLMProcessor.from_pretrained(tmp_path)
    assert loaded.generate(**processor.apply_request(clip(0.4)), max_new_tokens=2).shape[0] == 1


def test_the_heads_train_on_a_corpus_without_replies(towers: dict[str, str], corpus: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (Path(corpus) / "metadata.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key != "response"} for row in rows]
    rows = [row | {"audio": str(Path(corpus) / row["audio"])} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = settings_of(towers, str(tmp_path / "rows.jsonl"), eval_split="validation")
    trainer = run_training(script, args_of(tmp_path / "run", response_loss_weight=0))
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_emotion_loss"] + metrics["eval_dimension_loss"])
    assert "eval_ua" in metrics and "eval_response_loss" not in metrics and trainer.state.global_step == 2
    with pytest.raises(ValueError, match="response"):
        run_training(settings_of(towers, str(tmp_path / "rows.jsonl")), args_of(tmp_path / "another"))
