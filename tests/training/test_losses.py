"""The losses against naive formulas, SciPy and audmetric, and on input that has nothing to learn from."""

import math

import audmetric
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from relllm.training.alignment import Alignment, divergence
from relllm.training.losses import ccc_loss, dimension_loss, emotion_loss, response_kl

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
    assert loss.item() == pytest.approx(-np.mean([scores[0, 2], scores[2, 0], scores[3, 4]]), rel=1e-6)
    assert_finite_gradient(loss, logits)
    assert (logits.grad[1] == 0).all()


def test_emotion_loss_weighs_classes_by_their_mean_weight():
    logits, labels = torch.randn(4, 3), torch.tensor([2, 0, -100, 1])
    weights = torch.tensor([0.5, 2.0, 3.0])
    scores = log_softmax(logits.numpy(), axis=-1)
    expected = -(3 * scores[0, 2] + 0.5 * scores[1, 0] + 2 * scores[3, 1]) / 5.5
    assert emotion_loss(logits, labels, class_weights=weights).item() == pytest.approx(expected, rel=1e-6)


# Dimensions


def test_dimension_loss_counts_labelled_values_one_by_one():
    predicted = with_gradient(3, 3)
    target = torch.tensor([[0.1, NAN, 0.3], [NAN, NAN, NAN], [0.4, 0.5, 0.6]])
    differences = (predicted.detach().numpy() - target.numpy()) ** 2
    loss = dimension_loss(predicted, target)
    assert loss.item() == pytest.approx(np.nanmean(differences), rel=1e-6)
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
    num_items: int | Tensor | None = None,
) -> Tensor:
    """On logits of both branches, as the training forward sums it, and over its count or another."""
    alignment = Alignment(temperature, shifted)
    taught = text[alignment.positions(text_labels)]
    total = divergence(None, speech, speech_labels, text_labels, taught, alignment)
    return total / max(int(len(taught) if num_items is None else num_items), 1)


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


def losses_of_rows(rows: slice, num_items: dict[str, float] | None = None) -> dict[str, Tensor]:
    """Each loss on some rows of one fixed batch of six, partly unlabelled."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, 9, generator=generator)[rows]
    other = torch.randn(6, 4, 9, generator=generator)[rows]
    labels = torch.randint(0, 9, (6, 4), generator=generator)
    labels[0] = -100
    labels[1:3, :2] = -100
    emotions = torch.tensor([0, -100, 2, 3, -100, 1])[rows]
    target = torch.rand(6, 3, generator=generator)
    target[0, 1] = NAN
    target[4] = NAN
    items = num_items or {}
    labels, target, emotion_logits = labels[rows], target[rows], logits[:, 0, :4]
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    return {
        "emotion": emotion_loss(emotion_logits, emotions, num_items=items.get("emotion")),
        "weighted": emotion_loss(emotion_logits, emotions, class_weights=weights, num_items=items.get("weighted")),
        "dimension": dimension_loss(logits[:, 0, :3], target, items.get("dimension")),
        "kl": kl_as_trained(logits, other, labels, labels, num_items=items.get("kl")),
    }


@pytest.mark.parametrize("cuts", [[3], [1, 5], [2, 4]])
def test_micro_batches_with_the_whole_count_add_up_to_the_whole_batch(cuts: list[int]):
    counts = {"emotion": 4, "weighted": 1 + 0.5 + 1 + 2, "dimension": 14, "kl": 13}
    whole = losses_of_rows(slice(None))
    bounds = [0, *cuts, 6]
    parts = [losses_of_rows(slice(a, b), counts) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, torch.tensor(0), torch.tensor(0.0), 5])
def test_nothing_labelled_gives_zero_with_a_gradient(num_items: Tensor | int | None):
    token_logits, class_logits, predicted = with_gradient(2, 3, 5), with_gradient(2, 5), with_gradient(2, 3)
    no_tokens, no_classes = torch.full((2, 3), -100), torch.full((2,), -100)
    weights = torch.rand(5)
    losses = [
        kl_as_trained(token_logits, torch.randn(2, 3, 5), no_tokens, no_tokens, num_items=num_items),
        emotion_loss(class_logits, no_classes, num_items=num_items),
        emotion_loss(class_logits, no_classes, class_weights=weights, num_items=num_items),
        dimension_loss(predicted, torch.full((2, 3), NAN), num_items),
        ccc_loss(predicted, torch.full((2, 3), NAN)),
    ]
    assert all(loss.item() == 0 and loss.shape == () for loss in losses)
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
