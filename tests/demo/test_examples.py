"""The spoken examples: what is written, and what an incomplete folder says."""

import json
from pathlib import Path

import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="needs eSpeak NG (relllm[demo])")

from typer.testing import CliRunner

from relllm.cli import app
from relllm.demo.examples import EXAMPLES, read_examples, write_examples
from relllm.labels import EMOTIONS
from relllm.processing.audio_relllm import load_audio


def test_one_sentence_is_said_in_every_emotion_and_all_clips_are_speech(tmp_path) -> None:
    examples = write_examples(tmp_path)
    first = [example for example in examples if example.text == examples[0].text]
    assert [example.emotion for example in first] == list(EMOTIONS)
    assert 5 <= len(examples) <= 8
    for example in examples:
        info = soundfile.info(example.path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        waveform = load_audio(example.path)
        assert 0.5 < len(waveform) / 16_000 < 5 and 0.05 < abs(waveform).max() <= 1
    assert len({example.path for example in examples}) == len(examples)
    sad, angry = (next(e for e in first if e.emotion == name) for name in ("sad", "angry"))
    assert (
        soundfile.info(sad.path).duration > 1.2 * soundfile.info(angry.path).duration
    )  # 125 against 225 words a minute


def test_the_same_bytes_come_again(tmp_path) -> None:
    first, second = write_examples(tmp_path / "a"), write_examples(tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert Path(one.path).read_bytes() == Path(other.path).read_bytes()


def test_the_command_writes_them_and_says_so(tmp_path) -> None:
    result = CliRunner().invoke(app, ["prepare", "examples", "--out", str(tmp_path / "examples")])
    assert result.exit_code == 0, result.output
    assert [example.text for example in read_examples(tmp_path / "examples")] == [e.text for e in EXAMPLES]


def test_a_folder_without_examples_says_how_to_write_them(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="relllm prepare examples"):
        read_examples(tmp_path)


def test_a_missing_clip_is_named(tmp_path) -> None:
    entry = {"path": "gone.wav", "text": "Hello.", "emotion": "sad", "voice": "en-us"}
    (tmp_path / "examples.json").write_text(json.dumps([entry]))
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        read_examples(tmp_path)
