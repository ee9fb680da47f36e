"""The two towers behind one function: what they give of a clip, before anything that RE-LLM itself learns.

While the towers are frozen this never changes, so it can be kept and given to the model instead of features. What does
not live here: the towers (`audio_tower_relllm`, `emotion_tower_relllm`), fusion and projector (`modeling_relllm`).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs

from .audio_tower_relllm import encode_audio
from .emotion_tower_relllm import ReLLMEmotionModel


@dataclass
class TowerOutputs(ModelOutput):
    """
    Args:
        frames (`torch.Tensor` of shape `(windows, T, d_s)`): Of the speech tower; past a window's own count, padding.
        lengths (`torch.LongTensor` of shape `(windows,)`): Each window's own frame count.
        emotion_embedding (`torch.Tensor` of shape `(windows, d_e)`, *optional*): Of the emotion tower, where there is
            one.
        dimensions (`torch.Tensor` of shape `(windows, 3)`, *optional*): Its arousal, dominance, valence.
        hidden_states, attentions (`tuple` of `torch.Tensor`, *optional*): Of the speech tower, layer by layer.
    """

    frames: Tensor = None  # type: ignore[assignment]  # always there: a ModelOutput's fields need defaults
    lengths: Tensor = None  # type: ignore[assignment]
    emotion_embedding: Tensor | None = None
    dimensions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def run_towers(
    audio_tower: PreTrainedModel,
    emotion_tower: ReLLMEmotionModel | None,
    input_features: Tensor,
    input_features_mask: Tensor | None = None,
    input_values: Tensor | None = None,
    input_values_mask: Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> TowerOutputs:
    """Both towers over the same windows.

    Args:
        audio_tower (`PreTrainedModel`): The speech tower.
        emotion_tower ([`ReLLMEmotionModel`], *optional*): `None` for a model without one.
        input_features, input_features_mask, input_values, input_values_mask (`torch.Tensor`): See
            [`ReLLMModel.get_audio_features`].
        kwargs: `output_hidden_states` and `output_attentions`, for the speech tower.

    Raises:
        ValueError: If the emotion tower is there and `input_values` is not.
    """
    with _frozen(audio_tower):
        encoded, lengths = encode_audio(audio_tower, input_features, input_features_mask, **kwargs)
    outputs = TowerOutputs(
        encoded.last_hidden_state, lengths, hidden_states=encoded.hidden_states, attentions=encoded.attentions
    )
    if emotion_tower is not None:
        if input_values is None:
            raise ValueError("input_features came without input_values, which the emotion tower reads. Pass both.")
        with _frozen(emotion_tower):
            emotion = emotion_tower(input_values.to(emotion_tower.dtype), input_values_mask)
        outputs.emotion_embedding, outputs.dimensions = emotion.embedding, emotion.dimensions
    return outputs


def is_trained(module: nn.Module) -> bool:
    """Whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


def clip_average(num_windows: Tensor, weights: Tensor) -> Tensor:
    """`(clips, windows)`: row i averages the windows of clip i, each by its weight."""
    clip_end = num_windows.cumsum(0)[:, None]
    window = torch.arange(len(weights), device=weights.device)[None]
    belongs = (window < clip_end) & (window >= clip_end - num_windows[:, None])
    share = belongs * weights.float()
    return share / share.sum(-1, keepdim=True)


def _frozen(tower: nn.Module) -> AbstractContextManager:
    """No graph through a tower that does not train, also where embeddings were hooked to require gradients."""
    return nullcontext() if is_trained(tower) else torch.no_grad()


__all__ = ["TowerOutputs", "clip_average", "is_trained", "run_towers"]
