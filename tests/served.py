"""A running server for the tests: a tiny model behind a socket of 127.0.0.1, in a thread of this process.

`reply_alone` is what its answers are compared with: the model's own `generate`, one conversation at a time.
"""

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from openai import OpenAI
from tiny_models import RATE, audio_inputs, clip, conversation_inputs

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.inference.inference_settings import BatchSettings, RequestLimits
from relllm.inference.server.app import Service
from relllm.inference.server.server import Server
from relllm.inference.server.writing import Job

NAME = "tiny"


@dataclass
class Running:
    """A server in a thread, with the batches that its engine has begun, in order."""

    server: Server
    service: Service
    port: int
    thread: threading.Thread
    batches: list[list[Job]]

    @property
    def num_waiting(self) -> int:
        return len(self.service.engine.queue)

    def dropped(self) -> int:
        """Requests that were given up because their client had gone."""
        return sum(job.cancelled and job.ended for batch in self.batches for job in batch)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key: str = "none") -> OpenAI:
        """OpenAI's own client. It does not repeat a request: an error is a test's business."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)


@contextlib.contextmanager
def serving(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    *,
    api_key: str | None = None,
    settings: BatchSettings = BatchSettings(),  # noqa: B008
    limits: RequestLimits = RequestLimits(),  # noqa: B008
    grace_s: float = 5.0,
) -> Iterator[Running]:
    """A server on a free port; it has stopped when the block is left."""
    service = Service(model, processor, name=NAME, api_key=api_key, settings=settings, limits=limits)
    batches: list[list[Job]] = []
    begin = service.engine._begin

    def recorded(batch: list[Job]) -> None:
        batches.append(batch)
        begin(batch)

    service.engine._begin = recorded
    started = threading.Event()
    server = Server(service, grace_s=grace_s, announce=started.set)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        assert started.wait(30), "the server did not start"
        yield Running(server, service, sock.getsockname()[1], thread, batches)
    finally:
        server.should_exit = True
        thread.join(30)
        service.engine.join(30)
        assert not thread.is_alive() and not service.engine.is_alive()


def wait_until(condition, *, seconds: float = 10.0) -> None:
    """Waits for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def audio_file(waveform: np.ndarray, *, kind: str = "WAV", rate: int = RATE) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, waveform, rate, format=kind)
    return stream.getvalue()


def as_read(waveform: np.ndarray, **options) -> np.ndarray:
    """The samples that a file of this waveform holds: 16 bit, for WAV."""
    return soundfile.read(io.BytesIO(audio_file(waveform, **options)), dtype="float32")[0]


def clip_part(data: bytes | np.ndarray, kind: str = "wav") -> dict:
    """An `input_audio` part."""
    data = audio_file(data) if isinstance(data, np.ndarray) else data
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def user(*parts) -> dict:
    """A user's turn for the server: strings are texts, arrays are clips."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else clip_part(part) for part in parts]
    return {"role": "user", "content": content}


def own_conversation(messages: list[dict], waveforms: list[np.ndarray]) -> list[dict]:
    """The same conversation as the processor takes it, with the clips as arrays, in order."""
    clips = iter(waveforms)
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part if part["type"] == "text" else {"type": "audio", "audio": as_read(next(clips))}
                for part in content
            ]
        turns.append({"role": message["role"], "content": content})
    return turns


@torch.no_grad()
def reply_alone(
    model, processor, messages: list[dict], waveforms: list[np.ndarray], *, seed: int | None = None, **options
) -> str:
    """`generate` on one conversation: greedy unless `options` say otherwise; `seed` is of the tokens' draws alone."""
    inputs = conversation_inputs(processor, own_conversation(messages, waveforms))
    options = {"do_sample": False, "max_new_tokens": 8, **options}
    if seed is not None and (clips := audio_inputs(inputs)):  # Transformers 5.18's wav2vec2 draws a number a layer
        options["mm_encoder_outputs"] = {"audio": model.get_audio_features(**clips)}
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if seed is not None:
        options |= {"do_sample": True, "top_k": 0}
        torch.manual_seed(seed)
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def raw_request(port: int, head: str, body: bytes = b"", *, seconds: float = 10.0) -> bytes:
    """Sends bytes as they are and returns all that comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


__all__ = [
    "NAME",
    "Running",
    "as_read",
    "audio_file",
    "clip",
    "clip_part",
    "own_conversation",
    "raw_request",
    "reply_alone",
    "serving",
    "user",
    "wait_until",
]
