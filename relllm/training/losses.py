"""The losses of RE-LLM as pure functions of tensors.

What lives here: the response's cross-entropy, the two auxiliary losses of RE-LLM, the alignment loss of its parent,
BLSP-Emo (KL against the same LLM reading the transcript). What does not: their weights, which are settings of a run.

Every function computes in float32 (the original summed its total in bfloat16) and returns a zero with a gradient where
nothing is labelled. Means take `num_items`: with the count of the whole accumulated batch, the sum over micro-batches
equals the mean over that batch.
"""

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
VARIANCE_FLOOR = 1e-8  # keeps the concordance of two equal constants finite


def response_cross_entropy(logits: Tensor, labels: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token, over the tokens of the reply (`response_ce` in the original code).

    Args:
        logits (`torch.Tensor` of shape `(batch, sequence, vocabulary)`): Position t scores the token at t + 1.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): Token ids, not shifted; -100 outside the reply.
        num_items (`int` or `torch.Tensor`, *optional*): Divides the sum; by default the tokens counted here.

    Returns:
        `torch.Tensor` of shape `()`: In nats a token.
    """
    targets = labels[:, 1:].flatten()
    counted = targets != IGNORE_INDEX
    rows = logits[:, :-1].flatten(0, 1)[counted].float()
    total = functional.cross_entropy(rows, targets[counted], reduction="sum")
    return _mean(total, counted.sum(), num_items)


def emotion_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the emotion (RE-LLM's auxiliary loss; `input_er` in the original code).

    Args:
        logits (`torch.Tensor` of shape `(clips, classes)`): Of the emotion head.
        labels (`torch.LongTensor` of shape `(clips,)`): Class indices; -100 where unlabelled.
        class_weights (`torch.Tensor` of shape `(classes,)`, *optional*): Weight of each class.
        num_items (`int`, `float` or `torch.Tensor`, *optional*): Divides the sum; by default the labelled clips, or
            with `class_weights` the sum of their weights, as in `torch.nn.functional.cross_entropy`.

    Returns:
        `torch.Tensor` of shape `()`: In nats a clip.
    """
    counted = labels != IGNORE_INDEX
    targets = labels[counted]
    weights = None if class_weights is None else class_weights.to(logits.device, torch.float32)
    total = functional.cross_entropy(logits[counted].float(), targets, weight=weights, reduction="sum")
    own_count = counted.sum() if weights is None else weights[targets].sum()
    return _mean(total, own_count, num_items)


def dimension_loss(predicted: Tensor, target: Tensor, num_items: int | Tensor | None = None) -> Tensor:
    """Mean squared error over the emotion dimensions (RE-LLM's auxiliary loss; `input_er_avd` in its code).

    Args:
        predicted (`torch.Tensor` of shape `(clips, 3)`): In the order of `DIMENSIONS`.
        target (`torch.Tensor` of shape `(clips, 3)`): Values in [0, 1]; NaN where unlabelled, each value by itself.
        num_items (`int` or `torch.Tensor`, *optional*): Divides the sum; by default the labelled values.

    Returns:
        `torch.Tensor` of shape `()`: Squared units of the labels.
    """
    labelled = ~target.isnan()
    total = (predicted[labelled].float() - target[labelled].float()).square().sum()
    return _mean(total, labelled.sum(), num_items)


def ccc_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - concordance correlation coefficient (Lin, 1989), averaged over the dimensions; of one batch as a whole.

    A concordance is no sum over clips, so there is no `num_items`: with small micro-batches prefer [`dimension_loss`].

    Args:
        predicted (`torch.Tensor` of shape `(clips, 3)`): In the order of `DIMENSIONS`.
        target (`torch.Tensor` of shape `(clips, 3)`): NaN where unlabelled; a dimension with fewer than two labelled
            clips counts for nothing.

    Returns:
        `torch.Tensor` of shape `()`: Between 0 (equal) and 2.
    """
    losses = []
    for x, y in zip(predicted.float().unbind(1), target.float().unbind(1), strict=True):
        labelled = ~y.isnan()
        if labelled.sum() >= 2:
            losses.append(1 - concordance(x[labelled], y[labelled]))
    return torch.stack(losses).mean() if losses else predicted.float().sum() * 0


def response_kl(
    speech_logits: Tensor,
    text_logits: Tensor,
    speech_labels: Tensor,
    text_labels: Tensor,
    *,
    temperature: float = 2.0,
    shifted: bool = True,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """KL(text ‖ speech) over the reply: the LLM is to say after hearing what it says after reading (BLSP-Emo).

    No factor of temperature squared, as in the original. Unlike the original, whose positions are one late (those that
    hold a reply token, the last of which predicts nothing of it), the positions compared are those that predict one.

    Args:
        speech_logits (`torch.Tensor` of shape `(batch, S, vocabulary)`): Of the branch that hears; gets the gradient.
        text_logits (`torch.Tensor` of shape `(batch, T, vocabulary)`): Of the branch that reads the transcript.
        speech_labels (`torch.LongTensor` of shape `(batch, S)`): -100 outside the reply.
        text_labels (`torch.LongTensor` of shape `(batch, T)`): Likewise, with the same reply in each row.
        temperature (`float`, *optional*, defaults to 2.0): Divides both logits; the original's value.
        shifted (`bool`, *optional*, defaults to `True`): `False` reproduces the original's positions.
        num_items (`int` or `torch.Tensor`, *optional*): Divides the sum; by default the positions compared.

    Returns:
        `torch.Tensor` of shape `()`: In nats a position.

    Raises:
        ValueError: If a row's reply differs in length between the branches.
    """
    speech_mask, text_mask = reply_positions(speech_labels, shifted), reply_positions(text_labels, shifted)
    if not torch.equal(speech_mask.sum(1), text_mask.sum(1)):
        raise ValueError(
            f"The branches mark different numbers of positions: speech {speech_mask.sum(1).tolist()}, text "
            f"{text_mask.sum(1).tolist()}. Both must hold the same reply."
        )
    total = kl_sum(speech_logits[speech_mask], text_logits[text_mask], temperature)
    return _mean(total, speech_mask.sum(), num_items)


def kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student), summed over positions; no gradient to the teacher.

    Args:
        student, teacher (`torch.Tensor` of shape `(positions, vocabulary)`): Logits.
        temperature (`float`): Divides both.

    Returns:
        `torch.Tensor` of shape `()`: In nats.
    """
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    teacher = functional.softmax(teacher.float().detach() / temperature, dim=-1)
    return functional.kl_div(log_student, teacher, reduction="sum")


def reply_positions(labels: Tensor, shifted: bool) -> Tensor:
    """Where a KL over the reply compares: `(batch, sequence)`, True at the positions that predict a reply's token.

    Args:
        labels (`torch.LongTensor` of shape `(batch, sequence)`): -100 outside the reply.
        shifted (`bool`): `False` marks the positions that hold the reply instead, as the original code does.
    """
    is_reply = labels != IGNORE_INDEX
    return functional.pad(is_reply[:, 1:], (0, 1)) if shifted else is_reply


def concordance(x: Tensor, y: Tensor) -> Tensor:
    """Lin's concordance correlation coefficient of two vectors, with population variances."""
    dx, dy = x - x.mean(), y - y.mean()
    scale = dx.square().mean() + dy.square().mean() + (x.mean() - y.mean()).square()
    return 2 * (dx * dy).mean() / scale.clamp(min=VARIANCE_FLOOR)


def _mean(total: Tensor, own_count: Tensor, num_items: int | float | Tensor | None) -> Tensor:
    """`total` over `num_items` or over its own count; over 1 where that is zero, and so is the total."""
    count = own_count if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / torch.where(count == 0, torch.ones_like(count), count)


__all__ = [
    "IGNORE_INDEX",
    "ccc_loss",
    "concordance",
    "dimension_loss",
    "emotion_loss",
    "kl_sum",
    "reply_positions",
    "response_cross_entropy",
    "response_kl",
]
