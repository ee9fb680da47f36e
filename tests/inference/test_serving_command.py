"""The real `relllm serve`, in a process of its own: started, asked, flooded with rubbish, stopped by a signal."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from processes import Child, ForkServer, run_command
from served import audio_file, clip, reply_alone, user, wait_until
from tiny_models import tiny_emotion_tower, tiny_model, tiny_processor
from typer.testing import CliRunner

from relllm.cli import app

MESSAGES, CLIPS = [user("Hear: ", clip(0.6))], [clip(0.6)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-re-llm"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def start(fork_server: ForkServer, checkpoint: Path, *flags: str, **variables: str) -> tuple[Child, str]:
    """The process and its address, once it says that it serves."""
    command = ["serve", str(checkpoint), "--port", "0", "--device", "cpu", *flags]
    process = fork_server.start(run_command, *command, COLUMNS="200", **variables)
    wait_until(lambda: "Serving" in process.stdout or process.poll() is not None, seconds=120)
    found = re.search(r"at (http://127\.0\.0\.1:\d+/v1)", process.stdout)
    assert found, process.stdout + process.stderr
    return process, found[1]


def test_the_command_serves_and_a_signal_ends_it_gracefully(fork_server: ForkServer, checkpoint) -> None:
    process, url = start(fork_server, checkpoint, "--max-tokens", "900", RELLLM_API_KEY="secret")
    try:
        with pytest.raises(openai.AuthenticationError), OpenAI(base_url=url, api_key="x", max_retries=0) as stranger:
            stranger.models.list()
        with OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["tiny-re-llm"]
            answer = client.chat.completions.create(model="tiny-re-llm", messages=MESSAGES, max_tokens=8)
            expected = reply_alone(tiny_model(), tiny_processor(), MESSAGES, CLIPS)
            assert answer.choices[0].message.content == expected
            stream = client.chat.completions.create(
                model="tiny-re-llm", messages=MESSAGES, max_tokens=300, stream=True, seed=1, temperature=1.0
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)  # what runs is finished
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(re.search(r":(\d+)/", url)[1])), timeout=5)
    finally:
        process.kill()
        process.wait(30)


def test_the_server_stays_small() -> None:
    """What a service needs beyond it, vLLM has."""
    files = (Path(__file__).parents[2] / "relllm" / "inference" / "server").glob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 1000


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded(checkpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", str(port), "--device", "cpu"])
    assert result.exit_code != 0 and f"port {port}" in " ".join(result.output.split())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_every_address_of_ipv6_is_every_address_of_ipv4_too(checkpoint, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def connect(_: object) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            raise ValueError("somebody listens")

    monkeypatch.setattr("relllm.cli.talking.load_relllm", connect)
    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--host", "::", "--port", str(port)])
    assert "somebody listens" in f"{result.output} {result.exception}"


@pytest.mark.parametrize("key", ["", "a\n", "two words", "schlüssel"])
@pytest.mark.parametrize("as_flag", [True, False])
def test_a_key_that_no_client_can_send_is_refused(checkpoint, key: str, as_flag: bool) -> None:
    flags, env = (["--api-key", key], {}) if as_flag else ([], {"RELLLM_API_KEY": key})
    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", "0", *flags], env=env)
    assert result.exit_code == 2 and "The key (--api-key, RELLLM_API_KEY)" in " ".join(result.output.split())


def test_a_checkpoint_of_another_kind_is_refused(tmp_path) -> None:
    tiny_emotion_tower().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", "--device", "cpu"])
    assert result.exit_code != 0 and "not a ReLLM" in " ".join(result.output.replace("│", " ").split())


def test_a_missing_package_is_named_with_what_to_install(checkpoint, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("relllm.inference.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--port", "0"])
    assert result.exit_code == 1 and "pip install relllm[serve]" in result.stderr


@pytest.mark.parametrize("number", [0, 1])
def test_the_curl_lines_of_the_documents_send_clips_of_any_length(tmp_path, number: int) -> None:
    """With a `curl` that keeps what it is given: a command line may be 128 KiB long, and 10 s of speech are 320 kB."""
    lines = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    command = re.findall(r"^\$ (curl .*?)^```", lines, flags=re.DOTALL | re.MULTILINE)[number]
    (tmp_path / "question.wav").write_bytes(audio_file(clip(10.0)))
    (tmp_path / "curl").write_text("#!/bin/sh\ncat > body.json\n")
    (tmp_path / "curl").chmod(0o755)
    paths = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=paths, check=True)
    body = json.loads((tmp_path / "body.json").read_text())
    parts = body["input"] if number else body["messages"][0]["content"]
    sent = next(part["input_audio"]["data"] for part in parts if part["type"] == "input_audio")
    assert base64.b64decode(sent) == (tmp_path / "question.wav").read_bytes()
