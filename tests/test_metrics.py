"""Metrics against naive formulas and other libraries, and their degenerate cases."""

import math
import sys
import warnings

import audmetric
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, root_mean_squared_error

from relllm.labels import EMOTIONS
from relllm.metrics import calibration_metrics, concordances, dimension_metrics, recognition_metrics, vote_metrics


def test_recognition_agrees_with_the_naive_formulas() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    predictions = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 5, 300))
    metrics = recognition_metrics(labels.tolist(), predictions.tolist(), EMOTIONS)
    recalls, f1s = [], []
    for index in range(5):
        hits = np.sum((labels == index) & (predictions == index))
        recalls.append(hits / np.sum(labels == index))
        precision = hits / np.sum(predictions == index)
        f1s.append(2 * precision * recalls[-1] / (precision + recalls[-1]))
    assert metrics["ua"] == pytest.approx(np.mean(recalls))
    assert metrics["wa"] == pytest.approx(np.mean(labels == predictions))
    assert metrics["macro_f1"] == pytest.approx(np.mean(f1s))
    assert list(metrics["recall"].values()) == pytest.approx(recalls)
    for true, predicted in np.ndindex(5, 5):
        expected = np.sum((labels == true) & (predictions == predicted))
        assert metrics["confusion_matrix"][true][predicted] == expected


def test_ua_differs_from_wa_on_unbalanced_classes() -> None:
    metrics = recognition_metrics(["sad"] * 8 + ["happy"] * 2, ["sad"] * 10, ["happy", "sad"])
    assert (metrics["ua"], metrics["wa"]) == (0.5, 0.8)
    assert metrics["macro_f1"] == pytest.approx((0 + 2 * 0.8 / 1.8) / 2)


def test_a_class_without_labels_is_left_out_but_predicting_it_is_wrong() -> None:
    metrics = recognition_metrics(["sad", "sad", "happy"], ["sad", "angry", "happy"], EMOTIONS)
    assert metrics["recall"] == {"neutral": None, "happy": 1.0, "angry": None, "sad": 0.5, "surprise": None}
    assert metrics["ua"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((1.0 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([], [], "no clips"),
        (["sad"], [], "1 labels and 0 predictions"),
        (["sad"], ["bored"], "prediction at position 0 is 'bored'"),
        ([0, 5], [0, 0], "label at position 1 is 5"),
        ([0], [-1], "prediction at position 0 is -1"),
    ],
)
def test_recognition_refuses_what_it_cannot_count(labels: list, predictions: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recognition_metrics(labels, predictions, EMOTIONS)


def test_dimensions_agree_with_the_naive_formulas() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(200)
    predicted = 0.3 + 0.5 * truth + rng.normal(0, 0.1, 200)
    metrics = dimension_metrics({"arousal": truth.tolist()}, {"arousal": predicted.tolist()})["arousal"]
    covariance = np.mean((truth - truth.mean()) * (predicted - predicted.mean()))
    ccc = 2 * covariance / (truth.var() + predicted.var() + (truth.mean() - predicted.mean()) ** 2)
    assert metrics["ccc"] == pytest.approx(ccc)
    assert metrics["pearson"] == pytest.approx(covariance / (truth.std() * predicted.std()))
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean((truth - predicted) ** 2)))
    assert metrics["num_clips"] == 200


def test_unlabelled_clips_are_dropped_for_each_dimension_alone() -> None:
    labels = {"valence": [0.1, None, 0.5, 0.9], "arousal": [float("nan"), 0.2, 0.4, 0.6]}
    predictions = {"arousal": [0.0, 0.2, 0.4, 0.6], "valence": [0.1, 7.0, 0.5, 0.9]}
    metrics = dimension_metrics(labels, predictions)
    assert list(metrics) == ["arousal", "valence"]
    assert [metrics[name]["num_clips"] for name in metrics] == [3, 3]
    assert [metrics[name]["ccc"] for name in metrics] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ([None, None], [0.1, 0.2], (None, None, None)),
        ([0.5], [0.4], (None, None, 0.1)),
        ([0.2, 0.8], [0.5, 0.5], (0.0, None, 0.3)),
        ([0.5, 0.5], [0.5, 0.5], (None, None, 0.0)),
    ],
)
def test_undefined_values_are_none_and_never_nan(labels: list, predictions: list, expected: tuple) -> None:
    metrics = dimension_metrics({"dominance": labels}, {"dominance": predictions})["dominance"]
    assert (metrics["ccc"], metrics["pearson"]) == expected[:2]
    assert metrics["rmse"] == (None if expected[2] is None else pytest.approx(expected[2]))


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ({"arousal": [0.1]}, {"valence": [0.1]}, "expected the same names"),
        ({"activation": [0.1]}, {"activation": [0.1]}, "expected the same names"),
        ({}, {}, "expected the same names"),
        ({"arousal": [0.1]}, {"arousal": []}, "1 labels and 0 predictions"),
        ({"arousal": [0.1]}, {"arousal": [float("nan")]}, "prediction for clip 0 is nan"),
        ({"arousal": [float("inf")]}, {"arousal": [0.1]}, "label of clip 0 is infinite"),
    ],
)
def test_dimensions_refuse_what_they_cannot_count(labels: dict, predictions: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dimension_metrics(labels, predictions)


RNG = np.random.default_rng(2)
RECOGNITION_CASES = {
    "random": (RNG.integers(0, 5, 200), RNG.integers(0, 5, 200)),
    "one class absent from the labels": (RNG.integers(0, 4, 100), RNG.integers(0, 5, 100)),
    "one class never predicted": (RNG.integers(0, 5, 100), RNG.integers(0, 4, 100)),
    "constant predictions": (RNG.integers(0, 5, 100), np.full(100, 3)),
    "constant labels": (np.full(50, 2), RNG.integers(0, 5, 50)),
    "one clip, right": (np.array([4]), np.array([4])),
    "one clip, wrong": (np.array([4]), np.array([0])),
}


@pytest.mark.parametrize("case", RECOGNITION_CASES)
def test_recognition_agrees_with_scikit_learn_and_audmetric(case: str) -> None:
    labels, predictions = RECOGNITION_CASES[case]
    metrics = recognition_metrics(labels.tolist(), predictions.tolist(), EMOTIONS)
    present = np.unique(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are no label, which is the case here
        ua = balanced_accuracy_score(labels, predictions)
    assert metrics["ua"] == pytest.approx(ua, abs=1e-12)
    named = [[EMOTIONS[index] for index in values] for values in (labels, predictions)]
    recall = audmetric.recall_per_class(*named, labels=list(EMOTIONS), zero_division=0.0)
    assert {name: metrics["recall"][name] or 0.0 for name in recall} == pytest.approx(recall, abs=1e-12)
    assert metrics["wa"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-12)
    f1 = f1_score(labels, predictions, average=None, labels=range(5), zero_division=0)[present].mean()
    assert metrics["macro_f1"] == pytest.approx(f1, abs=1e-12)


def test_an_answer_without_an_emotion_is_a_wrong_one() -> None:
    metrics = recognition_metrics(["sad", "sad", "happy", "happy"], ["sad", None, "happy", None], EMOTIONS)
    assert (metrics["ua"], metrics["wa"], metrics["num_unparsed"], metrics["num_clips"]) == (0.5, 0.5, 2, 4)
    assert metrics["macro_f1"] == pytest.approx(2 / 3)
    assert sum(map(sum, metrics["confusion_matrix"])) == 2
    nothing = recognition_metrics(["sad"], [None], EMOTIONS)
    assert (nothing["ua"], nothing["macro_f1"], nothing["num_unparsed"]) == (0.0, 0.0, 1)


@pytest.mark.parametrize("label", [None, float("nan"), True])
def test_a_label_that_is_none_is_refused_and_not_counted(label: object) -> None:
    with pytest.raises(ValueError, match="label at position 1"):
        recognition_metrics(["sad", label], ["sad", "sad"], EMOTIONS)  # type: ignore[list-item]


DIMENSION_CASES = {
    "random": (RNG.random(100), RNG.random(100)),
    "ties": (RNG.integers(0, 3, 60) / 2, RNG.integers(0, 3, 60) / 2),
    "two clips": (np.array([0.2, 0.9]), np.array([0.7, 0.1])),
    "far from zero": (1000 + RNG.random(50), 1000 + RNG.random(50)),
}


@pytest.mark.parametrize("case", DIMENSION_CASES)
def test_dimensions_agree_with_scipy_scikit_learn_and_audmetric(case: str) -> None:
    truth, predicted = DIMENSION_CASES[case]
    metrics = dimension_metrics({"valence": truth.tolist()}, {"valence": predicted.tolist()})["valence"]
    assert metrics["ccc"] == pytest.approx(audmetric.concordance_cc(truth, predicted), abs=1e-12)
    assert metrics["pearson"] == pytest.approx(pearsonr(truth, predicted).statistic, abs=1e-12)
    assert metrics["rmse"] == pytest.approx(root_mean_squared_error(truth, predicted), abs=1e-12)


def test_concordances_are_those_of_labelled_clips_and_of_two_or_more() -> None:
    rng = np.random.default_rng(4)
    truth = rng.random((60, 3), dtype=np.float32)
    predicted = (truth + rng.normal(0, 0.2, (60, 3))).astype(np.float32)
    truth[:4, 0] = np.nan
    truth[1:, 2] = np.nan  # one clip has no concordance
    values = concordances(truth, predicted)
    assert list(values) == ["ccc_arousal", "ccc_dominance"]
    assert values["ccc_arousal"] == pytest.approx(audmetric.concordance_cc(truth[4:, 0], predicted[4:, 0]), abs=1e-6)
    assert values["ccc_dominance"] == pytest.approx(audmetric.concordance_cc(truth[:, 1], predicted[:, 1]), abs=1e-6)


def test_concordances_are_0_without_variance_and_nan_where_the_model_is_broken() -> None:
    constant, broken = np.full((9, 3), 0.1), np.full((9, 3), np.nan)
    assert set(concordances(constant, constant).values()) == {0.0}
    assert all(math.isnan(value) for value in concordances(np.eye(9, 3), broken).values())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_values_that_floats_cannot_square_give_none_and_never_nan(scale: float) -> None:
    values = [scale, 2 * scale, 4 * scale]
    metrics = dimension_metrics({"valence": values}, {"valence": values[::-1]})["valence"]
    assert metrics["ccc"] is None and metrics["pearson"] is None
    assert metrics["rmse"] is None or math.isfinite(metrics["rmse"])


def test_the_calibration_error_agrees_with_the_naive_formula() -> None:
    rng = np.random.default_rng(3)
    rows = rng.dirichlet(np.full(5, 0.5), 300)
    labels = rng.integers(0, 5, 300)
    names = [EMOTIONS[index] for index in labels]
    metrics = calibration_metrics(names, [dict(zip(EMOTIONS, row.tolist(), strict=True)) for row in rows], EMOTIONS)
    confidence, right = rows.max(axis=1), rows.argmax(axis=1) == labels
    expected = 0.0
    for index in range(15):
        members = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        assert metrics["bins"][index]["num_clips"] == members.sum()
        if members.any():
            assert metrics["bins"][index]["accuracy"] == pytest.approx(right[members].mean(), abs=1e-12)
            expected += members.mean() * abs(right[members].mean() - confidence[members].mean())
    assert metrics["ece"] == pytest.approx(expected, abs=1e-12)
    assert metrics["num_clips"] == sum(one["num_clips"] for one in metrics["bins"]) == 300


def test_calibration_of_one_clip_ties_and_certainty() -> None:
    names = ["sad", "happy"]
    assert calibration_metrics(["sad"], [{"sad": 1.0, "happy": 0.0}], names)["ece"] == 0.0
    assert calibration_metrics(["happy"], [{"sad": 1.0, "happy": 0.0}], names)["ece"] == 1.0
    tie = calibration_metrics(["sad"], [{"sad": 0.5, "happy": 0.5}], names)
    assert tie["ece"] == 0.5  # the first of the equals
    assert (tie["bins"][0]["confidence"], tie["bins"][0]["accuracy"]) == (None, None)
    edge = calibration_metrics(["sad"], [{"sad": 0.8, "happy": 0.2}], names)["bins"][11]
    assert edge["upper"] == 0.8 and edge["num_clips"] == 1  # which belongs to the lower bin


@pytest.mark.parametrize(
    ("labels", "row", "message"),
    [
        ([], None, "no clips"),
        (["sad"], {"sad": float("nan"), "happy": 0.5}, "output is broken"),
        (["sad"], {"sad": 0.5, "happy": 0.1}, "sum to 1"),
        (["sad"], {"sad": 1.5, "happy": -0.5}, "sum to 1"),
        (["sad"], {"sad": 1.0}, "has probabilities for"),
        (["bored"], {"sad": 0.5, "happy": 0.5}, "label at position 0 is 'bored'"),
        (["sad", "sad"], {"sad": 0.5, "happy": 0.5}, "2 labels and 1 rows"),
    ],
)
def test_calibration_refuses_what_it_cannot_count(labels: list[str], row: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_metrics(labels, [] if row is None else [row], ["sad", "happy"])


def test_votes_are_held_against_every_rater() -> None:
    names = ["neutral", "happy", "angry"]
    votes = [["neutral", "angry", "angry"], ["happy"], ["other", "happy", "neutral"], ["neutral", "neutral"]]
    labels = ["angry", "happy", None, "neutral"]
    table = [[0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]
    probabilities = [dict(zip(names, row, strict=True)) for row in table]
    predictions = ["neutral", "happy", "angry", "neutral"]
    found = vote_metrics(votes, predictions, names, labels=labels, probabilities=probabilities)
    # The first is some rater's; the third nobody's, and its votes are equal: the first class of them is the truth.
    truth = ["neutral", "happy", "neutral", "neutral"]
    assert found["any_rater_macro_f1"] == pytest.approx(
        f1_score(truth, predictions, labels=names[:2], average="macro")
    )
    shares = [[1 / 3, 0, 2 / 3], [0, 1, 0], [0.5, 0.5, 0], [1, 0, 0]]
    expected = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(shares, table, strict=True)]
    assert found["jensen_shannon"] == pytest.approx(np.mean(expected))
    # Bins of 1/15: 0.6 alone (share 1/3), the two of 0.7 together (shares 1 and 0), 1.0 alone (share 1).
    assert found["ece"] == pytest.approx((abs(1 / 3 - 0.6) + 2 * abs(0.5 - 0.7) + 0) / 4)
    assert found["num_clips"] == 4
    only = vote_metrics(votes, [None, "happy", "angry", "neutral"], names, labels=labels)
    assert only["jensen_shannon"] is only["ece"] is None
    with pytest.raises(ValueError, match="votes at position 0 have none of"):
        vote_metrics([["other"]], ["happy"], names, labels=[None])


@pytest.mark.parametrize("package", ["sklearn.metrics", "audmetric", "scipy.special"])
def test_a_package_that_is_missing_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sure = [{"happy": 1.0, "sad": 0.0}]
    with pytest.raises(ImportError, match=rf"{package}.*pip install relllm\[eval\]`, or `relllm\[train\]"):
        dimension_metrics({"valence": [0.5]}, {"valence": [0.5]})
        vote_metrics([["happy"]], ["happy"], ["happy", "sad"], labels=["happy"], probabilities=sure)
    if package == "audmetric":
        with pytest.raises(ImportError, match=r"relllm\[train\]"):
            concordances(np.zeros((2, 3)), np.zeros((2, 3)))
