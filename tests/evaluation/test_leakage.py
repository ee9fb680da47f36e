"""A model measured on rows that made it: its training's record against them, from `relllm train` to `--folds`."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
from datasets import Dataset
from light_checkpoints import save_towers
from pictures import blank_pictures
from tiny_models import RATE, clip
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.loading import load_corpus
from relllm.data.membership import digest_rows, pack_digests, unpack_digests
from relllm.evaluation.evaluating import evaluate
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.folds import evaluate_folds
from relllm.evaluation.leakage import find_seen
from relllm.training.checkpoints import describe_seen
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig, check_selection
from relllm.training.run import run_training

pytestmark = [pytest.mark.usefixtures("no_drawing"), pytest.mark.slow]
SESSIONS = ("Ses01", "Ses02", "Ses03")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of each of three sessions."""
    folder = tmp_path_factory.mktemp("corpora") / "iemocap"
    folder.mkdir()
    rows = []
    for index in range(6):
        soundfile.write(folder / f"c{index}.wav", clip(0.3, seed=index), RATE)
        labels = {"emotion": ("sad", "happy")[index // 3], "arousal": 0.3, "dominance": 0.4, "valence": 0.5}
        said = {"text": f"words {index}", "response": "I see.", "session": SESSIONS[index % 3]}
        rows.append({"id": f"c{index}", "audio": f"c{index}.wav", **said, **labels})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the first session held out, the last to choose the checkpoint by; the others by their records alone:
    the same model, which would have read other rows.
    """
    folder = tmp_path_factory.mktemp("runs")
    save_towers(folder / "towers")
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    start = {setting: str(folder / "towers" / name) for setting, name in names.items()}
    held_out = "session=Ses01;validation:session=Ses03"
    script = ReLLMScriptArguments(
        **start, projector_inner_dim=16, lora_r=2, lora_alpha=2, full_window=False, data=str(corpus),
        held_out=held_out, eval_split="validation",
    )  # fmt: skip
    args = ReLLMSFTConfig(
        output_dir=str(folder / "Ses01"), disable_tqdm=True, dataloader_pin_memory=False, bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_steps=1, save_steps=1, eval_steps=1, eval_strategy="steps",
        report_to="none", load_best_model_at_end=True, metric_for_best_model="eval_loss", log_completions=0,
    )  # fmt: skip
    run_training(script, args)
    for index, session in enumerate(SESSIONS[1:], start=1):
        shutil.copytree(folder / "Ses01", folder / session)
        write_record(folder / session, corpus, f"session={session};validation:session={SESSIONS[index - 1]}")
    return folder


def write_record(run: Path, corpus: Path, held_out: str) -> None:
    """Have a run's record say which rows another would have read."""
    path = run / "training_settings.json"
    record = json.loads(path.read_text())
    rows = {name: load_corpus(str(corpus), name, held_out=held_out) for name in ("train", "validation")}
    record["seen_rows"] = {name: pack_digests(digest_rows(one)) for name, one in rows.items()}
    path.write_text(json.dumps(record))


def settings(model: Path, corpus: Path, out: Path, **options: object) -> EvaluationSettings:
    return EvaluationSettings(str(model), str(corpus), out, tasks=("dimensions",), device="cpu", **options)


def test_each_fold_is_measured_by_the_model_that_did_not_read_it(runs: Path, corpus: Path, tmp_path: Path) -> None:
    metrics = evaluate_folds(settings(runs / "{fold}", corpus, tmp_path / "out"), "session", progress=False)
    unread = {"recorded": True, "trained_on": 0, "validated_on": 0, "chosen_by": True, "corpora": ["iemocap"]}
    assert metrics["training"] == unread


def test_a_swapped_fold_is_refused_before_anything_runs(runs: Path, corpus: Path, tmp_path: Path) -> None:
    for name, other in zip(SESSIONS, (*SESSIONS[1:], SESSIONS[0]), strict=True):
        (tmp_path / f"swapped-{other}").symlink_to(runs / name)
    with pytest.raises(ValueError, match=r"swapped-Ses01 .* 2 of them are among the rows that it was trained on"):
        evaluate_folds(settings(tmp_path / "swapped-{fold}", corpus, tmp_path / "out"), "session")
    given = [
        "evaluate",
        str(runs / "Ses01"),
        str(corpus),
        "--held-out",
        "session=Ses03",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*given, "--device", "cpu"])
    said = " ".join(f"{result.output} {result.exception}".replace("│", " ").split())
    assert result.exit_code != 0 and "2 among those that its checkpoint was chosen by" in said
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_what_is_measured_all_the_same_says_so(runs: Path, corpus: Path, tmp_path: Path) -> None:
    with blank_pictures():
        seen = evaluate(settings(runs / "Ses01", corpus, tmp_path, split="", allow_seen=True), progress=False)
    assert seen["training"]["trained_on"] == 2 and seen["training"]["validated_on"] == 2


def test_the_same_clips_under_another_split_are_found(runs: Path, corpus: Path) -> None:
    record = json.loads((runs / "Ses01" / "training_settings.json").read_text())
    again = load_corpus(str(corpus), "all").map(lambda row: {"split": "test", "session": None, "audio": "/gone.wav"})
    assert find_seen(record, again)["trained_on"] == 2
    other = again.map(lambda row: {"text": f"other {row['text']}"})  # of another corpus with ids alike
    assert find_seen(record, other)["trained_on"] == 0


def test_what_the_first_stage_read_is_read(runs: Path, corpus: Path) -> None:
    """And what it was chosen by is what this one was chosen by."""
    held_out = "session=Ses03"
    script = ReLLMScriptArguments(model_name_or_path=str(runs / "Ses01"), data=str(corpus), held_out=held_out)
    train_rows = load_corpus(str(corpus), "train", held_out=held_out)
    record = describe_seen(script, train_rows, {}, {"model_name_or_path": str(runs / "Ses01")}, "main")
    seen = find_seen(record, load_corpus(str(corpus), "test", held_out=held_out))
    assert (seen["trained_on"], seen["validated_on"], seen["chosen_by"]) == (0, 2, True)
    assert find_seen(record, load_corpus(str(corpus), "all"))["trained_on"] == 4


@pytest.mark.parametrize("start", ["model_name_or_path", "text_model"])
def test_an_llm_that_an_earlier_training_taught_is_not_unseen_when_it_reads(
    runs: Path, corpus: Path, tmp_path: Path, start: str
) -> None:
    """Of a second stage whose own LLM was frozen, on other rows; an LLM that no training touched has read none."""
    first, second = (shutil.copytree(runs / "Ses01", tmp_path / name) for name in ("first", "second"))
    record = json.loads((first / "training_settings.json").read_text())
    if start == "model_name_or_path":
        (first / "training_settings.json").write_text(json.dumps(record | {"unfreeze": ["text_model"]}))
    towers = {"audio_tower": "a", "text_model": str(first), "emotion_fusion": "none"}
    given = towers if start == "text_model" else {"model_name_or_path": str(first)}
    held_out = "session=Ses02"
    rows = load_corpus(str(corpus), "test", held_out=held_out)
    seen = describe_seen(ReLLMScriptArguments(data=str(corpus), **given), rows, {}, {start: str(first)}, "main")
    (second / "training_settings.json").write_text(json.dumps(record | seen))
    asked = {"tasks": ("ser",), "system": "text-only", "device": "cpu", "held_out": held_out}
    with pytest.raises(ValueError, match="2 of them are among the rows that it was trained on"):
        evaluate(EvaluationSettings(str(second), str(corpus), tmp_path / "out", **asked))
    with blank_pictures():
        bare = evaluate(EvaluationSettings(str(runs / "Ses01"), str(corpus), tmp_path / "bare", **asked))
    assert bare["training"]["trained_on"] == 0


def test_a_checkpoint_chosen_by_the_test_split_needs_a_flag_and_says_so(tmp_path: Path) -> None:
    args = ReLLMSFTConfig(output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", use_cpu=True)
    for given in ({"data": "rows", "eval_split": "test"}, {"data": [{"name": "rows", "eval_split": "test"}]}):
        of = {"audio_tower": "a", "text_model": "b", "emotion_fusion": "none", **given}
        with pytest.raises(ValueError, match="--select_on_test true"):
            check_selection(ReLLMScriptArguments(**of), args)
        meant = ReLLMScriptArguments(**of, select_on_test=True)
        assert check_selection(meant, args) == {"selected_on_test": True}
    (tmp_path / "training_settings.json").write_text('{"selected_on_test": true}')
    start = {"model_name_or_path": str(tmp_path)}
    assert describe_seen(meant, Dataset.from_list([]), {}, start, "main")["selected_on_test"]


def test_a_model_without_a_record_is_not_known_and_a_public_tower_is() -> None:
    rows = Dataset.from_list([{"id": "a", "text": "b"}])
    tower = {"emotion_tower": {"name": "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim"}}
    found = find_seen({}, rows, towers=tower)
    assert not found["recorded"] and found["corpora"] == ["msp-podcast"]


def test_digests_come_back_from_text_and_damage_is_told() -> None:
    digests = digest_rows(Dataset.from_list([{"id": f"{i}", "text": None} for i in range(50)]))
    assert len(digests) == 50 and unpack_digests(pack_digests(digests)) == digests
    with pytest.raises(ValueError, match="damaged"):
        unpack_digests("AAAA")
