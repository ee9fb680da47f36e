"""The effects of augmentation, each measured by something that knows nothing of how it was made."""

import io

import numpy as np
import pytest
import scipy.signal
import soundfile

from relllm.training.augmentation import (
    CODECS,
    add_noise,
    add_reverberation,
    change_gain,
    change_speed,
    draw_noise,
    pass_codec,
    pass_telephone,
    within_full_scale,
)

RATE = 16_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sine(frequency_hz: float, duration_s: float = 1.0, amplitude: float = 0.3) -> np.ndarray:
    time_s = np.arange(round(duration_s * RATE)) / RATE
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def noise(duration_s: float = 1.0, amplitude: float = 0.1) -> np.ndarray:
    return (amplitude * rng(7).standard_normal(round(duration_s * RATE))).astype(np.float32)


def loudest_frequency(waveform: np.ndarray) -> float:
    """In Hz, between the bins of a long FFT."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)), 2**20))
    return float(np.argmax(spectrum)) * RATE / 2**20


def power_db(waveform: np.ndarray) -> float:
    return 10 * np.log10(np.mean(waveform.astype(np.float64) ** 2))


@pytest.mark.parametrize("speed", [0.8, 0.93, 1.1, 1.37])
def test_speed_divides_the_length_and_multiplies_the_frequency(speed: float) -> None:
    faster = change_speed(sine(440.0, 2.0), speed)
    assert len(faster) == pytest.approx(2 * RATE / speed, abs=1)
    assert loudest_frequency(faster) == pytest.approx(440 * speed, rel=1e-3)
    assert power_db(faster) == pytest.approx(power_db(sine(440.0, 2.0)), abs=0.1)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_noise_has_the_stated_ratio_to_the_clip(snr_db: float, seed: int) -> None:
    clean = sine(300.0, amplitude=0.02)
    added = add_noise(clean, draw_noise(rng(seed), len(clean)), snr_db) - clean
    assert power_db(clean) - power_db(added) == pytest.approx(snr_db, abs=0.02)


def test_made_noise_is_white_or_pink() -> None:
    slopes = set()
    for seed in range(12):
        frequencies, density = scipy.signal.welch(draw_noise(rng(seed), 8 * RATE), RATE, nperseg=4096)
        band = (frequencies > 50) & (frequencies < 7000)
        slope = np.polyfit(np.log2(frequencies[band]), 10 * np.log10(density[band]), 1)[0]  # dB an octave
        assert min(abs(slope), abs(slope + 3.01)) < 0.3
        slopes.add(round(slope / 3))
    assert slopes == {0, -1}


def test_silence_has_no_ratio_and_stays_silent() -> None:
    quiet = np.zeros(RATE, np.float32)
    assert np.array_equal(add_noise(quiet, noise(), 10.0), quiet)
    assert np.array_equal(add_noise(noise(), quiet, 10.0), noise())


@pytest.mark.parametrize("rt60_s", [0.2, 0.6, 1.2])
def test_reverberation_decays_as_fast_as_stated(rt60_s: float) -> None:
    impulse = np.zeros(3 * RATE, np.float32)
    impulse[0] = 0.5
    response = add_reverberation(impulse, rng(), rt60_s, RATE).astype(np.float64)
    decay_db = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1][: round(rt60_s * RATE)] / np.sum(response**2))
    steady = (decay_db < -5) & (decay_db > -35)  # Schroeder's curve, as for T30
    slope = np.polyfit(np.flatnonzero(steady) / RATE, decay_db[steady], 1)[0]
    assert -60 / slope == pytest.approx(rt60_s, rel=0.06)
    assert response[0] ** 2 == pytest.approx(np.sum(response[1:] ** 2), rel=1e-3)  # as much echo as direct sound


def test_reverberation_keeps_length_and_loudness() -> None:
    wet = add_reverberation(noise(2.0), rng(), 0.4, RATE)
    assert wet.shape == noise(2.0).shape and power_db(wet) == pytest.approx(power_db(noise(2.0)), abs=0.01)


@pytest.mark.parametrize("gain_db", [-20.0, -3.0, 6.0])
def test_gain_is_in_decibels(gain_db: float) -> None:
    assert power_db(change_gain(noise(), gain_db)) - power_db(noise()) == pytest.approx(gain_db, abs=1e-3)


def test_a_telephone_passes_its_band_and_nothing_else() -> None:
    heard = pass_telephone(noise(4.0), RATE)
    frequencies, before = scipy.signal.welch(noise(4.0), RATE, nperseg=2048)
    _, after = scipy.signal.welch(heard, RATE, nperseg=2048)
    change_db = 10 * np.log10(after / before)
    inside = (frequencies > 400) & (frequencies < 3300)
    outside = ((frequencies > 20) & (frequencies < 200)) | (frequencies > 3500)
    assert np.abs(change_db[inside]).max() < 1.0 and change_db[outside].max() < -40


def test_a_telephone_neither_delays_nor_cuts() -> None:
    for length in (RATE, RATE + 1, 12_345):
        heard = pass_telephone(sine(1000.0, 2.0)[:length], RATE)
        assert len(heard) == length
        middle = slice(2000, length - 2000)
        np.testing.assert_allclose(heard[middle], sine(1000.0, 2.0)[:length][middle], atol=0.01)


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_is_what_soundfile_reads_back(codec: str) -> None:
    clip = sine(440.0) + noise(amplitude=0.02)
    buffer = io.BytesIO()
    container, encoding = CODECS[codec]
    options = {} if codec == "ulaw" else {"compression_level": 0.6}
    soundfile.write(buffer, clip, RATE, format=container, subtype=encoding, **options)
    buffer.seek(0)
    expected = soundfile.read(buffer, dtype="float32")[0]
    heard = pass_codec(clip, codec, 0.6, RATE)
    np.testing.assert_allclose(heard, expected[: len(clip)], atol=1e-6)
    assert 5 < power_db(clip) - power_db(heard - clip) < 60  # it lost something, and is not delayed


def test_mu_law_has_the_levels_of_the_standard() -> None:
    ramp = np.linspace(-0.95, 0.95, RATE).astype(np.float32)
    levels = np.unique(pass_codec(ramp, "ulaw", 0.0, RATE))
    assert len(levels) <= 256
    steps = np.diff(levels[levels >= 0])
    assert steps.max() / steps[steps > 0].min() == pytest.approx(128, rel=0.02)  # eight segments, each twice as wide


def test_more_compression_loses_more() -> None:
    clip = sine(440.0) + noise(amplitude=0.05)
    for codec in ("mp3", "opus"):
        good, bad = (power_db(pass_codec(clip, codec, level, RATE) - clip) for level in (0.2, 0.97))
        assert bad > good + 3


EFFECTS = {
    "speed": lambda clip: change_speed(clip, 0.9),
    "reverb": lambda clip: add_reverberation(clip, rng(), 0.3, RATE),
    "noise": lambda clip: add_noise(clip, draw_noise(rng(), len(clip)), 5.0),
    "gain": lambda clip: change_gain(clip, 12.0),
    "telephone": lambda clip: pass_telephone(clip, RATE),
    "mp3": lambda clip: pass_codec(clip, "mp3", 0.9, RATE),
    "opus": lambda clip: pass_codec(clip, "opus", 0.9, RATE),
    "ulaw": lambda clip: pass_codec(clip, "ulaw", 0.0, RATE),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_effect_gives_finite_float32_within_full_scale(name: str) -> None:
    loud = np.sign(sine(200.0)).astype(np.float32)  # a square wave at full scale: filters overshoot on it
    for clip in (loud, 1.5 * loud, np.zeros(RATE, np.float32), noise(0.025)):
        given = clip.copy()
        heard = EFFECTS[name](clip)
        assert heard.dtype == np.float32 and np.isfinite(heard).all() and np.abs(heard).max() <= 1
        assert len(heard) == (np.ceil(len(clip) / 0.9) if name == "speed" else len(clip))
        assert np.array_equal(clip, given)


def test_full_scale_is_reached_by_scaling_and_not_by_clipping() -> None:
    clip = sine(300.0, amplitude=0.8)
    loud = change_gain(clip, 12.0)
    assert np.abs(loud).max() == pytest.approx(1.0)
    np.testing.assert_allclose(loud, clip / np.abs(clip).max(), atol=1e-6)
    assert within_full_scale(clip) is clip
