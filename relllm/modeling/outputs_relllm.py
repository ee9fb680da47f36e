"""What the models return, with the shape of each field."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast


@dataclass
class ReLLMAudioOutput(BaseModelOutputWithPooling):
    """What the model hears, before the LLM.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(windows, L, d)`): Projected positions, padded on the right.
        pooler_output (`torch.Tensor` of shape `(tokens, d)`): The valid ones in one row, clip after clip; of
            `get_audio_features` alone.
        lengths (`torch.LongTensor` of shape `(windows,)`): Valid positions of each window.
        hidden_states, attentions (`tuple` of `torch.Tensor`, *optional*): Of the speech tower, layer by layer.
        emotion_logits (`torch.Tensor` of shape `(clips, classes)`): Of `config.emotion_labels`.
        dimensions (`torch.Tensor` of shape `(clips, 3)`): Arousal, dominance, valence from the projected positions.
        emotion_embedding (`torch.Tensor` of shape `(clips, d_e)`, *optional*): The utterance embedding.
        tower_dimensions (`torch.Tensor` of shape `(clips, 3)`, *optional*): The emotion tower's own reading.
    """

    lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None


@dataclass
class ReLLMModelOutput(BaseModelOutputWithPast):
    """Of [`ReLLMModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, sequence, d)`): The LLM's last hidden states.
        audio_hidden_states (`torch.Tensor` of shape `(windows, L, d)`, *optional*): Projected, padded on the right.
        audio_lengths (`torch.LongTensor` of shape `(windows,)`, *optional*): Valid positions of each window.
        emotion_logits, dimensions, emotion_embedding, tower_dimensions: See [`ReLLMAudioOutput`].
    """

    audio_hidden_states: Tensor | None = None
    audio_lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None


@dataclass
class ReLLMCausalLMOutput(CausalLMOutputWithPast):
    """Of [`ReLLMForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Next-token cross-entropy, where `labels` are given.
        logits (`torch.Tensor` of shape `(batch, sequence, vocabulary)`): Next-token scores.
        audio_hidden_states (`torch.Tensor` of shape `(windows, L, d)`, *optional*): Projected, padded on the right.
        audio_lengths (`torch.LongTensor` of shape `(windows,)`, *optional*): Valid positions of each window.
        emotion_logits, dimensions, emotion_embedding, tower_dimensions: See [`ReLLMAudioOutput`].
    """

    audio_hidden_states: Tensor | None = None
    audio_lengths: Tensor | None = None
    emotion_logits: Tensor | None = None
    dimensions: Tensor | None = None
    emotion_embedding: Tensor | None = None
    tower_dimensions: Tensor | None = None


__all__ = ["ReLLMAudioOutput", "ReLLMCausalLMOutput", "ReLLMModelOutput"]
