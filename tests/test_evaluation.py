"""Metrics against naive formulas, their degenerate cases, and plots that are written."""

from pathlib import Path

import numpy as np
import pytest

from relllm.evaluation.dimensions import dimension_metrics
from relllm.evaluation.plots import plot_confusion_matrix, plot_valence_arousal
from relllm.evaluation.recognition import recognition_metrics
from relllm.labels import EMOTIONS


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


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


def test_the_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    path = plot_confusion_matrix([[3, 0], [0, 0]], ["sad", "happy"], tmp_path / "new" / "matrix.png", title="UA")
    assert path == tmp_path / "new" / "matrix.png" and is_png(path)
    with pytest.raises(ValueError, match="Expected a 2 x 2 matrix"):
        plot_confusion_matrix([[1]], ["sad", "happy"], path)


def test_the_valence_arousal_plane_is_drawn(tmp_path: Path) -> None:
    path = plot_valence_arousal(
        [0.1, 0.9], [0.2, 0.8], [0.3, 1.4], [-0.2, 0.7], ["sad", "happy"], tmp_path / "plane.png"
    )
    assert is_png(path)
    with pytest.raises(ValueError, match="at least one clip"):
        plot_valence_arousal([], [], [], [], [], path)
    with pytest.raises(ValueError, match="same number of values"):
        plot_valence_arousal([0.1], [0.1, 0.2], [0.1], [0.1], ["sad"], path)
