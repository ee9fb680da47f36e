"""Several data sets in one run: from files on disk to what is trained, measured and recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Dataset, concatenate_datasets
from light_checkpoints import tower_settings
from processes import ForkServer
from tiny_models import clip, tiny_processor
from trainers import make_rows, make_trainer

from relllm.data.loading import load_corpus
from relllm.data.mixing import DataSource, mix_rows, name_sources, parse_sources
from relllm.data.survey import survey_rows
from relllm.labels import DIMENSIONS
from relllm.training.baselines.text_training import parse_text_arguments, run_text_training
from relllm.training.checkpoints import RECORD_NAME, describe_origin
from relllm.training.config import ReLLMScriptArguments
from relllm.training.run import evaluation_metrics, parse_arguments, run_training

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def write_corpus(folder: Path, name: str, count: int, **labels: object) -> Path:
    """A corpus of clips with replies, half of them by ann, half by ben, as JSONL, as Parquet, or as both would be."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        soundfile.write(folder / f"{index}.wav", clip(0.2, seed=index + 100 * count), 16_000)
        row = {"id": f"{folder.name}-{index}", "audio": f"{index}.wav", "response": "You sound upset."}
        rows.append(row | {"speaker": ("ann", "ben")[index % 2]} | labels)
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    one = write_corpus(folder / "one", "targets.jsonl", 6, emotion="sad", arousal=1, age=30)
    two = write_corpus(folder / "two", "rows.parquet", 4, emotion="calm", arousal=0.25, text="so", age="old")
    return str(one), str(two)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tower_settings(tmp_path_factory.mktemp("towers"))


def arguments(towers: dict[str, str], folder: Path, recipe: str) -> list[str]:
    (folder / "recipe.yaml").write_text(recipe)
    flags = [part for name, place in towers.items() for part in (f"--{name}", place)]
    flags += ["--projector_inner_dim", "16", "--lora_r", "4", "--full_window", "false", "--max_steps", "1"]
    flags += ["--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]
    flags += ["--disable_tqdm", "true", "--warmup_steps", "0", "--gradient_accumulation_steps", "1"]
    return ["--config", str(folder / "recipe.yaml"), *flags, "--out", str(folder / "run")]


def test_a_run_over_two_corpora_knows_both(corpora, towers, tmp_path: Path) -> None:
    recipe = (
        f"data: [{{name: {corpora[0]}, weight: 1, held_out: speaker=ben}}, {{name: {corpora[1]}, weight: 3}}]\n"
        "held_out: speaker=ann\neval_split: test\ndimension_loss_weight: 1\n"
    )
    given = arguments(towers, tmp_path, recipe)
    trainer = run_training(*parse_arguments(given))
    assert trainer.model.config.emotion_labels == ["sad", "calm"]
    assert {row["id"] for row in trainer.train_dataset} == {"one-0", "one-2", "one-4", "two-1", "two-3"}
    assert {row["id"] for row in trainer.eval_dataset["one"]} == {"one-1", "one-3", "one-5"}
    measured = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert {f"eval_{name}loss" for name in ("", "one_", "two_")} <= measured.keys()
    record = json.loads((tmp_path / "run" / RECORD_NAME).read_text())
    assert [(one["name"], one["weight"], one["held_out"]) for one in record["data"]] == [
        ("targets.jsonl", 1, "speaker=ben"),
        ("rows.parquet", 3, None),
    ]
    fingerprints = {"train_rows_fingerprint", "eval_rows_one_fingerprint", "eval_rows_two_fingerprint"}
    assert fingerprints <= record.keys() and record["seen_corpora"] == ["one", "two"]
    changed = arguments(towers, tmp_path, recipe.replace("weight: 3", "weight: 2"))
    with pytest.raises(ValueError, match="data"):
        run_training(*parse_arguments(changed))


def run_mixed(given: list[str], processes: int) -> None:
    """A run of four rows an update, in one process or as one of two."""
    shares = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", str(2 // processes)]
    run_training(*parse_arguments([*given, *shares]))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(corpora, towers, tmp_path: Path, fork_server: ForkServer) -> None:
    logs = []
    for processes in (1, 2):
        (tmp_path / f"{processes}").mkdir()
        recipe = (
            f"data: [{{name: {corpora[0]}, weight: 1}}, {{name: {corpora[1]}, weight: 3}}]\nheld_out: speaker=ann\n"
        )
        recipe += "eval_split: test\neval_strategy: steps\neval_steps: 2\nlogging_steps: 1\nlora_dropout: 0\n"
        given = arguments(towers, tmp_path / f"{processes}", recipe + "learning_rate: 1.0e-2\n")
        given[given.index("--max_steps") + 1] = "4"
        place = given.index("--gradient_accumulation_steps")
        del given[place : place + 2]
        if processes == 1:
            fork_server.run(run_mixed, given, 1)
        else:
            ranks = fork_server.run_ranks(run_mixed, given, 2)
            assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:] + ranks[1].stderr[-2000:]
        state = json.loads((tmp_path / f"{processes}" / "run" / "trainer_state.json").read_text())
        logs.append([{k: v for k, v in log.items() if "loss" in k or "ccc" in k} for log in state["log_history"]])
    one, two = logs
    assert len(one) == len(two) and {"eval_loss", "eval_one_loss", "eval_two_loss"} <= {k for log in one for k in log}
    for expected, found in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_a_reader_chooses_its_checkpoint_by_the_rows_of_all_data_sets(towers, tmp_path: Path) -> None:
    """Also where a transcript is a list of one; rows of several clips are left out."""
    one = write_corpus(tmp_path / "one", "targets.jsonl", 4, text=["I won."], response="Great!")
    two = write_corpus(tmp_path / "two", "targets.jsonl", 4, text=["I lost."])
    more = {"id": "more", "audio": "0.wav", "response": "Oh.", "text": ["a", "b"], "speaker": "ben"}
    one.write_text(one.read_text() + json.dumps(more) + "\n")
    best = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    best += ["--select_on_test", "true"]
    given = arguments({"text_model": towers["text_model"]}, tmp_path, "held_out: speaker=ben\neval_split: test\n")
    place = given.index("--projector_inner_dim")
    given[place : place + 6] = ["--lora_r", "4", "--data", f"{one}=1,{two}=3"]
    trainer = run_text_training(*parse_text_arguments([*given, *best]))
    measured = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert trainer.state.best_metric == measured["eval_loss"] and len(trainer.eval_dataset) == 4
    words = trainer.processing_class.decode(trainer.eval_dataset[0]["input_ids"])
    assert "I won." in words and "Great!" in words
    record = json.loads((tmp_path / "run" / RECORD_NAME).read_text())
    assert record["eval_rows_one"] == record["eval_rows_two"] == 2


@pytest.mark.slow
def test_the_rows_are_drawn_by_the_weights_until_all_were_there(corpora) -> None:
    parts = {place: load_corpus(place, "all") for place in corpora}
    mixed = mix_rows(parts, [1, 4], seed=0)
    origins = [row_id.split("-")[0] for row_id in mixed["id"]]
    assert len(set(mixed["id"])) == 10 and 0.65 < np.mean([origin == "two" for origin in origins]) < 0.92
    assert mixed["id"] == mix_rows(parts, [1, 4], seed=0)["id"] != mix_rows(parts, [1, 4], seed=1)["id"]
    first = {row["id"]: row for row in mixed}
    assert first["one-0"]["text"] is None and first["two-0"]["text"] == "so" and "age" not in mixed.column_names
    assert first["one-0"]["arousal"] == 1.0 and first["two-0"]["audio"]["path"].endswith("two/0.wav")
    streams = {place: load_corpus(place, "all", streaming=True) for place in corpora}
    assert {row["id"] for row in mix_rows(streams, [1, 4], seed=0)} == set(mixed["id"])


def test_metrics_over_all_data_sets_are_those_of_one_that_holds_them(tmp_path: Path) -> None:
    rows, processor = make_rows(tmp_path), tiny_processor()
    sets = {"a": Dataset.from_list(rows[:5]), "b": Dataset.from_list(rows[5:])}
    trainer = make_trainer(rows, tmp_path / "run", processor, tasks={"reply": 1, "recognition": 1})
    alone = trainer.evaluate({"a": sets["a"]})
    apart = trainer.evaluate(sets)
    whole = trainer.evaluate(concatenate_datasets(list(sets.values())))
    surveys = {name: survey_rows(part) for name, part in sets.items()}
    one = {"a": surveys["a"]}, alone
    merged = {"": survey_rows(concatenate_datasets(list(sets.values())))}, whole
    for given, found in ((surveys, apart), one, merged):
        of_no_use = ("_time", "runtime", "_per_second", "tokens", "epoch")
        of_no_use += (
            ("eval_entropy", "eval_mean_token_accuracy") if found is not whole else ()
        )  # of the last set alone
        mine = [name for name in found if not name.endswith(of_no_use)]
        assert sorted(mine) == sorted(f"eval_{name}" for name in evaluation_metrics(trainer.args, given))
    names = [name for name in whole if not name.endswith(("_runtime", "_per_second", "entropy", "accuracy", "tokens"))]
    assert {"eval_loss", "eval_ua", "eval_ccc_arousal", "eval_recognition_loss"} <= set(names)
    for name in set(names) & apart.keys():
        assert apart[name] == pytest.approx(whole[name], rel=1e-5), name
    assert {"eval_loss", "eval_ua", "eval_ccc_arousal", "eval_a_loss", "eval_b_recognition_loss"} <= apart.keys()
    assert "eval_loss" in trainer.state.log_history[-2] and "eval_a_loss" not in trainer.state.log_history[-2]
    trainer.evaluation_loop = None
    with pytest.raises(TypeError):
        trainer.evaluate(sets)
    assert trainer._pool is None


def test_data_sets_are_named_in_one_line_or_in_a_list(corpora, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    both = [DataSource("a.jsonl", 1.0), DataSource("x=y/b.jsonl", 0.5)]
    assert parse_sources("a.jsonl, x=y/b.jsonl=0.5") == both
    assert parse_sources(["a.jsonl", {"name": "x=y/b.jsonl", "weight": 0.5}]) == both
    assert parse_sources("[a.jsonl, {name: x=y/b.jsonl, weight: 0.5}]") == both
    assert parse_sources(str(tmp_path / "a,b")) == [DataSource(str(tmp_path / "a,b"))]
    wrong = {"expected a number > 0": "a=0,b", "an empty list": [], "has \\['wieght'\\]": [{"name": "a", "wieght": 1}]}
    for message, data in {**wrong, "expected a place": [3]}.items():
        with pytest.raises(ValueError, match=message):
            parse_sources(data)
    script = ReLLMScriptArguments(data="org/a", model_name_or_path="m")
    record = describe_origin(script, sets := Dataset.from_list([{"text": "a"}]), {"foo_": sets, "": sets}, {})
    assert {"train_rows": 1, "eval_rows": 1, "eval_rows_foo_": 1}.items() <= record.items()
    assert script.data == "org/a" and ReLLMScriptArguments(data=["org/a"], model_name_or_path="m").data == "org/a"
    assert name_sources(parse_sources(list(corpora))) == ["one", "two"]
    (tmp_path / "d").mkdir()
    a, b = (tmp_path / "d" / name for name in ("a.jsonl", "b.jsonl"))
    for file in (a, b):
        file.touch()
    assert name_sources(parse_sources(f"{a},{b}")) == ["d-a", "d-b"]
    with pytest.raises(ValueError, match="cannot be told apart"):
        name_sources(parse_sources(f"{a},{a}"))


def test_columns_are_gone_through_in_one_order_and_one_of_two_kinds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a set is another in each process, and with it the fingerprint in the cache, and the message."""
    casts, cast_column = [], Dataset.cast_column
    monkeypatch.setattr(Dataset, "cast_column", lambda rows, *to: casts.append(to[0]) or cast_column(rows, *to))
    numbers = dict.fromkeys(DIMENSIONS, 1)
    rows = [dict.fromkeys(("text", "speaker", "emotion"), value) | numbers for value in ("sad", ["sad"])]
    parts = {"one": Dataset.from_list(rows[:1]), "two": Dataset.from_list(rows[1:])}
    with pytest.raises(ValueError, match="column 'emotion' is of different kinds: .* in one; .* in two"):
        mix_rows(parts, [1, 1], seed=0)
    assert casts == [*DIMENSIONS, *DIMENSIONS]
