"""The projector from tower frames to LLM positions (BLSP-Emo's `modeling_adapter.py`), and their place in the text.

No shape depends on a value: an accelerator never waits for the host, and the pass compiles as one graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from .audio_tower_relllm import count_frames, frame_mask
from .configuration_relllm import ReLLMConfig
from .releases_relllm import padding_mask


@dataclass
class ProjectorOutput:
    """
    Args:
        hidden_states (`torch.Tensor` of shape `(clips, L, d)`): Positions for the LLM, padded on the right.
        lengths (`torch.LongTensor` of shape `(clips,)`): Positions of each clip, at least 1.
    """

    hidden_states: Tensor
    lengths: Tensor


def count_projected(config: ReLLMConfig, frames: Tensor) -> Tensor:
    """Count the positions that the projector makes of these frames: floor((L - 1)/2 + 1) a convolution."""
    for _ in config.projector_kernel_sizes:
        frames = (frames - 1) // 2 + 1
    return frames


def count_positions(
    config: ReLLMConfig, inputs: Tensor | None, mask: Tensor | None, frames: Tensor | None = None
) -> Tensor:
    """Count, `()`, the positions of speech inputs and their mask, or of the `frames` that a tower has made of them."""
    if frames is None:
        assert inputs is not None
        lengths = mask.sum(-1) if mask is not None else torch.full(inputs.shape[:1], inputs.shape[-1])
        frames = count_frames(config.audio_config, lengths)
    return (count_projected(config, frames) + (config.emotion_fusion == "token")).sum()


class ConvProjector(nn.Module):
    """Stride-2 convolutions with GLU, then x + W2·f(W1·x) and a LayerNorm; f is a GELU or transformer layers."""

    def __init__(self, config: ReLLMConfig):
        super().__init__()
        self.config = config
        width, out = config.projector_input_size, config.text_config.hidden_size
        last = len(config.projector_kernel_sizes) - 1
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(width, 2 * out if i == last else 2 * width, size, stride=2, padding=size // 2)
            for i, size in enumerate(config.projector_kernel_sizes)
        )
        self.fc1 = nn.Linear(out, config.projector_inner_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_inner_dim, out, bias=False)
        layer_config = WhisperConfig(  # pre-norm, as in the original code
            d_model=config.projector_inner_dim,
            encoder_attention_heads=config.projector_heads,
            encoder_ffn_dim=config.projector_ffn_dim,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(WhisperEncoderLayer(layer_config) for _ in range(config.projector_layers))
        self.layer_norm = nn.LayerNorm(out, eps=1e-5)

    def forward(self, frames: Tensor, lengths: Tensor) -> ProjectorOutput:
        """
        Args:
            frames (`torch.Tensor` of shape `(clips, T, width)`): Tower frames, fused with the emotion embedding.
            lengths (`torch.LongTensor` of shape `(clips,)`): Frames that belong to each clip.
        """
        hidden = frames.transpose(1, 2)
        for conv in self.conv_layers:
            if self.config.projector_masking:  # zeros past the end, as a lone clip has them from the convolution
                hidden = hidden * frame_mask(lengths, hidden.shape[-1])[:, None].to(hidden)
            if hidden.shape[-1] == 1:  # of one frame oneDNN leaves parts of a bfloat16 weight gradient unwritten
                hidden = nn.functional.pad(hidden, (0, 1))  # one of the convolution's own zeros: the length stays 1
            hidden = nn.functional.glu(conv(hidden), dim=1)
            lengths = (lengths - 1) // 2 + 1
        hidden = hidden.transpose(1, 2)
        inner = self.fc1(hidden)
        if not self.layers:
            inner = nn.functional.gelu(inner)
        mask = None
        if self.layers and self.config.projector_masking:
            valid = frame_mask(lengths, inner.shape[1])
            attention_config = self.layers[0].self_attn.config
            mask = padding_mask(attention_config, inner, valid)
        for layer in self.layers:
            inner = layer(inner, mask)
        return ProjectorOutput(self.layer_norm(hidden + self.fc2(inner)), lengths)


def place_positions(
    inputs_embeds: Tensor,
    audio_mask: Tensor,
    positions: Tensor,
    lengths: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Put the k-th valid position at the k-th placeholder, row after row; return `(batch, sequence, d)`.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch, sequence, d)`): Embeddings of the text.
        audio_mask (`torch.BoolTensor` of shape `(batch, sequence)`): True at the placeholders.
        positions (`torch.Tensor`): `(windows, L, d)`, padded on the right, or `(tokens, d)` without padding.
        lengths (`torch.LongTensor` of shape `(windows,)`, *optional*): Valid positions of each window, as many in all
            as there are placeholders; see [`check_counts`].
        places (`torch.LongTensor` of shape `(placeholders,)`, *optional*): The placeholders in `batch * sequence`.
    """
    audio_mask = audio_mask.to(inputs_embeds.device)  # each of these may come from another device
    lengths = None if lengths is None else lengths.to(inputs_embeds.device)
    count = torch.tensor(positions.shape[0], device=audio_mask.device) if lengths is None else lengths.sum()
    # Packed positions have been waited for. Others are counted before a tower runs, but for a training's: the collator
    # has counted these, and waiting for the queue here would cost a step.
    check_counts(audio_mask, count, waits=lengths is None and places is None and not torch.is_grad_enabled())
    flat = positions.flatten(0, -2).to(inputs_embeds)
    if len(flat) == 0:
        return inputs_embeds
    if places is not None:
        places = places.to(inputs_embeds.device)
        _check_places(audio_mask.flatten(), places)
        if lengths is not None:
            padding = ~frame_mask(lengths, positions.shape[1]).flatten()
            flat = flat.index_select(0, padding.argsort(stable=True)[: len(places)])
        return inputs_embeds.flatten(0, 1).index_copy(0, places, flat).view_as(inputs_embeds)
    source = (audio_mask.flatten().cumsum(0) - 1).clamp(min=0, max=len(flat) - 1)  # (batch * sequence,)
    if lengths is not None:
        padding = ~frame_mask(lengths, positions.shape[1]).flatten()
        source = padding.argsort(stable=True)[source]  # valid positions first, in their order
    placed = flat.index_select(0, source).view_as(inputs_embeds)
    return torch.where(audio_mask.unsqueeze(-1), placed, inputs_embeds)


def check_counts(audio_mask: Tensor, positions: Tensor, *, waits: bool) -> None:
    """Raise a `ValueError` if the number of placeholders is not that of audio positions `()`.

    On an accelerator the host `waits` for both, or else the check is an assertion of the device.
    """
    placeholders, positions = audio_mask.sum(), positions.to(audio_mask.device)
    if (waits or audio_mask.device.type == "cpu") and not torch.compiler.is_compiling():
        if placeholders != positions:
            raise ValueError(count_message(int(placeholders), int(positions)))
    else:
        torch._assert_async(placeholders == positions, "Audio placeholders and audio positions differ in number.")


def _check_places(audio_mask: Tensor, places: Tensor) -> None:
    """Raise a `ValueError` if these are not the placeholders, in order; an accelerator asserts all but the order."""
    right = (torch.zeros_like(audio_mask).index_fill_(0, places, True) == audio_mask).all()
    if audio_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        if not right or (places.diff() <= 0).any():
            raise ValueError(
                "audio_positions are not those of the placeholders in input_ids, in their order. Leave them out."
            )
    else:
        torch._assert_async(right, "audio_positions are not those of the placeholders.")


def count_message(placeholders: int, positions: int) -> str:
    """Return what the error says of numbers that differ."""
    return (
        f"The text has {placeholders} audio placeholder tokens and the audio makes {positions} positions. "
        "Let ReLLMProcessor make both, and do not truncate its output."
    )
