"""Rows from every place they may lie in, with audio left encoded and found wherever the process runs."""

import csv
import hashlib
import json
from pathlib import Path

import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, IterableDataset, List, Value, disable_progress_bars
from tiny_models import clip

import relllm
from relllm.data.data_settings import InspectSettings, PrepareSettings
from relllm.data.inspection import inspect_corpus
from relllm.data.journal import audio_fingerprint
from relllm.data.loading import column_values, load_corpus
from relllm.data.preparing import prepare_corpus
from relllm.data.rows import COLUMNS, Corpus, CorpusFacts, Row
from relllm.processing.audio_relllm import load_audio

disable_progress_bars()
ROWS = [
    {"id": "a", "audio": "audio/a.wav", "response": "Oh no.", "emotion": "sad", "arousal": 0.2, "split": "train"},
    {"id": "b", "audio": "audio/b.wav", "response": "Great!", "emotion": None, "arousal": None, "split": "train"},
    {"id": "c", "audio": "audio/c.wav", "response": "I see.", "emotion": "happy", "arousal": 1, "split": "test"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A prepared corpus: WAV files and `metadata.jsonl`."""
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    for index, row in enumerate(ROWS):
        soundfile.write(folder / str(row["audio"]), clip(0.1, seed=index), 16_000)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def saved(rows: list[dict], corpus: Path) -> Dataset:
    """As a data set with an audio column, the bytes inside."""
    rows = [row | {"audio": {"bytes": (corpus / row["audio"]).read_bytes(), "path": None}} for row in rows]
    return Dataset.from_list(rows).cast_column("audio", Audio())


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def places(corpus: Path) -> dict[str, Path]:
    """The same rows in every form."""
    absolute = [row | {"audio": str(corpus / row["audio"])} for row in ROWS]
    (corpus / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_csv(corpus / "rows.csv", ROWS)
    Dataset.from_list(ROWS).to_parquet(corpus / "rows.parquet")
    saved(ROWS, corpus).to_parquet(corpus / "audio.parquet")
    Dataset.from_list(absolute).save_to_disk(corpus.parent / "saved")
    splits = {name: saved([row for row in ROWS if row["split"] == name], corpus) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(corpus.parent / "saved-splits")
    (corpus.parent / "parquet").mkdir()
    for name, dataset in splits.items():
        dataset.to_parquet(corpus.parent / "parquet" / f"{name}-00000-of-00001.parquet")
    return {
        "a prepared corpus": corpus,
        "a file of JSON lines": corpus / "rows.jsonl",
        "a table of text": corpus / "rows.csv",
        "a Parquet file": corpus / "rows.parquet",
        "a Parquet file with its audio": corpus / "audio.parquet",
        "a saved data set": corpus.parent / "saved",
        "saved splits": corpus.parent / "saved-splits",
        "a folder of Parquet": corpus.parent / "parquet",
    }


def test_rows_are_the_same_from_every_place_and_their_audio_reads(corpus: Path) -> None:
    for place, path in places(corpus).items():
        for streaming in (False, True):
            dataset = load_corpus(str(path), "train", streaming=streaming)
            assert isinstance(dataset, IterableDataset if streaming else Dataset), place
            rows = list(dataset)
            assert [row["id"] for row in rows] == ["a", "b"], place
            assert [row["emotion"] for row in rows] == ["sad", None], place
            assert [row["arousal"] for row in rows] == [0.2, None], place
            assert [len(load_audio(row["audio"])) for row in rows] == [1600, 1600], place


def test_without_a_split_all_rows_come_where_there_is_one_table(corpus: Path) -> None:
    assert load_corpus(str(corpus))["id"] == ["a", "b", "c"]
    found = places(corpus)
    assert len(load_corpus(str(found["a saved data set"]))) == 3
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]. Name one"):
        load_corpus(str(found["saved splits"]))


def test_a_relative_path_is_found_from_another_folder(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    audio = load_corpus("corpus", "test")["audio"][0]
    monkeypatch.chdir("/")
    assert len(load_audio(audio)) == 1600


def test_audio_parts_of_conversations_are_found_and_addresses_are_left_alone(corpus: Path) -> None:
    parts = [{"type": "audio", "path": "audio/a.wav"}, {"type": "audio", "path": "https://example.org/b.wav"}]
    row = {"id": "m", "messages": [{"role": "user", "content": parts}]}
    (corpus / "chat.jsonl").write_text(json.dumps(row) + "\n")
    content = load_corpus(str(corpus / "chat.jsonl"))[0]["messages"][0]["content"]
    assert [part["path"] for part in content] == [str(corpus / "audio/a.wav"), "https://example.org/b.wav"]


def test_columns_that_are_missing_everywhere_keep_their_type(corpus: Path) -> None:
    dataset = load_corpus(str(corpus), "train")
    (corpus / "metadata.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    unlabelled = load_corpus(str(corpus))
    assert unlabelled.features["arousal"] == dataset.features["arousal"]
    assert unlabelled.features["emotion"] == dataset.features["emotion"]
    for votes in (None, []):
        (corpus / "metadata.jsonl").write_text(json.dumps(ROWS[1] | {"emotion_votes": votes}) + "\n")
        assert load_corpus(str(corpus)).features["emotion_votes"] == List(Value("string"))


@pytest.mark.parametrize(
    "content, split, message",
    [
        ("", None, "holds no rows"),
        ('{"id": "a"}\n{"id":', None, "line 2 is not JSON"),
        ("[1]\n", None, "line 1 is list, expected one object"),
        ('{"id": "a", "split": "train"}\n', "dev", r"no rows of the split 'dev'; its rows are of \['train'\]"),
        ('{"id": "a"}\n', "dev", "its rows name no split, which makes them all 'train'"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: str, split: str | None, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_corpus(str(path), split)
    assert str(path) in str(raised.value)


def test_other_bad_sources_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No file or folder ./gone"):
        load_corpus("./gone")
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match=r"is a \.txt file; expected \.jsonl"):
        load_corpus(str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="without metadata.jsonl, without Parquet"):
        load_corpus(str(corpus / "audio"))
    write_csv(tmp_path / "rows.csv", [{"id": "a", "arousal": "high"}])
    with pytest.raises(ValueError, match=r"line 2: arousal is 'high'"):
        load_corpus(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("id,text\na,yes, please\n")
    with pytest.raises(ValueError, match="line 2 has more fields than the header"):
        load_corpus(str(tmp_path / "rows.csv"))
    found = places(corpus)
    with pytest.raises(ValueError, match="has no rows of the split 'dev'"):
        load_corpus(str(found["a saved data set"]), "dev")


# --- a prepared data set ---------------------------------------------------------------------------------------------

SESSIONS = ("Ses01", "Ses01", "Ses02", "Ses03", "Ses03", None)
SPLIT_OF = ("train", "train", "train", "validation", "test2", "test2")


@pytest.fixture
def prepared(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six rows in three splits, one of which has a name that `datasets` does not know; two shards of train."""
    monkeypatch.setattr("relllm.data.preparing.SHARD_ROWS", 2)
    monkeypatch.setattr("relllm.plots.plot_report", lambda *args, **options: [])
    audio = str(corpus / "audio/a.wav")
    rows = [
        Row(**(dict.fromkeys(COLUMNS) | {"id": f"r{index}", "audio": audio, "session": session, "split": split}))
        for index, (session, split) in enumerate(zip(SESSIONS, SPLIT_OF, strict=True))
    ]
    facts = CorpusFacts("own", "Own", "en", "other", "", "", "")
    settings = PrepareSettings(output_dir=tmp_path / "own", num_proc=1)
    prepare_corpus(Corpus(facts, rows, [], []), settings, progress=False)
    return tmp_path / "own"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_splits_of_a_prepared_data_set_are_those_of_its_rows(prepared: Path, streaming: bool) -> None:
    for split, expected in (("train", ["r0", "r1", "r2"]), ("validation", ["r3"]), ("test2", ["r4", "r5"])):
        rows = load_corpus(prepared, split, streaming=streaming)
        assert [row["id"] for row in rows] == expected
    assert relllm.load_corpus is load_corpus
    with pytest.raises(
        ValueError, match=r"no rows of the split 'dev'; its rows are of \['test2', 'train', 'validation'\]"
    ):
        load_corpus(prepared, "dev", streaming=streaming)


def test_streaming_reads_one_row_group_at_a_time_and_can_be_split_between_workers(prepared: Path) -> None:
    rows = load_corpus(prepared, "train", streaming=True)
    assert rows.num_shards == 2
    assert [row["id"] for row in rows.shard(2, 1)] == ["r2"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "held_out, expected",
    [
        ("session=Ses01", {"test": ["r0", "r1"], "train": ["r2", "r3", "r4"]}),
        ("session=Ses01,Ses02", {"test": ["r0", "r1", "r2"], "train": ["r3", "r4"]}),
        (
            "session=Ses03; validation:session=Ses02",
            {"test": ["r3", "r4"], "validation": ["r2"], "train": ["r0", "r1"]},
        ),
    ],
)
def test_holding_out_makes_splits_that_share_no_row(
    prepared: Path, held_out: str, expected: dict[str, list[str]], streaming: bool
) -> None:
    """The row without a session is in none: it may belong to the one that is held out."""
    for split, ids in expected.items():
        rows = list(load_corpus(prepared, split, held_out=held_out, streaming=streaming))
        assert sorted(row["id"] for row in rows) == ids and {row["split"] for row in rows} == {split}


def test_holding_out_works_wherever_rows_lie(corpus: Path) -> None:
    for place, path in places(corpus).items():
        assert list(load_corpus(path, "train", held_out="id=b")["id"]) in (["a", "c"], ["c", "a"]), place
        assert list(load_corpus(path, "test", held_out="id=b")["id"]) == ["b"], place


@pytest.mark.parametrize("named", [{}, {"split": None}], ids=["no column", "an empty column"])
def test_rows_that_name_no_split_are_for_training_wherever_they_lie(tmp_path: Path, named: dict) -> None:
    """As `datasets` has it of a single file. They are no other split, so nothing is measured on them by mistake."""
    rows = [{"id": name, "audio": "a.wav", "duration_s": 1.0, **named} for name in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_csv(tmp_path / "rows.csv", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows).to_parquet(tmp_path / "prepared" / "data" / "unsplit-00000-of-00001.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "prepared", "saved"):
        path = tmp_path / name
        assert load_corpus(path, "train")["id"] == ["a", "b", "c"], name
        assert [row["id"] for row in load_corpus(path, "train", streaming=True)] == ["a", "b", "c"], name
        with pytest.raises(ValueError, match="name no split, which makes them all 'train'.*make them by held_out"):
            load_corpus(path, "test")


def test_left_out_rows_are_counted_aloud(prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_corpus(prepared, "train", held_out="session=Ses01")
    assert "1 rows of" in caplog.text and "have no session" in caplog.text


@pytest.mark.parametrize(
    "split, held_out, message",
    [
        (None, "session=Ses01", "makes the splits train, test; got split=None"),
        ("validation", "session=Ses01", "got split='validation'"),
        ("test", "Ses01", "held_out is 'Ses01', expected column=value"),
        ("test", "session=", "expected column=value"),
        ("test", "session=Ses01;session=Ses02", "expected column=value"),
        ("train", "validation:session=Ses01", "holds nothing out for test"),
        ("test", "sesion=Ses01", "no column 'sesion' to hold out by"),
        (
            "test",
            "session=Ses09",
            r"no rows with session \['Ses09'\]; there are \['Ses01', 'Ses02', 'Ses03'\]",
        ),
        ("train", "session=Ses01,Ses02,Ses03", "no row left for 'train'"),
        ("train", "session=Ses01;validation:session=Ses01", "both in test and in validation"),
    ],
)
def test_what_cannot_be_held_out_is_named(prepared: Path, split: str | None, held_out: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(prepared, split, held_out=held_out)


def test_a_table_with_a_column_of_missing_values_can_be_held_out(tmp_path: Path) -> None:
    """As `write-targets` writes what `prepare folder` made: no split, and a column that no row of ours has."""
    rows = [{"id": f"{n}", "audio": "a.wav", "speaker": n, "split": None, "duration_s": 1.0} for n in range(3)]
    (tmp_path / "targets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = "speaker=1;validation:speaker=2"  # numbers there
    found = {name: load_corpus(tmp_path / "targets.jsonl", name, held_out=held_out) for name in ("train", "test")}
    assert {name: (part["id"], part["split"]) for name, part in found.items()} == {
        "train": (["0"], ["train"]),
        "test": (["1"], ["test"]),
    }
    assert load_corpus(tmp_path / "targets.jsonl", "train", held_out="")["id"] == ["0", "1", "2"]


def test_the_values_of_a_column_are_those_of_all_splits(corpus: Path) -> None:
    assert column_values(corpus, "split") == ["test", "train"]
    with pytest.raises(ValueError, match="no column 'session'.*id"):
        column_values(corpus / "metadata.jsonl", "session")


def test_all_is_the_rows_of_every_split(prepared: Path, corpus: Path) -> None:
    by_split = [row["id"] for split in ("train", "validation", "test2") for row in load_corpus(prepared, split)]
    assert sorted(load_corpus(prepared, "all")["id"]) == sorted(by_split) and len(by_split) == len(set(by_split)) > 2
    assert {row["id"] for row in load_corpus(prepared, "all", streaming=True)} == set(by_split)
    assert load_corpus(corpus, "all")["id"] == ["a", "b", "c"]


def test_a_stream_whose_later_rows_name_a_split_is_refused_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("relllm.data.loading.LOOKED_AT", 2)
    rows = [{"id": name, "audio": f"{name}.wav", "split": None} for name in "abc"]
    Dataset.from_list([*rows[:2], rows[2] | {"split": "test"}]).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match="first 2 rows of the stream name no split.*a later one is of 'test'"):
        list(load_corpus(tmp_path / "rows.parquet", "train", streaming=True))


def test_clips_that_are_in_a_table_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    clips = [bytes([number]) * 9000 for number in range(4)]
    rows = [{"id": f"{i}", "audio": {"bytes": one, "path": "a.wav"}} for i, one in enumerate(clips)]
    first = Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
    moved = [rows[0] | {"audio": rows[0]["audio"] | {"path": "elsewhere/a.wav"}}, *rows[1:]]
    assert audio_fingerprint(first) == audio_fingerprint(Dataset.from_list(moved)) is not None
    longer = [rows[0] | {"audio": {"bytes": clips[0] + b"\0", "path": "a.wav"}}, *rows[1:]]
    other = [rows[0] | {"audio": {"bytes": clips[3], "path": "a.wav"}}, *rows[1:]]  # of the same size
    swapped = [rows[0] | {"audio": rows[1]["audio"]}, rows[1] | {"audio": rows[0]["audio"]}, *rows[2:]]
    assert len({audio_fingerprint(Dataset.from_list(one)) for one in (rows, longer, other, swapped)}) == 4
    parts = [(9000, one[4096:4160], one[4840:4904]) for one in clips]  # as checkpoints have recorded it
    assert audio_fingerprint(first) == hashlib.sha256("".join(map(repr, parts)).encode()).hexdigest()[:16]
    half, same_half = first.select([2, 0]), Dataset.from_list([rows[2], rows[0]])
    assert audio_fingerprint(half) == audio_fingerprint(same_half) != audio_fingerprint(first)
    first.to_parquet(str(tmp_path / "table.parquet"))
    assert audio_fingerprint(load_corpus(tmp_path / "table.parquet")) == audio_fingerprint(first)
    assert audio_fingerprint(Dataset.from_list([{"id": "a", "audio": "a.wav"}])) is None
    assert audio_fingerprint(Dataset.from_list([{"audio": {"bytes": None, "path": "a.wav"}}])) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_the_hub_is_named_with_configuration_and_revision_and_its_rows_are_numbered(
    corpus: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(name: str, config: str | None = None, **kwargs: object) -> DatasetDict:
        asked.append((name, config, kwargs["revision"]))
        rows = Dataset.from_dict({"audio": [str(corpus / "audio/a.wav")] * 2, "speaker": [3, 4], "emotion": [0, 1]})
        rows = rows.cast_column("emotion", ClassLabel(names=["ang", "hap"])).cast_column("audio", Audio())
        parts = {"train": rows, "test": rows}
        return {name: part.to_iterable_dataset() for name, part in parts.items()} if streaming else DatasetDict(parts)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *where, **kwargs: ["train", "test"])
    rows = list(load_corpus("org/speech:de@v2", "test", streaming=streaming))
    assert [row["id"] for row in rows] == ["test-000000", "test-000001"]
    assert [row["emotion"] for row in rows] == ["angry", "happy"]
    assert all(isinstance(row["audio"], dict) for row in rows)  # still encoded
    held = list(load_corpus("org/speech", "train", held_out="speaker=3", streaming=streaming))
    assert [row["id"] for row in held] == ["train-000001", "test-000001"]  # a speaker that is a number
    assert asked == [("org/speech", "de", "v2"), ("org/speech", None, None)]
    if not streaming:
        findings = inspect_corpus(InspectSettings("org/speech", audio=False)).findings
        assert [(one.check, one.detail) for one in findings] == [
            ("speaker in several splits", "3: 1 in train, 1 in test"),
            ("speaker in several splits", "4: 1 in train, 1 in test"),
        ]


def test_a_split_of_a_table_may_have_other_columns_and_kinds_than_another(tmp_path: Path) -> None:
    one = {"id": "a", "audio": "a.wav", "split": "train", "text": "x"}
    two = {"id": "b", "audio": ["b.wav", "c.wav"], "split": "test", "text": ["x", "y"], "response": "z"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    train = load_corpus(tmp_path / "rows.jsonl", "train")
    assert train["id"] == ["a"] and "response" not in train.column_names
