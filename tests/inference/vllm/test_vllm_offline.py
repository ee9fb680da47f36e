"""`relllm evaluate` and `relllm write-targets` with `--engine vllm` write the files of the other engine."""

import json
from pathlib import Path

import pytest
import soundfile
from target_rows import make_rows, read_lines, write_lines
from tiny_models import RATE, clip, tiny_tokenizer
from typer.testing import CliRunner
from vllm_checkpoints import save_checkpoint, save_llm

from relllm.cli import app
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
def test_a_model_is_measured_by_the_same_lines(corpus: Path, system: str, tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path / "model", light=True)
    given = ["--system", system, "--max-new-tokens", 8, "--batch-size", 4]
    tasks = ["--tasks", "ser,dimensions" if system == "re-llm" else "ser"]
    run("evaluate", place, corpus, "--output-dir", tmp_path / "ours", *given, *tasks, "--device", "cpu")
    run("evaluate", place, corpus, "--output-dir", tmp_path / "vllm", *given, *tasks, *IN_VLLM)
    (head, *lines), (own_head, *own) = (read_lines(tmp_path / name / "predictions.jsonl") for name in ("vllm", "ours"))
    assert head["settings"].pop("engine") == "vllm" and head == own_head
    assert near({line["id"]: line for line in lines}, {line["id"]: line for line in own})
    assert len({line["recognition"]["generated"]["text"] for line in own if "recognition" in line}) > 1
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("vllm", "ours")]
    assert near(*(one["recognition"] for one in metrics))


def test_replies_to_learn_are_the_same(tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    template = build_chat_template(tiny_tokenizer())
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    data = write_lines(tmp_path / "rows.jsonl", make_rows())
    given = ["--text-model", llm, "--max-new-tokens", 8, "--batch-size", 4, "--min-words", 1]
    run("write-targets", data, "--out", tmp_path / "ours.jsonl", *given, "--device", "cpu")
    run("write-targets", data, "--out", tmp_path / "vllm.jsonl", *given, *IN_VLLM)
    assert read_lines(tmp_path / "vllm.jsonl") == read_lines(tmp_path / "ours.jsonl")
    assert len({row["response"] for row in read_lines(tmp_path / "ours.jsonl")}) > 1
    drawn = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for out in drawn:
        run("write-targets", data, "--out", out, *given, "--temperature", 1.0, *IN_VLLM)
    assert read_lines(drawn[0]) == read_lines(drawn[1]) != read_lines(tmp_path / "vllm.jsonl")
