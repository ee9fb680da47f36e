"""The emotion tower: audEERING's layout exactly, batches as single clips, nothing random and nothing unpickled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import WAVEFORM_TOWERS, clip, tiny_audio_config, tiny_emotion_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Wav2Vec2Model, Wav2Vec2PreTrainedModel

from relllm import ReLLMEmotionConfig, ReLLMEmotionModel

# WavLM's own attention, on a padded batch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
DIMENSIONS = {0: "arousal", 1: "dominance", 2: "valence"}


class RegressionHead(nn.Module):
    """As in the model card of audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.final_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(features)))))


class EmotionModel(Wav2Vec2PreTrainedModel):
    """As in the same model card."""

    def __init__(self, config):
        super().__init__(config)
        self.wav2vec2 = Wav2Vec2Model(config)
        self.classifier = RegressionHead(config)
        self.post_init()

    def forward(self, input_values: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = self.wav2vec2(input_values)[0].mean(dim=1)
        return hidden_states, self.classifier(hidden_states)


@pytest.fixture(scope="module")
def original() -> EmotionModel:
    torch.manual_seed(5)
    config = tiny_audio_config("wav2vec2", layers=2)
    config.id2label = DIMENSIONS
    config.label2id = {name: index for index, name in DIMENSIONS.items()}
    config.final_dropout = 0.1
    return EmotionModel(config).eval()


@pytest.fixture
def checkpoint(original: EmotionModel, tmp_path: Path) -> Path:
    original.save_pretrained(tmp_path)
    return tmp_path


def padded(durations_s: list[float]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Values and mask of a batch, and its clips alone."""
    clips = [torch.from_numpy(clip(duration, seed=index)) for index, duration in enumerate(durations_s)]
    values = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(samples)) for samples in clips], batch_first=True).long()
    return values, mask, clips


@torch.no_grad()
def test_a_checkpoint_of_the_audeering_layout_gives_the_original_models_numbers(
    original: EmotionModel, checkpoint: Path
) -> None:
    names = load_file(checkpoint / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"wav2vec2", "classifier"}
    tower = ReLLMEmotionModel.from_pretrained(checkpoint)
    assert not tower.training and tower.config.final_dropout == 0.1
    for duration_s in (0.025, 0.5, 2.0):
        values = torch.from_numpy(clip(duration_s))[None]
        embedding, dimensions = original(values)
        output = tower(values)
        torch.testing.assert_close(output.dimensions, dimensions, rtol=0, atol=1e-6)
        torch.testing.assert_close(output.embedding, embedding, rtol=2e-6, atol=1e-6)


@torch.no_grad()
def test_a_saved_tower_comes_back_with_the_same_reading_through_auto_model(checkpoint: Path, tmp_path: Path) -> None:
    tower = ReLLMEmotionModel.from_pretrained(checkpoint)
    tower.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert type(loaded) is ReLLMEmotionModel
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is ReLLMEmotionConfig
    values = torch.from_numpy(clip(0.5))[None]
    assert torch.equal(loaded(values).dimensions, tower(values).dimensions)
    assert list(tower(values)) == ["embedding", "dimensions", "last_hidden_state"]
    assert torch.equal(tower(values, return_dict=False)[1], tower(values).dimensions)


@pytest.mark.parametrize("part", ["classifier.dense", "classifier.out_proj", "wav2vec2.encoder.layers.1.attention"])
def test_a_checkpoint_that_lacks_weights_is_refused_by_their_names(part: str, checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    kept = {name: weight for name, weight in state.items() if not name.startswith(part)}
    assert len(kept) < len(state)
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {len(state) - len(kept)} weights.*{part}"):
        ReLLMEmotionModel.from_pretrained(checkpoint)


def test_a_bare_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    Wav2Vec2Model(tiny_audio_config("wav2vec2", layers=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.dense"):
        ReLLMEmotionModel.from_pretrained(tmp_path)


def test_a_pickled_checkpoint_is_refused_without_being_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"opening this would raise UnpicklingError")
    with pytest.raises(OSError, match="safetensors"):
        ReLLMEmotionModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="unpickle"):
        ReLLMEmotionModel.from_pretrained(checkpoint, use_safetensors=False)


def test_labels_in_another_order_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {"0": "valence", "1": "arousal", "2": "dominance"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be .*arousal.*dominance.*valence.*in this order"):
        ReLLMEmotionModel.from_pretrained(checkpoint)


@torch.no_grad()
@pytest.mark.parametrize("kind", WAVEFORM_TOWERS)
def test_a_clip_reads_the_same_alone_and_in_a_ragged_batch(kind: str) -> None:
    torch.manual_seed(0)
    tower = ReLLMEmotionModel(tiny_emotion_config(kind, layers=2)).eval()
    values, mask, clips = padded([0.31, 0.9, 0.05])
    batch = tower(values, mask)
    assert (batch.dimensions.std(0) > 1e-3).all()
    for index, samples in enumerate(clips):
        alone = tower(samples[None])
        torch.testing.assert_close(batch.dimensions[index], alone.dimensions[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(batch.embedding[index], alone.embedding[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", WAVEFORM_TOWERS)
def test_the_embedding_is_the_mean_of_the_bare_encoders_frames(kind: str) -> None:
    torch.manual_seed(0)
    tower = ReLLMEmotionModel(tiny_emotion_config(kind, layers=2)).eval()
    bare = AutoModel.from_config(tower.config.encoder_config).eval()
    bare.load_state_dict(tower.encoder.state_dict())
    values, mask, clips = padded([0.31, 0.9])
    expected = torch.stack([bare(samples[None]).last_hidden_state[0].mean(0) for samples in clips])
    torch.testing.assert_close(tower(values, mask).embedding, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_a_mask_padding_counts_as_in_the_original_code(original: EmotionModel, checkpoint: Path) -> None:
    tower = ReLLMEmotionModel.from_pretrained(checkpoint)
    values, mask, _ = padded([0.31, 0.9])
    torch.testing.assert_close(tower(values).dimensions, original(values)[1], rtol=0, atol=1e-6)
    assert not torch.allclose(tower(values, mask).dimensions[0], original(values)[1][0], atol=1e-3)


def test_gradients_reach_every_weight_of_a_tower_in_training() -> None:
    torch.manual_seed(0)
    config = tiny_emotion_config(layers=2)
    config.encoder_config.layerdrop = 0.0
    tower = ReLLMEmotionModel(config).train()
    values, mask, _ = padded([0.5, 0.9])
    tower(values, mask).dimensions.square().mean().backward()
    without = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    assert without <= {"wav2vec2.masked_spec_embed"}
