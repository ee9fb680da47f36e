"""Projected positions into the LLM's sequence, without asking a device how many there are.

Nothing here has a shape that depends on a value, so that an accelerator never waits for the host, and the pass
compiles as one graph. What does not live here: where the placeholders are (`modeling_relllm.py`).
"""

import torch
from torch import Tensor

from .audio_tower_relllm import frame_mask


def place_positions(
    inputs_embeds: Tensor, audio_mask: Tensor, positions: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Put audio positions where the placeholders are: the k-th valid one at the k-th placeholder, row after row.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch, sequence, d)`): Embeddings of the text.
        audio_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at the placeholders.
        positions (`torch.Tensor`): `(windows, L, d)`, padded on the right, or `(tokens, d)` without padding.
        lengths (`torch.LongTensor` of shape `(windows,)`, *optional*): Valid positions of each window.

    Returns:
        `torch.Tensor` of shape `(batch, sequence, d)`.

    Raises:
        ValueError: If placeholders and valid positions differ in number, with both counts. On an accelerator the check
            runs there, as an assertion of the device, and the host does not wait for it.
    """
    count = torch.tensor(positions.shape[0], device=audio_mask.device) if lengths is None else lengths.sum()
    check_counts(audio_mask, count.to(audio_mask.device))
    flat = positions.flatten(0, -2).to(inputs_embeds.device, inputs_embeds.dtype)
    if len(flat) == 0:
        return inputs_embeds
    source = (audio_mask.flatten().cumsum(0) - 1).clamp(min=0, max=len(flat) - 1)  # (batch * sequence,)
    if lengths is not None:
        padding = ~frame_mask(lengths, positions.shape[1]).flatten()
        source = padding.argsort(stable=True).to(source.device)[source]  # valid positions first, in their order
    placed = flat.index_select(0, source).view_as(inputs_embeds)
    return torch.where(audio_mask.unsqueeze(-1), placed, inputs_embeds)


def check_counts(audio_mask: Tensor, positions: Tensor) -> None:
    """Holds the number of placeholders against that of audio positions; see [`place_positions`].

    Args:
        audio_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at the placeholders.
        positions (`torch.LongTensor` of shape `()`): Audio positions.
    """
    placeholders = audio_mask.sum()
    if audio_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if placeholders != positions:
            raise ValueError(count_message(int(placeholders), int(positions)))
    else:
        torch._assert_async(placeholders == positions, "Audio placeholders and audio positions differ in number.")


def count_message(placeholders: int, positions: int) -> str:
    """What the error says."""
    return (
        f"The text has {placeholders} audio placeholder tokens and the audio makes {positions} positions. "
        "Let ReLLMProcessor make both, and do not truncate its output."
    )


__all__ = ["check_counts", "count_message", "place_positions"]
