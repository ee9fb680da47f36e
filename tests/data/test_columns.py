"""Columns of data sets as the Hub has them, saved and read again: class labels, spellings, audio within messages."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable

from relllm import load_corpus
from relllm.data.columns import normalize_columns

NAMES = ["sad", "Happiness", "boredom", "other"]


@pytest.fixture
def clip_path(tmp_path: Path) -> str:
    soundfile.write(tmp_path / "clip.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16_000)
    return str(tmp_path / "clip.wav")


def saved(rows: dict, folder: Path, **types: object) -> str:
    dataset = Dataset.from_dict(rows)
    for name, feature in types.items():
        dataset = dataset.cast_column(name, feature)
    dataset.save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_labels_are_read_by_their_names_and_names_in_one_spelling(
    streaming: bool, clip_path: str, tmp_path: Path
) -> None:
    numbers = saved(
        {"audio": [clip_path] * 5, "emotion": [0, 1, 2, 3, -1]}, tmp_path / "a", emotion=ClassLabel(names=NAMES)
    )
    names = saved({"audio": [clip_path] * 5, "emotion": ["sad", "hap", "boredom", "xxx", "a"]}, tmp_path / "b")
    assert [row["emotion"] for row in load_corpus(numbers, streaming=streaming)] == [
        "sad",
        "happy",
        "boredom",
        None,
        None,
    ]
    # A letter is whatever its corpus says, and stays.
    assert [row["emotion"] for row in load_corpus(names, streaming=streaming)] == [
        "sad",
        "happy",
        "boredom",
        None,
        "a",
    ]


def test_labels_of_several_clips_and_names_that_are_right_already(clip_path: str, tmp_path: Path) -> None:
    labels = List(ClassLabel(names=NAMES))
    several = saved({"audios": [[clip_path, clip_path]], "emotion": [[1, 0]]}, tmp_path / "a", emotion=labels)
    assert load_corpus(several)[0]["emotion"] == ["happy", "sad"]
    right = Dataset.from_dict({"emotion": ["sad", None, "happy"]})
    assert normalize_columns(right) is right  # nothing is copied


def test_numbers_without_names_are_refused(clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"numbers without names.*ClassLabel\(names=\["):
        load_corpus(saved({"audio": [clip_path], "emotion": [3]}, tmp_path / "a"))


def test_dimensions_on_another_scale_are_refused_with_their_limits(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("audio,valence\na.wav,1\nb.wav,4.5\nc.wav,\n")
    with pytest.raises(ValueError, match=r"valence goes from 1 to 4\.5, and 1 of 2 values are outside \[0, 1\]"):
        load_corpus(tmp_path / "rows.csv")


def test_audio_is_left_encoded_wherever_it_is_and_nothing_is_copied(clip_path: str, tmp_path: Path) -> None:
    clip = {"bytes": Path(clip_path).read_bytes(), "path": None}
    part = {"type": Value("string"), "text": Value("string"), "audio": Audio()}
    messages = List({"role": Value("string"), "content": List(part)})
    features = Features({"messages": messages, "clips": List(Audio()), "audio": Audio()})
    user = {"role": "user", "content": [{"type": "audio", "text": None, "audio": clip}]}
    rows = [{"messages": [user], "clips": [clip, clip], "audio": clip}]
    table = InMemoryTable(pyarrow.Table.from_pylist(rows * 3, schema=features.arrow_schema))
    Dataset(table, info=DatasetInfo(features=features)).save_to_disk(str(tmp_path / "nested"))
    files = sorted((tmp_path / "nested").iterdir())
    for dataset in (load_corpus(tmp_path / "nested"), load_corpus(tmp_path / "nested", streaming=True)):
        row = next(iter(dataset))
        assert row["audio"] == clip and row["clips"] == [clip, clip]
        assert row["messages"][0]["content"][0]["audio"] == clip
    assert sorted((tmp_path / "nested").iterdir()) == files
    chosen = normalize_columns(Dataset(table, info=DatasetInfo(features=features)).select([2, 1]))
    assert len(chosen) == 2 and chosen[0]["audio"] == clip
