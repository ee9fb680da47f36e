"""The effects of augmentation, one function each: speed, reverberation, noise, gain, telephone band, codecs.

What lives here: samples and numbers in, samples out; the same input gives the same output. What does not: which effect
a clip gets and how strong (`augmentation.py`).

Waveforms are `(samples,)`, float32, in [-1, 1]. An effect whose result would exceed full scale scales the whole clip
down to it, because clipping would add a distortion that nobody asked for. Every effect but speed keeps the length.
"""

import functools
import io

import numpy as np
import soundfile

from relllm.processing.audio_relllm import SAMPLING_RATE, resample

TELEPHONE_BAND_HZ = (300.0, 3400.0)
_TELEPHONE_TAPS = 511  # at 16 kHz: the edges of the band are about 110 Hz wide
_KAISER_BETA = 6.0  # some 60 dB down outside the band

# Name -> container and encoding, as libsndfile calls them.
CODECS = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "ulaw": ("WAV", "ULAW")}


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Plays a clip faster or slower, like a tape: duration is divided by `speed`, every frequency multiplied by it.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): At any rate.
        speed (`float`): Rounded to 0.01; 1.1 is a tenth faster, and some 1.65 semitones higher.

    Returns:
        `np.ndarray` of shape `(ceil(samples / speed),)`.
    """
    percent = round(100 * speed)  # a whole number keeps the resampling filter small
    return within_full_scale(resample(waveform, percent * SAMPLING_RATE // 100, SAMPLING_RATE))


def add_reverberation(waveform: np.ndarray, rng: np.random.Generator, rt60_s: float, sampling_rate: int) -> np.ndarray:
    """Puts a clip into a room whose echo is noise that decays by 60 dB in `rt60_s`, as strong as the direct sound.

    A model of the late reverberation alone: no early reflections, and all frequencies decay alike.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): The echo after its end is cut off.
        rng (`np.random.Generator`): Draws the echo.
        rt60_s (`float`): Reverberation time in seconds.
        sampling_rate (`int`): In Hz.

    Returns:
        `np.ndarray` of shape `(samples,)`: As loud (RMS) as before.
    """
    num_samples = max(round(rt60_s * sampling_rate), 2)
    tail = rng.standard_normal(num_samples) * 10 ** (-3 * np.arange(num_samples) / num_samples)
    tail[0] = 0
    response = tail / np.linalg.norm(tail)
    response[0] = 1
    wet = _convolve(waveform, response)[: len(waveform)]
    power = np.mean(wet**2)
    if power > 0:
        wet *= np.sqrt(np.mean(waveform.astype(np.float64) ** 2) / power)
    return within_full_scale(wet.astype(np.float32))


def draw_noise(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Gaussian noise, white or pink (power falls with 1 / frequency), each half of the time.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: float32, of variance about 1.
    """
    is_pink = rng.random() < 0.5
    noise = rng.standard_normal(num_samples)
    if is_pink:
        spectrum = np.fft.rfft(noise)
        spectrum[0] = 0
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        noise = np.fft.irfft(spectrum, num_samples)
        noise /= noise.std()
    return noise.astype(np.float32)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Adds noise at a signal-to-noise ratio: mean power of the whole clip over mean power of the noise.

    Args:
        waveform, noise (`np.ndarray` of shape `(samples,)`): Of equal length.
        snr_db (`float`): In dB.

    Returns:
        `np.ndarray` of shape `(samples,)`: The clip itself where clip or noise is silent: no ratio exists.
    """
    signal_power, noise_power = (np.mean(values.astype(np.float64) ** 2) for values in (waveform, noise))
    if signal_power == 0 or noise_power == 0:
        return waveform
    scale = np.sqrt(signal_power / noise_power) * 10 ** (-snr_db / 20)
    return within_full_scale((waveform + scale * noise).astype(np.float32))


def change_gain(waveform: np.ndarray, gain_db: float) -> np.ndarray:
    """Makes a clip louder or quieter; no louder than full scale.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): At any rate.
        gain_db (`float`): In dB of amplitude.
    """
    return within_full_scale((waveform * 10 ** (gain_db / 20)).astype(np.float32))


def pass_telephone(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """What a telephone line leaves: 300 to 3400 Hz, which its 8000 samples a second hold without loss.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): The result has the same length and no delay.
        sampling_rate (`int`): In Hz.
    """
    delay = _TELEPHONE_TAPS // 2
    narrow = _convolve(waveform, _telephone_filter(sampling_rate))[delay : delay + len(waveform)]
    return within_full_scale(narrow.astype(np.float32))


def pass_codec(waveform: np.ndarray, codec: str, compression: float, sampling_rate: int) -> np.ndarray:
    """Encodes and decodes a clip in memory.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): In [-1, 1].
        codec (`str`): One of `CODECS`; `"ulaw"` is the 8 bit of digital telephony, at `sampling_rate`.
        compression (`float`): From 0 (best quality) to 0.99, for MP3 and Opus.
        sampling_rate (`int`): In Hz; Opus takes 8, 12, 16, 24 and 48 kHz.

    Returns:
        `np.ndarray` of shape `(samples,)`: As libsndfile decodes it.
    """
    container, encoding = CODECS[codec]
    buffer = io.BytesIO()
    options = {} if codec == "ulaw" else {"compression_level": compression}
    soundfile.write(buffer, within_full_scale(waveform), sampling_rate, format=container, subtype=encoding, **options)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    return within_full_scale(_fit(decoded, len(waveform)))


def within_full_scale(waveform: np.ndarray) -> np.ndarray:
    """The clip, scaled down as a whole where it exceeds [-1, 1]."""
    peak = float(np.abs(waveform).max())
    # Divided in float64 and rounded to float32, the peak is 1 exactly.
    return waveform if peak <= 1 else (waveform.astype(np.float64) / peak).astype(np.float32)


@functools.cache
def _telephone_filter(sampling_rate: int) -> np.ndarray:
    """A band pass of linear phase: the difference of two windowed sinc low passes."""
    time = np.arange(_TELEPHONE_TAPS) - _TELEPHONE_TAPS // 2
    low, high = (2 * edge / sampling_rate for edge in TELEPHONE_BAND_HZ)
    band = high * np.sinc(high * time) - low * np.sinc(low * time)
    return band * np.kaiser(_TELEPHONE_TAPS, _KAISER_BETA)


def _convolve(waveform: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The full convolution, by FFT, `(samples + taps - 1,)` in float64."""
    num_samples = len(waveform) + len(kernel) - 1
    size = 1 << (num_samples - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(kernel, size), size)[:num_samples]


def _fit(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut, or padded with zeros: the block sizes of codecs leave a few samples too many or too few."""
    return np.pad(waveform[:num_samples], (0, max(num_samples - len(waveform), 0)))


__all__ = [
    "CODECS",
    "TELEPHONE_BAND_HZ",
    "add_noise",
    "add_reverberation",
    "change_gain",
    "change_speed",
    "draw_noise",
    "pass_codec",
    "pass_telephone",
    "within_full_scale",
]
