"""The losses against naive formulas, SciPy and audmetric, and on input that has nothing to learn from."""

import math
from pathlib import Path

import audmetric
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from tiny_models import tiny_model
from torch import Tensor
from transformers.utils import ModelOutput

from relllm import ReLLMSFTConfig
from relllm.training.alignment import Alignment, divergence
from relllm.training.losses import ccc_loss, dimension_loss, emotion_loss, response_kl, soft_emotion_loss
from relllm.training.objective import Objective

NAN = float("nan")


def with_gradient(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def assert_finite_gradient(loss: Tensor, *inputs: Tensor) -> None:
    loss.backward()
    for tensor in inputs:
        assert tensor.grad.isfinite().all()


# Emotion


def test_emotion_loss_ignores_unlabelled_clips():
    logits, labels = with_gradient(4, 5), torch.tensor([2, -100, 0, 4])
    scores = log_softmax(logits.detach().numpy(), axis=-1)
    loss = emotion_loss(logits, labels)
    assert loss.item() == pytest.approx(-np.sum([scores[0, 2], scores[2, 0], scores[3, 4]]), rel=1e-6)
    assert_finite_gradient(loss, logits)
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.5, 1.0, 2.0, 3.0])])
def test_the_loss_on_votes_is_torch_s_and_with_one_vote_that_of_the_label(weights: Tensor | None):
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    votes = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0.2, 0.2, 0.2, 0.2, 0.2], [0, 0, 0, 0, 1]])
    expected = torch.nn.functional.cross_entropy(logits, votes, weight=weights, reduction="sum")
    torch.testing.assert_close(soft_emotion_loss(logits, votes, weights), expected)
    labels = torch.tensor([3, -100, 0, 4])
    shares = torch.zeros(4, 5)
    shares[[0, 2, 3], [3, 0, 4]] = 1.0
    torch.testing.assert_close(soft_emotion_loss(logits, shares, weights), emotion_loss(logits, labels, weights))


def test_emotion_loss_weighs_classes():
    logits, labels = torch.randn(4, 3), torch.tensor([2, 0, -100, 1])
    weights = torch.tensor([0.5, 2.0, 3.0])
    scores = log_softmax(logits.numpy(), axis=-1)
    expected = -(3 * scores[0, 2] + 0.5 * scores[1, 0] + 2 * scores[3, 1])
    assert emotion_loss(logits, labels, class_weights=weights).item() == pytest.approx(expected, rel=1e-6)


# Dimensions


def test_dimension_loss_counts_labelled_values_one_by_one():
    predicted = with_gradient(3, 3)
    target = torch.tensor([[0.1, NAN, 0.3], [NAN, NAN, NAN], [0.4, 0.5, 0.6]])
    differences = (predicted.detach().numpy() - target.numpy()) ** 2
    loss = dimension_loss(predicted, target)
    assert loss.item() == pytest.approx(np.nansum(differences), rel=1e-6)
    assert_finite_gradient(loss, predicted)
    assert (predicted.grad[1] == 0).all() and predicted.grad[0, 1] == 0 and predicted.grad[0, 0] != 0


def test_ccc_loss_is_one_minus_audmetrics_concordance():
    predicted, target = with_gradient(20, 3), torch.rand(20, 3)
    loss = ccc_loss(predicted, target)
    columns = zip(target.T.numpy(), predicted.detach().T.numpy(), strict=True)
    expected = 1 - np.mean([audmetric.concordance_cc(truth, guess) for truth, guess in columns])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert_finite_gradient(loss, predicted)


def test_ccc_loss_leaves_out_what_is_not_labelled():
    predicted, target = with_gradient(6, 3), torch.rand(6, 3)
    target[:2, 0] = NAN
    target[1:, 1] = NAN  # one label: no concordance
    truth, guess = target.numpy(), predicted.detach().numpy()
    expected = [
        audmetric.concordance_cc(truth[2:, 0], guess[2:, 0]),
        audmetric.concordance_cc(truth[:, 2], guess[:, 2]),
    ]
    loss = ccc_loss(predicted, target)
    assert loss.item() == pytest.approx(1 - np.mean(expected), rel=1e-4)
    assert_finite_gradient(loss, predicted)
    assert (predicted.grad[:, 1] == 0).all()


@pytest.mark.parametrize("predicted_value", [0.5, 0.2])
def test_ccc_loss_of_constants_is_one_and_finite(predicted_value: float):
    predicted = torch.full((4, 3), predicted_value, requires_grad=True)
    loss = ccc_loss(predicted, torch.full((4, 3), 0.5))
    assert loss.item() == 1
    assert_finite_gradient(loss, predicted)


def test_ccc_loss_of_no_two_labels_is_zero_whatever_is_predicted_without_one():
    predicted = with_gradient(2, 3)
    masked = torch.where(torch.tensor([True, False, True]), predicted, NAN)  # of a tower not trained to dominance
    loss = ccc_loss(masked, torch.tensor([[0.5, NAN, NAN], [NAN, NAN, 0.5]]))
    assert loss.item() == 0
    assert_finite_gradient(loss, predicted)


@pytest.mark.parametrize("sign, expected", [(1, 0.0), (-1, 2.0)])
def test_ccc_loss_spans_agreement_to_opposition(sign: int, expected: float):
    values = torch.linspace(-1, 1, 9)[:, None].expand(-1, 3)
    assert ccc_loss(sign * values, values).item() == pytest.approx(expected, abs=1e-6)


# KL


def kl_as_trained(
    speech: Tensor,
    text: Tensor,
    speech_labels: Tensor,
    text_labels: Tensor,
    *,
    temperature: float = 2.0,
    shifted: bool = True,
) -> Tensor:
    """On logits of both branches, as the training forward sums it, over its count."""
    alignment = Alignment(temperature, shifted)
    taught = text[alignment.positions(text_labels)]
    total = divergence(None, speech, speech_labels, text_labels, taught, alignment)
    return total / len(taught)


def naive_kl(text_rows: list[np.ndarray], speech_rows: list[np.ndarray], temperature: float) -> float:
    pairs = zip(text_rows, speech_rows, strict=True)
    return np.mean(
        [rel_entr(softmax(text / temperature), softmax(speech / temperature)).sum() for text, speech in pairs]
    )


@pytest.mark.parametrize("shifted", [True, False])
def test_response_kl_compares_the_stated_positions(shifted: bool):
    speech, text = with_gradient(2, 6, 5), with_gradient(2, 4, 5)
    speech_labels = torch.tensor([[-100, -100, -100, 1, 2, 3], [-100, -100, 4, 4, -100, -100]])
    text_labels = torch.tensor([[-100, 1, 2, 3], [-100, 4, 4, -100]])
    late = 1 if shifted else 0
    speech_rows = [(0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]
    text_rows = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    expected = naive_kl(
        [text[b, t - late].detach().numpy() for b, t in text_rows],
        [speech[b, t - late].detach().numpy() for b, t in speech_rows],
        temperature=3.0,
    )
    loss = kl_as_trained(speech, text, speech_labels, text_labels, temperature=3.0, shifted=shifted)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert_finite_gradient(loss, speech)
    assert text.grad is None


def test_response_kl_of_equal_logits_is_zero():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, 1, 2, 3], [-100, -100, 4, 4]])
    assert kl_as_trained(logits, logits.clone(), labels, labels).item() == pytest.approx(0, abs=1e-6)


def test_response_kl_with_masked_out_tokens_is_finite():
    speech, labels = with_gradient(1, 3, 4), torch.tensor([[-100, 1, 2]])
    text = torch.randn(1, 3, 4)
    text[..., 0] = -math.inf  # a token that the LLM rules out has probability 0 in the teacher
    loss = kl_as_trained(speech, text, labels, labels)
    assert loss.isfinite()
    assert_finite_gradient(loss, speech)


def test_response_kl_refuses_different_replies():
    labels, shorter = torch.tensor([[-100, 1, 2, 3]]), torch.tensor([[-100, 1, 2, -100]])
    with pytest.raises(ValueError, match="speech 3, text 2"):
        kl_as_trained(torch.randn(1, 4, 5), torch.randn(1, 4, 5), labels, shorter)


# What all share


CLASS_WEIGHTS = [1.0, 2.0, 0.5, 1.0, 3.0]


def objective_of(folder: Path, **settings: object) -> Objective:
    options = {"use_cpu": True, "report_to": "none", "response_kl_weight": 1.0, **settings}
    return Objective(ReLLMSFTConfig(output_dir=str(folder), **options), tiny_model())


def batch_of(rows: slice) -> tuple[ModelOutput, dict[str, Tensor]]:
    """Some rows of one fixed batch of six, partly unlabelled: what a training pass returns, and the labels."""
    generator = torch.Generator().manual_seed(1)
    speech, text = (torch.randn(6, 4, 9, generator=generator)[rows] for _ in range(2))
    labels = torch.randint(0, 9, (6, 4), generator=generator)
    labels[0] = -100
    labels[1:3, :2] = -100
    emotions = torch.tensor([0, -100, 2, 3, -100, 1])[rows]
    target = torch.rand(6, 3, generator=generator)
    target[0, 1] = NAN
    target[4] = NAN
    labels, target = labels[rows], target[rows]
    how = Alignment(2.0, True)
    kl = divergence(None, speech, labels, labels, text[how.positions(labels)], how)
    output = ModelOutput(emotion_logits=speech[:, 0, :5], dimensions=speech[:, 0, :3], response_kl=kl)
    targets = {"emotion_labels": emotions, "dimension_labels": target, "labels": labels, "teacher_labels": labels}
    return output, targets


def values_of(objective: Objective, rows: slice, num_items: Tensor | None = None) -> dict[str, Tensor]:
    output, batch = batch_of(rows)
    counts = objective.count(batch)
    terms = objective.terms(output, batch, counts, counts if num_items is None else num_items)
    return {term.name: term.value for term in terms}


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_the_objective_means_over_what_is_labelled(tmp_path: Path, class_weights: list[float] | None):
    objective = objective_of(tmp_path, emotion_class_weights=class_weights)
    output, batch = batch_of(slice(None))
    weights = None if class_weights is None else torch.tensor(class_weights)
    emotion = torch.nn.functional.cross_entropy(output.emotion_logits, batch["emotion_labels"], weight=weights)
    values = values_of(objective, slice(None))
    assert values["emotion_loss"].item() == pytest.approx(emotion.item(), rel=1e-6)
    squared = (output.dimensions - batch["dimension_labels"]) ** 2
    assert values["dimension_loss"].item() == pytest.approx(squared.nanmean().item(), rel=1e-6)
    assert values["response_kl"].item() == pytest.approx(output.response_kl.item() / 13, rel=1e-6)
    counts = objective.count({"tower_outputs": None, **batch}).tolist()  # which is no tensor
    assert counts == [4 if class_weights is None else 1 + 0.5 + 1 + 2, 14, 13]


@pytest.mark.parametrize("cuts", [[3], [1, 5], [2, 4]])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_micro_batches_with_the_whole_count_add_up_to_the_whole_batch(tmp_path: Path, class_weights, cuts: list[int]):
    objective = objective_of(tmp_path, emotion_class_weights=class_weights)
    whole, counts = values_of(objective, slice(None)), objective.count(batch_of(slice(None))[1])
    bounds = [0, *cuts, 6]
    parts = [values_of(objective, slice(a, b), counts) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert whole.keys() == {"emotion_loss", "dimension_loss", "response_kl"}
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, torch.tensor([5.0, 5.0, 5.0])])
@pytest.mark.parametrize("settings", [{}, {"emotion_class_weights": CLASS_WEIGHTS}, {"dimension_loss": "ccc"}])
def test_nothing_labelled_gives_zero_with_a_gradient(tmp_path: Path, settings: dict, num_items: Tensor | None):
    token_logits, class_logits, predicted = with_gradient(2, 3, 5), with_gradient(2, 5), with_gradient(2, 3)
    no_tokens = torch.full((2, 3), -100)
    kl = divergence(None, token_logits, no_tokens, no_tokens, torch.randn(0, 5), Alignment(2.0, True))
    output = ModelOutput(emotion_logits=class_logits, dimensions=predicted, response_kl=kl)
    batch = {"emotion_labels": torch.full((2,), -100), "dimension_labels": torch.full((2, 3), NAN)}
    batch |= {"labels": no_tokens, "teacher_labels": no_tokens}
    objective = objective_of(tmp_path, **settings)
    counts = objective.count(batch)
    losses = [
        term.value for term in objective.terms(output, batch, counts, counts if num_items is None else num_items)
    ]
    assert len(losses) == 3 and all(loss.item() == 0 and loss.shape == () for loss in losses)
    assert_finite_gradient(sum(losses), token_logits, class_logits, predicted)


def test_a_prediction_that_is_not_a_number_is_not_hidden():
    predicted = torch.tensor([[NAN, 0.5, 0.5]])
    assert dimension_loss(predicted, torch.full((1, 3), 0.5)).isnan()


def test_half_precision_is_scored_in_float32():
    logits, other, labels = torch.randn(9, 300).bfloat16(), torch.randn(9, 300).bfloat16(), torch.randint(0, 300, (9,))
    target = torch.rand(9, 300)
    for loss, precise in (
        (emotion_loss(logits, labels), emotion_loss(logits.float(), labels)),
        (dimension_loss(logits, target), dimension_loss(logits.float(), target)),
        (ccc_loss(logits, target), ccc_loss(logits.float(), target)),
        (response_kl(logits, other, 2.0), response_kl(logits.float(), other.float(), 2.0)),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, precise)
