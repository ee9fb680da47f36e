"""The losses of RE-LLM beside the reply's cross-entropy, which TRL computes, as pure functions of tensors.

Every function computes in float32 (the original summed its total in bfloat16) and returns a zero with a gradient where
nothing is labelled. Means take `num_items`: with the count of the whole accumulated batch, the sum over micro-batches
equals the mean over that batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
VARIANCE_FLOOR = 1e-8  # keeps the concordance of two equal constants finite


def emotion_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of the emotion, in nats a clip (RE-LLM; `input_er` in the original code).

    Args:
        logits (`torch.Tensor` of shape `(clips, classes)`): Of the emotion head.
        labels (`torch.LongTensor` of shape `(clips,)`): Class indices; -100 where unlabelled.
        class_weights (`torch.Tensor` of shape `(classes,)`, *optional*): Weight of each class.
        num_items (`int`, `float` or `torch.Tensor`, *optional*): Divides the sum; by default the labelled clips, or
            with `class_weights` the sum of their weights, as in `torch.nn.functional.cross_entropy`.
    """
    counted = labels != IGNORE_INDEX
    targets = labels[counted]
    weights = None if class_weights is None else class_weights.to(logits.device, torch.float32)
    total = functional.cross_entropy(logits[counted].float(), targets, weight=weights, reduction="sum")
    own_count = counted.sum() if weights is None else weights[targets].sum()
    return _mean(total, own_count, num_items)


def dimension_loss(predicted: Tensor, target: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Return the mean squared error over the emotion dimensions (RE-LLM; `input_er_avd` in the original code).

    Args:
        predicted (`torch.Tensor` of shape `(clips, 3)`): In the order of `DIMENSIONS`.
        target (`torch.Tensor` of shape `(clips, 3)`): Values in [0, 1]; NaN where unlabelled, each value by itself.
        num_items (`int` or `torch.Tensor`, *optional*): Divides the sum; by default the labelled values.
    """
    labelled = ~target.isnan()
    total = (predicted[labelled].float() - target[labelled].float()).square().sum()
    return _mean(total, labelled.sum(), num_items)


def ccc_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 - concordance correlation (Lin, 1989; population variances), averaged over the dimensions.

    It lies between 0 (equal) and 2. A concordance is of one batch as a whole and no sum over clips, so there is no
    `num_items`: with small micro-batches prefer [`dimension_loss`].

    Args:
        predicted (`torch.Tensor` of shape `(clips, 3)`): In the order of `DIMENSIONS`.
        target (`torch.Tensor` of shape `(clips, 3)`): NaN where unlabelled; a dimension with fewer than two labelled
            clips counts for nothing.
    """
    losses = []
    for x, y in zip(predicted.float().unbind(1), target.float().unbind(1), strict=True):
        labelled = ~y.isnan()
        if labelled.sum() < 2:
            continue
        x, y = x[labelled], y[labelled]
        dx, dy = x - x.mean(), y - y.mean()
        scale = dx.square().mean() + dy.square().mean() + (x.mean() - y.mean()).square()
        losses.append(1 - 2 * (dx * dy).mean() / scale.clamp(min=VARIANCE_FLOOR))
    return torch.stack(losses).mean() if losses else predicted.float().sum() * 0


def response_kl(speech: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Return KL(text ‖ speech), in nats, summed over positions: the LLM is to say after hearing what it says after
    reading (BLSP-Emo). As there, no factor of temperature squared; no gradient to the text's branch.

    Args:
        speech, text (`torch.Tensor` of shape `(positions, vocabulary)`): Logits of the branch that hears, and of the
            one that reads the transcript.
        temperature (`float`): Divides both.

    Raises:
        ValueError: If the branches have different numbers of positions.
    """
    if len(speech) != len(text):
        raise ValueError(
            f"The branches mark different numbers of positions: speech {len(speech)}, text {len(text)}. Both must "
            "hold the same reply."
        )
    log_speech = functional.log_softmax(speech.float() / temperature, dim=-1)
    text = functional.softmax(text.float().detach() / temperature, dim=-1)
    return functional.kl_div(log_speech, text, reduction="sum")


def _mean(total: Tensor, own_count: Tensor, num_items: int | float | Tensor | None) -> Tensor:
    """Return `total` over `num_items` or its own count; over 1 where that is zero, and so is the total."""
    count = own_count if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / torch.where(count == 0, torch.ones_like(count), count)
