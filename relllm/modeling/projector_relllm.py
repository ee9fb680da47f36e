"""The projector from tower frames to LLM positions: the convolutional subsampler of RE-LLM and BLSP-Emo.

It returns padded positions with each clip's own count, and `place_positions` puts them into the LLM's sequence with no
shape that depends on a value: an accelerator never waits for the host, and the pass compiles as one graph. Source:
`modeling_adapter.py` of BLSP-Emo's code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from .audio_tower_relllm import frame_mask
from .configuration_relllm import ReLLMConfig


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
        self.layers = _encoder_layers(config, config.projector_inner_dim, config.projector_layers)
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
                hidden = hidden * frame_mask(lengths, hidden.shape[-1])[:, None].to(hidden.dtype)
            hidden = nn.functional.glu(conv(hidden), dim=1)
            lengths = (lengths - 1) // 2 + 1
        hidden = hidden.transpose(1, 2)
        inner = self.fc1(hidden)
        if self.layers:
            inner = _run_layers(self.layers, inner, lengths if self.config.projector_masking else None)
        else:
            inner = nn.functional.gelu(inner)
        return ProjectorOutput(self.layer_norm(hidden + self.fc2(inner)), lengths)


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
    """Return what the error says."""
    return (
        f"The text has {placeholders} audio placeholder tokens and the audio makes {positions} positions. "
        "Let ReLLMProcessor make both, and do not truncate its output."
    )


def clip_average(num_windows: Tensor, weights: Tensor) -> Tensor:
    """`(clips, windows)`: row i averages the windows of clip i, each by its weight."""
    clip_end = num_windows.cumsum(0)[:, None]
    window = torch.arange(len(weights), device=weights.device)[None]
    belongs = (window < clip_end) & (window >= clip_end - num_windows[:, None])
    share = belongs * weights.float()
    return share / share.sum(-1, keepdim=True)


def _encoder_layers(config: ReLLMConfig, width: int, count: int) -> nn.ModuleList:
    """Pre-norm transformer layers as Whisper's, which is what the original code uses."""
    layer_config = WhisperConfig(
        d_model=width,
        encoder_attention_heads=config.projector_heads,
        encoder_ffn_dim=config.projector_ffn_dim,
        attn_implementation="sdpa",
    )
    return nn.ModuleList(WhisperEncoderLayer(layer_config) for _ in range(count))


def _run_layers(layers: nn.ModuleList, hidden: Tensor, lengths: Tensor | None) -> Tensor:
    if not layers:
        return hidden
    mask = None
    if lengths is not None:
        mask = create_bidirectional_mask(
            config=layers[0].self_attn.config,
            inputs_embeds=hidden,
            attention_mask=frame_mask(lengths, hidden.shape[1]),
        )
    for layer in layers:
        hidden = layer(hidden, mask)
    return hidden


__all__ = [
    "ConvProjector",
    "ProjectorOutput",
    "check_counts",
    "clip_average",
    "count_message",
    "count_projected",
    "place_positions",
]
