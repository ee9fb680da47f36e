"""The half of RE-LLM that hears: two towers, their fusion, the projector, and the heads that read the emotion.

It needs no LLM but its width, so that an inference engine with an LLM of its own can have this half alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import local_torch_dtype
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .audio_tower_relllm import build_tower, clip_average, encode_audio, frame_mask, masked_mean, without_graph
from .checkpoint_relllm import tower_dtype
from .configuration_relllm import DIMENSIONS, ReLLMConfig
from .emotion_tower_relllm import ReLLMEmotionModel, only_trained
from .outputs_relllm import ReLLMAudioOutput, TowerOutputs
from .projector_relllm import ConvProjector, ProjectorOutput

MEL_HOP = 160  # samples a mel frame of Whisper


class ReLLMHearing(nn.Module):
    """The hearing half, by the names that its weights have in a checkpoint of [`ReLLMModel`], which inherits it."""

    config: ReLLMConfig

    def make_hearing(self, config: ReLLMConfig) -> None:
        """Make towers, projector and heads, each in its own precision: what trains in float32, or the default's."""
        hidden_size = config.text_config.hidden_size
        # A load sets the default precision, and then keeps for each weight the one in which it is made here.
        with local_torch_dtype(tower_dtype(config, "audio_tower")):
            self.audio_tower = build_tower(config.audio_config)
        emotion_config: Any = config.emotion_config
        with local_torch_dtype(tower_dtype(config, "emotion_tower")):
            self.emotion_tower = ReLLMEmotionModel(emotion_config) if emotion_config is not None else None
        with local_torch_dtype(torch.promote_types(torch.get_default_dtype(), torch.float32)):  # of what trains
            self.multi_modal_projector = ConvProjector(config)
            if config.emotion_fusion == "token":
                self.emotion_projector = nn.Linear(config.emotion_config.hidden_size, hidden_size)
            self.emotion_head = nn.Linear(hidden_size, len(config.emotion_labels), bias=False)
            self.dimension_head = nn.Linear(hidden_size, len(DIMENSIONS), bias=False)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_values_mask: Tensor | None = None,
        audio_num_windows: Tensor | None = None,
        tower_outputs: TowerOutputs | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReLLMAudioOutput:
        """Encode, fuse, project and read the emotion.

        Args:
            input_features (`torch.Tensor`, *optional*):
                Log-mel `(windows, mels, frames)`, or waveforms `(windows, samples)` for a tower that reads those.
            input_features_mask (`torch.Tensor` of shape `(windows, frames or samples)`, *optional*): 1 on the clip.
            input_values (`torch.Tensor` of shape `(windows, samples)`, *optional*): Waveforms for the emotion tower.
            input_values_mask (`torch.Tensor` of shape `(windows, samples)`, *optional*): 1 on the clip.
            audio_num_windows (`torch.LongTensor` of shape `(clips,)`, *optional*): Windows of each clip, by default 1.
            tower_outputs ([`TowerOutputs`], *optional*): In the place of features and waveforms; no tower then runs.
            kwargs: `output_hidden_states` and `output_attentions`, for the speech tower.
        """
        features = (input_features, input_features_mask, input_values, input_values_mask)
        audio = self._hear(features, audio_num_windows, tower_outputs, **kwargs)
        # An index of a length that only the device knows: `forward` does without it.
        assert audio.last_hidden_state is not None and audio.lengths is not None
        audio.pooler_output = audio.last_hidden_state[frame_mask(audio.lengths, audio.last_hidden_state.shape[1])]
        return audio

    def _hear(
        self,
        features: tuple[Tensor | None, ...],
        audio_num_windows: Tensor | None,
        tower_outputs: TowerOutputs | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReLLMAudioOutput:
        """Return what [`~ReLLMModel.get_audio_features`] does, without `pooler_output`."""
        if (features[0] is None) == (tower_outputs is None):
            raise ValueError("Pass exactly one of input_features and tower_outputs.")
        towers = tower_outputs if tower_outputs is not None else self.run_towers(*features, **kwargs)  # type: ignore[arg-type]
        projected = self._project(towers)
        pooled = masked_mean(projected.hidden_states, projected.lengths)
        if audio_num_windows is None:
            audio_num_windows = torch.ones_like(projected.lengths)
        by_tokens = clip_average(audio_num_windows, projected.lengths)
        by_frames = clip_average(audio_num_windows, towers.lengths)
        pooled = _averaged(by_tokens, pooled)
        readings = (towers.emotion_embedding, towers.dimensions)
        embedding, tower_dimensions = (None if one is None else _averaged(by_frames, one) for one in readings)
        emotion_logits = self.emotion_head(pooled.to(self.emotion_head.weight.dtype))
        dimensions = self.dimension_head(pooled.to(self.dimension_head.weight.dtype))
        trained = self.config.trained_readings
        if trained is not None and not self.training:
            emotion_logits = emotion_logits if "emotion" in trained else torch.full_like(emotion_logits, torch.nan)
            dimensions = only_trained(dimensions, trained)
        return ReLLMAudioOutput(
            last_hidden_state=projected.hidden_states,
            lengths=projected.lengths,
            hidden_states=towers.hidden_states,
            attentions=towers.attentions,
            emotion_logits=emotion_logits,
            dimensions=dimensions,
            emotion_embedding=embedding,
            tower_dimensions=tower_dimensions,
        )

    def run_towers(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        input_values_mask: Tensor | None = None,
        speech: TowerOutputs | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TowerOutputs:
        """Return what the towers make of the audio, to keep as `tower_outputs` while they are frozen.

        What the speech tower has made of it before, `speech`, stands in its place.
        """
        outputs = speech
        if outputs is None:
            outputs = self._hear_speech(input_features, input_features_mask, input_values, **kwargs)
        if self.emotion_tower is not None:
            if input_values is None:
                raise ValueError("input_features came without input_values, which the emotion tower reads. Pass both.")
            with without_graph(self.emotion_tower):
                emotion = self.emotion_tower(input_values.to(self.emotion_tower.dtype), input_values_mask)
            outputs.emotion_embedding, outputs.dimensions = emotion.embedding, emotion.dimensions
        return outputs

    def _hear_speech(
        self,
        input_features: Tensor,
        input_features_mask: Tensor | None,
        input_values: Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TowerOutputs:
        with without_graph(self.audio_tower):
            # The waveforms are of the same clips, and padded to the longest.
            longest = None
            if input_values is not None and self.audio_tower.config.model_type == "whisper":
                longest = -(-input_values.shape[-1] // MEL_HOP)
            encoded, lengths = encode_audio(self.audio_tower, input_features, input_features_mask, longest, **kwargs)
        states = {"hidden_states": encoded.hidden_states, "attentions": encoded.attentions}
        return TowerOutputs(encoded.last_hidden_state, lengths, **states)

    def _project(self, towers: TowerOutputs) -> ProjectorOutput:
        """Fuse the emotion embedding with the frames (or put it before them) and project: `(windows, L, d)`."""
        dtype = self.multi_modal_projector.fc1.weight.dtype  # float32 over an LLM in half precision
        frames = towers.frames.to(dtype)
        if self.config.emotion_fusion == "concat":
            repeated = towers.emotion_embedding.to(frames)[:, None].expand(-1, frames.shape[1], -1)
            frames = torch.cat([frames, repeated], dim=-1)
        projected = self.multi_modal_projector(frames, towers.lengths)
        if self.config.emotion_fusion == "token":
            token = self.emotion_projector(towers.emotion_embedding.to(dtype))[:, None]
            projected.hidden_states = torch.cat([token.to(projected.hidden_states), projected.hidden_states], dim=1)
            projected.lengths = projected.lengths + 1
        return projected


def _averaged(shares: Tensor, values: Tensor) -> Tensor:
    exact = torch.promote_types(values.dtype, torch.float32)
    return (shares.to(values.device, exact) @ values.to(exact)).to(values.dtype)
