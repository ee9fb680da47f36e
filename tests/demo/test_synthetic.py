"""The synthetic corpus: bit-identical, free of leaks, with overlapping emotions; and the check of a row."""

import hashlib
import string
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from relllm.data.rows import COLUMNS, Row, validate_row
from relllm.demo.demo_settings import SyntheticSettings
from relllm.demo.espeak import Utterance, speak
from relllm.demo.synthetic import (
    SPLITS,
    VOICES,
    draw_prosody,
    load_synthetic_corpus,
    plan_split,
    speak_rows,
    synthesize_corpus,
)
from relllm.demo.synthetic_text import REPLIES, SENTENCES
from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.processing.audio_relllm import load_audio

pytest.importorskip("espeakng_loader")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def synthesize_tiny(directory: Path, seed: int = 0) -> None:
    sizes = {"train_clips": 2, "validation_clips": 1, "test_clips": 1}
    synthesize_corpus(SyntheticSettings(output_dir=directory, seed=seed, num_proc=1, **sizes), progress=False)


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "corpus"
    synthesize_tiny(directory)
    return directory


# --- the audio -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_corpus_is_bit_identical_when_written_again_later(corpus: Path, tmp_path: Path) -> None:
    time.sleep(1.1)  # eSpeak NG seeds its noise by the second, unless told otherwise; each call starts a process of it
    synthesize_tiny(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(corpus)
    assert sum(name.startswith("audio") for name in digests(corpus)) == 20


def test_a_clip_does_not_depend_on_what_was_said_before() -> None:
    first = Utterance("The train leaves at nine.", "en-us+f3", 50, 50, 175)
    second = Utterance("The dog is in the garden.", "en-gb-x-rp", 70, 90, 220)
    forward, backward = list(speak([first, second, first])), list(speak([second, first]))
    assert forward[0] == forward[2] == backward[1]
    assert forward[1] == backward[0]
    assert forward[0] != forward[1]


def test_an_unknown_voice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nobody.*unknown voice"):
        list(speak([Utterance("Hello.", "nobody", 50, 50, 175)]))


def test_without_the_wheel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install relllm\[demo\]"):
        next(speak([]))


def test_files_are_16_khz_16_bit_mono_speech(corpus: Path) -> None:
    for path in sorted((corpus / "audio").iterdir()):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 0.5 < info.duration < 6.0
        assert np.sqrt(np.mean(load_audio(path) ** 2)) > 0.002


def test_prosody_is_heard_in_the_audio() -> None:
    slow, fast = speak([Utterance("The dog sleeps in the garden.", "en-us", 50, 50, rate) for rate in (125, 225)])
    assert len(slow[0]) > 1.4 * len(fast[0])


# --- the rows --------------------------------------------------------------------------------------------------------


def test_the_reader_gives_valid_rows(corpus: Path) -> None:
    for split, num_rows in zip(SPLITS, (10, 5, 5), strict=True):
        dataset = load_synthetic_corpus(corpus, split)
        assert tuple(dataset.column_names) == COLUMNS and len(dataset) == num_rows
        for row in dataset:
            validate_row(row)
            assert row["split"] == split and Path(row["audio"]).is_file()


def test_a_complete_corpus_is_reused_and_another_one_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    synthesize_tiny(corpus)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    with pytest.raises(FileExistsError, match="Choose another --out"):
        synthesize_tiny(corpus, seed=1)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no data set"):
        synthesize_tiny(tmp_path)


def test_interrupted_it_goes_on_with_the_splits_that_are_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_validation(rows: Sequence[Row], directory: Path, *, seed: int) -> None:
        if rows[0]["split"] == "validation":
            raise KeyboardInterrupt
        speak_rows(rows, directory, seed=seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("relllm.demo.synthetic.speak_rows", stop_at_validation)
        synthesize_tiny(tmp_path / "corpus")
    assert {path.name for path in tmp_path.glob("corpus*")} == {"corpus.journal", "corpus.partial"}
    first = tmp_path / "corpus.partial/audio/train-00000.wav"
    made = first.stat().st_mtime_ns
    synthesize_tiny(tmp_path / "corpus")
    assert (tmp_path / "corpus/audio/train-00000.wav").stat().st_mtime_ns == made
    assert digests(tmp_path / "corpus") == digests(corpus)


def test_reading_what_is_not_there_is_an_error(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No synthetic corpus"):
        load_synthetic_corpus(tmp_path, "train")
    with pytest.raises(ValueError, match="Expected a split of train, validation, test, got 'dev'"):
        load_synthetic_corpus(corpus, "dev")
    with pytest.raises(ValueError, match="at least 1 test clip"):
        list(plan_split("test", 0))


# --- the plan --------------------------------------------------------------------------------------------------------


def test_splits_share_no_voice_and_no_sentence() -> None:
    rows = {split: [clip.row for clip in plan_split(split, 40)] for split in SPLITS}
    for column in ("speaker", "text"):
        seen = [{row[column] for row in rows[split]} for split in SPLITS]
        assert len(set.union(*seen)) == sum(len(values) for values in seen)
    train_variants = {voice.partition("+")[2] for voice in VOICES["train"] + VOICES["validation"]}
    assert not train_variants & {voice.partition("+")[2] for voice in VOICES["test"]}


def test_neither_voice_nor_sentence_gives_the_emotion_away() -> None:
    pairs = {emotion: [] for emotion in EMOTIONS}
    for clip in plan_split("train", 50):
        pairs[clip.row["emotion"]].append((clip.row["speaker"], clip.row["text"]))
    assert all(said == pairs["neutral"] for said in pairs.values())
    assert len(set(pairs["neutral"])) == 50


def test_a_larger_corpus_begins_with_the_smaller_one() -> None:
    small, large = list(plan_split("train", 3)), list(plan_split("train", 6))
    assert large[: len(small)] == small
    assert list(plan_split("train", 3, seed=1)) != small


def test_the_distributions_of_the_emotions_overlap() -> None:
    drawn = {
        emotion: np.array(
            [
                (prosody.pitch, prosody.pitch_range, prosody.rate, prosody.gain)
                for prosody in (draw_prosody(emotion, np.random.default_rng(seed)) for seed in range(300))
            ]
        )
        for emotion in EMOTIONS
    }
    low, high = ({emotion: extreme(drawn[emotion], axis=0) for emotion in EMOTIONS} for extreme in (np.min, np.max))
    for emotion in EMOTIONS:  # in every parameter at once, its range meets that of another emotion
        others = [other for other in EMOTIONS if other != emotion]
        assert any(np.all((low[other] < high[emotion]) & (high[other] > low[emotion])) for other in others)


def test_targets_are_in_range_and_vary_within_an_emotion() -> None:
    rows = [clip.row for clip in plan_split("train", 100)]
    for dimension in DIMENSIONS:
        for emotion in EMOTIONS:
            values = np.array([row[dimension] for row in rows if row["emotion"] == emotion])
            assert values.min() >= 0 and values.max() <= 1
            assert values.std() > 0.02


def test_replies_ask_about_the_topic_and_sentences_name_no_emotion() -> None:
    topics = {sentence.text: sentence.topic for sentences in SENTENCES.values() for sentence in sentences}
    for clip in plan_split("test", 40):
        assert topics[clip.row["text"]] in clip.row["response"] and "?" in clip.row["response"]
    words = {word.strip(string.punctuation).lower() for text in topics for word in text.split()}
    assert not words & {*EMOTIONS, "glad", "sorry", "upset", "wonderful", "terrible", "suddenly"}
    assert all(len(set(replies)) == len(replies) == 3 for replies in REPLIES.values())


# --- the check of a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "non-empty string"),
        ({"id": None}, "non-empty string"),
        ({"emotoin": "sad"}, r"Row 'a1': unknown columns \['emotoin'\]"),
        ({"audio": None}, "Row 'a1': no audio"),
        ({"emotion": "ang"}, "Row 'a1': emotion 'ang' is not canonical"),
        ({"arousal": 4.5}, r"Row 'a1': arousal is 4\.5, expected \[0, 1\]"),
        ({"valence": float("nan")}, "Row 'a1': valence is nan"),
        ({"dominance": "0.5"}, "Row 'a1': dominance is '0.5'"),
        ({"speaker": 3}, "Row 'a1': speaker is 3, expected a string"),
        ({"style": 3, "text": 3, "gender": 3, "events": "x"}, "Row 'a1': style is 3"),  # the first of the row
        (
            {"dimension_source": "guess"},
            "Row 'a1': dimension_source is 'guess', expected 'label', 'pseudo:<model id>'",
        ),
    ],
)
def test_a_bad_row_is_named(changes: dict[str, object], message: str) -> None:
    row = {"id": "a1", "audio": "a1.wav", "emotion": "sad", "arousal": 0.2, "valence": None}
    validate_row(row)
    with pytest.raises(ValueError, match=message):
        validate_row(row | changes)


def test_the_table_holds_paths_relative_to_the_corpus(corpus: Path) -> None:
    for path in (corpus / "data").iterdir():
        for audio in pyarrow.parquet.read_table(path)["audio"].to_pylist():
            assert not Path(audio).is_absolute() and (corpus / audio).is_file()
