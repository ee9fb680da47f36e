"""The demo from corpus to report, at a size that learns nothing: its steps, its honesty, its going on."""

import io
import json

import pytest
from rich.console import Console

from relllm.demo import DemoSettings, run_demo

pytest.importorskip("espeakng_loader", reason="the demo's speech needs `pip install relllm[demo]`")


def tiny_settings(folder, **changes) -> DemoSettings:
    sizes = {"clips_per_emotion": (3, 1, 1), "text_epochs": 0.1, "emotion_epochs": 0.1, "speech_epochs": 0.1}
    return DemoSettings(out=folder, **(sizes | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    console = Console(file=io.StringIO(), width=200)
    learned = run_demo(tiny_settings(folder), console)
    return folder, learned, console.file.getvalue()


@pytest.mark.slow
def test_every_step_leaves_what_it_made(run):
    folder, _, report = run
    for name in ("corpus", "llm", "emotion-tower", "re-llm", "speech-only"):
        assert (folder / name).is_dir(), name
    assert len(list((folder / "plots").rglob("*.png"))) == 4
    assert not list(folder.glob("*.partial"))
    results = json.loads((folder / "results.json").read_text())
    assert results["re-llm"]["num_clips"] == 5 and len(results["re-llm"]["replies"]) == 5
    assert f"{results['re-llm']['ua']:.3f}" in report and "not human emotion" in report


@pytest.mark.slow
def test_the_verdict_follows_from_the_measured_accuracy(run):
    folder, learned, report = run
    accuracy = json.loads((folder / "results.json").read_text())["re-llm"]["ua"]
    assert learned == (accuracy > 0.3)
    assert ("learned nothing" in report) == (not learned)


@pytest.mark.slow
def test_a_second_run_makes_nothing_anew_and_finds_the_same(run):
    folder, learned, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    results = json.loads((folder / "results.json").read_text())
    assert run_demo(tiny_settings(folder), Console(file=io.StringIO())) == learned
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert json.loads((folder / "results.json").read_text()) == results


@pytest.mark.slow
def test_a_step_that_was_interrupted_is_done_again(run):
    folder, _, _ = run
    (folder / "speech-only").rename(folder / "speech-only.partial")
    (folder / "speech-only.partial" / "model.safetensors").write_bytes(b"half a file")
    run_demo(tiny_settings(folder), Console(file=io.StringIO()))
    assert (folder / "speech-only" / "model.safetensors").stat().st_size > 1000
    assert not (folder / "speech-only.partial").exists()


@pytest.mark.slow
def test_a_folder_of_other_settings_is_refused(run):
    folder, _, _ = run
    with pytest.raises(ValueError, match="Choose another --out"):
        run_demo(tiny_settings(folder, seed=1), Console(file=io.StringIO()))
