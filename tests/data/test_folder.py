"""Your own speech: tables with paths, bare folders, and the command that writes them."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_models import clip
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.corpora.folder import parse_folder
from relllm.data.data_settings import FolderSettings
from relllm.data.loading import load_corpus
from relllm.data.rows import COLUMNS, validate_row
from relllm.processing.audio_relllm import load_audio


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("b.wav", "a.flac", "deep/c.WAV")):
        soundfile.write(folder / name, clip(0.1, seed=index), 16_000, format="FLAC" if "flac" in name else "WAV")
    (folder / "notes.txt").write_text("not audio")
    (folder / "._b.wav").write_bytes(b"left by macOS")
    return folder


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_bare_folder_gives_a_row_for_each_audio_file(speech: Path) -> None:
    corpus = parse_folder(FolderSettings(speech, split="train", language="de"))
    assert [row["id"] for row in corpus.rows] == ["a", "b", "deep/c"]
    assert [row["audio"] for row in corpus.rows] == [str(speech / name) for name in ("a.flac", "b.wav", "deep/c.WAV")]
    for row in corpus.rows:
        validate_row(row)
        assert tuple(row) == COLUMNS and (row["split"], row["language"], row["text"]) == ("train", "de", None)
    assert corpus.notes == ["Files that are no audio, left out: 1."] and not corpus.dropped


def test_a_table_gives_the_columns_that_it_has(speech: Path) -> None:
    rows = [
        {"path": "b.wav", "emotion": "Angry", "arousal": "0.9", "speaker": "1", "split": "test", "age": "40"},
        {"path": str(speech / "a.flac"), "emotion": "", "text": "Hello, you"},
    ]
    corpus = parse_folder(FolderSettings(write_csv(speech / "table.csv", rows), split="train"))
    first, second = corpus.rows
    assert (first["id"], first["emotion"], first["arousal"], first["speaker"]) == ("b", "angry", 0.9, "1")
    assert (first["dimension_source"], second["dimension_source"]) == ("label", None)
    assert (first["split"], second["split"], second["text"], second["emotion"]) == (
        "test",
        "train",
        "Hello, you",
        None,
    )
    assert Path(first["audio"]) == speech / "b.wav" and Path(second["audio"]) == speech / "a.flac"
    assert corpus.notes == ["Columns that a row has no place for, left out: age."]


def test_json_lines_are_read_alike_and_found_in_their_folder(speech: Path) -> None:
    lines = [{"id": 7, "audio": "b.wav", "session": 2, "valence": 1, "dimension_source": "pseudo:org/tower"}]
    (speech / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = parse_folder(FolderSettings(speech)).rows[0]
    assert (row["id"], row["session"], row["valence"], row["dimension_source"]) == ("7", "2", 1, "pseudo:org/tower")


def test_bad_rows_are_dropped_with_their_line_and_value(speech: Path) -> None:
    lines = [
        {"id": "grumpy", "audio": "b.wav", "emotion": "grumpy"},
        {"id": "scale", "audio": "b.wav", "arousal": 4.5},
        {"id": "typed", "audio": "b.wav", "valence": "0.5"},
        {"id": "pathless", "audio": None},
        {"id": "address", "audio": "https://example.org/a.wav"},
        {"id": "good", "audio": "b.wav"},
        {"id": "good", "audio": "a.flac"},
    ]
    (speech / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = parse_folder(FolderSettings(speech))
    assert [row["id"] for row in corpus.rows] == ["good"]
    assert {entry.id: entry.reason for entry in corpus.dropped} == {
        "grumpy": "unknown emotion name",
        "scale": "dimension outside the scale",
        "typed": "row does not validate",
        "pathless": "no path of a local file",
        "address": "no path of a local file",
        "good": "repeated id",
    }
    details = {entry.id: entry.detail for entry in corpus.dropped}
    assert "metadata.jsonl:2" in details["scale"] and "4.5" in details["scale"] and "'grumpy'" in details["grumpy"]


def test_a_label_set_keeps_the_others_out(speech: Path) -> None:
    rows = [{"path": "b.wav", "emotion": "fear"}, {"path": "a.flac", "emotion": "sad"}]
    corpus = parse_folder(FolderSettings(write_csv(speech / "table.csv", rows), label_set="4"))
    assert [row["id"] for row in corpus.rows] == ["a"]
    assert [(entry.id, entry.reason, entry.detail) for entry in corpus.dropped] == [
        ("b", "emotion outside the label set", "fear")
    ]


def test_what_is_no_speech_is_an_error(speech: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Nothing is at"):
        parse_folder(FolderSettings(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is a \.txt file; expected \.csv, \.jsonl or a folder"):
        parse_folder(FolderSettings(speech / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no audio files"):
        parse_folder(FolderSettings(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"has the columns \['name', 'emotion'\], none of audio, path"):
        parse_folder(FolderSettings(write_csv(tmp_path / "table.csv", [{"name": "b.wav", "emotion": "sad"}])))
    with pytest.raises(ValueError, match="label_set is '6'"):
        parse_folder(FolderSettings(speech, label_set="6"))
    for name in ("metadata.csv", "metadata.jsonl"):
        (speech / name).write_text("audio\n")
    with pytest.raises(ValueError, match=r"holds metadata\.jsonl, metadata\.csv\. Give the one to read"):
        parse_folder(FolderSettings(speech))


def test_the_command_writes_a_data_set_and_says_what_it_left_out(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # without PyAV
    (speech / "d.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(40))
    arguments = ["prepare", "folder", str(speech), "--out", str(tmp_path / "out"), "--split", "train", "--embed-audio"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert load_corpus(tmp_path / "out", "train")["id"] == ["a", "b", "deep/c"]
    assert "not readable as audio: 1" in done.output
    dropped = json.loads((tmp_path / "out/report.json").read_text())["dropped"]["not readable as audio"]["clips"]
    assert dropped[0]["id"] == "d" and "ffmpeg -i INPUT" in dropped[0]["detail"]


@pytest.mark.parametrize("channel", ["mix", "left", "right", "each"])
def test_a_call_becomes_the_rows_of_its_channels(channel: str, tmp_path: Path) -> None:
    sides = {"left": clip(0.5), "right": clip(0.5, seed=1)}
    (tmp_path / "calls").mkdir()
    soundfile.write(tmp_path / "calls/a.wav", np.stack(list(sides.values()), axis=1), 16_000)
    soundfile.write(tmp_path / "calls/antiphase.wav", np.stack([clip(0.5), -clip(0.5)], axis=1), 16_000)
    soundfile.write(tmp_path / "calls/mono.wav", clip(0.4), 16_000)
    command = ["prepare", "folder", str(tmp_path / "calls"), "--out", str(tmp_path / "out"), "--channel", channel]
    done = CliRunner().invoke(app, [*command, "--embed-audio"])
    assert done.exit_code == 0, done.output
    rows = {row["id"]: load_audio(row["audio"]) for row in load_corpus(tmp_path / "out")}
    dropped = json.loads((tmp_path / "out/report.json").read_text())["dropped"]
    reasons = {"mix": ["channels that cancel each other"], "each": []}.get(channel, ["no such channel"])
    assert list(dropped) == reasons
    if channel == "each":
        assert list(rows) == ["a-left", "a-right", "antiphase-left", "antiphase-right", "mono"]
        expected = {f"a-{side}": samples for side, samples in sides.items()}
    else:
        assert list(rows) == (["a", "mono"] if channel == "mix" else ["a", "antiphase"])
        expected = {"a": sides.get(channel, (sides["left"] + sides["right"]) / 2)}
    for name, samples in expected.items():
        np.testing.assert_allclose(rows[name], samples, atol=2 / 32768)


def test_a_channel_of_what_is_kept_by_path_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", "folder", str(tmp_path), "--channel", "left"])
    assert done.exit_code == 2 and "needs embed_audio" in done.output


def test_the_command_stops_with_a_line_and_no_traceback(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", "folder", str(tmp_path / "gone")])
    assert done.exit_code == 1 and "stopped: Nothing is at" in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("corpus", ["iemocap", "esd", "msp-podcast"])
def test_a_wrong_root_of_a_corpus_is_said_in_a_line(corpus: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", corpus, str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "stopped:" in done.output and not (tmp_path / "out").exists()
