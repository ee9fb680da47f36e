"""`relllm inspect`: every check finds what is wrong by id, finds nothing else, and writes where it was told."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, disable_progress_bars
from rich.console import Console
from tiny_models import clip
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data import inspection
from relllm.data.data_settings import InspectSettings
from relllm.data.inspection import Inspection, check_table, inspect_corpus, measure_clip, write_report
from relllm.data.report import summarise_rows
from relllm.plots import plot_valence_arousal_labels

disable_progress_bars()
RATE = 16_000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_rows(count: int = 4) -> list[dict]:
    """Sound rows: one speaker a split, emotions that go with their dimensions."""
    emotions = [("happy", 0.9, 0.7), ("angry", 0.1, 0.9), ("sad", 0.2, 0.2), ("neutral", 0.5, 0.4)]
    return [
        {
            "id": f"clip-{index}",
            "audio": f"audio/{index}.wav",
            "text": f"It is {index}.",
            "emotion": emotions[index % 4][0],
            "arousal": emotions[index % 4][2],
            "dominance": 0.5,
            "valence": emotions[index % 4][1],
            "speaker": "test-1" if index == 0 else "train-1",
            "split": "test" if index == 0 else "train",
        }
        for index in range(count)
    ]


def write_corpus(folder: Path, rows: list[dict]) -> Path:
    (folder / "audio").mkdir(parents=True)
    for index, row in enumerate(rows):
        soundfile.write(folder / row["audio"], clip(0.1 + index / 100, seed=index), RATE)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_sentence_of_several_splits_is_found_whatever_its_case(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows:
        row |= {"text": "I never want to hear that song again.", "speaker": None}
    rows[0]["text"] = "i NEVER want, to hear that song again"
    by_check = check_table(rows)
    assert [(finding.check, finding.ids, finding.detail) for finding in by_check] == [
        (
            "same transcript in several splits",
            ["clip-0", "clip-1", "clip-2", "clip-3"],
            "i never want to hear that song again: 1 in test, 3 in train",
        )
    ]
    assert check_table([row | {"text": "Oh, yes."} for row in rows]) == []
    assert len(check_table([row | {"text": "打远一看，它们的确很是美丽"} for row in rows])) == 1
    assert check_table([row | {"split": "train"} for row in rows]) == []


def found(inspected: Inspection) -> dict[str, list[list[str]]]:
    findings: dict[str, list[list[str]]] = {}
    for finding in inspected.findings:
        findings.setdefault(finding.check, []).append(finding.ids)
    return findings


def look(folder: Path, **kwargs: float | bool) -> Inspection:
    settings = InspectSettings(str(folder), **{"num_proc": 1, **kwargs})  # type: ignore[arg-type]
    return inspect_corpus(settings, progress=False)


def test_nothing_is_found_in_a_sound_corpus(tmp_path: Path) -> None:
    assert look(write_corpus(tmp_path / "corpus", make_rows())).findings == []


def test_each_fault_of_the_audio_is_found_by_id(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", make_rows(8))
    soundfile.write(folder / "audio/1.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "audio/2.wav", np.sign(np.sin(np.arange(8000) / 9)), RATE)
    (folder / "audio/3.wav").unlink()
    (folder / "audio/4.wav").write_bytes((folder / "audio/4.wav").read_bytes()[:1000])
    soundfile.write(folder / "audio/6.wav", clip(2.0, seed=9), RATE)
    inspected = look(folder, max_seconds=1.5)
    assert found(inspected) == {
        "audio cannot be read": [["clip-3"], ["clip-4"]],
        "silent": [["clip-1"]],
        "clipped": [["clip-2"]],
        "long": [["clip-6"]],
    }
    details = {finding.ids[0]: finding.detail for finding in inspected.findings}
    assert "No such audio file" in details["clip-3"]
    assert "truncated" in details["clip-4"]
    assert details["clip-6"] == "2.0 s"


def test_the_same_samples_are_found_in_another_container_and_named_across_splits(tmp_path: Path) -> None:
    rows = make_rows(6)
    folder = write_corpus(tmp_path / "corpus", rows)
    for copy, original in ((5, 4), (2, 0)):  # 0 is in the test split
        samples, _ = soundfile.read(folder / f"audio/{original}.wav", dtype="int16")
        soundfile.write(folder / f"audio/{copy}.flac", samples, RATE)
        rows[copy]["audio"] = f"audio/{copy}.flac"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert found(look(folder)) == {
        "same audio in several splits": [["clip-0", "clip-2"]],
        "same audio": [["clip-4", "clip-5"]],
    }


@pytest.mark.parametrize("run, clipped", [(2, False), (3, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_three_samples_in_a_row_at_full_scale_are_clipped(run: int, clipped: bool, sign: int, tmp_path: Path) -> None:
    samples = clip(0.1, seed=0) * 0.5
    samples[700 : 700 + run] = sign
    samples[100] = samples[-1] = sign
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    facts = measure_clip(str(tmp_path / "a.wav"))
    assert facts.full_scale_run == run
    assert (facts.full_scale_run >= inspection.CLIPPED_SAMPLES) == clipped


def test_a_clip_is_measured_at_its_own_rate(tmp_path: Path) -> None:
    samples = np.repeat([0.999, -0.999], 4000)[:, None] * [1, 1]
    soundfile.write(tmp_path / "a.wav", samples, 8000)
    facts = measure_clip(str(tmp_path / "a.wav"))
    assert facts.duration_s == 1.0
    assert facts.peak == pytest.approx(0.999, abs=1e-4)
    soundfile.write(tmp_path / "b.wav", samples, 16_000)
    assert measure_clip(str(tmp_path / "b.wav")).digest != facts.digest


@pytest.mark.parametrize(
    ("emotion", "dimension", "value", "contradicts"),
    [
        ("happy", "valence", 0.34, True),
        ("happy", "valence", 0.35, False),
        ("angry", "valence", 0.66, True),
        ("sad", "valence", 0.65, False),
        ("sad", "valence", 0.9, True),
        ("angry", "arousal", 0.3, True),
        ("sad", "arousal", 0.1, False),
        ("neutral", "valence", 0.0, False),
        (None, "valence", 0.0, False),
        ("happy", "valence", None, False),
    ],
)
def test_an_emotion_contradicts_a_dimension_beyond_the_limits(
    emotion: str | None, dimension: str, value: float | None, contradicts: bool
) -> None:
    findings = check_table([{"id": "a", "split": None, "emotion": emotion, dimension: value}])
    assert [finding.ids for finding in findings] == ([["a"]] if contradicts else [])
    if contradicts:
        assert f"{emotion}, {dimension} {value:.2f} is" in findings[0].detail


def test_speakers_in_several_splits_are_named_and_unknown_ones_leak_nowhere() -> None:
    rows = [
        {"id": "a", "split": "train", "speaker": "s1"},
        {"id": "b", "split": "test", "speaker": "s1"},
        {"id": "c", "split": "train", "speaker": "s1"},
        {"id": "d", "split": "test", "speaker": "s2"},
        {"id": "e", "split": "train", "speaker": None},
        {"id": "f", "split": "test", "speaker": None},
        {"id": "g", "split": None, "speaker": "s2"},
    ]
    [finding] = check_table(rows)
    assert finding.check == "speaker in several splits"
    assert (sorted(finding.ids), finding.detail) == (["a", "b", "c"], "s1: 2 in train, 1 in test")


def test_ids_used_more_than_once_are_found(tmp_path: Path) -> None:
    rows = [{"id": name, "split": None} for name in "abab" + "c"]
    assert [(finding.ids, finding.detail) for finding in check_table(rows)] == [(["a"], "2 rows"), (["b"], "2 rows")]


def test_the_table_alone_is_looked_at_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_corpus(tmp_path / "corpus", make_rows() + [make_rows()[0] | {"audio": "audio/9.wav"}])
    (folder / "audio/2.wav").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(inspection, "load_audio", refuse)
    inspected = look(folder, audio=False)
    assert found(inspected) == {"id used more than once": [["clip-0"]]}
    assert not inspected.audio_was_read


def embedded(rows: list[dict], folder: Path) -> Dataset:
    held = [row | {"audio": {"bytes": (folder / row["audio"]).read_bytes(), "path": None}} for row in rows]
    return Dataset.from_list(held).cast_column("audio", Audio())


def in_shards(rows: list[dict], folder: Path, target: Path) -> None:
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        (target / "data").mkdir(parents=True, exist_ok=True)
        split_rows = embedded(chosen, folder)
        if split == "test":  # in the other the names themselves
            split_rows = split_rows.cast_column("emotion", ClassLabel(names=["angry", "happy", "sad", "neutral"]))
        split_rows.to_parquet(target / "data" / f"{split}-00000-of-00001.parquet")


def as_saved(rows: list[dict], folder: Path, target: Path) -> None:
    splits = {name: embedded([row for row in rows if row["split"] == name], folder) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(target)


@pytest.mark.parametrize("write", [in_shards, as_saved])
def test_every_split_of_every_layout_is_read(tmp_path: Path, write: Callable[[list[dict], Path, Path], None]) -> None:
    rows = make_rows()
    rows[0]["speaker"] = "train-1"  # who leaks from one split to the other
    folder = write_corpus(tmp_path / "corpus", rows)
    write(rows, folder, tmp_path / "other")
    before = sorted(path.name for path in (tmp_path / "other").rglob("*"))
    inspected, plain = look(tmp_path / "other"), look(folder)
    key = {"key": lambda row: row["id"]}
    assert sorted(inspected.rows, **key) == sorted(plain.rows, **key)
    assert [sorted(finding.ids) for finding in inspected.findings] == [[row["id"] for row in rows]]
    assert sorted(path.name for path in (tmp_path / "other").rglob("*")) == before  # nothing is written there


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", make_rows(70))  # more than two chunks
    (folder / "audio/69.wav").unlink()
    assert look(folder, num_proc=2) == look(folder)


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    rows = make_rows()
    rows[2] |= {"text": None, "valence": None, "emotion": None}
    rows[3] |= {"speaker": "train-2"}
    inspected = look(write_corpus(tmp_path / "corpus", rows))
    summary = {name: split.describe() for name, split in summarise_rows(inspected.rows).items()}
    assert summary["test"]["rows"] == 1
    train = summary["train"]
    assert (train["rows"], len(train["speakers"]), train["with_text"]) == (3, 2, 2)
    assert [found["rows"] for found in train["dimensions"].values()] == [3, 3, 2]
    assert train["emotions"] == {"angry": 1, "neutral": 1, "unlabelled": 1}
    assert train["duration_s"] == pytest.approx({"shortest": 0.11, "median": 0.12, "longest": 0.13})
    assert train["hours"] == pytest.approx(0.36 / 3600, abs=5e-5)


def test_the_report_has_every_id_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [
        row | {"split": "train" if index % 2 else "test", "speaker": "s"} for index, row in enumerate(make_rows(30))
    ]
    inspected = look(write_corpus(tmp_path / "corpus", rows), audio=False)
    report, plot = write_report(inspected, tmp_path / "out")
    content = json.loads(report.read_text())
    assert content["num_findings"] == {"speaker in several splits": 1}
    assert sorted(content["findings"][0]["ids"]) == sorted(row["id"] for row in rows)
    assert content["splits"]["test"]["rows"] == 15
    assert content["splits"]["test"]["duration_s"] == {}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "valence_arousal.png"]


def test_without_dimensions_there_is_no_plot(tmp_path: Path) -> None:
    rows = [{"id": "a", "audio": "audio/a.wav", "emotion": "sad"}]
    inspected = look(write_corpus(tmp_path / "corpus", rows))
    assert [path.name for path in write_report(inspected, tmp_path / "out")] == ["report.json"]


def test_rows_without_ids_are_named_by_their_number(tmp_path: Path) -> None:
    rows = [{"audio": "audio/a.wav"}, {"audio": "audio/b.wav"}]
    folder = write_corpus(tmp_path / "corpus", rows)
    (folder / "audio/b.wav").unlink()
    assert found(look(folder)) == {"audio cannot be read": [["row 1"]]}


def test_data_without_audio_and_data_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "text": "Hello."}\n')
    with pytest.raises(ValueError, match="has no column `audio`.*--no-audio"):
        look(tmp_path / "rows.jsonl")
    assert look(tmp_path / "rows.jsonl", audio=False).findings == []
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        look(tmp_path / "gone")


def test_a_plot_of_nothing_or_of_other_lengths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got \\[1, 2, 1\\]"):
        plot_valence_arousal_labels([0.1], [0.1, 0.2], ["sad"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one clip"):
        plot_valence_arousal_labels([], [], [], tmp_path / "a.png")


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr("relllm.cli.data.console", Console(width=160, markup=False))
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_shows_everything_and_writes_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    rows[1] |= {"id": "[bold]clip-1", "text": "It is [/b] loud.", "valence": 0.9}
    folder = write_corpus(tmp_path / "corpus", rows)
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, output = run(str(folder), "--num-proc", "1", monkeypatch=monkeypatch)
    assert code == 0
    for shown in (
        "[bold]clip-1",
        "It is [/b] loud.",
        "emotion contradicts a dimension",
        "angry, valence 0.90 is above",
    ):
        assert shown in output
    assert re.search(r"train +│ 3 +│ 0.00 .*shortest 0.1", output)
    assert (tmp_path / "runs/inspect/corpus/report.json").is_file()
    assert sorted(folder.rglob("*")) == before


def test_strict_fails_on_a_finding_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = write_corpus(tmp_path / "sound", make_rows())
    odd = write_corpus(tmp_path / "odd", [row | {"speaker": "s"} for row in make_rows()])
    for folder, strict, expected in ((sound, True, 0), (odd, False, 0), (odd, True, 1)):
        flags = ["--no-audio", "--out", str(tmp_path / "out"), *(["--strict"] if strict else [])]
        code, output = run(str(folder), *flags, monkeypatch=monkeypatch)
        assert code == expected
        assert ("No findings." in output) == (folder == sound)
        assert "The audio was not read" in output
