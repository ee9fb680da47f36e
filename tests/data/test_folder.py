"""Your own speech: tables with paths, bare folders, and the command that writes them."""

import csv
import json
import math
import re
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
from relllm.data.loading import corpus_facts, corpus_name, load_corpus
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


def write_lines(folder: Path, *lines: dict) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_bad_rows_are_dropped_with_their_line_and_value(speech: Path) -> None:
    lines = [
        {"id": "typed", "audio": "b.wav", "valence": "high"},
        {"id": "pathless", "audio": None},
        {"id": "empty", "audio": ""},
        {"id": "address", "audio": "https://example.org/a.wav"},
        {"id": "good", "audio": "b.wav"},
        {"id": "good", "audio": "a.flac"},
    ]
    corpus = parse_folder(FolderSettings(write_lines(speech, *lines)))
    assert [row["id"] for row in corpus.rows] == ["good"]
    assert {entry.id: entry.reason for entry in corpus.dropped} == {
        "typed": "row does not validate",
        "pathless": "no path of a local file",
        "empty": "no path of a local file",
        "address": "no path of a local file",
        "good": "repeated id",
    }
    assert "metadata.jsonl:1" in corpus.dropped[0].detail and "'high'" in corpus.dropped[0].detail


def test_a_column_on_another_scale_is_refused_until_its_scale_is_told(speech: Path) -> None:
    rated = [{"audio": f"{n}.wav", "arousal": n % 5 + 1, "valence": n % 5 / 2 - 1} for n in range(20)]
    write_lines(speech, *rated)
    with pytest.raises(ValueError, match=r"arousal goes from 1 to 5, and 16 of 20 values are outside .*--scale"):
        parse_folder(FolderSettings(speech))
    with pytest.raises(ValueError, match="valence goes from -1 to 1"):
        parse_folder(FolderSettings(speech, scale="arousal=1,5"))
    corpus = parse_folder(FolderSettings(speech, scale="arousal=1,5;valence=-1,1"))
    assert [(row["arousal"], row["valence"]) for row in corpus.rows[:5]] == [(n / 4, n / 4) for n in range(5)]
    write_lines(speech, *rated[:19], rated[19] | {"arousal": 5.5})
    corpus = parse_folder(FolderSettings(speech, scale="arousal=1,5;valence=-1,1"))
    assert len(corpus.rows) == 20 and corpus.rows[19]["arousal"] is None and corpus.rows[19]["valence"] == 1
    assert [(entry.id, entry.detail) for entry in corpus.blanked] == [
        ("19", "metadata.jsonl:20: arousal is 5.5, expected 1 to 5")
    ]
    with pytest.raises(ValueError, match="16 of 20 values are outside"):  # a wrong scale is no twenty odd values
        parse_folder(FolderSettings(speech, scale="0,1"))
    write_lines(speech, {"audio": "0.wav", "arousal": 0.5}, {"audio": "1.wav", "arousal": math.nan})
    assert [row["arousal"] for row in parse_folder(FolderSettings(speech)).rows] == [0.5, None]
    for wrong in ("5,1", "1", "rage=1,5", "1,2,3"):
        with pytest.raises(ValueError, match="expected for example 1,5"):
            FolderSettings(speech, scale=wrong)


def test_letters_and_other_unknown_names_are_listed_and_mapped_kept_or_dropped(speech: Path) -> None:
    emotions = ["A", "F", "calm", "calm", "Angry", "other"]
    write_lines(speech, *({"audio": f"{n}.wav", "emotion": name} for n, name in enumerate(emotions)))

    def read(**told: object) -> dict[str, str | None]:
        return {row["id"]: row["emotion"] for row in parse_folder(FolderSettings(speech, **told)).rows}

    with pytest.raises(ValueError, match=r"'A' \(1\), 'F' \(1\), 'calm' \(2\)\. Say what they mean, --emotions A="):
        read()
    told = read(emotions=("A=fear", "F=happy", "calm=neutral"))
    assert told == dict(zip("012345", ["fear", "happy", "neutral", "neutral", "angry", None], strict=True))
    assert read(unknown_emotions="keep")["2"] == "calm" and read(unknown_emotions="keep")["0"] == "A"
    assert read(unknown_emotions="drop") == {"4": "angry", "5": None}
    with pytest.raises(ValueError, match="emotions has 'A'"):
        read(emotions=("A",))
    write_lines(speech, {"audio": "0.wav", "emotion": "A", "emotion_votes": "A;F"})
    corpus = parse_folder(FolderSettings(speech, emotions=("A=fear", "F=happy")))
    assert corpus.rows[0]["emotion_votes"] == ["fear", "happy"]


def test_split_names_are_folded_mapped_or_refused_with_their_line(speech: Path) -> None:
    names = ["Train", "dev", "val", "valid", "TEST", "test2", "training"]
    write_lines(speech, *({"audio": f"{n}.wav", "split": name} for n, name in enumerate(names)))
    splits = [row["split"] for row in parse_folder(FolderSettings(speech)).rows]
    assert splits == ["train", *["validation"] * 3, "test", "test2", "train"]
    for wrong in ("../../evil", "train-clean-100", "all", "dev/x", "unsplit"):
        write_lines(speech, {"audio": "b.wav"}, {"audio": "a.flac", "split": wrong})
        with pytest.raises(ValueError, match=rf"metadata.jsonl:2: the split is called '{re.escape(wrong)}'"):
            parse_folder(FolderSettings(speech))
        mapped = parse_folder(FolderSettings(speech, splits=(f"{wrong}=validation",)))
        assert [row["split"] for row in mapped.rows] == [None, "validation"]
        with pytest.raises(ValueError, match="the split is called"):
            validate_row({"id": "a", "audio": "a.wav", "split": wrong})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_tables_are_read_as_spreadsheets_write_them(speech: Path, separator: str, encoding: str) -> None:
    lines = [
        ["Filename", " Label", "Transcription", "Speaker ID", "Sex", "Valence", "Votes"],
        ["b.wav", "Anger", "Déjà vu", "7", "F", '"0,5"', "sad|annoyed|ang"],
    ]
    (speech / "t.csv").write_bytes("\r\n".join(separator.join(line) for line in lines).encode(encoding))
    [row] = parse_folder(FolderSettings(speech / "t.csv")).rows
    assert (row["emotion"], row["text"], row["speaker"], row["gender"]) == ("angry", "Déjà vu", "7", "female")
    assert (row["valence"], row["emotion_votes"]) == (0.5, ["sad", "other", "angry"])


def test_the_tables_of_an_audio_folder_are_those_of_its_splits(speech: Path) -> None:
    for split, name in (("train", "x"), ("dev", "y")):
        (speech / split).mkdir()
        write_csv(speech / split / "metadata.csv", [{"file_name": f"{name}.wav", "emotion": "sad"}])
    rows = parse_folder(FolderSettings(speech)).rows
    assert {row["id"]: (row["split"], row["audio"]) for row in rows} == {
        "train/x": ("train", str(speech / "train/x.wav")),
        "dev/y": ("validation", str(speech / "dev/y.wav")),
    }


def test_a_table_without_a_column_of_emotions_is_told_so(speech: Path) -> None:
    table = write_csv(speech / "table.csv", [{"path": "b.wav", "mood": "sad"}])
    with pytest.raises(ValueError, match=r"no column of emotions: \['mood'\] are not understood.*--unlabelled"):
        parse_folder(FolderSettings(table))
    assert parse_folder(FolderSettings(table, columns=("emotion=mood",))).rows[0]["emotion"] == "sad"
    assert parse_folder(FolderSettings(table, unlabelled=True)).rows[0]["emotion"] is None
    with pytest.raises(ValueError, match=r"columns names \['mud'\]"):
        parse_folder(FolderSettings(table, columns=("emotion=mud",)))


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
    with pytest.raises(ValueError, match="label_set must be one of 4, 5, all, got '6'"):
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


def test_a_corpus_is_called_as_it_is_named_on_its_card_and_in_what_reads_it(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "out", [{"path": "b.wav", "emotion": "sad"}, {"path": "a.flac", "emotion": "happy"}]
    write_csv(speech / "metadata.csv", rows)
    given = ["prepare", "folder", str(speech), "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--name", "clinic-2"])
    assert done.exit_code == 0, done.output
    assert corpus_name(out) == "clinic-2" and "# clinic-2\n" in (out / "README.md").read_text()
    assert corpus_facts(out)["name"] == corpus_facts(out)["title"] == "clinic-2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus_name("~/out") == "clinic-2" and corpus_facts("~/out") == corpus_facts(out)
    again = CliRunner().invoke(app, [*given, "--name", "other"])
    assert again.exit_code != 0 and "corpus" in f"{again.output} {again.exception}"
    with pytest.raises(ValueError, match="name is 'my clinic'"):
        FolderSettings(speech, name="my clinic")
    pattern = FolderSettings(speech, name="clinic", pattern=r"(?P<speaker>[ab])\.(wav|flac)")
    assert parse_folder(pattern).facts.name == "clinic" and FolderSettings(speech, name="x").directory.name == "x"
