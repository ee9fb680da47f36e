"""Pseudo-labels of arousal, dominance and valence: where they go, what they say of themselves, bad audio, resuming."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_models import RATE, clip, tiny_emotion_config, tiny_emotion_tower
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.annotate import annotate_rows, read_dimensions
from relllm.data.data_settings import AnnotationSettings
from relllm.data.journal import journal_path, report_path
from relllm.data.loading import load_corpus
from relllm.data.rows import validate_row
from relllm.labels import DIMENSIONS
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel

SETTINGS = AnnotationSettings("lab/tower")


@pytest.fixture(scope="module")
def tower() -> ReLLMEmotionModel:
    """A tiny tower whose readings lie within [0, 1], so that only the tests that want it clip."""
    model = tiny_emotion_tower()
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(0.02)
        model.classifier.out_proj.bias.copy_(torch.tensor([0.3, 0.5, 0.7]))
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of different lengths, one labelled in full, one in part, one no audio at all."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(6):
        soundfile.write(folder / f"c{i}.wav", clip(0.3 + 0.1 * i, seed=i), RATE)
        rows.append({"id": f"c{i}", "audio": f"c{i}.wav", **dict.fromkeys(DIMENSIONS)})
    rows[1] |= {"arousal": 0.25, "dominance": 0.5, "valence": 1.0}
    rows[2] |= {"valence": 0.125}
    (folder / "c3.wav").write_bytes(b"no audio at all")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dimensions_of(row: dict) -> list[float]:
    return [row[name] for name in DIMENSIONS]


def test_a_reading_is_what_the_tower_gives_for_the_normalised_clip(tower) -> None:
    clips = [clip(0.9, seed=1), clip(0.4, seed=2)]
    for waveform, values in zip(clips, read_dimensions(tower, clips), strict=True):
        normal = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        with torch.no_grad():
            expected = tower(torch.from_numpy(normal)[None]).dimensions[0]
        assert values == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_clip_too_short_for_the_tower_on_disk_is_named_and_the_others_are_read(tower, tmp_path: Path) -> None:
    config = tiny_emotion_config()
    config.encoder_config.conv_kernel = [10, 8, 4]  # 770 samples for a frame
    ReLLMEmotionModel(config).save_pretrained(tmp_path)
    short, whole = read_dimensions(ReLLMEmotionModel.from_pretrained(tmp_path), [clip(1.0)[:769], clip(1.0)[:770]])
    assert "at least 48.12 ms" in short and np.isfinite(whole).all()


def test_a_long_clip_is_the_average_of_its_windows(tower) -> None:
    long = np.concatenate([clip(25, seed=1), 0.5 * clip(15, seed=2)])
    (values,) = read_dimensions(tower, [long])
    halves = read_dimensions(tower, [long[: 20 * RATE], long[20 * RATE :]])
    assert values == pytest.approx(np.mean(halves, axis=0).tolist(), abs=2e-6)


def test_rows_without_dimensions_get_them_and_say_from_whom(tower, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    report = annotate_rows(load_corpus(str(corpus)), out, lambda: tower, SETTINGS, batch_size=2, progress=False)
    rows = list(load_corpus(str(out)))
    for row in rows:
        validate_row(row)
        assert Path(row["audio"]).is_file()
    assert [row["id"] for row in rows] == [f"c{i}" for i in range(6)]
    pseudo = "pseudo:lab/tower"
    assert [row["dimension_source"] for row in rows] == [pseudo, "label", "label", None, pseudo, pseudo]
    assert dimensions_of(rows[1]) == [0.25, 0.5, 1.0]
    assert dimensions_of(rows[2]) == [None, None, 0.125]
    assert dimensions_of(rows[3]) == [None, None, None]
    (expected,) = read_dimensions(tower, [corpus / "c4.wav"])
    assert dimensions_of(rows[4]) == pytest.approx(expected, abs=2e-5)
    assert (report["rows"], report["read"], report["kept"]) == (6, 3, {"label": 2})
    assert report["partly_labelled"] == {"count": 1, "ids": ["c2"]}
    assert report["not_read"]["count"] == 1 and "c3.wav" in report["not_read"]["reasons"]["c3"]
    assert report["clipped"] == {"count": 0, "raw_values": {}}
    assert json.loads(report_path(out).read_text()) == report


def test_overwrite_replaces_labels_where_the_audio_can_be_read(tower, corpus: Path, tmp_path: Path) -> None:
    rows = load_corpus(str(corpus)).map(lambda row: {"arousal": 0.5} if row["id"] == "c3" else {})
    settings = AnnotationSettings("lab/tower", revision="v2", overwrite=True)
    report = annotate_rows(rows, tmp_path / "out.jsonl", lambda: tower, settings, progress=False)
    written = read_lines(tmp_path / "out.jsonl")
    pseudo = "pseudo:lab/tower@v2"
    assert [row["dimension_source"] for row in written] == [pseudo, pseudo, pseudo, "label", pseudo, pseudo]
    assert dimensions_of(written[1]) != [0.25, 0.5, 1.0] and written[3]["arousal"] == 0.5
    assert report["read"] == 5


def test_readings_of_another_model_are_kept_and_keep_their_name(tower, corpus: Path, tmp_path: Path) -> None:
    annotate_rows(load_corpus(str(corpus)), tmp_path / "one.jsonl", lambda: tower, SETTINGS, progress=False)
    again = AnnotationSettings("other/tower")
    report = annotate_rows(
        load_corpus(str(tmp_path / "one.jsonl")), tmp_path / "two.jsonl", lambda: tower, again, progress=False
    )
    assert report["kept"] == {"pseudo:lab/tower": 3, "label": 2} and report["read"] == 0
    assert [row["dimension_source"] for row in read_lines(tmp_path / "two.jsonl")] == [
        row["dimension_source"] for row in read_lines(tmp_path / "one.jsonl")
    ]


def test_what_leaves_the_scale_is_clipped_and_counted_and_another_scale_is_refused(tmp_path: Path) -> None:
    tower = tiny_emotion_tower()
    rows = Dataset.from_list([{"id": "a", "audio": str(tmp_path / "a.wav")}])
    soundfile.write(tmp_path / "a.wav", clip(0.5), RATE)
    with torch.no_grad():
        tower.classifier.out_proj.weight.zero_()
        tower.classifier.out_proj.bias.copy_(torch.tensor([1.25, 0.5, -0.25]))
    report = annotate_rows(rows, tmp_path / "near.jsonl", lambda: tower, SETTINGS, progress=False)
    (row,) = read_lines(tmp_path / "near.jsonl")
    assert dimensions_of(row) == [1.0, 0.5, 0.0] and row["dimension_source"] == "pseudo:lab/tower"
    assert report["clipped"] == {"count": 1, "raw_values": {"a": [1.25, 0.5, -0.25]}}
    for value in (4.5, float("nan")):
        with torch.no_grad():
            tower.classifier.out_proj.bias.fill_(value)
        report = annotate_rows(rows, tmp_path / f"far{value}.jsonl", lambda: tower, SETTINGS, progress=False)
        (row,) = read_lines(tmp_path / f"far{value}.jsonl")
        assert dimensions_of(row) == [None] * 3 and row["dimension_source"] is None
        assert "not on the scale [0, 1]" in report["not_read"]["reasons"]["a"]


def test_an_interrupted_run_goes_on_to_the_same_file(tower, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    rows, out = load_corpus(str(corpus)), tmp_path / "out.jsonl"
    annotate_rows(rows, tmp_path / "whole.jsonl", lambda: tower, SETTINGS, batch_size=2, progress=False)
    calls = []

    def interrupt(model, clips):
        calls.append(len(clips))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read_dimensions(model, clips)

    monkeypatch.setattr("relllm.data.annotate.read_dimensions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        annotate_rows(rows, out, lambda: tower, SETTINGS, batch_size=2, progress=False)
    monkeypatch.undo()
    assert not out.exists() and len(read_lines(journal_path(out))) == 1 + 2
    with pytest.raises(ValueError, match=r"other settings \(emotion_model: "):
        annotate_rows(rows, out, lambda: tower, AnnotationSettings("other/tower"), progress=False)
    annotate_rows(rows, out, lambda: tower, SETTINGS, batch_size=2, progress=False)
    whole = tmp_path / "whole.jsonl"
    assert out.read_bytes() == whole.read_bytes()
    assert report_path(out).read_bytes() == report_path(whole).read_bytes()


def test_the_command_annotates_a_corpus(tower, corpus: Path, tmp_path: Path) -> None:
    tower.save_pretrained(tmp_path / "tower")
    out = tmp_path / "out.jsonl"
    options = ["--emotion-model", str(tmp_path / "tower"), "--out", str(out), "--device", "cpu", "--batch-size", "4"]
    result = CliRunner().invoke(app, ["annotate", str(corpus), *options])
    assert result.exit_code == 0, result.output
    assert "not read" in result.output
    assert read_lines(out)[0]["dimension_source"] == f"pseudo:{tmp_path / 'tower'}"
