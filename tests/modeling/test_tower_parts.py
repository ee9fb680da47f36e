"""A ragged batch runs in groups of like length, and each clip's frames are those that it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    SPEECH_TOWERS,
    clip,
    tiny_audio_config,
    tiny_config,
    tiny_emotion_tower,
    tiny_extractor,
    tiny_model,
    tiny_speech_tower,
)
from torch import Tensor, nn

from relllm import ReLLMConfig
from relllm.modeling import audio_tower_relllm
from relllm.modeling.audio_tower_relllm import build_tower, encode_audio, group_by_length
from relllm.modeling.hearing_relllm import ReLLMHearing

DURATIONS_S = (0.5, 0.2, 0.9, 0.3, 0.88, 0.51)
GROUPS = [[2, 4], [5, 0], [3], [1]]  # by hand: none below 0.9 of the longest of its group


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return pad([torch.from_numpy(clip(duration, seed=index)) for index, duration in enumerate(DURATIONS_S)])


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    padded = nn.utils.rnn.pad_sequence
    return padded(rows, batch_first=True), padded([torch.ones(len(row), dtype=torch.long) for row in rows], True)


def speech_inputs(kind: str, durations_s: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    extractor = tiny_extractor(tiny_config(audio=kind))
    features = extractor([clip(duration, seed=index) for index, duration in enumerate(durations_s)])
    return features["input_features"], features["input_features_mask"]


def encoder(kind: str) -> nn.Module:
    tower = tiny_speech_tower(kind, layers=2)
    return tower.get_encoder() if kind == "whisper" else tower


def ran(tower: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and width of what runs from now on, group after group."""
    seen: list[tuple[int, int]] = []
    for name in ("_encode_mel", "_encode_waveforms"):
        inner = getattr(audio_tower_relllm, name)

        def wrapped(tower, inputs, *args, inner=inner, **kwargs):
            seen.append((inputs.shape[0], inputs.shape[-1]))
            return inner(tower, inputs, *args, **kwargs)

        monkeypatch.setattr(audio_tower_relllm, name, wrapped)
    return seen


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's own masks
@pytest.mark.parametrize("gradient", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("kind", SPEECH_TOWERS)
def test_a_clip_has_the_same_frames_alone_and_in_a_ragged_batch(kind, gradient):
    tower = encoder(kind)
    inputs, mask = speech_inputs(kind, DURATIONS_S)
    with torch.set_grad_enabled(gradient):
        output, lengths = encode_audio(tower, inputs, mask)
        assert output.last_hidden_state.shape[1] == lengths.max()
        for row, own, found, length in zip(inputs, mask, output.last_hidden_state, lengths, strict=True):
            alone, _ = encode_audio(tower, row[None, ..., : own.sum()])
            assert alone.last_hidden_state.shape[1] == length
            torch.testing.assert_close(found[:length], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "hubert-group"])
def test_no_group_has_more_padding_than_its_slack(kind, monkeypatch):
    tower = encoder(kind)
    inputs, mask = speech_inputs(kind, DURATIONS_S)
    seen = ran(tower, monkeypatch)
    encode_audio(tower, inputs, mask)
    padding = 1 - int(mask.sum()) / sum(rows * width for rows, width in seen)
    assert padding <= (0 if kind == "hubert-group" else audio_tower_relllm.CPU_SLACK)
    assert 1 - int(mask.sum()) / mask.numel() > 0.3  # the batch itself has much
    assert [rows for rows, _ in seen] == ([1] * 6 if kind == "hubert-group" else [len(group) for group in GROUPS])


def test_groups_are_those_made_by_hand():
    assert group_by_length([round(1000 * duration) for duration in DURATIONS_S], 0.1, 1e9) == GROUPS
    assert group_by_length([7, 7, 7, 7], 0.0, 14) == [[0, 1], [2, 3]]
    assert group_by_length([100, 7], 1.0, 10) == [[0], [1]]  # one clip at least
    assert group_by_length([3, 900, 1], 1.0, float("inf")) == [[1, 0, 2]]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    slack=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    most=st.sampled_from([1.0, 4000.0, 20000.0, float("inf")]),
)
def test_groups_hold_every_clip_once_and_keep_both_limits(sizes, slack, most):
    groups = group_by_length(sizes, slack, most)
    assert sorted(place for group in groups for place in group) == list(range(len(sizes)))
    for group in groups:
        longest = max(sizes[place] for place in group)
        assert sizes[group[0]] == longest
        assert all(sizes[place] >= (1 - slack) * longest for place in group)
        assert len(group) == 1 or len(group) * longest <= most
    if slack == 1.0 and most == float("inf"):
        assert len(groups) == 1


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "wav2vec2-group"])
def test_an_accelerator_runs_a_batch_whole_but_where_a_norm_allows_no_padding(kind):
    tower, sizes = build_tower(tiny_audio_config(kind, layers=2)), [100, 80, 30, 30]
    groups = group_by_length(sizes, *audio_tower_relllm._limits(tower, torch.device("cuda"), {}))
    assert groups == ([[0], [1], [2, 3]] if kind == "wav2vec2-group" else [[0, 1, 2, 3]])


def test_a_group_is_no_larger_than_the_limit_for_a_cpu_allows(monkeypatch):
    tower = tiny_emotion_tower(layers=2)
    values, mask = pad([torch.from_numpy(clip(0.5, seed=index)) for index in range(5)])
    whole = tower(values, mask)
    config = tower.encoder.config
    first_convolution = config.conv_dim[0] * values.shape[1] / config.conv_stride[0]
    monkeypatch.setattr(audio_tower_relllm, "MAX_CPU_VALUES", 2 * first_convolution)
    seen = ran(tower.encoder, monkeypatch)
    parts = tower(values, mask)
    assert [rows for rows, _ in seen] == [2, 2, 1]
    torch.testing.assert_close(parts.embedding, whole.embedding, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.dimensions, whole.dimensions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_hidden_states_come_of_the_whole_batch(kind):
    inputs, mask = speech_inputs(kind, DURATIONS_S)
    output, _ = encode_audio(encoder(kind), inputs, mask, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert all(len(states) == len(DURATIONS_S) for states in output.hidden_states)


def test_a_gradient_reaches_every_group(batch):
    tower = tiny_emotion_tower(layers=2)
    values, mask = batch
    values.requires_grad_(True)
    output, _ = encode_audio(tower.encoder, values, mask)
    output.last_hidden_state.square().sum().backward()
    assert (values.grad.abs().sum(-1) > 0).all()


def test_a_clip_as_long_as_the_window_leaves_the_others_in_the_cheap_mode():
    tower = encoder("whisper")
    both, alone = speech_inputs("whisper", (2.0, 0.7)), speech_inputs("whisper", (2.0,))
    short, _ = encode_audio(tower, *(tensor[1:, ..., : both[1][1].sum()] for tensor in both))
    output, lengths = encode_audio(tower, *both)
    torch.testing.assert_close(output.last_hidden_state[1, : lengths[1]], short.last_hidden_state[0])
    long, _ = encode_audio(tower, *alone)
    torch.testing.assert_close(output.last_hidden_state[0], long.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    window = tower(alone[0][..., :200]).last_hidden_state  # a full clip: both modes are the same
    torch.testing.assert_close(long.last_hidden_state, window, rtol=1e-4, atol=1e-5)


def test_more_than_the_window_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="at most 200 mel frames, got 201"):
        encode_audio(encoder("whisper"), torch.zeros(1, 16, 201))


def test_the_host_asks_for_the_lengths_once(monkeypatch):
    asked = []
    inner = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append(1) or inner(self))
    encode_audio(encoder("whisper"), *speech_inputs("whisper", DURATIONS_S))
    assert len(asked) == 1


@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
def test_the_hearing_half_alone_hears_what_the_model_hears_from_the_same_names(fusion: str) -> None:
    """An engine with an LLM of its own takes this half from a checkpoint."""

    class Alone(ReLLMHearing):
        def __init__(self, config: ReLLMConfig) -> None:
            super().__init__()
            self.config = config
            self.make_hearing(config)

    model = tiny_model(fusion=fusion)
    half = Alone(model.config).eval()
    state = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    half.load_state_dict({name: weight for name, weight in state.items() if not name.startswith("text_model.")})
    features = tiny_extractor(model.config)([clip(0.5), clip(2.5, seed=1)])
    features.pop("num_audio_tokens")
    with torch.no_grad():
        found, expected = half.get_audio_features(**features), model.get_audio_features(**features)
    for name in ("pooler_output", "emotion_logits", "dimensions"):
        assert torch.equal(found[name], expected[name])
