"""The benchmarks run at tiny sizes and write what they say they write. What they measure is not judged here."""

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import run_command

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import harness  # noqa: E402
import reference  # noqa: E402
import run_all  # noqa: E402

IN_PROCESS = (
    "decoding",
    "features",
    "gpu",
    "growth",
    "launches",
    "padding",
    "prefill",
    "prompt_cache",
    "reply",
    "tower_cache",
    "towers",
    "training",
)
OWN_PROCESSES = ("imports", "memory", "serving")  # these start fresh interpreters
NO_GOALS = ("generation",)


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run_all, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(reference.QUICK_SIZES["audio"], "max_source_positions", 300)  # windows of 6 s in place of 30
    return tmp_path / "results"


def run_quickly(name: str, results: Path) -> dict:
    importlib.import_module(name).main(quick=True)
    return json.loads((results / f"{name}.json").read_text())


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_benchmark_runs_and_says_what_was_to_reach(name, results):
    content = run_quickly(name, results)
    goals = [row for row in content["rows"] if row["to reach"]]
    assert goals and all(isinstance(row["reached"], float) for row in content["rows"])
    assert content["environment"]["versions"]["torch"] and content["environment"]["load_average"] >= 0
    if name == "growth":
        assert (results / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NO_GOALS)
def test_a_benchmark_without_goals_runs(name, results):
    assert all(isinstance(row["reached"], float) for row in run_quickly(name, results)["rows"])


@pytest.mark.slow
def test_the_lora_dispatches_no_more_operations_than_it_did():
    """At the paper's number of layers; what the LLM itself dispatches is Transformers'."""
    launches = importlib.import_module("launches")
    ours, bare = (launches.count_launches(lora=lora) for lora in (True, False))
    own = {name: counts.total() - bare[name].total() for name, counts in ours.items()}
    assert own["training step"] <= 1662 * 1.05 and own["prefill"] <= 422 * 1.05
    assert ours["training step"].total() <= 5261 * 1.05  # all of a step, while the LoRA still ran at every position
    assert own["decode step"] == 0
    # Once for each input: of the attention, of its output, of the MLP, and of what that widens to.
    assert ours["training step"]["native_dropout"] == 4 * 28


@pytest.mark.slow
def test_profiles_are_drawn_and_traced(results, tmp_path, monkeypatch):
    profiles = importlib.import_module("profiles")
    monkeypatch.setattr(profiles, "RESULTS", results)
    profiles.main(suffix="_now", traces=tmp_path / "traces", quick=True)
    for name in ("training", "reply"):
        assert (results / f"profile_{name}_now.png").read_bytes().startswith(b"\x89PNG")
        events = json.loads((tmp_path / "traces" / f"{name}_now.json").read_text())["traceEvents"]
        assert {"speech tower", "emotion tower", "projector", "LLM"} <= {event.get("name") for event in events}


def test_the_benchmark_of_imports_runs(results, monkeypatch):
    imports = importlib.import_module("imports")
    for name, arguments in imports.STATEMENTS.items():
        if arguments[0] == "-c":  # a fresh process takes seconds for it
            exec(arguments[1], {})
            monkeypatch.setitem(imports.STATEMENTS, name, ("-c", "import json"))
    assert all(isinstance(row["reached"], float) for row in run_quickly("imports", results)["rows"])


def measure(*arguments: object) -> None:
    print(json.dumps(importlib.import_module("memory").measure(*arguments)))


@pytest.mark.slow
def test_the_benchmark_of_memory_runs(results, monkeypatch, fork_server):
    """Its processes are forked here; its own start afresh, and import everything."""

    class Forking:
        def apply(self, function, arguments):
            assert function is memory.measure
            return json.loads(fork_server.run(measure, *arguments).stdout.splitlines()[-1])

        def get_context(self, method):
            return self

        def Pool(self, *_, **__):
            return contextlib.nullcontext(self)

    memory = importlib.import_module("memory")
    monkeypatch.setattr(memory, "multiprocessing", Forking())
    assert all(isinstance(row["reached"], float) for row in run_quickly("memory", results)["rows"])


def test_the_benchmark_of_serving_runs(results, monkeypatch, fork_server):
    """Its server is forked here; its own is a fresh process."""

    def start(command, *, stdout, stderr, env):
        assert command[:3] == [sys.executable, "-m", "relllm.cli"] and stderr == subprocess.STDOUT
        return fork_server.start(run_command, *command[3:], output=Path(stdout.name), **env)

    serving = importlib.import_module("serving")
    monkeypatch.setattr(serving, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    assert all(isinstance(row["reached"], float) for row in run_quickly("serving", results)["rows"])


def test_every_benchmark_runs_here_but_the_one_that_runs_for_minutes():
    assert {*run_all.names(), "gpu"} == {*IN_PROCESS, *OWN_PROCESSES, *NO_GOALS, "prepare"}


def test_variants_take_turns_and_warm_ups_are_not_timed(monkeypatch):
    order: list[str] = []
    ticks = iter(range(100))
    monkeypatch.setattr(harness, "read_clock", lambda: float(next(ticks)))
    found = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmups=1)
    assert order == ["a", "b"] * 4
    assert found == {"a": 1.0, "b": 1.0}


def test_a_goal_is_met_on_its_own_side_only():
    assert harness.figure("x", 0.2, "<= 0.22")["met"] == "yes"
    assert harness.figure("x", 0.23, "<= 0.22")["met"] == "no"
    assert harness.figure("x", 4.0, ">= 4")["met"] == "yes"
    assert harness.figure("x", 3.9, ">= 4")["met"] == "no"
    assert harness.figure("x", 3.9)["met"] == ""


def test_the_peak_of_memory_is_that_since_the_reset():
    harness.reset_peak()
    before = harness.resident_mib(peak=True)
    block = b"x" * (64 * 1024**2)
    assert harness.resident_mib(peak=True) - before == pytest.approx(64, abs=16)
    del block


def test_a_failing_benchmark_is_named_and_the_others_are_summed_up(results, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "good.py").write_text("print('measured')")
    (folder / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(run_all, "FOLDER", folder)
    harness.report("good", [harness.figure("speed of light", 3.0, ">= 2")], about="a test")
    assert run_all.main([]) == 1
    out, err = capfd.readouterr()
    assert "measured" in out and "speed of light" in out and "bad failed" in err


def test_a_benchmark_that_is_not_there_is_an_error_with_the_names(capsys):
    assert run_all.main(["speed"]) == 2
    assert "speed" in capsys.readouterr().err
