"""wav2vec2's convolutions as matrix products give what Transformers' own feature encoders give."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_speech_tower
from torch import nn
from transformers import AutoConfig
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder
from transformers.models.wavlm.modeling_wavlm import WavLMFeatureEncoder

from relllm.modeling import audio_tower_relllm, convolution_relllm
from relllm.modeling.audio_tower_relllm import encode_audio
from relllm.modeling.convolution_relllm import can_convolve, convolve

LAYERS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 11)), min_size=1, max_size=5)


def feature_encoder(layers: list[tuple[int, int, int]], bias: bool, activation: str = "gelu") -> nn.Module:
    kernels, strides, widths = zip(*layers, strict=True)
    config = AutoConfig.for_model(
        "wav2vec2",
        conv_kernel=kernels,
        conv_stride=strides,
        conv_dim=widths,
        num_feat_extract_layers=len(layers),
        conv_bias=bias,
        feat_extract_norm="layer",
        feat_extract_activation=activation,
    )
    encoder = Wav2Vec2FeatureEncoder(config).eval()
    for layer in encoder.conv_layers:  # norms that scale and shift, as trained ones do
        nn.init.normal_(layer.layer_norm.weight)
        nn.init.normal_(layer.layer_norm.bias)
    return encoder


@settings(max_examples=50, deadline=None)
@given(
    layers=LAYERS,
    bias=st.booleans(),
    activation=st.sampled_from(["gelu", "relu", "silu"]),
    samples=st.integers(1, 3000),
    at_once=st.sampled_from([1, 7, 100]),
    seed=st.integers(0, 2**16),
)
def test_products_are_the_convolutions_of_any_kernels_and_strides(layers, bias, activation, samples, at_once, seed):
    torch.manual_seed(seed)
    encoder = feature_encoder(layers, bias, activation)
    frames = samples
    for kernel, stride, _ in layers:
        frames = (frames - kernel) // stride + 1
        assume(frames >= 1)
    clips = torch.randn(2, samples + 3)[:, 3:]  # not at the start of its memory
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution_relllm, "FRAMES_AT_ONCE", at_once)
        assert can_convolve(encoder.conv_layers, clips)
        # In float64: a norm over one or two channels that are almost equal magnifies float32's rounding a hundredfold.
        encoder, clips = encoder.double(), clips.double()
        found = convolve(encoder.conv_layers, clips)
        for clip, frames_of_clip in zip(clips, found, strict=True):
            expected = encoder(clip[None])[0].T
            torch.testing.assert_close(frames_of_clip, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("encoder_class", [Wav2Vec2FeatureEncoder, HubertFeatureEncoder, WavLMFeatureEncoder])
def test_products_are_those_of_each_kind_at_the_real_kernels(encoder_class):
    torch.manual_seed(0)
    config = AutoConfig.for_model("wav2vec2", conv_dim=(48,) * 7, feat_extract_norm="layer", conv_bias=True)
    encoder = encoder_class(config).eval()
    clips = [torch.randn(samples) for samples in (400, 16_000, 70_001)]
    with torch.no_grad():
        for clip, found in zip(clips, convolve(encoder.conv_layers, clips), strict=True):
            torch.testing.assert_close(found, encoder(clip[None])[0].T, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's own masks
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_a_tower_gives_what_its_own_forward_gives(kind, monkeypatch):
    tower = tiny_speech_tower(kind)
    waveforms = torch.randn(3, 12_000)
    mask = (torch.arange(12_000)[None] < torch.tensor([12_000, 11_500, 11_111])[:, None]).long()
    calls = []
    monkeypatch.setattr(audio_tower_relllm, "convolve", lambda *args: calls.append(1) or convolve(*args))
    with torch.no_grad():
        output, lengths = encode_audio(tower, waveforms, mask)
        expected = tower(waveforms, attention_mask=mask).last_hidden_state
    assert calls
    for found, own, length in zip(output.last_hidden_state, expected, lengths, strict=True):
        torch.testing.assert_close(found[:length], own[:length], rtol=1e-4, atol=1e-5)


def test_what_trains_or_reports_its_states_takes_the_path_of_transformers(monkeypatch):
    monkeypatch.setattr(audio_tower_relllm, "convolve", lambda *args: pytest.fail("products"))
    tower, waveforms = tiny_speech_tower("wav2vec2"), torch.randn(1, 4000)
    encode_audio(tower, waveforms)[0].last_hidden_state.sum().backward()
    assert tower.feature_extractor.conv_layers[0].conv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        encode_audio(tower.train(), waveforms)
        encode_audio(tower.eval(), waveforms, output_hidden_states=True)


@torch.no_grad()
def test_products_are_for_plain_float32_convolutions_only():
    layers, waveforms = tiny_speech_tower("wav2vec2").feature_extractor.conv_layers, torch.randn(1, 4000)
    assert can_convolve(layers, waveforms)
    assert not can_convolve(layers, waveforms.bfloat16())
    assert not can_convolve(layers, waveforms.to("meta"))
    assert not can_convolve(tiny_speech_tower("wav2vec2-group").feature_extractor.conv_layers, waveforms)
    with torch.enable_grad():
        assert not can_convolve(layers, waveforms)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_convolve(layers, waveforms)
    plain = layers[1].conv
    for other in (nn.Conv1d(12, 12, 3, stride=4, dilation=2), nn.Conv1d(12, 12, 3, stride=4, padding=1)):
        layers[1].conv = other
        assert not can_convolve(layers, waveforms)
    layers[1].conv = nn.utils.parametrizations.weight_norm(plain)
    assert not can_convolve(layers, waveforms)
