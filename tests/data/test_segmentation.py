"""`cut_into_turns`: turns of a recording whose utterances and silences are known to the sample."""

import builtins
import sys

import numpy as np
import pytest
import torch

from relllm.data import segmentation
from relllm.data.segmentation import cut_into_turns
from relllm.demo.espeak import Utterance, speak
from relllm.processing.audio_relllm import resample

RATE = 16_000
SENTENCES = (
    "I am so sorry to hear that, what happened?",
    "They lost my luggage again and nobody answers.",
    "That is wonderful news, tell me more about it!",
)


@pytest.fixture(scope="module")
def utterances() -> list[np.ndarray]:
    """Three sentences at 16 kHz, without the silence before and after them."""
    spoken = []
    for samples, rate in speak(Utterance(text, "en-us", 50, 50, 160) for text in SENTENCES):
        wave = resample(np.frombuffer(samples, "<i2").astype(np.float32) / 32768, rate, RATE)
        loud = np.flatnonzero(np.abs(wave) > 0.02)
        spoken.append(wave[loud[0] : loud[-1] + 1])
    return spoken


def silence(duration_s: float) -> np.ndarray:
    """A quiet room: noise 66 dB below full scale."""
    noise = np.random.default_rng(0).standard_normal(round(duration_s * RATE))
    return (5e-4 * noise).astype(np.float32)


def recording_of(pieces: list[np.ndarray], silences_s: list[float]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Silence, speech, silence, speech, …, silence, and where the speech is, in seconds."""
    parts, turns, position = [silence(silences_s[0])], [], len(silence(silences_s[0]))
    for piece, after_s in zip(pieces, silences_s[1:], strict=True):
        turns.append((position / RATE, (position + len(piece)) / RATE))
        parts += [piece, silence(after_s)]
        position += len(piece) + len(parts[-1])
    return np.concatenate(parts), turns


def test_turns_begin_and_end_where_the_speech_does(utterances: list[np.ndarray]) -> None:
    recording, expected = recording_of(utterances, [1.0, 0.9, 2.5, 1.2])
    found = cut_into_turns(recording, padding_s=0.0)
    assert np.abs(np.array(found) - np.array(expected)).max() < 0.2


def test_padding_is_kept_around_a_turn_and_turns_do_not_overlap(utterances: list[np.ndarray]) -> None:
    recording, _ = recording_of(utterances, [1.0, 0.9, 0.9, 1.2])
    bare = np.array(cut_into_turns(recording, padding_s=0.0))
    padded = np.array(cut_into_turns(recording, padding_s=0.25))
    np.testing.assert_allclose(padded - bare, [[-0.25, 0.25]] * 3, atol=0.002)
    wide = np.array(cut_into_turns(recording, padding_s=3.0))
    assert (wide[:-1, 1] <= wide[1:, 0]).all() and wide[0, 0] == 0 and wide[-1, 1] <= len(recording) / RATE


def test_a_pause_shorter_than_min_silence_does_not_end_a_turn(utterances: list[np.ndarray]) -> None:
    recording, _ = recording_of(utterances[:2], [0.5, 0.9, 0.5])
    assert len(cut_into_turns(recording, min_silence_s=0.5)) == 2
    assert len(cut_into_turns(recording, min_silence_s=2.0)) == 1


@pytest.mark.parametrize("quiet", [np.zeros(3 * RATE, np.float32), silence(3.0)], ids=["zeros", "noise"])
def test_silence_gives_no_turn(quiet: np.ndarray) -> None:
    assert cut_into_turns(quiet) == []


def test_speech_shorter_than_min_speech_is_no_turn(utterances: list[np.ndarray]) -> None:
    recording, _ = recording_of(utterances[:1], [0.5, 0.5])
    assert len(cut_into_turns(recording)) == 1 and cut_into_turns(recording, min_speech_s=20.0) == []


def test_a_long_turn_is_cut_at_its_quietest_pause(utterances: list[np.ndarray]) -> None:
    recording, parts = recording_of(utterances, [0.3, 0.35, 0.35, 0.3])
    whole = cut_into_turns(recording, min_silence_s=1.0)
    longest = max(end - start for start, end in parts) + 0.6  # one sentence and its pauses, not two
    found = cut_into_turns(recording, min_silence_s=1.0, max_turn_s=longest)
    assert len(whole) == 1 and len(found) == 3
    for (_, end), (_, before), (after, _) in zip(found[:-1], parts[:-1], parts[1:], strict=True):
        assert before < end < after
    assert [end for _, end in found[:-1]] == [start for start, _ in found[1:]]  # nothing is lost at a cut
    assert (found[0][0], found[-1][1]) == whole[0]
    assert all(end - start <= longest for start, end in found)


def test_a_long_turn_without_a_pause_is_cut_all_the_same(utterances: list[np.ndarray]) -> None:
    endless = np.concatenate([*utterances, *utterances])
    found = cut_into_turns(endless, max_turn_s=2.0, min_silence_s=1.0)
    lengths = [end - start for start, end in found]
    assert max(lengths) <= 2.0 and min(lengths[:-1]) >= 0.99 and lengths[-1] >= 0.025


def test_another_rate_gives_the_same_turns(utterances: list[np.ndarray]) -> None:
    recording, expected = recording_of(utterances, [1.0, 0.9, 2.5, 1.2])
    found = cut_into_turns(resample(recording, RATE, 44_100), sampling_rate=44_100, padding_s=0.0)
    assert np.abs(np.array(found) - np.array(expected)).max() < 0.2


def test_one_recording_leaves_no_trace_in_the_next(utterances: list[np.ndarray]) -> None:
    first, second = (recording_of([piece], [0.7, 0.7])[0] for piece in utterances[:2])
    alone = cut_into_turns(second)
    cut_into_turns(first)
    assert cut_into_turns(second) == alone


def test_the_model_is_loaded_once_and_leaves_torchs_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in [name for name in sys.modules if name.split(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)
    segmentation.load_detector.cache_clear()
    try:
        assert segmentation.load_detector() is segmentation.load_detector()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)
        segmentation.load_detector.cache_clear()


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_silero(name: str, *args: object, **kwargs: object) -> object:
        if name == "silero_vad":
            raise ImportError("No module named 'silero_vad'")
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_silero)
    segmentation.load_detector.cache_clear()
    with pytest.raises(ImportError, match=r"pip install relllm\[vad\]"):
        cut_into_turns(silence(1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.0}, "threshold must be in"),
        ({"padding_s": -0.1}, "must be >= 0"),
        ({"max_turn_s": 0.5}, "max_turn_s must be at least 1 s"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_into_turns(silence(1.0), **change)


def test_a_waveform_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        cut_into_turns(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        cut_into_turns(np.full(RATE, np.nan, np.float32))
