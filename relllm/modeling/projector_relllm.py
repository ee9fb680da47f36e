"""Projectors from tower frames to LLM positions: the convolutional subsampler of RE-LLM and BLSP-Emo's CFormer.

Both return padded positions with each clip's own count. Source: `modeling_adapter.py` of BLSP-Emo's code.
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
        token_logits (`torch.Tensor` of shape `(clips, L, vocabulary)`, *optional*): CFormer's words.
        alphas (`torch.Tensor` of shape `(clips, T)`, *optional*): CFormer's firing weights, scaled to the token count.
        alphas_sum (`torch.Tensor` of shape `(clips,)`, *optional*): Their sum before scaling: the predicted count.
    """

    hidden_states: Tensor
    lengths: Tensor
    token_logits: Tensor | None = None
    alphas: Tensor | None = None
    alphas_sum: Tensor | None = None


def count_projected(config: ReLLMConfig, frames: Tensor) -> Tensor:
    """Positions that the convolutional projector makes of these frames: floor((L - 1)/2 + 1) a convolution."""
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

    def forward(self, frames: Tensor, lengths: Tensor, num_tokens: Tensor | None = None) -> ProjectorOutput:
        """
        Args:
            frames (`torch.Tensor` of shape `(clips, T, width)`): Tower frames, fused with the emotion embedding.
            lengths (`torch.LongTensor` of shape `(clips,)`): Frames that belong to each clip.
            num_tokens: Not used: the convolutions fix the count.
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


class CFormer(nn.Module):
    """Continuous integrate-and-fire: one position for each word piece, found by summing weights along time to 1.

    Differs from the original code where a clip fires twice within one frame: there the weights of the other clips in
    the batch are overwritten. Here each position takes exactly its share of the time axis.
    """

    def __init__(self, config: ReLLMConfig):
        super().__init__()
        self.config = config
        width, text_config = config.projector_input_size, config.text_config
        self.pre_layers = _encoder_layers(config, width, config.cformer_pre_layers)
        self.cif_proj = nn.Linear(width - 1, width)
        self.post_layers = _encoder_layers(config, width, config.cformer_post_layers)
        self.out_proj = nn.Linear(width, text_config.hidden_size)
        self.token_head = nn.Linear(width, text_config.vocab_size, bias=False)

    def forward(self, frames: Tensor, lengths: Tensor, num_tokens: Tensor | None = None) -> ProjectorOutput:
        """
        Args:
            frames (`torch.Tensor` of shape `(clips, T, width)`): Tower frames; the last channel becomes the weight.
            lengths (`torch.LongTensor` of shape `(clips,)`): Frames that belong to each clip.
            num_tokens (`torch.LongTensor` of shape `(clips,)`, *optional*):
                Positions to make, in training those of the transcript; by default the rounded sum of the weights.
        """
        hidden = _run_layers(self.pre_layers, frames, lengths if self.config.projector_masking else None)
        alphas = torch.sigmoid(hidden[..., -1].float()) * frame_mask(lengths, hidden.shape[1])
        alphas_sum = alphas.sum(-1)
        if num_tokens is None:
            num_tokens = torch.round(alphas_sum).long().clamp(min=1)
        alphas = alphas * (num_tokens / alphas_sum)[:, None]
        weights = integrate_and_fire(alphas, num_tokens).to(hidden.dtype)
        hidden = self.cif_proj(weights @ hidden[..., :-1])
        hidden = _run_layers(self.post_layers, hidden, num_tokens)
        return ProjectorOutput(self.out_proj(hidden), num_tokens, self.token_head(hidden), alphas, alphas_sum)


def integrate_and_fire(alphas: Tensor, num_tokens: Tensor) -> Tensor:
    """Share of each frame that goes to each position.

    Position k owns the interval [k, k + 1) of the running sum of the weights, and the last one whatever rounding
    leaves over.

    Args:
        alphas (`torch.Tensor` of shape `(clips, T)`): Weights, each row summing to its token count.
        num_tokens (`torch.LongTensor` of shape `(clips,)`): Token counts.

    Returns:
        `torch.Tensor` of shape `(clips, max(num_tokens), T)`; rows past a clip's own count are zero.
    """
    weights = alphas.double()  # a float32 sum of a few dozen would be off by more than 1e-6 of a position
    end = weights.cumsum(-1)[:, None]  # (clips, 1, T)
    start = end - weights[:, None]
    token = torch.arange(int(num_tokens.max()), device=alphas.device)[None, :, None]
    is_last = token == num_tokens[:, None, None] - 1
    upper = torch.where(is_last, torch.inf, token + 1)
    share = (torch.minimum(end, upper) - torch.maximum(start, token)).clamp(min=0)
    return (share * (token < num_tokens[:, None, None])).to(alphas.dtype)


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


__all__ = ["CFormer", "ConvProjector", "ProjectorOutput", "count_projected", "integrate_and_fire"]
