"""The losses of RE-LLM beside the reply's cross-entropy, which TRL computes, as pure functions of tensors.

All compute in float32 and return a zero with a gradient where nothing is labelled. All but the concordance are sums:
those of micro-batches add up, over the count of the whole accumulated batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
VARIANCE_FLOOR = 1e-8  # keeps the concordance of two equal constants finite


def emotion_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of the emotion, summed over clips (RE-LLM; `input_er` in the original code).

    `logits` are `(clips, classes)`, `labels` `(clips,)` with -100 where unlabelled, `class_weights` `(classes,)`.
    """
    weights = None if class_weights is None else class_weights.to(logits.device, torch.float32)
    return functional.cross_entropy(logits.float(), labels, weight=weights, ignore_index=IGNORE_INDEX, reduction="sum")


def soft_emotion_loss(logits: Tensor, votes: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of the emotion against what raters said, summed over clips.

    Both are `(clips, classes)`; `votes` are shares that sum to 1, or 0 where nobody voted.
    """
    weights = 1.0 if class_weights is None else class_weights.to(logits.device, torch.float32)
    return -(weights * votes * functional.log_softmax(logits.float(), dim=-1)).sum()


def dimension_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the squared errors of the emotion dimensions, summed (RE-LLM; `input_er_avd` in the original code).

    Both are `(clips, 3)`, in the order of `DIMENSIONS`; targets are in [0, 1], or NaN, each value by itself.
    """
    labelled = ~target.isnan()
    return ((predicted.float() - target.float().nan_to_num()) * labelled).square().sum()


def ccc_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return 1 - concordance correlation (Lin, 1989; population variances), averaged over the dimensions, in [0, 2].

    Both are `(clips, 3)`; targets are NaN where unlabelled, and a dimension with fewer than two labelled clips counts
    for nothing. A concordance is of one batch as a whole: with small micro-batches prefer [`dimension_loss`].
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
    return torch.stack(losses).mean() if losses else predicted[:0].float().sum()


def response_kl(speech: Tensor, text: Tensor, temperature: float) -> Tensor:
    """Return KL(text ‖ speech) (BLSP-Emo) in nats, summed over positions; no gradient to the text's branch.

    Both are logits, `(positions, vocabulary)`, which the temperature divides; no factor of its square, as there.
    """
    log_speech = functional.log_softmax(speech.float() / temperature, dim=-1)
    text = functional.softmax(text.float().detach() / temperature, dim=-1)
    return functional.kl_div(log_speech, text, reduction="sum")
