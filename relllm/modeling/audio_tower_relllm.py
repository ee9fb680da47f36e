"""Whisper, wav2vec2, HuBERT and WavLM behind one function: features and mask in, frames and their counts out.

A clip encodes to the same frames alone and in a batch; on a CPU a ragged batch runs in groups of like length.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .convolution_relllm import can_convolve, convolve
from .devices_relllm import offloaded_weights
from .releases_relllm import padding_mask

# 32 MiB in float32: glibc takes more from the system each time, which is a third of the time of 8 clips in wav2vec2.
MAX_CPU_VALUES = 2**23
# How much shorter than the longest of its group a clip may be, as a share of it. On an accelerator groups do not pay:
# eight clips of 1 to 27 s took an H200 101 to 119 ms in groups, and 92 ms as a whole.
CPU_SLACK = 0.1

Lengths = TypeVar("Lengths", int, Tensor)


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an audio encoder with random weights, in the precision of what is being built around it; of Whisper, an
    encoder-decoder, its encoder alone.
    """
    dtype = torch.get_default_dtype()
    if config.model_type == "whisper":
        return WhisperEncoder._from_config(config, dtype=dtype)
    return AutoModel.from_config(config, dtype=dtype)


def count_frames(config: PreTrainedConfig, lengths: Lengths) -> Lengths:
    """Count the frames that a tower makes of these lengths: mel frames for Whisper, else samples."""
    if config.model_type == "whisper":
        return (lengths - 1) // 2 + 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return lengths


def encode_audio(
    tower: PreTrainedModel,
    inputs: Tensor,
    mask: Tensor | None = None,
    longest: int | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[BaseModelOutput, Tensor]:
    """Run a tower; return its output, with `last_hidden_state` `(clips, T, width)`, and the frame counts `(clips,)`.

    Args:
        inputs (`torch.Tensor`): Log-mel `(clips, mels, frames)` for Whisper, else waveforms `(clips, samples)`.
        mask (`torch.Tensor` of shape `(clips, frames or samples)`, *optional*): 1 on what belongs to the clip.
        longest (`int`, *optional*): Where the host knows it: no clip has more mel frames or samples.
        kwargs: `output_hidden_states` and `output_attentions`. With them the batch runs as a whole; encoders with a
            group norm give none for a ragged one.
    """
    with offloaded_weights(tower):
        return _encode(tower, inputs, mask, longest, **kwargs)


def group_by_length(sizes: Sequence[int], slack: float, most: float) -> list[list[int]]:
    """Group clips of like length, as places in `sizes`, the longest first.

    Args:
        slack (`float`): How much shorter than the longest of its group a clip may be, as a share of it.
        most (`float`): Values in a group's rectangle of clips x longest size; a group has one clip at least.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        longest = sizes[groups[-1][0]] if groups else 0
        if groups and sizes[place] >= (1 - slack) * longest and (len(groups[-1]) + 1) * longest <= most:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def frame_mask(lengths: Tensor, width: int) -> Tensor:
    """Return a mask `(clips, width)`, True on the first `lengths[i]` positions of row i."""
    return torch.arange(width, device=lengths.device)[None] < lengths[:, None]


def clip_average(num_windows: Tensor, weights: Tensor) -> Tensor:
    """Return `(clips, windows)`: row i averages the windows of clip i, each by its weight."""
    num_windows = num_windows.to(weights.device)
    clip_end = num_windows.cumsum(0)[:, None]
    window = torch.arange(len(weights), device=weights.device)[None]
    belongs = (window < clip_end) & (window >= clip_end - num_windows[:, None])
    share = belongs * weights.float()
    return share / share.sum(-1, keepdim=True)


def masked_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of the first `lengths[i]` positions of row i, `(clips, width)` of `(clips, positions, width)`.

    It is summed in float32: bfloat16 counts 1499 frames as 1496, and a sum in float16 ends at 65,504.
    """
    lengths = lengths.to(values.device)
    valid = frame_mask(lengths, values.shape[1]).unsqueeze(-1)
    total = (values * valid).sum(1, dtype=torch.promote_types(values.dtype, torch.float32))
    return (total / lengths[:, None]).to(values.dtype)


def is_trained(module: nn.Module) -> bool:
    """Tell whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def without_graph(tower: nn.Module) -> AbstractContextManager:
    """Keep no graph of a tower that does not train, also where embeddings were hooked to require gradients."""
    return nullcontext() if is_trained(tower) else torch.no_grad()


def _encode(
    tower: PreTrainedModel,
    inputs: Tensor,
    mask: Tensor | None,
    longest: int | None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[BaseModelOutput, Tensor]:
    if mask is None:
        mask = torch.ones(inputs.shape[0], inputs.shape[-1], dtype=torch.long, device=inputs.device)
    lengths = count_frames(tower.config, mask.sum(-1))
    inputs, width = inputs.to(tower.dtype), inputs.shape[-1]
    is_whisper = tower.config.model_type == "whisper"
    window = tower.max_source_positions * tower.conv1.stride[0] * tower.conv2.stride[0] if is_whisper else width
    sizes: list[int] | None = None
    if _needs_sizes(tower, inputs.device) or width > window + 1 or (is_whisper and width == window and not longest):
        sizes = mask.sum(-1).tolist()  # the only wait for the device in a call
        longest = max(sizes)
    else:  # as wide as it is given; a cheap batch with a clip of a whole window is one frame wider
        longest = min(width, window, longest or width)
    encode = _encode_waveforms
    if is_whisper:
        if longest > window:
            raise ValueError(f"The speech tower takes at most {window} mel frames, got {longest}.")
        if width == window:  # as it was trained, with attention over silence: the original recipe
            output = tower(inputs, return_dict=True, **kwargs)
            output.last_hidden_state = output.last_hidden_state[:, : count_frames(tower.config, longest)]
            return output, lengths
        encode = _encode_mel
    groups = group_by_length(sizes, *_limits(tower, inputs.device, kwargs)) if sizes is not None else []
    if sizes is None or len(groups) == 1:
        return encode(tower, inputs[..., :longest], mask[:, :longest], return_dict=True, **kwargs), lengths
    places = [torch.tensor(group, device=inputs.device) for group in groups]
    parts = []
    for own, group in zip(places, groups, strict=True):
        longest = sizes[group[0]]
        output = encode(tower, inputs[own, ..., :longest], mask[own, :longest], return_dict=True)
        parts.append(output.last_hidden_state)
    frames = parts[0].new_zeros(len(sizes), *parts[0].shape[1:])  # the first has the longest clip
    for own, part in zip(places, parts, strict=True):
        frames[own.to(frames.device), : part.shape[1]] = part
    return BaseModelOutput(last_hidden_state=frames), lengths


def _needs_sizes(tower: PreTrainedModel, device: torch.device) -> bool:
    """Tell whether a batch may run in groups: on a CPU, or where a norm over time allows no padding."""
    return device.type == "cpu" or getattr(tower.config, "feat_extract_norm", None) == "group"


def _limits(tower: PreTrainedModel, device: torch.device, kwargs: Mapping[str, object]) -> tuple[float, float]:
    """Return `slack` and `most` of [`group_by_length`] for this batch."""
    config = tower.config
    is_whisper = config.model_type == "whisper"
    whole = _wants_states(tower, kwargs) or _is_sharded(tower) or device.type != "cpu"
    most = math.inf
    if not whole:  # the values of the largest activation for each mel frame or sample
        most = MAX_CPU_VALUES / (
            config.encoder_ffn_dim / 2 if is_whisper else config.conv_dim[0] / config.conv_stride[0]
        )
    if not is_whisper and config.feat_extract_norm == "group":
        return 0.0, most  # such a norm takes its statistics over time, padding included: none may be there
    return 1.0 if whole else CPU_SLACK, most


@capture_outputs  # on Whisper's own layers: the tower is what Transformers takes for `self`
def _encode_mel(tower: PreTrainedModel, features: Tensor, mask: Tensor, **kwargs: object) -> BaseModelOutput:
    """Run Whisper's encoder over as many positions as the batch needs."""
    longest = count_frames(tower.config, features.shape[-1])
    # Padding is set to zero before each convolution, where a lone clip would have the convolution's own zeros.
    hidden = nn.functional.gelu(tower.conv1(features * mask[:, None].to(features)))
    hidden = nn.functional.gelu(tower.conv2(hidden * mask[:, None].to(hidden)))
    hidden = hidden.transpose(1, 2) + tower.embed_positions.weight[:longest]
    hidden = nn.functional.dropout(hidden, p=tower.dropout, training=tower.training)
    lengths = count_frames(tower.config, mask.sum(-1)).to(hidden.device)
    attention_mask = padding_mask(tower.config, hidden, frame_mask(lengths, longest))
    for layer in tower.layers:
        hidden = layer(hidden, attention_mask)
    return BaseModelOutput(last_hidden_state=tower.layer_norm(hidden))


def _encode_waveforms(tower: PreTrainedModel, waveforms: Tensor, mask: Tensor, **kwargs: object) -> BaseModelOutput:
    if tower.config.feat_extract_norm == "group":
        return tower(waveforms, **kwargs)  # clips of one length
    layers = tower.feature_extractor.conv_layers
    if tower.training or _wants_states(tower, kwargs) or _is_sharded(tower) or not can_convolve(layers, waveforms):
        return tower(waveforms, attention_mask=mask, **kwargs)
    # As the tower's own forward does in eval mode, after convolutions that cost less.
    clips = [row[:size] for row, size in zip(waveforms, mask.sum(-1).tolist(), strict=True)]
    features = nn.utils.rnn.pad_sequence(convolve(layers, clips), batch_first=True)
    hidden = tower.feature_projection(features)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # HuBERT's gives nothing beside it
    own = frame_mask(count_frames(tower.config, mask.sum(-1)), features.shape[1])
    return tower.encoder(hidden, attention_mask=own)


def _wants_states(tower: PreTrainedModel, kwargs: Mapping[str, object]) -> bool:
    config = tower.config
    hidden_states = kwargs.get("output_hidden_states", config.output_hidden_states)
    return bool(hidden_states or kwargs.get("output_attentions", config.output_attentions))


def _is_sharded(tower: PreTrainedModel) -> bool:
    """Tell whether processes gather the weights layer by layer: all must then run the tower equally often."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, sharded) for module in tower.modules())
