"""`relllm empathy train` and `score`: a toy that is learnt, runs that are killed, the files, tables with levels."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from empathy_scorers import save_encoder, scorer_of, tokenizer_of, write_csv
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from tiny_models import tiny_tokenizer
from tokenizers.processors import ByteLevel
from transformers import AutoTokenizer, Trainer
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.journal import Journal
from relllm.evaluation.empathy import scorer_training
from relllm.evaluation.empathy.epitome import PairCollator, encode_pairs, read_pairs, split_pairs
from relllm.evaluation.empathy.scorer import EmpathyScorer
from relllm.evaluation.empathy.scorer_training import measure, train_scorer
from relllm.evaluation.empathy.scoring import cut_windows, load_scorers, score_pairs, score_table
from relllm.evaluation.evaluation_settings import EmpathySettings, ScoringSettings

SIGNS = {0: "ok", 1: "sorry", 2: "what"}  # the word that decides the level
FILLERS = ["fine", "that", "is", "hard", "today", "me", "more", "so", "and", "tell"]
TEXTS = ["i feel sad", "i feel lost today", "today is hard and i feel so lost"]


def toy_csv(path: Path, count: int = 240) -> Path:
    """Pairs in the public format whose level a word decides, which is the rationale; some of them twice."""
    rng = random.Random(0)
    rows = []
    for index in range(count):
        level = index % 3
        words = rng.sample(FILLERS, 4)
        words.insert(rng.randrange(5), SIGNS[level])
        post = f"{rng.choice(TEXTS)} {' '.join(rng.choices(FILLERS, k=3))}"
        rows.append((f"s{index}", f"r{index}", post, " ".join(words), level, f"{SIGNS[level]}|" if level else ""))
    return write_csv(path, [*rows, *rows[:7]])


def settings_of(folder: Path, *, count: int = 240, **changes: object) -> EmpathySettings:
    quick = {"learning_rate": 5e-3, "epochs": 8, "batch_size": 16, "max_length": 16, "device": "cpu"}
    data, encoder = folder / "pairs.csv", folder / "encoder"
    if not data.exists():
        toy_csv(data, count)
        save_encoder(
            encoder, hidden_size=32, intermediate_size=64, initializer_range=0.2
        )  # wide: it is not pretrained
    return EmpathySettings(
        data=data, **{"mechanism": "ER", "encoder": str(encoder), "output_dir": folder / "out", **quick, **changes}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("empathy")
    return folder, train_scorer(settings_of(folder), progress=False)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return EmpathyScorer.from_pretrained(folder).state_dict()


def test_a_level_that_a_word_decides_is_learnt(trained: tuple[Path, dict]) -> None:
    test = trained[1]["test"]
    assert test["level"]["accuracy"] > 0.9 and test["level"]["macro_f1"] > 0.9
    assert test["rationale"]["token_f1"] > 0.8
    assert trained[1]["test_baseline"]["accuracy"] < 0.5


def test_the_metrics_are_those_of_the_saved_scorer_on_the_test_split(trained: tuple[Path, dict]) -> None:
    folder, metrics = trained
    model = EmpathyScorer.from_pretrained(folder / "out" / "ER").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "ER")
    pairs, _ = read_pairs(folder / "pairs.csv")
    test = split_pairs(pairs, seed=0)["test"]
    with torch.no_grad():
        guesses = model(**PairCollator(0)(encode_pairs(test, tokenizer, 16))).level_logits.argmax(-1).tolist()
    truth = [pair.level for pair in test]
    assert metrics["test"]["level"]["accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    assert metrics["test"]["level"]["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert metrics["test"]["level"]["confusion_matrix"] == confusion_matrix(truth, guesses).tolist()


def test_the_folder_says_what_was_trained_on_what(trained: tuple[Path, dict]) -> None:
    folder, metrics = trained
    out = folder / "out" / "ER"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["ER"]
    assert metrics["data"]["duplicates_removed"]["count"] == 7 and metrics["data"]["num_pairs"] == 240
    assert sum(split["num_pairs"] for split in metrics["splits"].values()) == 240
    assert sum(sum(split["levels"]) for split in metrics["splits"].values()) == 240
    assert {"torch", "transformers", "relllm"} <= metrics["versions"].keys() and metrics["seed"] == 0
    assert (out / "confusion_matrix.png").stat().st_size > 1000
    written = "".join(path.read_text() for path in out.glob("*.json"))
    assert str(folder) not in written


def test_the_seekers_encoder_stays_as_it_was_and_the_other_does_not(trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    model = EmpathyScorer.from_pretrained(folder / "out" / "ER")
    fresh = EmpathyScorer.from_encoder(str(folder / "encoder"), mechanism="ER", max_length=16)
    before, after = fresh.seeker_encoder.state_dict(), model.seeker_encoder.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    after = model.response_encoder.state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_the_kept_checkpoint_is_the_best_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch is made the best one; what is kept is what an uninterrupted run had after it."""
    scores = iter([0.1, 0.9, 0.5])
    after_epoch: list[dict] = []

    def rank(self: Trainer, *args: object, **kwargs: object) -> dict[str, float]:
        if len(after_epoch) < 3:
            after_epoch.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
            metrics = {"eval_macro_f1": next(scores), "epoch": float(len(after_epoch))}
            self.log(metrics)
            return metrics
        raise AssertionError("a fourth evaluation")

    monkeypatch.setattr(Trainer, "evaluate", rank)
    metrics = train_scorer(settings_of(tmp_path, epochs=3), progress=False)
    kept = weights_of(tmp_path / "out" / "ER")
    assert metrics["chosen_epoch"] == 2
    assert all(torch.equal(kept[name], tensor) for name, tensor in after_epoch[1].items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in after_epoch[2].items())


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"count": 48, "epochs": 3}
    (tmp_path / "whole").mkdir()
    uninterrupted = train_scorer(settings_of(tmp_path / "whole", **small), progress=False)
    settings = settings_of(tmp_path, **small)
    step, steps = Trainer.training_step, []

    def killed(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 6:  # in the second of three epochs
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_scorer(settings, progress=False)
    assert not (tmp_path / "out" / "ER").exists()
    unfinished = tmp_path / "out" / "ER.unfinished" / "checkpoints" / "checkpoint-999"  # killed while it was written
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        train_scorer(settings_of(tmp_path, **small, seed=1), progress=False)
    metrics = train_scorer(settings, progress=False)
    assert len(steps) < 6 + 3 * 3  # three epochs of three steps: it did not begin again
    assert metrics["test"] == uninterrupted["test"] and metrics["chosen_epoch"] == uninterrupted["chosen_epoch"]
    expected = weights_of(tmp_path / "whole" / "out" / "ER")
    found = weights_of(tmp_path / "out" / "ER")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_complete_run_is_returned_and_other_settings_are_refused(
    trained: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = trained
    monkeypatch.setattr(scorer_training, "_build_trainer", None)
    assert train_scorer(settings_of(folder), progress=False) == metrics
    with pytest.raises(FileExistsError, match="from other data or settings"):
        train_scorer(settings_of(folder, epochs=9), progress=False)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    identity = scorer_training._training_identity(settings)
    with (
        Journal(tmp_path / "out" / "ER.unfinished" / "settings.jsonl", identity),
        pytest.raises(BlockingIOError, match="Another process"),
    ):
        train_scorer(settings, progress=False)


def test_token_f1_is_the_mean_over_pairs_with_a_rationale_or_a_prediction() -> None:
    x = -100
    labels = [
        [x, 1, 1, 1, 0, 0, 1, x],
        [x, 0, 0, 0, 0, 0, 0, x],  # none
        [x, 1, 1, 0, 0, x, x, x],
        [x, 0, 0, 0, x, x, x, x],  # none, and none predicted: left out
        [x, x, x, x, x, x, x, x],  # not known: left out
        [x, 1, 1, 1, 1, 0, 0, x],
    ]
    predictions = [
        [1, 1, 1, 0, 0, 0, 1, 1],  # 3 of 3 right, of 4: F1 6/7
        [0, 0, 1, 0, 0, 0, 0, 0],  # F1 0
        [0, 0, 0, 0, 0, 1, 1, 1],  # none where it counts: F1 0
        [1, 0, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 0],  # 1 of 3 right, of 4: F1 2/7
    ]
    logits = np.eye(2)[np.array(predictions)]
    found = measure(np.zeros((6, 3)), logits, np.zeros(6, dtype=int), np.array(labels))["rationale"]
    assert found["token_f1"] == pytest.approx((6 / 7 + 0 + 0 + 2 / 7) / 4)
    assert found["num_pairs"] == 5


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = np.full((2, 3), np.nan)
    prediction = type("P", (), {"predictions": (logits, None), "label_ids": (None, None)})()
    with pytest.raises(ValueError, match="training diverged"):
        scorer_training._predicted(prediction)


def test_measures_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, levels = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    found = measure(logits, np.zeros((40, 2, 2)), levels, np.full((40, 2), -100))
    assert found["level"]["accuracy"] == pytest.approx(accuracy_score(levels, logits.argmax(1)))
    assert found["level"]["macro_f1"] == pytest.approx(f1_score(levels, logits.argmax(1), average="macro"))
    assert found["rationale"]["token_f1"] is None and found["rationale"]["num_pairs"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mechanism": "XX"}, "mechanism must be one of"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"device": "cuda:7"}, "device must be one of auto, cpu"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, **change)


def save_scorer(folder: Path, mechanism: str) -> None:
    scorer_of(folder.parent / "encoder", mechanism=mechanism).save_pretrained(folder)
    tokenizer_of(" ".join([*TEXTS, *FILLERS])).save_pretrained(folder)


def test_scored_together_pairs_have_the_levels_they_have_alone(tmp_path: Path) -> None:
    for mechanism in ("EX", "ER"):
        save_scorer(tmp_path / mechanism, mechanism)
    scorers = load_scorers(tmp_path)
    assert list(scorers) == ["ER", "EX"]
    pairs = [(post, " ".join(FILLERS[:count])) for count, post in enumerate(TEXTS * 3, start=1)]
    together = score_pairs(scorers, pairs, batch_size=4)
    for pair, found in zip(pairs, together, strict=True):
        alone = score_pairs(scorers, [pair])[0]
        for mechanism in scorers:
            assert found[mechanism]["level"] == alone[mechanism]["level"]
            assert found[mechanism]["probabilities"] == pytest.approx(alone[mechanism]["probabilities"], abs=1e-5)
            assert sum(found[mechanism]["probabilities"]) == pytest.approx(1)
            assert found[mechanism]["level"] == int(np.argmax(found[mechanism]["probabilities"]))
    assert together[0]["ER"]["probabilities"] != pytest.approx(together[0]["EX"]["probabilities"], abs=1e-3)


def test_an_empty_response_is_level_0_and_an_empty_post_is_refused(tmp_path: Path) -> None:
    save_scorer(tmp_path / "ER", "ER")
    scorers = load_scorers(tmp_path / "ER")
    silence = {"level": 0, "probabilities": [1.0, 0.0, 0.0], "tokens": 0, "cut": False}
    assert score_pairs(scorers, [("i feel sad", " ")]) == [{"ER": silence}]
    with pytest.raises(ValueError, match="seeker post at position 1 is empty"):
        score_pairs(scorers, [("a", "b"), ("", "b")])


def test_a_long_response_is_read_in_part_or_in_windows(tmp_path: Path) -> None:
    save_scorer(tmp_path / "ER", "ER")
    scorers = load_scorers(tmp_path)
    words = (" ".join(TEXTS) + " " + " ".join(FILLERS)).split()[:24]
    parts = [" ".join(words[start : start + 10]) for start in (0, 10, 20)]  # 12 tokens, of which two are special
    alone = [found["ER"] for found in score_pairs(scorers, [("i feel sad", part) for part in parts])]
    [[cut], [whole]] = ([found["ER"] for found in score_pairs(scorers, [("i feel sad", " ".join(words))], windows=w)]
                        for w in (False, True))  # fmt: skip
    assert (cut["tokens"], cut["cut"], whole["tokens"], whole["cut"]) == (24, True, 24, False)
    assert cut["probabilities"] == pytest.approx(alone[0]["probabilities"], abs=1e-5)
    assert whole["level"] == max(found["level"] for found in alone)
    assert [found["cut"] for found in alone] == [False] * 3


@pytest.mark.parametrize("trims", [True, False])
def test_the_windows_of_a_byte_level_tokenizer_have_the_tokens_of_the_whole(tmp_path: Path, trims: bool) -> None:
    """As RoBERTa's: the blank before a word is a part of its token, whose offsets leave it out or have it."""
    save_scorer(tmp_path / "ER", "ER")
    scorer = load_scorers(tmp_path)["ER"]
    tokenizer = tiny_tokenizer(audio_token=False)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trims)
    tokenizer.save_pretrained(tmp_path / "ER")
    by_bytes = load_scorers(tmp_path)["ER"]
    text = "  I am so sorry,\nthat is really hard 😢 to hear … what happened next?  And how do you feel today "
    for one in (scorer, by_bytes):
        limit = 12 - one.tokenizer.num_special_tokens_to_add()
        windows, count = cut_windows(text, one)
        whole, *parts = (one.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, *windows))
        assert "".join(windows) == text and len(windows) > 1
        assert sum(parts, []) == whole and count == len(whole) and max(map(len, parts)) <= limit


def test_folders_without_a_scorer_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no empathy scorer"):
        load_scorers(tmp_path)
    save_scorer(tmp_path / "ER", "IP")
    with pytest.raises(ValueError, match="holds a scorer of IP"):
        load_scorers(tmp_path)
    save_encoder(tmp_path / "bert")
    with pytest.raises(ValueError, match="holds a 'bert' model"):
        load_scorers(tmp_path / "bert")


def test_a_scorer_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_scorer(tmp_path / "ER", "ER")
    model = EmpathyScorer.from_pretrained(tmp_path / "ER")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("level_head.dense")}
    model.save_pretrained(tmp_path / "ER", state_dict=weights)
    with pytest.raises(ValueError, match="lacks 2 weights of the scorer, such as level_head.dense"):
        load_scorers(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_keeps_its_columns_and_gets_levels(tmp_path: Path, suffix: str) -> None:
    save_scorer(tmp_path / "ER", "ER")
    rows = [{"name": f"é, {i}", "seeker_post": TEXTS[i], "response_post": "that is hard" * (i > 0)} for i in range(3)]
    table = tmp_path / f"pairs{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_csv(table, [tuple(row.values()) for row in rows], ",".join(rows[0]))
    result = CliRunner().invoke(app, ["empathy", "score", str(table), "--scorers", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    out = tmp_path / f"pairs.scored{suffix}"
    with out.open(newline="", encoding="utf-8") as file:
        scored = list(csv.DictReader(file)) if suffix == ".csv" else [json.loads(line) for line in file]
    expected = score_pairs(load_scorers(tmp_path), [(row["seeker_post"], row["response_post"]) for row in rows])
    for row, found, part in zip(rows, scored, expected, strict=True):
        assert {name: found[name] for name in row} == row
        assert int(found["ER_level"]) == part["ER"]["level"]
        assert [float(found[f"ER_p{level}"]) for level in range(3)] == part["ER"]["probabilities"]
    assert "1 responses are empty" in result.output and not list(tmp_path.glob("*.partial"))


def test_a_table_is_never_overwritten_nor_its_columns(tmp_path: Path) -> None:
    save_scorer(tmp_path / "ER", "ER")
    table = write_csv(tmp_path / "pairs.csv", [("a", "b", 1)], "seeker_post,response_post,ER_level")
    with pytest.raises(ValueError, match="is the table itself"):
        score_table(ScoringSettings(table, tmp_path, tmp_path / "." / "pairs.csv"), progress=False)
    with pytest.raises(ValueError, match=r"has the columns \['ER_level'\] already"):
        score_table(ScoringSettings(table, tmp_path, tmp_path / "out.csv"), progress=False)
    with pytest.raises(ValueError, match="ends in .csv or .jsonl"):
        score_table(ScoringSettings(table, tmp_path, tmp_path / "out.xlsx"), progress=False)


def test_the_command_trains_and_says_what_is_wrong(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    flags = ["--mechanism", "EX", "--encoder", settings.encoder, "--out", str(tmp_path / "out"), "--device", "cpu"]
    quick = ["--epochs", "1", "--max-length", "16"]
    result = CliRunner().invoke(app, ["empathy", "train", "--data", str(settings.data), *flags, *quick])
    assert result.exit_code == 0, result.output
    assert "247 rows, 7 duplicates removed, 0 of another level" in " ".join(result.output.split())
    bad = write_csv(tmp_path / "bad.csv", [("a", "b", 5, "")], "seeker_post,response_post,level,rationales")
    result = CliRunner().invoke(app, ["empathy", "train", "--data", str(bad), *flags, "--mechanism", "IP"])
    assert result.exit_code == 1 and "level is '5', expected 0, 1 or 2" in " ".join(result.stderr.split())
