"""`relllm evaluate` and `relllm write-targets` with `--engine vllm` write the files of the other engine."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from target_rows import make_rows, read_lines, write_lines
from tiny_models import RATE, clip, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from vllm_checkpoints import save_checkpoint, save_llm

from relllm.cli import app
from relllm.data.journal import report_path
from relllm.inference.vllm import vllm_engine
from relllm.labels import DIMENSIONS, EMOTIONS
from relllm.processing.turns_relllm import build_chat_template

ARGUMENTS = json.dumps(
    {
        **{"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8},
        **{"kv_cache_memory_bytes": 64 * 2**20, "gpu_memory_utilization": 0.1},
    }
)
IN_VLLM = ["--engine", "vllm", "--engine-args", ARGUMENTS]


def run(*arguments: object) -> None:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output


@pytest.fixture(scope="module", autouse=True)
def one_engine_a_model() -> Iterator[None]:
    """Each start of vLLM takes seconds: the commands on one model share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "OfflineEngine", functools.cache(vllm_engine.OfflineEngine))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), light=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips, one of several windows, and one that is no audio."""
    folder, rows = tmp_path_factory.mktemp("corpus"), []
    for index in range(6):
        soundfile.write(folder / f"c{index}.wav", clip(5.0 if index == 4 else 0.4 + 0.2 * index, seed=index), RATE)
        row = {"id": f"c{index}", "audio": f"c{index}.wav", "text": f"words {index}", "split": "test"}
        rows.append(row | {"emotion": EMOTIONS[index % 4], "speaker": "a"} | dict.fromkeys(DIMENSIONS, 0.1 * index))
    (folder / "c5.wav").write_bytes(b"no audio at all")
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def near(found: object, expected: object) -> bool:
    """Whether two answers are the same but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[name], expected[name]) for name in expected)
    return found == pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else found == expected


@pytest.mark.parametrize("system", ["re-llm", "text-only"])
def test_a_model_is_measured_by_the_same_lines(place: Path, corpus: Path, system: str, tmp_path: Path) -> None:
    given = ["--system", system, "--max-new-tokens", 8, "--batch-size", 4]
    tasks = ["--tasks", "ser,dimensions" if system == "re-llm" else "ser"]
    run("evaluate", place, corpus, "--output-dir", tmp_path / "ours", *given, *tasks, "--device", "cpu")
    run("evaluate", place, corpus, "--output-dir", tmp_path / "vllm", *given, *tasks, *IN_VLLM)
    (head, *lines), (own_head, *own) = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("vllm", "ours"))
    engines = [(one["settings"].pop("engine"), one["settings"].pop("engine_args")) for one in (head, own_head)]
    assert engines == [("vllm", json.loads(ARGUMENTS)), ("transformers", {})]
    assert head == own_head
    assert near({line["id"]: line for line in lines}, {line["id"]: line for line in own})
    assert len({line["recognition"]["generated"]["text"] for line in own if "recognition" in line}) > 1
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("vllm", "ours")]
    assert near(*(one["recognition"] for one in metrics))


def test_replies_to_learn_are_the_same(tmp_path: Path) -> None:
    tokenizer, place = tiny_tokenizer(), save_llm(tmp_path / "llm")
    tokenizer.chat_template = build_chat_template(tokenizer)
    tokenizer.save_pretrained(place)
    llm = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        llm.get_input_embeddings().weight[tokenizer.eos_token_id] *= 2  # else no reply comes to an end
    llm.generation_config.repetition_penalty = 1.5
    llm.save_pretrained(place)
    data = write_lines(tmp_path / "rows.jsonl", make_rows(40))
    given = ["--text-model", place, "--max-new-tokens", 48, "--batch-size", 16, "--min-words", 1]
    outs = {name: tmp_path / f"{name}.jsonl" for name in ("ours", "vllm", "drawn", "again")}
    run("write-targets", data, "--out", outs["ours"], *given, "--device", "cpu")
    run("write-targets", data, "--out", outs["vllm"], *given, *IN_VLLM)
    for name in ("drawn", "again"):
        run("write-targets", data, "--out", outs[name], *given, "--temperature", 1.0, *IN_VLLM)
    written = {name: read_lines(out) for name, out in outs.items()}
    reports = {name: json.loads(report_path(out).read_text()) for name, out in outs.items()}
    assert written["vllm"] == written["ours"] and reports["vllm"]["dropped"] == reports["ours"]["dropped"]
    assert len({row["response"] for row in written["ours"]}) > 1
    assert written["drawn"] == written["again"] != written["ours"]
