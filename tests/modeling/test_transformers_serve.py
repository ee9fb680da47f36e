"""`transformers serve` answers what was said, for a checkpoint that it knows through `import relllm`."""

import base64
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import soundfile
from tiny_models import RATE, clip, conversation_inputs, tiny_model, tiny_processor, user_turn

pytest.importorskip("fastapi")
pytest.importorskip("openai")  # Transformers' server is built on its types

ORDERS = {
    "relllm first": "import relllm; from transformers.cli.transformers import main; main()",
    "transformers first": "from transformers.cli.transformers import main; import relllm; main()",
}


@pytest.fixture(params=ORDERS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", ORDERS[request.param], "serve", str(tmp_path), "--device", "cpu", "--port", port]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 180
            while "Uvicorn running" not in (tmp_path / "log").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            yield f"http://localhost:{port}/v1/chat/completions"
        finally:
            process.terminate()


@pytest.mark.slow
def test_it_answers_a_clip_as_the_model_does(url: str, tmp_path: Path) -> None:
    wav = io.BytesIO()
    soundfile.write(wav, clip(1.0), RATE, format="WAV", subtype="FLOAT")
    audio = {"data": base64.b64encode(wav.getvalue()).decode(), "format": "wav"}
    content = [{"type": "text", "text": "Reply to this:"}, {"type": "input_audio", "input_audio": audio}]
    body = {
        "model": str(tmp_path),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(url, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    model, processor = tiny_model(), tiny_processor()
    inputs = conversation_inputs(processor, [user_turn("Reply to this:", clip(1.0))])
    reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.json()["choices"][0]["message"]["content"] == processor.decode(reply, skip_special_tokens=True)
    assert answer.json()["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
