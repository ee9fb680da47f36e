"""What the towers, the audio's way and the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class TowerOutputs(ModelOutput):
    """
    Args:
        frames (`torch.Tensor` of shape `(windows, T, d_s)`): Of the speech tower; past a window's own count, padding.
        lengths (`torch.LongTensor` of shape `(windows,)`): Each window's own frame count.
        emotion_embedding (`torch.Tensor` of shape `(windows, d_e)`, *optional*): The emotion tower's.
        dimensions (`torch.Tensor` of shape `(windows, 3)`, *optional*): Its arousal, dominance, valence.
        hidden_states, attentions (`tuple` of `torch.Tensor`, *optional*): Of the speech tower, layer by layer.
    """

    frames: Tensor = None  # type: ignore[assignment]  # always there: a ModelOutput's fields need defaults
    lengths: Tensor = None  # type: ignore[assignment]
    emotion_embedding: Tensor | None = None
    dimensions: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ReLLMAudioOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(windows, L, d)`): Projected positions, padded on the right.
        pooler_output (`torch.Tensor` of shape `(tokens, d)`): The valid ones; of `get_audio_features` alone.
        lengths (`torch.LongTensor` of shape `(windows,)`): Valid positions of each window.
        hidden_states, attentions (`tuple` of `torch.Tensor`, *optional*): Of the speech tower, layer by layer.
        emotion_logits (`torch.Tensor` of shape `(clips, classes)`): Of `config.emotion_labels`.
        dimensions (`torch.Tensor` of shape `(clips, 3)`): Arousal, dominance, valence from the projected positions.
            Both are NaN in eval mode for what is not among the configuration's `trained_readings`.
        emotion_embedding (`torch.Tensor` of shape `(clips, d_e)`, *optional*): The utterance embedding.
        tower_dimensions (`torch.Tensor` of shape `(clips, 3)`, *optional*): The emotion tower's own reading.
    """

    lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None


@dataclass
class ReLLMModelOutput(MoeModelOutputWithPast):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, d)`): The LLM's last hidden states.
        audio_hidden_states (`torch.Tensor` of shape `(windows, L, d)`, *optional*): Projected, padded on the right.
        audio_lengths (`torch.LongTensor` of shape `(windows,)`, *optional*): Valid positions of each window.
        emotion_logits, dimensions, emotion_embedding, tower_dimensions: See [`ReLLMAudioOutput`].
        router_logits, aux_loss: Of an LLM that is a mixture of experts, with `output_router_logits=True`.
    """

    aux_loss: Tensor | None = None
    audio_hidden_states: Tensor | None = None
    audio_lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None


@dataclass
class ReLLMCausalLMOutput(MoeCausalLMOutputWithPast):
    """What [`ReLLMForConditionalGeneration`] returns: loss, logits, and the rest as in [`ReLLMModelOutput`]."""

    audio_hidden_states: Tensor | None = None
    audio_lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None
