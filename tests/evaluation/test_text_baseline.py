"""The baseline that reads and learns, from files on disk: `relllm train-text`, `evaluate`, `compare`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_templates import CHATML
from empathy_scorers import save_scorers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import add_bos, tiny_llm, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from relllm.cli import app
from relllm.evaluation import evaluating
from relllm.evaluation.adapters import load_causal_lm
from relllm.evaluation.asking import Questions, answer_tokens, conversations, render
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.fingerprints import model_fingerprint
from relllm.evaluation.predicting import load_tokenizer
from relllm.modeling.places_relllm import PlaceError
from relllm.setting import read_recipe
from relllm.training.baselines.text_training import TextTrainer, parse_text_arguments, run_text_training
from relllm.training.checkpoints import RunComplete

pytestmark = [pytest.mark.usefixtures("no_drawing"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
REPLY = "Oh no."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LLM as published, in bfloat16, whose tokenizer puts BOS before texts, and eight rows with transcripts."""
    folder = tmp_path_factory.mktemp("text")
    tiny_llm().to(torch.bfloat16).save_pretrained(folder / "llm")
    tokenizer = add_bos(tiny_tokenizer(audio_token=False))
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(folder / "llm")
    emotions = ("sad", "happy")
    rows = [
        {"id": f"c{i}", "audio": f"c{i}.wav", "text": f" words {i}", "response": REPLY, "emotion": emotions[i % 2]}
        | {"session": f"Ses0{i // 4 + 1}"}
        for i in range(8)
    ]
    (folder / "iemocap").mkdir()
    lines = [*rows, {**rows[0], "id": "silent", "text": ""}]
    (folder / "iemocap" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture(scope="module")
def trained(place: Path) -> TextTrainer:
    return train(place, "tuned")


def train(place: Path, name: str) -> TextTrainer:
    recipe = str(ROOT / "recipes" / "text_only.yaml")
    changes = {
        **{"text_model": place / "llm", "data": place / "iemocap", "held_out": "session=Ses02", "eval_split": ""},
        **{
            "output_dir": place / name,
            "save_steps": 20,
            "learning_rate": 2e-2,
            "warmup_steps": 0,
            "max_steps": 40,
            "seed": 0,
        },
        **{"gradient_accumulation_steps": 1, "bf16": "false", "use_cpu": "true", "eval_strategy": "no"},
        **{"disable_tqdm": "true", "dataloader_pin_memory": "false", "gradient_checkpointing": "false"},
    }
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    return run_text_training(*parse_text_arguments(["--config", recipe, *flags]))


def run(model: Path, place: Path, name: str, **options: object) -> dict:
    data, out = str(place / "iemocap"), place / "runs" / name
    told = {"held_out": "session=Ses02", "max_new_tokens": 8, "device": "cpu", **options}
    told["empathy_scorers"] = str(save_scorers(place / "scorers", ("ER",)))
    with pytest.MonkeyPatch.context() as patch:  # of which the levels are not
        patch.setattr(evaluating, "_load_score", lambda *_: levels)
        return evaluating.evaluate(EvaluationSettings(str(model), data, out, **told), progress=False)


def levels(pairs: list) -> list[dict]:
    return [{"ER": {"level": 2 * (reply == REPLY), "probabilities": [1, 0, 0]}} for _, reply in pairs]


def test_it_is_taught_the_prompt_that_it_is_asked_with_and_the_labels_of_a_rellm(
    trained: TextTrainer, place: Path
) -> None:
    tokenizer, template, _ = load_tokenizer(str(place / "tuned"), "main")
    turns = conversations(Questions(("empathy",), ("sad", "happy")), {"type": "text", "text": " words 0"})["reply"]
    prompt = tokenizer(render(tokenizer, template, turns), add_special_tokens=False)["input_ids"]
    reply = answer_tokens(tokenizer, template, REPLY)
    row = trained.train_dataset[0]
    assert len(trained.train_dataset) == 4 and prompt.count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][: len(prompt) + len(reply)] == prompt + reply
    assert [label for label in row["labels"] if label != -100] == reply and row["labels"].index(reply[0]) == len(
        prompt
    )
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(place / "llm").chat_template


def test_the_adapter_on_its_llm_computes_what_the_sum_of_their_weights_does(trained: TextTrainer, place: Path) -> None:
    found = load_causal_lm(str(place / "tuned"), revision="main", dtype="float32")
    expected = AutoModelForCausalLM.from_pretrained(place / "llm", dtype=torch.float32)
    lora = load_file(place / "tuned" / "adapter_model.safetensors")
    assert {weight.dtype for weight in lora.values()} == {torch.float32}
    for name in [name for name in lora if "lora_A" in name]:
        module = expected.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
        module.weight.data += lora[name.replace("lora_A", "lora_B")] @ lora[name]  # alpha 16 / rank 16
    settings = json.loads((shutil.copytree(place / "tuned", place / "scaled") / "adapter_config.json").read_text())
    (place / "scaled" / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    ids = torch.arange(2, 22)[None]
    torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-4)
    fingerprints = {model_fingerprint(str(place / name)) for name in ("tuned", "llm", "tuned/checkpoint-40", "scaled")}
    assert len(fingerprints) == 3  # the last checkpoint is what was saved


def test_an_interrupted_run_goes_on_and_gives_the_same_adapter(trained: TextTrainer, place: Path) -> None:
    again = shutil.copytree(place / "tuned", place / "again")
    shutil.rmtree(again / "checkpoint-40")
    (again / "adapter_model.safetensors").unlink()
    record = json.loads((again / "training_settings.json").read_text())
    assert record.pop("steps_done") == 40
    (again / "training_settings.json").write_text(json.dumps(record))
    assert train(place, "again").state.global_step == 40
    found, expected = (load_file(place / name / "adapter_model.safetensors") for name in ("again", "tuned"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with pytest.raises(RunComplete, match="40 steps"):
        train(place, "again")


def test_trained_measured_and_compared_with_the_llm_as_it_is(trained: TextTrainer, place: Path) -> None:
    tuned, bare = run(place / "tuned", place, "tuned"), run(place / "llm", place, "bare", tasks=("empathy",))
    assert (tuned["system"], bare["system"]) == ("text-only-tuned", "text-only")
    assert tuned["empathy"]["ER"]["mean_level"] == 2 and bare["empathy"]["ER"]["mean_level"] == 0
    assert tuned["label_set"] == ["happy", "sad"] and tuned["prompts"]["reply"] == bare["prompts"]["reply"]
    assert tuned["model"]["towers"] == {"text_model": str(place / "llm")}
    assert tuned["training"]["recorded"] and tuned["training"]["corpora"] == ["iemocap"]
    runs = [str(place / "runs" / name) for name in ("bare", "tuned")]
    done = CliRunner().invoke(app, ["compare", *runs, "--baseline", "text-only", "--out", str(place / "compared")])
    assert done.exit_code == 0, done.output
    table = (place / "compared" / "comparison.md").read_text()
    assert table.index("Text-only LLM on transcripts") < table.index("Text-only LLM, fine-tuned on the replies")


def test_rows_that_taught_it_and_other_names_for_it_are_refused(trained: TextTrainer, place: Path) -> None:
    with pytest.raises(ValueError, match="4 of them are among the rows that it was trained on"):
        run(place / "tuned", place, "seen", held_out="session=Ses01")
    with pytest.raises(ValueError, match="Leave --system out"):
        run(place / "tuned", place, "other", system="text-only")
    given = ["evaluate", str(place / "runs"), str(place / "iemocap"), "--out", str(place / "none")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2 and "no folder with a config.json or adapter_config.json" in done.output
    tiny_model().save_pretrained(place / "rellm")
    (place / "on-rellm").mkdir()
    settings = json.loads((place / "tuned" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(place / "rellm")
    (place / "on-rellm" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="an adapter on the ReLLM"):
        run(place / "on-rellm", place, "other")
    moved = settings | {"base_model_name_or_path": str(place / "lm")}
    (place / "on-rellm" / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(PlaceError, match="there is .*llm"):
        run(place / "on-rellm", place, "other")


def test_an_adapter_that_came_without_a_tokenizer_has_that_of_its_llm(place: Path) -> None:
    """As `PeftModel.save_pretrained` leaves it; one of another kind than weights is refused."""
    llm = AutoModelForCausalLM.from_pretrained(place / "llm")
    get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / "own")
    assert run(place / "own", place, "own", tasks=("ser",))["system"] == "text-only-tuned"
    tokenizer, template, _ = load_tokenizer(str(place / "own"), "main")
    assert (
        tokenizer.get_vocab() == AutoTokenizer.from_pretrained(place / "llm").get_vocab()
        and "<|im_start|>" in template
    )
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    llm = AutoModelForCausalLM.from_pretrained(place / "llm")
    get_peft_model(llm, prompt).save_pretrained(place / "prompts")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter"):
        load_causal_lm(str(place / "prompts"), revision="main", dtype="auto")


def test_the_recipe_is_that_of_stage_two_without_the_hearing() -> None:
    own, whole = (read_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("text_only", "stage2_emotion"))
    elsewhere = {"output_dir": "", "gradient_checkpointing": True}  # TRL's own trainer does not choose the latter
    assert {**own, **elsewhere} == {**{name: whole[name] for name in own}, **elsewhere}
    script, args = parse_text_arguments(
        ["--config", str(ROOT / "recipes" / "text_only.yaml"), "--bf16", "false", "--use_cpu", "true"]
    )
    assert script.lora == {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}
    for name in ("learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "num_train_epochs"):
        assert getattr(args, name) == whole[name]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == whole["rows_per_update"]
    assert args.max_grad_norm == whole["max_grad_norm"]
