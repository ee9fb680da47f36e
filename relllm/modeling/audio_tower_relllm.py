"""Audio encoders of any supported kind behind one function: features and mask in, frames and their counts out.

Whisper (log-mel) and wav2vec2, HuBERT, WavLM (waveform). Padding never reaches a clip's own frames: a clip encodes to
the same frames alone and in a batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

# 32 MiB in float32, up to where glibc keeps freed memory. More it takes from the system each time: with 8 clips of 5 s
# in wav2vec2 a third of the time goes into that, and a batch is slower than its clips one by one.
MAX_CPU_VALUES = 2**23


def build_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """An audio encoder with random weights; of an encoder-decoder (Whisper), its encoder."""
    tower = AutoModel.from_config(config)
    return tower.get_encoder() if config.is_encoder_decoder else tower


def count_frames(config: PreTrainedConfig, lengths: Tensor) -> Tensor:
    """Frames that a tower makes of inputs of these lengths.

    Args:
        config (`PreTrainedConfig`): The tower's.
        lengths (`torch.LongTensor` of any shape): Mel frames for Whisper, samples for the waveform encoders.
    """
    if config.model_type == "whisper":
        return (lengths - 1) // 2 + 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths = (lengths - kernel) // stride + 1
    return lengths


def encode_audio(
    tower: PreTrainedModel, inputs: Tensor, mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
) -> tuple[BaseModelOutput, Tensor]:
    """Run a tower.

    Args:
        tower (`PreTrainedModel`): From [`build_tower`].
        inputs (`torch.Tensor`): Log-mel `(clips, mels, frames)` for Whisper, else waveforms `(clips, samples)`.
        mask (`torch.Tensor` of shape `(clips, frames or samples)`, *optional*): 1 on what belongs to the clip.
        kwargs: `output_hidden_states` and `output_attentions`, as of any model.

    Returns:
        `tuple`: The tower's output, with frames `(clips, T, width)` in `last_hidden_state` and T the longest clip's,
        and each clip's own frame count `(clips,)`. Encoders that see clips one by one give no hidden states.
    """
    if mask is None:
        mask = torch.ones(inputs.shape[0], inputs.shape[-1], dtype=torch.long, device=inputs.device)
    lengths = count_frames(tower.config, mask.sum(-1))
    encode = _encode_mel if tower.config.model_type == "whisper" else _encode_waveform
    return encode(tower, inputs.to(tower.dtype), mask, lengths, return_dict=True, **kwargs), lengths


def frame_mask(lengths: Tensor, width: int) -> Tensor:
    """`(clips, width)`, True on the first `lengths[i]` positions of row i."""
    return torch.arange(width, device=lengths.device)[None] < lengths[:, None]


def _encode_mel(
    tower: PreTrainedModel, features: Tensor, mask: Tensor, lengths: Tensor, **kwargs: object
) -> BaseModelOutput:
    """Whisper's encoder over its full window as it was trained, or over as many positions as the batch needs."""
    window = tower.max_source_positions * tower.conv1.stride[0] * tower.conv2.stride[0]
    if features.shape[-1] < window:
        return _encode_short_mel(tower, features, mask, lengths, **kwargs)
    if features.shape[-1] > window:
        raise ValueError(f"The speech tower takes at most {window} mel frames, got {features.shape[-1]}.")
    output = tower(features, **kwargs)  # attention over the whole window, silence included: the original recipe
    output.last_hidden_state = output.last_hidden_state[:, : int(lengths.max())]
    return output


@capture_outputs  # on Whisper's own layers: the tower is what Transformers takes for `self`
def _encode_short_mel(
    tower: PreTrainedModel, features: Tensor, mask: Tensor, lengths: Tensor, **kwargs: object
) -> BaseModelOutput:
    longest = (features.shape[-1] - 1) // 2 + 1
    # Padding is set to zero before each convolution, where a lone clip would have the convolution's own zeros.
    hidden = nn.functional.gelu(tower.conv1(features * mask[:, None].to(features.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden * mask[:, None].to(hidden.dtype)))
    hidden = hidden.transpose(1, 2) + tower.embed_positions.weight[:longest]
    hidden = nn.functional.dropout(hidden, p=tower.dropout, training=tower.training)
    attention_mask = create_bidirectional_mask(
        config=tower.config, inputs_embeds=hidden, attention_mask=frame_mask(lengths, longest)
    )
    for layer in tower.layers:
        hidden = layer(hidden, attention_mask)
    return BaseModelOutput(last_hidden_state=tower.layer_norm(hidden))


def _encode_waveform(
    tower: PreTrainedModel, waveforms: Tensor, mask: Tensor, lengths: Tensor, **kwargs: object
) -> BaseModelOutput:
    if tower.config.feat_extract_norm == "layer":
        rows = _rows_at_once(tower, waveforms)
        if rows >= len(waveforms) or _wants_states(tower, kwargs):
            return tower(waveforms, attention_mask=mask, **kwargs)
        return _encode_parts(tower, waveforms.split(rows), mask.split(rows), int(lengths.max()))
    # A group norm takes its statistics over time, padding included: such encoders see ragged clips one by one.
    samples = mask.sum(-1).tolist()
    if min(samples) == waveforms.shape[-1]:
        return tower(waveforms, **kwargs)
    clips = [tower(row[None, :length]).last_hidden_state[0] for row, length in zip(waveforms, samples, strict=True)]
    return BaseModelOutput(last_hidden_state=nn.utils.rnn.pad_sequence(clips, batch_first=True))


def _encode_parts(
    tower: PreTrainedModel, waveforms: tuple[Tensor, ...], masks: tuple[Tensor, ...], num_frames: int
) -> BaseModelOutput:
    """Parts of a batch in turn, each as long as its own longest clip."""
    parts = []
    for part, mask in zip(waveforms, masks, strict=True):
        longest = int(mask.sum(-1).max())
        hidden = tower(part[:, :longest], attention_mask=mask[:, :longest]).last_hidden_state
        parts.append(nn.functional.pad(hidden, (0, 0, 0, num_frames - hidden.shape[1])))
    return BaseModelOutput(last_hidden_state=torch.cat(parts))


def _wants_states(tower: PreTrainedModel, kwargs: Mapping[str, object]) -> bool:
    config = tower.config
    hidden_states = kwargs.get("output_hidden_states", config.output_hidden_states)
    return bool(hidden_states or kwargs.get("output_attentions", config.output_attentions))


def _rows_at_once(tower: PreTrainedModel, waveforms: Tensor) -> int:
    """Clips to run together: all on an accelerator; on a CPU as many as keep the first convolution's output small."""
    if waveforms.device.type != "cpu":
        return len(waveforms)
    values = tower.config.conv_dim[0] * (waveforms.shape[-1] // tower.config.conv_stride[0])
    return max(1, MAX_CPU_VALUES // values)
