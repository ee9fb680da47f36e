"""The demo from corpus to report, at a size that learns nothing: its steps, its honesty, its going on."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import blank_pictures
from processes import run_command
from rich.console import Console

from relllm.demo import steps, tiny
from relllm.demo.demo_settings import DemoSettings
from relllm.demo.tiny import run_demo
from relllm.evaluation.statistics import wilcoxon_test
from relllm.hub import push
from relllm.labels import EMOTIONS

pytestmark = pytest.mark.usefixtures("no_drawing")
pytest.importorskip("espeakng_loader", reason="the demo's speech needs `pip install relllm[demo]`")

ASKED = 3  # of five test clips, here


def tiny_settings(folder, **changes) -> DemoSettings:
    sizes = {"train_clips": 3, "validation_clips": 1, "test_clips": 1}
    epochs = dict.fromkeys(("text_epochs", "emotion_epochs", "speech_epochs"), 0.1)
    return DemoSettings(output_dir=folder, **(sizes | epochs | changes))


def test_the_heads_read_as_many_clips_as_show_the_gain_that_200_left_open():
    gain, differ = 0.045, 97 / 200  # seen on 200 clips (p = 0.42): UA, and the share on which one alone was right
    num_clips = len(EMOTIONS) * DemoSettings().test_clips
    shares = ((differ + gain) / 2, (differ - gain) / 2, 1 - differ)
    drawn = np.random.default_rng(0).multinomial(num_clips, shares, size=500)
    found = [wilcoxon_test(np.repeat([1, -1, 0], counts)).p_value < 0.05 for counts in drawn]
    assert 0.8 < np.mean(found) < 0.9  # power at 5 %, and not many more clips than it takes


@pytest.fixture(scope="module", autouse=True)
def few_asked():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "ASKED", ASKED)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, fork_server):
    def start(command, *, check):
        assert command[:3] == [sys.executable, "-m", "relllm.cli"] and check
        fork_server.run(run_command, *command[3:])

    folder = tmp_path_factory.mktemp("runs") / "demo"
    console = Console(file=io.StringIO(), width=200)
    with blank_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "subprocess", SimpleNamespace(run=start))  # forked here; its own imports everything
        learned = run_demo(tiny_settings(folder), console)
    return folder, learned, console.file.getvalue()


@pytest.mark.slow
def test_every_step_leaves_what_it_made(run):
    folder, _, report = run
    for name in ("corpus", "llm", "emotion-tower", "re-llm", "speech-only"):
        assert (folder / name).is_dir(), name
    assert not list(folder.glob("*.partial"))
    asked = {"generated": ASKED, "likelihood": ASKED}
    systems = {"runs": ("text-only", "speech-only", "re-llm"), "heads/runs": ("speech-only", "re-llm")}
    for place, of_place in systems.items():
        for system in of_place:
            metrics = json.loads((folder / place / system / "metrics.json").read_text())
            clips = {way: numbers["num_clips"] for way, numbers in metrics["recognition"].items()}
            assert metrics["system"] == system and clips == ({"head": 5} if place == "heads/runs" else asked)
            assert ("dimensions" in metrics) == (place == "heads/runs")
            assert list((folder / place / system / "plots").glob("*.png"))
    assert f"{metrics['recognition']['head']['ua']:.3f}" in report and "not human emotion" in report
    assert "--system re-llm --device cpu --ways head --out" in report
    assert (folder / "comparison" / "comparison.md").is_file()
    assert "UA, head | RE-LLM" in (folder / "heads" / "comparison" / "comparison.md").read_text()
    card = (folder / "re-llm" / "README.md").read_text()
    assert "synthetic" in card and "first 3 rows" in card and "5 clips of" in card and str(folder) not in card


@pytest.mark.slow
def test_the_verdict_follows_from_the_measured_accuracy(run):
    folder, learned, report = run
    metrics = json.loads((folder / "heads" / "runs" / "re-llm" / "metrics.json").read_text())
    accuracy = metrics["recognition"]["head"]["ua"]
    assert learned == (accuracy > 0.3)
    assert ("learned nothing" in report) == (not learned)


@pytest.fixture
def no_fresh_processes(monkeypatch):
    """The first run has loaded the checkpoint in other processes."""
    asked = []
    monkeypatch.setattr(push, "check_loads", lambda folder, **options: asked.append(folder))
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command))
    yield
    assert len(asked) == 2 and "reply" in asked[1]


@pytest.mark.slow
def test_a_second_run_makes_nothing_anew_and_finds_the_same(run, no_fresh_processes):
    folder, learned, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in folder.rglob("predictions.jsonl")}
    assert run_demo(tiny_settings(folder), Console(file=io.StringIO())) == learned
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_step_that_was_interrupted_is_done_again(run, no_fresh_processes):
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
