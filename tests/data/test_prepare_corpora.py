"""`relllm prepare` on trees in the layouts of the real corpora, from the command to what training reads."""

import json

import pytest
from corpus_trees import write_esd, write_iemocap, write_msp_podcast
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.loading import load_corpus

pytestmark = pytest.mark.usefixtures("no_drawing")
EXPECTED = {
    "iemocap": {"train": {"neutral": 1, "angry": 1, "happy": 2, "sad": 1}, "test": {"happy": 1}},
    "esd": {
        "train": {"neutral": 2},
        "test": {"neutral": 2},
        "validation": {"neutral": 2, "angry": 2, "happy": 2, "sad": 2, "surprise": 2},
    },
    "msp-podcast": {
        "train": {"angry": 1, "surprise": 1},
        "test": {"neutral": 1},
        "validation": {"happy": 1},
        "test2": {"sad": 1},
    },
}
WRITERS = {"iemocap": write_iemocap, "esd": write_esd, "msp-podcast": write_msp_podcast}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("embed", [False, True], ids=["by reference", "embedded"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_corpus_becomes_rows_that_training_reads(name, embed, tmp_path):
    root, out = WRITERS[name](tmp_path / "root"), tmp_path / "out"
    command = ["prepare", name, str(root), "--out", str(out), "--num-proc", "1", *["--embed-audio"] * embed]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert {split: found["emotions"] for split, found in report["splits"].items()} == EXPECTED[name]
    for split, emotions in EXPECTED[name].items():
        rows = load_corpus(str(out), split)
        assert len(rows) == sum(emotions.values())
        for row in rows:
            where = row["audio"]["path"] if embed else row["audio"]
            assert where.endswith(".wav") and (row["id"] in where) and 0.04 < row["duration_s"] < 0.06
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and not any(row["text"] in card for row in load_corpus(str(out), "test"))


def test_a_wrong_root_is_one_sentence_and_writes_nothing(tmp_path):
    write_iemocap(tmp_path / "parent" / "IEMOCAP_full_release")
    result = CliRunner().invoke(app, ["prepare", "iemocap", str(tmp_path / "parent"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "IEMOCAP_full_release" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
