"""Preparing a data set: bad clips are counted, kills are survived, bytes depend on rows and settings alone."""

import hashlib
import io
import json
import os
import re
import signal
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import yaml
from datasets import Audio, disable_progress_bars
from processes import ForkServer
from scipy.signal import resample_poly
from tiny_models import clip

from relllm.data import preparing
from relllm.data.clips import to_16_bit
from relllm.data.data_settings import FolderSettings
from relllm.data.loading import load_corpus
from relllm.data.preparing import prepare_corpus
from relllm.data.rows import COLUMNS, Corpus, CorpusFacts, Dropped, Row
from relllm.processing.audio_relllm import load_audio

disable_progress_bars()
FACTS = CorpusFacts("own", "Our corpus", "en", "other", "Keep it to yourselves.", "https://example.org", "@misc{own}")
SECRET = "the transcript that no card may hold"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparing, "SHARD_ROWS", 2)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relllm.plots.plot_report", lambda *args, **options: [])


def make_row(path: Path, number: int, **changes: object) -> Row:
    row = dict.fromkeys(COLUMNS) | {
        "id": path.stem,
        "audio": str(path),
        "text": SECRET,
        "emotion": ("sad", "happy", None)[number % 3],
        "speaker": f"s{number % 2}",
        "split": "train" if number < 5 else "test",
    }
    return Row(**(row | changes))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Seven good clips; a parser has dropped one."""
    rows = []
    (tmp_path / "wav").mkdir()
    for number in range(7):
        path = tmp_path / "wav" / f"u{number}.wav"
        soundfile.write(path, clip(0.1 + 0.01 * number, seed=number), 16_000)
        rows.append(make_row(path, number, arousal=number / 10, valence=0.5))
    return Corpus(FACTS, rows, [Dropped("u9", "no label", "line 3")], ["One clip lies twice."])


def prepare(corpus: Corpus, out: Path, **options: object) -> dict:
    make_audio = options.pop("make_audio", None)
    settings = FolderSettings(out.parent / "wav", output_dir=out, **({"num_proc": 1} | options))
    return prepare_corpus(corpus, settings, make_audio=make_audio, progress=False)


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what is written -------------------------------------------------------------------------------------------------


def test_rows_come_back_as_the_parser_made_them(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    prepare(corpus, tmp_path / "out")
    for split in ("train", "test"):
        found = load_corpus(tmp_path / "out", split).to_list()
        assert [row.pop("duration_s") for row in found] == [soundfile.info(row["audio"]).duration for row in found]
        assert found == [row for row in corpus.rows if row["split"] == split]
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir()) == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{number}-of-00003.parquet" for number in range(3)),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "wav"]


def test_the_report_counts_what_is_there(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    report = prepare(corpus, tmp_path / "out")
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"] == {"kept": 7, "dropped": 1}
    assert report["dropped"] == {"no label": {"count": 1, "clips": [{"id": "u9", "detail": "line 3"}]}}
    assert report["splits"]["train"]["emotions"] == {"happy": 2, "sad": 2, "unlabelled": 1}
    assert report["splits"]["test"]["speakers"] == {"s0": 1, "s1": 1}
    assert report["speakers_in_several_splits"] == ["s0", "s1"]
    assert report["hours"] == pytest.approx(sum(0.1 + 0.01 * number for number in range(7)) / 3600, abs=5e-5)
    assert report["splits"]["train"]["dimensions"]["arousal"] == {"rows": 5, "mean": 0.2}
    assert report["notes"] == ["One clip lies twice."]


def test_the_card_has_terms_and_counts_but_no_utterance(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    prepare(corpus, tmp_path / "out", emotions=("it's <ärgerlich>=angry",))
    card = (tmp_path / "out/README.md").read_text()
    assert """- emotions: `["it's <ärgerlich>=angry"]`\n""" in card
    assert "Keep it to yourselves." in card and "| sad | 2 | 1 |" in card and "| no label | 1 |" in card
    for private in (SECRET, str(tmp_path), *(row["id"] for row in corpus.rows)):
        assert private not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license_name"] == "terms-of-its-owner" and front["license_link"] == "https://example.org"
    assert front["license"] == "other" and front["language"] == ["en"]
    files = {entry["split"]: entry["path"] for entry in front["configs"][0]["data_files"]}
    assert {split: len(list((tmp_path / "out").glob(glob))) for split, glob in files.items()} == {
        "train": 3,
        "test": 1,
    }


def test_pictures_are_drawn_of_what_is_labelled(corpus: Corpus, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out")
    plots = {path.name: path.read_bytes() for path in (tmp_path / "out/plots").iterdir()}
    assert sorted(plots) == ["class_counts.png", "dimensions.png", "durations.png", "valence_arousal.png"]
    assert all(struct.unpack(">II", content[16:24]) > (400, 400) for content in plots.values())
    for row in corpus.rows:
        row["arousal"] = row["valence"] = None
    prepare(corpus, tmp_path / "unlabelled")
    assert sorted(path.stem for path in (tmp_path / "unlabelled/plots").iterdir()) == ["class_counts", "durations"]


def test_rows_without_a_split_are_found_without_naming_one(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    for row in corpus.rows:
        row["split"] = None
    prepare(corpus, tmp_path / "out", embed_audio=True)
    assert load_corpus(tmp_path / "out")["split"] == [None] * 7
    assert len(list(load_corpus(tmp_path / "out", "train", streaming=True))) == 7


# --- audio -----------------------------------------------------------------------------------------------------------


def embedded(out: Path, split: str = "train") -> dict[str, bytes]:
    rows = load_corpus(out, split)
    assert isinstance(rows.features["audio"], Audio)
    return {row["id"]: row["audio"]["bytes"] for row in rows}


def test_our_own_format_is_embedded_byte_for_byte(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    report = prepare(corpus, tmp_path / "out", embed_audio=True)
    for row in corpus.rows[:5]:
        assert embedded(tmp_path / "out")[row["id"]] == Path(row["audio"]).read_bytes()
    assert report["conversion"] == {"converted": 0, "samples_set_to_full_scale": {}}


def test_other_audio_becomes_16_bit_mono_at_16_khz(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    path = tmp_path / "wav/u0.wav"
    seconds = np.arange(48_000) / 48_000
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(path, np.stack([tone, 0.5 * tone], axis=1), 48_000, subtype="PCM_24")
    report = prepare(corpus, tmp_path / "out", embed_audio=True)
    content = embedded(tmp_path / "out")["u0"]
    info = soundfile.info(io.BytesIO(content))
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (16_000, 1, "PCM_16", 16_000)
    expected = resample_poly(0.75 * tone, 1, 3)  # another library's resampler
    assert np.abs(load_audio(content) - expected)[200:-200].max() < 2e-3
    assert report["conversion"]["converted"] == 1


def test_samples_beyond_full_scale_are_set_to_it_and_counted(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    wave = clip(0.1, seed=0)
    wave[[10, 20, 30]] = [1.2, -1.5, 1.0]
    soundfile.write(tmp_path / "wav/u0.wav", wave, 16_000, subtype="FLOAT")
    report = prepare(corpus, tmp_path / "out", embed_audio=True)
    assert report["conversion"] == {"converted": 1, "samples_set_to_full_scale": {"u0": 2}}
    samples, _ = soundfile.read(io.BytesIO(embedded(tmp_path / "out")["u0"]), dtype="int16")
    assert samples[[10, 20, 30]].tolist() == [32767, -32768, 32767]
    assert np.abs(samples / 32768 - np.clip(wave, -1, 1)).max() <= 1 / 32768
    assert to_16_bit(np.array([1.0, -1.0]))[1] == 0


def break_clips(folder: Path) -> dict[str, str]:
    """Spoils files; the reason that each must be dropped for."""
    good = (folder / "u0.wav").read_bytes()
    soundfile.write(folder / "u1.wav", np.full(1600, np.nan), 16_000, subtype="FLOAT")
    (folder / "u2.wav").write_bytes(good[: len(good) // 2])
    (folder / "u3.wav").write_bytes(b"<html>not found</html>" * 20)
    (folder / "u4.wav").write_bytes(b"")
    soundfile.write(folder / "u5.wav", np.zeros(100), 16_000)
    (folder / "u6.wav").unlink()
    return {
        "u1": "NaN or infinite samples",
        "u2": "truncated audio",
        "u3": "not readable as audio",
        "u4": "empty audio",
        "u5": "too short",
        "u6": "no audio file",
    }


def test_bad_clips_are_counted_and_the_rest_goes_on(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    expected = break_clips(tmp_path / "wav")
    report = prepare(corpus, tmp_path / "out")
    found = {clip["id"]: reason for reason, item in report["dropped"].items() for clip in item["clips"]}
    assert found == expected | {"u9": "no label"}
    assert "u1.wav" in report["dropped"]["NaN or infinite samples"]["clips"][0]["detail"]
    assert list(report["splits"]) == ["train"] and load_corpus(tmp_path / "out", "train")["id"] == ["u0"]
    assert [path.name for path in (tmp_path / "out/data").iterdir()] == ["train-00000-of-00003.parquet"]


def test_the_limits_are_those_that_were_asked_for(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    report = prepare(corpus, tmp_path / "out", min_seconds=0.115, max_seconds=0.145)
    assert {reason: item["count"] for reason, item in report["dropped"].items()} == {
        "too long": 2,
        "too short": 2,
        "no label": 1,
    }
    with pytest.raises(ValueError, match="shortest clip < the longest, got 2 s and 1 s"):
        FolderSettings(tmp_path, min_seconds=2, max_seconds=1)


def test_silent_and_clipped_clips_are_named_and_kept(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    soundfile.write(tmp_path / "wav/u1.wav", np.zeros(1600), 16_000)
    soundfile.write(tmp_path / "wav/u2.wav", np.clip(4 * np.sin(np.arange(1600) / 20), -1, 1), 16_000)
    report = prepare(corpus, tmp_path / "out")
    assert report["kept_but_marked"] == {"silent": ["u1"], "clipped": ["u2"]} and report["rows"]["kept"] == 7


def test_embedded_audio_comes_in_small_row_groups(
    corpus: Corpus, tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "GROUP_BYTES", 4000)  # more than one clip, less than two
    monkeypatch.setattr(preparing, "SHARD_ROWS", 7)
    prepare(corpus, tmp_path / "out", embed_audio=True)
    table = pyarrow.parquet.ParquetFile(tmp_path / "out/data/train-00000-of-00001.parquet")
    assert [table.metadata.row_group(index).num_rows for index in range(table.num_row_groups)] == [2, 2, 1]
    assert len(embedded(tmp_path / "out")) == 5


# --- wrong rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"emotion": "grumpy"}, "Row 'u3': emotion 'grumpy' is not canonical"),
        ({"arousal": 1.5}, r"Row 'u3': arousal is 1.5, expected \[0, 1\]"),
        ({"id": "u0"}, "1 ids come more than once, for example 'u0'"),
    ],
)
def test_a_row_that_breaks_the_schema_is_named(corpus: Corpus, tmp_path: Path, changes: dict, message: str) -> None:
    corpus.rows[3] |= changes
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_keep_says_why_and_leaves_nothing(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No utterance can be kept \(too short: 7\)"):
        prepare(corpus, tmp_path / "out", min_seconds=5)
    corpus.rows = []
    with pytest.raises(ValueError, match=r"No utterance can be kept \(no label: 1\)"):
        prepare(corpus, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- processes, kills, other settings --------------------------------------------------------------------------------


def kill_at_the_third_shard(rows: Sequence[Row], directory: Path) -> None:
    if rows[0]["id"] == "u4":
        os.kill(os.getpid(), signal.SIGKILL)


def note_shard(rows: Sequence[Row], directory: Path) -> None:
    with (directory.parent / "shards").open("a") as file:
        file.write(rows[0]["id"] + "\n")


def prepare_and_be_killed(corpus: Corpus, out: Path) -> None:
    preparing.SHARD_ROWS = 2
    prepare(corpus, out, make_audio=kill_at_the_third_shard)


@pytest.mark.slow
def test_killed_and_started_again_it_does_the_rest_with_the_same_bytes(
    corpus: Corpus, fork_server: ForkServer, tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "whole")
    out = tmp_path / "out"
    assert fork_server.start(prepare_and_be_killed, corpus, out).wait() == -signal.SIGKILL and not out.exists()
    with pytest.raises(ValueError, match="label_set: 'all', now '4'.*choose another --out"):
        prepare(corpus, out, label_set="4")
    prepare(corpus, out, make_audio=note_shard)
    assert (tmp_path / "shards").read_text().split() == ["u4", "u5"]
    assert digests(out) == digests(tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "wav/u3.wav", clip(0.3, seed=9), 44_100)  # whose resampling sums many products
    prepare(corpus, tmp_path / "one", embed_audio=True)
    monkeypatch.setattr(preparing, "SMALL", 0)
    report = prepare(corpus, tmp_path / "two", embed_audio=True, num_proc=2)
    assert digests(tmp_path / "two") == digests(tmp_path / "one") and report["conversion"]["converted"] == 1


def test_a_kill_between_shards_and_report_is_survived(
    corpus: Corpus, tmp_path: Path, no_plots: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(corpus, tmp_path / "whole")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("relllm.data.card.write_card", fail)  # after the files have their final names
        prepare(corpus, tmp_path / "out")
    prepare(corpus, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_second_process_is_refused(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    def prepare_again(rows: Sequence[Row], directory: Path) -> None:
        with pytest.raises(BlockingIOError, match="Another process is writing"):
            prepare(corpus, tmp_path / "out")

    prepare(corpus, tmp_path / "out", make_audio=prepare_again)
    assert len(load_corpus(tmp_path / "out", "train")) == 5


def test_a_complete_data_set_is_left_alone(corpus: Corpus, tmp_path: Path, no_plots: None) -> None:
    report = prepare(corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(corpus, tmp_path / "out") == report
    with pytest.raises(FileExistsError, match=re.escape("embed_audio: False, now True")):
        prepare(corpus, tmp_path / "out", embed_audio=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert not list(tmp_path.glob("out.*"))


def test_a_data_set_of_an_earlier_release_loads_and_is_not_overwritten(
    corpus: Corpus, tmp_path: Path, no_plots: None
) -> None:
    """It lacks the columns that have come since."""
    settings = FolderSettings(tmp_path, output_dir=tmp_path / "out", num_proc=1)
    prepare_corpus(corpus, settings, progress=False)
    new = ["emotion_votes", "gender", "style", "events"]
    for path in (tmp_path / "out/data").glob("*.parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(new), path)
    report = tmp_path / "out/report.json"
    report.write_text(report.read_text().replace("relllm-data-3", "relllm-data-2"))
    rows = load_corpus(tmp_path / "out", "all")
    assert len(rows) > 0 and not set(new) & set(rows.column_names)
    with pytest.raises(FileExistsError, match="a data set that another release prepared"):
        prepare_corpus(corpus, settings, progress=False)


def test_another_folder_is_not_overwritten(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds no data set of `relllm prepare`"):
        prepare(corpus, tmp_path / "wav")
    assert len(list((tmp_path / "wav").iterdir())) == 7
