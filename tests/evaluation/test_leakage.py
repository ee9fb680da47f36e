"""A model measured on rows that made it: its training's record against them, from `relllm train` to `--folds`."""

import json
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
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig
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
    """A run for each session held out, the one before it to choose the checkpoint by."""
    folder = tmp_path_factory.mktemp("runs")
    save_towers(folder / "towers")
    for index, session in enumerate(SESSIONS):
        held_out = f"session={session};validation:session={SESSIONS[index - 1]}"
        train(folder / session, towers_of(folder), data=str(corpus), held_out=held_out, eval_split="validation")
    return folder


def towers_of(folder: Path) -> dict[str, str]:
    names = {"audio_tower": "speech", "emotion_tower": "emotion", "text_model": "llm"}
    return {setting: str(folder / "towers" / name) for setting, name in names.items()}


def train(out: Path, start: dict[str, str], **rows: object) -> None:
    tiny = {"projector_inner_dim": 16, "lora_r": 2, "lora_alpha": 2, "full_window": False} if len(start) > 1 else {}
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    quick = {"max_steps": 1, "save_steps": 1, "eval_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    args = ReLLMSFTConfig(
        output_dir=str(out), disable_tqdm=True, dataloader_pin_memory=False, gradient_checkpointing=False,
        **(chosen if rows.get("eval_split") else {}), **quick,
    )  # fmt: skip
    run_training(ReLLMScriptArguments(**start, **tiny, **rows), args)


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


def test_what_the_first_stage_read_is_read(runs: Path, corpus: Path, tmp_path: Path) -> None:
    train(
        tmp_path / "further", {"model_name_or_path": str(runs / "Ses01")}, data=str(corpus), held_out="session=Ses03"
    )
    record = json.loads((tmp_path / "further" / "training_settings.json").read_text())
    assert find_seen(record, load_corpus(str(corpus), "test", held_out="session=Ses03"))["validated_on"] == 2
    assert find_seen(record, load_corpus(str(corpus), "all"))["trained_on"] == 4


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
