"""`vllm serve CHECKPOINT`, asked as clients ask: replies, streams and emotions are those of our own model."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from openai import APIStatusError, AuthenticationError, BadRequestError, OpenAI
from vllm_checkpoints import NEW_TOKENS, Answer, answer, conversations, hear_alone, load, save_checkpoint

from relllm.inference.vllm.vllm_routes import _with_emotion

KEY = "secret"
START_S = 300


def test_an_error_in_a_stream_goes_out_although_nothing_can_be_heard_any_more() -> None:
    sent = ['data: {"choices":[{"finish_reason":null}]}\n\n', 'data: {"error":{}}\n\n', "data: [DONE]\n\n"]

    async def pieces() -> AsyncIterator[str]:
        for piece in sent:
            yield piece

    async def find() -> list:
        raise RuntimeError("the engine is dead")

    async def read() -> list[str]:
        return [piece async for piece in _with_emotion(pieces(), find)]

    assert asyncio.run(read()) == sent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("served"), light=True)


@pytest.fixture(scope="module")
def expected(place: Path) -> list[Answer]:
    return [answer(place, messages) for messages in conversations()]


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` is; that command itself fails in vLLM's CPU build, whose distribution has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place)]
    command += ["--served-model-name", "re-llm"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 * 2**20)]
    command += ["--gpu-memory-utilization", "0.1", "--limit-mm-per-prompt", '{"audio": 4}']
    environment = {**os.environ, "VLLM_PLUGINS": "relllm", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = open(place / "server.log", "wb")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not _is_up(address):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((place / "server.log").read_text()[-4000:])
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=120, max_retries=0)


def wav(clip: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, clip, 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def part(clip: np.ndarray) -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(clip)).decode(), "format": "wav"}}


def as_sent(messages: list[dict]) -> list[dict]:
    return [
        {**turn, "content": [part(p["audio"]) if p["type"] == "audio" else p for p in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in messages
    ]


def ask(client: OpenAI, messages: list[dict], **options: Any) -> Any:
    given = {"max_tokens": NEW_TOKENS, "temperature": 0, **options}
    return client.chat.completions.create(model="re-llm", messages=as_sent(messages), **given)


def check_emotion(told: list[dict], place: Path, clips: list[np.ndarray]) -> None:
    assert len(told) == len(clips)
    for one, clip in zip(told, clips, strict=True):
        probabilities, dimensions = hear_alone(place, clip)
        assert list(one["probabilities"].values()) == pytest.approx(probabilities, abs=1e-5)
        assert list(one["dimensions"].values()) == pytest.approx(dimensions, abs=1e-5)
        assert one["emotion"] == max(one["probabilities"], key=one["probabilities"].get)


def test_clients_at_once_get_the_models_own_replies_and_the_emotion(client, expected, place) -> None:
    options = {"extra_body": {"return_token_ids": True}, "logprobs": True}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda messages: ask(client, messages, **options), conversations()))
    assert [found.choices[0].token_ids for found in answers] == [one.tokens for one in expected]
    for found, one, messages in zip(answers, expected, conversations(), strict=True):
        logprobs = [token.logprob for token in found.choices[0].logprobs.content]
        assert logprobs == pytest.approx(one.logprobs, abs=1e-4, rel=0)
        check_emotion(found.emotion, place, one.clips)
        turns = [[i] * sum(p["type"] == "audio" for p in turn["content"]) for i, turn in enumerate(messages)
                 if isinstance(turn["content"], list)]  # fmt: skip
        assert [told["message"] for told in found.emotion] == [index for turn in turns for index in turn]


def test_a_stream_is_the_same_text_and_ends_with_the_emotion(client, expected, place) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(ask(client, conversations()[2], stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == load(place)[1].tokenizer.decode(expected[2].tokens, skip_special_tokens=True)
        assert [getattr(chunk, "emotion", None) is not None for chunk in chunks].count(True) == 1
        check_emotion(chunks[-1].emotion, place, expected[2].clips)


def test_what_vllm_offers_is_there(client, expected) -> None:
    several = ask(client, conversations()[1], n=3, temperature=1.0, seed=1, max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(several.emotion) == 1
    chosen = ask(client, conversations()[1], extra_body={"structured_outputs": {"choice": ["sad", "happy"]}})
    assert chosen.choices[0].message.content in ("sad", "happy")
    penalised = ask(client, conversations()[0], extra_body={"repetition_penalty": 10.0, "return_token_ids": True})
    assert penalised.choices[0].token_ids != expected[0].tokens
    silent = ask(client, conversations()[3])
    assert silent.emotion == []


def test_emotion_alone_from_json_and_from_a_form(url, expected, place) -> None:
    clips = [expected[4].clips[0], expected[1].clips[0][:7000]]  # one that was never heard
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "re-llm", "input": [part(clip) for clip in clips]}
    files = [("file", ("a.wav", wav(clip), "audio/wav")) for clip in clips]
    for options in ({"json": body}, {"files": files, "data": {"model": "re-llm"}}, {"files": files}):
        found = httpx.post(f"{url}/v1/emotion", headers=headers, timeout=60, **options)
        assert found.status_code == 200, found.text
        check_emotion(found.json()["data"], place, clips)
    for options in ({"json": {"model": "re-llm", "input": []}}, {"data": {"model": "re-llm"}, "files": [("x", "y")]}):
        assert httpx.post(f"{url}/v1/emotion", headers=headers, **options).status_code == 400
    wrong = httpx.post(f"{url}/v1/emotion", headers=headers, json={**body, "model": "other"})
    assert wrong.status_code == 404 and "other" in wrong.json()["error"]["message"]


def test_the_key_covers_the_added_routes(url, client) -> None:
    body = {"model": "re-llm", "input": []}
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert httpx.post(f"{url}/v1/emotion", headers=headers, json=body).status_code == 401
    with pytest.raises(AuthenticationError):
        ask(OpenAI(base_url=str(client.base_url), api_key="wrong", max_retries=0), conversations()[3])


def test_a_typed_placeholder_is_refused_with_and_without_a_clip(client) -> None:
    typed = {"role": "user", "content": "hi <|audio|> there"}
    with pytest.raises(BadRequestError, match="stands for a clip"):
        ask(client, [typed])
    with pytest.raises(BadRequestError, match="stands for a clip"):
        client.completions.create(model="re-llm", prompt="hi <|audio|>", max_tokens=1)
    with pytest.raises(BadRequestError, match="audio placeholders"):
        ask(client, [*conversations()[1], {"role": "assistant", "content": "?"}, typed])


def test_no_address_is_opened_for_a_client_and_bad_audio_is_named(client) -> None:
    address = {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:9/a.wav"}}
    with pytest.raises(APIStatusError, match="allowed-media-domains"):
        client.chat.completions.create(model="re-llm", messages=[{"role": "user", "content": [address]}])
    with pytest.raises(BadRequestError, match="at least 25 ms"):
        ask(client, [{"role": "user", "content": [part(np.zeros(100, np.float32))]}])
    assert json.dumps(ask(client, conversations()[1]).emotion)  # and it goes on
