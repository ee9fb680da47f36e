"""A batch that a CPU runs in parts gives what the whole batch gives."""

import pytest
import torch
from tiny_models import clip, tiny_emotion_tower

from relllm.modeling import audio_tower_relllm
from relllm.modeling.audio_tower_relllm import encode_audio

DURATIONS_S = (0.5, 0.2, 0.9, 0.3, 0.7)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(clip(duration, seed=index)) for index, duration in enumerate(DURATIONS_S)]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
@pytest.mark.parametrize("rows", [1, 2])
def test_parts_give_the_same_embeddings_as_the_whole_batch(kind, rows, batch, monkeypatch):
    tower = tiny_emotion_tower(kind)
    values, mask = batch
    whole = tower(values, mask)
    widths = []
    tower.encoder.register_forward_hook(lambda module, inputs, output: widths.append(tuple(inputs[0].shape)))
    monkeypatch.setattr(audio_tower_relllm, "_rows_at_once", lambda *_: rows)
    parts = tower(values, mask)
    torch.testing.assert_close(parts.embedding, whole.embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.dimensions, whole.dimensions, rtol=1e-5, atol=1e-6)
    assert parts.last_hidden_state.shape == whole.last_hidden_state.shape
    assert len(widths) == -(-len(values) // rows)
    assert min(width for _, width in widths) < values.shape[1]  # no part is longer than its own clips


def test_hidden_states_come_of_the_whole_batch(batch, monkeypatch):
    tower = tiny_emotion_tower()
    monkeypatch.setattr(audio_tower_relllm, "_rows_at_once", lambda *_: 1)
    output = tower(*batch, output_hidden_states=True)
    assert all(len(states) == len(DURATIONS_S) for states in output.hidden_states)


def test_a_part_holds_as_many_clips_as_the_limit_allows():
    tower = tiny_emotion_tower().encoder
    values_a_sample = tower.config.conv_dim[0] / tower.config.conv_stride[0]
    samples = int(audio_tower_relllm.MAX_CPU_VALUES / values_a_sample / 3)
    assert audio_tower_relllm._rows_at_once(tower, torch.empty(8, samples, device="cpu")) == 3
    assert audio_tower_relllm._rows_at_once(tower, torch.empty(8, 10 * samples, device="cpu")) == 1
    assert audio_tower_relllm._rows_at_once(tower, torch.empty(8, samples, device="meta")) == 8


def test_a_gradient_reaches_every_part(batch, monkeypatch):
    tower = tiny_emotion_tower()
    monkeypatch.setattr(audio_tower_relllm, "_rows_at_once", lambda *_: 1)
    values, mask = batch
    values.requires_grad_(True)
    output, _ = encode_audio(tower.encoder, values, mask)
    output.last_hidden_state.square().sum().backward()
    assert (values.grad.abs().sum(-1) > 0).all()
