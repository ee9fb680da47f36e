"""A scorer that never gives a level: the old recipe makes one, the new one does not, and `evaluate` refuses it."""

import json
import os
from pathlib import Path

import pytest
from empathy_scorers import imbalanced_csv, save_encoder
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, recall_score
from tiny_models import tiny_model
from transformers import AutoModel

from relllm.evaluation.empathy.epitome import read_pairs, split_pairs
from relllm.evaluation.empathy.quality import (
    describe_quality,
    find_weaknesses,
    measure_bag_of_words,
    quality_of,
    read_quality,
)
from relllm.evaluation.empathy.scorer_training import choose_learning_rate, train_scorer
from relllm.evaluation.evaluating import evaluate
from relllm.evaluation.evaluation_settings import EmpathySettings, EvaluationSettings

OLD_RECIPE = {"learning_rate": 2e-5, "epochs": 4}
GOOD = {"accuracy": 0.82, "macro_f1": 0.75, "recall": {"0": 0.9, "1": 0.7, "2": 0.5}, "num_pairs": 600}


def save_metrics(folder: Path, bag: float | None, **level: object) -> None:
    """A scorer's folder, as far as its quality goes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"mechanism": folder.name}))
    metrics = {"test": {"level": {**GOOD, **level}}, "bag_of_words": bag and {"macro_f1": bag}}
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_the_old_recipe_never_gives_the_rare_level_and_the_new_one_does(tmp_path: Path) -> None:
    data = imbalanced_csv(tmp_path / "pairs.csv")
    encoder = save_encoder(tmp_path / "encoder", hidden_size=128, intermediate_size=256, initializer_range=0.1)
    recalls = {}
    for name, recipe in (("old", OLD_RECIPE), ("new", {})):
        out = {"output_dir": tmp_path / name, "max_length": 16, "device": "cpu"}
        found = train_scorer(EmpathySettings(data, "ER", encoder, **out, **recipe), progress=False)
        recalls[name] = found["test"]["level"]["recall"]["2"]
        weak = find_weaknesses(read_quality(tmp_path / name))
        assert bool(weak) == (name == "old"), (weak, found["test"]["level"], found["bag_of_words"])
    assert recalls["old"] == 0 and recalls["new"] > 0.5


def test_the_learning_rate_goes_with_the_encoders_size(tmp_path: Path) -> None:
    from transformers import BertConfig

    tiny = AutoModel.from_pretrained(save_encoder(tmp_path / "encoder"))
    assert choose_learning_rate(tiny) == 1e-3
    minilm = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    assert choose_learning_rate(AutoModel.from_config(minilm)) == pytest.approx(1.57e-4, rel=0.03)


def test_the_bag_of_words_is_scikit_learns(tmp_path: Path) -> None:
    pairs, _ = read_pairs(imbalanced_csv(tmp_path / "pairs.csv"))
    splits = split_pairs(pairs, seed=0)
    found = measure_bag_of_words(splits["train"], splits["test"])
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[^\W_]+|[?!]")
    model = LogisticRegression(class_weight="balanced", max_iter=2000)
    model.fit(
        words.fit_transform([pair.response_post for pair in splits["train"]]), [p.level for p in splits["train"]]
    )
    guesses = model.predict(words.transform([pair.response_post for pair in splits["test"]]))
    truth = [pair.level for pair in splits["test"]]
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guesses))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guesses, average="macro"))
    assert list(found["recall"].values()) == pytest.approx(recall_score(truth, guesses, average=None))
    with pytest.raises(ValueError, match="nothing to learn"):
        measure_bag_of_words([pair for pair in splits["train"] if pair.level == 0], splits["test"])


def test_evaluate_refuses_a_weak_scorer_before_anything_runs(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    save_metrics(tmp_path / "scorers" / "ER", 0.69, macro_f1=0.488, recall={"0": 0.87, "1": 0.63, "2": 0.0})
    save_metrics(tmp_path / "scorers" / "IP", 0.69)
    settings = EvaluationSettings(str(tmp_path / "model"), "gone", tmp_path, empathy_scorers=str(tmp_path / "scorers"))
    with pytest.raises(
        ValueError, match="ER finds none of the pairs of level 2.*macro-F1 0.488, and a bag of words 0.690"
    ):
        evaluate(settings)


def test_what_makes_a_scorer_weak_and_what_a_table_says(tmp_path: Path) -> None:
    save_metrics(tmp_path / "ER", 0.75)  # as good as a bag of words
    save_metrics(tmp_path / "IP", 0.751)
    save_metrics(tmp_path / "EX", None)
    assert quality_of({"test": {"level": GOOD}}) == {**GOOD, "bag_of_words": None}  # of an older release
    (tmp_path / "unknown" / "EX").mkdir(parents=True)
    (tmp_path / "unknown" / "EX" / "config.json").write_text('{"mechanism": "EX"}')
    assert find_weaknesses(read_quality(tmp_path)) == ["IP has macro-F1 0.750, and a bag of words 0.751"]
    assert "not known" in find_weaknesses(read_quality(tmp_path / "unknown"))[0]
    assert describe_quality(read_quality(tmp_path / "EX")) == [
        "Scorer of EX on 600 test pairs: accuracy 0.820, macro-F1 0.750; recall of levels 0 / 1 / 2: 0.90 / 0.70 / "
        "0.50."
    ]
    assert describe_quality(read_quality(tmp_path / "ER")) == [
        "Scorer of ER on 600 test pairs: accuracy 0.820, macro-F1 0.750, a bag of words 0.750; recall of levels "
        "0 / 1 / 2: 0.90 / 0.70 / 0.50."
    ]


@pytest.mark.slow
@pytest.mark.skipif("RELLM_EPITOME" not in os.environ, reason="RELLM_EPITOME does not point at EPITOME's CSV files")
@pytest.mark.parametrize(
    ("mechanism", "file"),
    [("ER", "emotional-reactions"), ("IP", "interpretations"), ("EX", "explorations")],
)
def test_the_default_recipe_is_fit_to_measure_by_on_the_public_file(mechanism: str, file: str, tmp_path: Path) -> None:
    data = Path(os.environ["RELLM_EPITOME"]) / f"{file}-reddit.csv"
    encoder = os.environ.get("RELLM_EPITOME_ENCODER", "roberta-base")
    train_scorer(EmpathySettings(data, mechanism, encoder, tmp_path))
    assert find_weaknesses(read_quality(tmp_path)) == []
