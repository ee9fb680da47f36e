"""`relllm hear`: emotions of many clips as a table, from a checkpoint and clips on disk."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from pictures import blank_pictures
from tiny_models import RATE, clip, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import relllm.inference.hearing
from relllm.cli import app
from relllm.labels import DIMENSIONS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as published LLMs are; the heads, which were trained, in float32."""
    folder = tmp_path_factory.mktemp("re-llm")
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in folders, of other rates and kinds, a call on two channels, one that is no audio."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "day 1").mkdir()
    soundfile.write(folder / "day 1" / "take[1].wav", clip(0.7), RATE)
    soundfile.write(folder / "b.flac", clip(1.1, seed=1, rate=44_100), 44_100)
    soundfile.write(folder / "call.wav", np.stack([clip(5.3, seed=2), clip(5.3, seed=3)], axis=1), RATE)
    (folder / "c.wav").write_bytes(b"no audio at all")
    (folder / "notes.txt").write_text("Nothing.")
    return folder


def run(checkpoint: Path, *arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["hear", str(checkpoint), *map(str, arguments)], input=stdin)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.stdout, done.stderr


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_model(checkpoint: Path, samples: np.ndarray) -> dict[str, float]:
    """What the checkpoint returns for one clip, by Transformers alone."""
    model = AutoModel.from_pretrained(checkpoint).eval()
    inputs = AutoProcessor.from_pretrained(checkpoint).feature_extractor(samples)
    del inputs["num_audio_tokens"]
    with torch.no_grad():
        output = model.get_audio_features(**inputs)
    probabilities = output.emotion_logits[0].float().softmax(-1).tolist()
    named = {f"p_{name}": value for name, value in zip(model.config.emotion_labels, probabilities, strict=True)}
    for prefix, values in (("", output.dimensions), ("tower_", output.tower_dimensions)):
        named |= {f"{prefix}{name}": value for name, value in zip(DIMENSIONS, values[0].tolist(), strict=True)}
    return named


def test_a_folder_becomes_a_table_with_a_row_for_each_clip(checkpoint: Path, recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "tables" / "heard.csv"
    status, _, errors = run(checkpoint, recordings, "--out", out)
    rows = read_csv(out)
    names = [str(recordings / name) for name in ("b.flac", "c.wav", "call.wav", "day 1/take[1].wav")]
    assert sorted(row["clip"] for row in rows) == names
    assert status == 1 and "c.wav" in errors and len(errors.strip().splitlines()) == 1
    unread = next(row for row in rows if row["clip"] == names[1])
    assert "c.wav" in unread["error"] and not unread["emotion"]
    took = next(row for row in rows if row["clip"] == names[3])
    expected = by_model(checkpoint, soundfile.read(names[3], dtype="float32")[0])
    assert {name: float(took[name]) for name in expected} == pytest.approx(expected, abs=1e-3)
    assert took["emotion"] == max(expected, key=lambda name: expected[name] * name.startswith("p_"))[2:]
    assert (took["channel"], took["start_s"], took["end_s"], took["error"]) == ("mix", "0.0", "0.7", "")
    assert json.loads(out.with_name("heard.report.json").read_text())["not_read"].keys() == {names[1]}


def test_windows_of_each_channel_are_clips_of_their_own(checkpoint: Path, recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "heard.jsonl"
    options = ["--every", 2, "--overlap", 0.5, "--channel", "each", "--batch-size", 2, "--plots", tmp_path / "plots"]
    with blank_pictures():
        status, _, _ = run(checkpoint, recordings / "call.wav", *options, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 0
    spans = [(0.0, 2.5), (2.0, 4.5), (4.0, 5.3)]
    assert [(row["channel"], row["start_s"], row["end_s"]) for row in rows] == [
        (channel, *span) for channel in ("left", "right") for span in spans
    ]
    samples = soundfile.read(recordings / "call.wav", dtype="float32")[0]
    expected = by_model(checkpoint, samples[2 * RATE : int(4.5 * RATE), 1])
    assert {name: rows[4][name] for name in expected} == pytest.approx(expected, abs=1e-3)
    pictures = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert pictures == ["0001_call.wav_left.png", "0001_call.wav_right.png"]


@pytest.mark.parametrize(("duration_s", "ends"), [(4.9, [2.0, 4.9]), (5.1, [2.0, 4.0, 5.1]), (0.5, [0.5])])
def test_no_sliver_is_left_at_the_end(checkpoint: Path, tmp_path: Path, duration_s: float, ends: list) -> None:
    soundfile.write(tmp_path / "a.wav", clip(duration_s), RATE)
    status, table, _ = run(checkpoint, tmp_path / "a.wav", "--every", 2)
    rows = list(csv.DictReader(io.StringIO(table)))
    assert status == 0 and [float(row["end_s"]) for row in rows] == ends


def test_a_data_set_names_its_rows_and_standard_input_is_a_clip(
    checkpoint: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"id": f"row{number}", "audio": str(recordings / "b.flac")} for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, table, _ = run(checkpoint, tmp_path, "-", stdin=(recordings / "b.flac").read_bytes())
    rows = list(csv.DictReader(io.StringIO(table)))
    assert status == 0 and [row.pop("clip") for row in rows] == ["row0", "row1", "row2", "stdin"]
    assert rows[0] == rows[3]
    (tmp_path / "paths.csv").write_text(f"audio\n{recordings / 'b.flac'}\n")
    assert run(checkpoint, tmp_path / "paths.csv", "--out", tmp_path / "o.parquet")[0] == 0
    import pandas

    table = pandas.read_parquet(tmp_path / "o.parquet")
    assert list(table["clip"]) == [str(recordings / "b.flac")] and table["arousal"].dtype == float


def test_a_run_that_was_killed_goes_on_and_one_of_other_settings_is_refused(
    checkpoint: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [recordings / "b.flac", recordings / "call.wav", recordings / "day 1" / "take[1].wav"]
    whole, out = tmp_path / "whole.csv", tmp_path / "heard.csv"
    assert run(checkpoint, *files, "--batch-size", 1, "--out", whole)[0] == 0
    true_hear, heard = relllm.inference.hearing.hear, []

    def interrupted(model, processor, clips, **options):
        if len(heard) == 1:
            raise KeyboardInterrupt
        heard.extend(clips)
        return true_hear(model, processor, clips, **options)

    monkeypatch.setattr(relllm.inference.hearing, "hear", interrupted)
    status, _, errors = run(checkpoint, *files, "--batch-size", 1, "--out", out)
    assert status == 130 and not out.exists() and "same command goes on" in errors
    monkeypatch.setattr(relllm.inference.hearing, "hear", true_hear)
    status, _, errors = run(checkpoint, *files, "--every", 2, "--out", out)
    assert status == 1 and "every" in errors
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(relllm.inference.hearing, "hear", lambda *args, **kw: calls.append(1) or true_hear(*args, **kw))
        assert run(checkpoint, *files, "--batch-size", 1, "--out", out)[0] == 0
    assert len(calls) == 2 and read_csv(out) == read_csv(whole)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # what is complete loads nothing
    assert run(checkpoint, *files, "--out", out)[0] == 0
    status, _, errors = run(checkpoint, *files[:2], "--out", out)
    assert status == 1 and "is there already" in errors


def test_other_audio_of_the_same_name_is_another_table(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first, second = tmp_path / "a.wav", tmp_path / "b.wav"
    soundfile.write(first, clip(0.7), RATE)
    soundfile.write(second, clip(0.7, seed=1), RATE)
    lines = tmp_path / "rows.jsonl"
    sets = tmp_path / "rows.parquet"

    def write_rows(path: Path) -> None:
        lines.write_text(json.dumps({"id": "r", "audio": str(path)}) + "\n")
        rows = datasets.Dataset.from_list([{"id": "r", "audio": {"bytes": path.read_bytes(), "path": "r.wav"}}])
        rows.to_parquet(str(sets))

    for name, source in (("stdin", "-"), ("rows", lines), ("sets", sets), ("file", "clip.wav")):
        out, answers = tmp_path / f"{name}.csv", []
        for path in (first, first, second):
            write_rows(path)
            (tmp_path / path.stem).mkdir(exist_ok=True)
            shutil.copy2(path, tmp_path / path.stem / "clip.wav")  # the same name in two folders, of one size and age
            os.utime(tmp_path / path.stem / "clip.wav", (1, 1))
            monkeypatch.chdir(tmp_path / path.stem)
            answers.append(run(checkpoint, source, "--out", out, stdin=path.read_bytes()))
        assert [status for status, *_ in answers] == [0, 0, 1], (name, answers)
        assert "is there already" in answers[2][2] and "clips: " in answers[2][2]


def test_plots_are_drawn_of_a_table_that_is_complete(
    checkpoint: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    for suffix in ("csv", "parquet"):
        command = [recordings / "call.wav", recordings / "c.wav", "--every", 2, "--out", tmp_path / f"heard.{suffix}"]
        run(checkpoint, *command)
        with monkeypatch.context() as patch:
            patch.setattr("transformers.PreTrainedModel.from_pretrained", None)
            calls = drawn[suffix] = []
            patch.setattr(relllm.inference.hearing, "plot_over_time", lambda *a, calls=calls, **kw: calls.append(a))
            run(checkpoint, *command, "--plots", tmp_path / "plots")
    edges, probabilities, dimensions, path = drawn["csv"][0]
    assert edges == [0, 2, 4, 5.3] and path.name == "0001_call.wav_mix.png" and len(drawn["csv"]) == 1
    assert len(probabilities) == 5 and list(dimensions) == list(DIMENSIONS)
    assert all(0 <= value <= 1 for values in probabilities.values() for value in values)
    assert drawn["csv"] == drawn["parquet"]
    for out in ([], ["--out", tmp_path / "unread.csv"]):
        status, _, errors = run(checkpoint, recordings / "c.wav", "--every", 2, *out, "--plots", tmp_path / "none")
        assert status == 1 and "not heard" in errors and "Traceback" not in errors


def test_what_is_not_there_or_holds_no_audio_is_said_before_a_model_is_loaded(
    checkpoint: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    monkeypatch.chdir(recordings)
    (tmp_path / "empty").mkdir()
    for wrong, message, expected in (
        (["cal.wav"], "there is call.wav", 2),
        (["x/y.wav"], "No file or folder x/y.wav", 2),
        ([tmp_path / "empty"], "no audio files", 2),
        (["b.flac", "--overlap", 1], "--every", 2),
        (["b.flac", "--out", "o.txt"], ".csv, .jsonl, .parquet", 1),
        (["b.flac", "--dtype", "float61"], "float61", 2),
    ):
        status, _, errors = run(checkpoint, *wrong)
        assert (status, len(errors.strip().splitlines())) == (expected, 1) and message in errors, errors


def test_a_model_that_hears_speech_only_has_no_reading_of_a_tower(recordings: Path, tmp_path: Path) -> None:
    config = tiny_config(fusion="none")
    tiny_model(config).save_pretrained(tmp_path)
    tiny_processor(config).save_pretrained(tmp_path)
    status, table, _ = run(tmp_path, recordings / "b.flac")
    assert status == 0 and "arousal" in table and "tower_" not in table


def test_a_clip_beyond_the_limit_is_heard_in_windows_and_refused_whole(checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "re-llm")
    processor = tiny_processor()
    processor.feature_extractor.max_duration_s = 3.0  # ten minutes by default
    processor.save_pretrained(model)
    soundfile.write(tmp_path / "long.wav", clip(3.5), RATE)
    status, _, errors = run(model, tmp_path / "long.wav")
    assert status == 1 and "at most 3 s: --every" in errors
    status, table, _ = run(model, tmp_path / "long.wav", "--every", 2)
    assert status == 0 and len(table.splitlines()) == 3
