"""What the server refuses: each with its status and a reason in OpenAI's form, and the next request is answered."""

import base64
import contextlib
import http.client
import io
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.request

import numpy as np
import openai
import pytest
from served import NAME, audio_file, clip, clip_part, raw_request, serving, user
from tiny_models import tiny_model, tiny_processor

from relllm.inference.inference_settings import RequestLimits
from relllm.inference.server import schema
from relllm.inference.server import server as connections
from relllm.inference.server.prompts import PromptReader

KEY = "a-key"
LIMITS = RequestLimits(max_body_mib=400_000 / 1024**2, max_audio_seconds=3.0, max_clips=3, max_tokens=20)
GOOD = [user(clip(0.5))]
MANY_VALUES = b'{"model": "tiny", "metadata": [' + b"[]," * 120_000 + b"[]]}"  # each a Python object, were it parsed
MANY_WRONG_PARTS = b'{"model": "tiny", "messages": [{"role": "user", "content": [' + b"1," * 150_000 + b"1]}]}"


@pytest.fixture(scope="module")
def server():
    with serving(tiny_model(), tiny_processor(), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def ask(client, messages=GOOD, **options):
    return client.chat.completions.create(**{"model": NAME, "messages": messages, "max_tokens": 4, **options})


def part_of(data: str) -> list[dict]:
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return [{"role": "user", "content": [part]}]


def of_bytes(data: bytes) -> list[dict]:
    return part_of(base64.b64encode(data).decode())


def other_part(**part: object) -> list[dict]:
    return [{"role": "user", "content": [part]}]


def many_channels() -> bytes:
    return audio_file(np.zeros((400_000, 8), np.float32), kind="FLAC", rate=192_000)


REFUSED = {
    "not audio": (of_bytes(b"this is no audio" * 10), {}, "messages.0.content.0: not an audio file", "invalid_audio"),
    "empty": (of_bytes(b""), {}, "0 bytes", "invalid_audio"),
    "truncated": (of_bytes(audio_file(clip(0.5))[:-2000]), {}, "truncated", "invalid_audio"),
    "too short": (of_bytes(audio_file(clip(0.01))), {}, "too short", "invalid_audio"),
    "not base64": (part_of("%%%"), {}, "not base64", "invalid_audio"),
    "an address": (part_of("http://127.0.0.1:9/a.wav"), {}, "not base64", "invalid_audio"),
    "a file URL": (part_of("file:///etc/passwd"), {}, "not base64", "invalid_audio"),
    "a path": (part_of("/etc/hostname"), {}, "neither|base64|not an audio", "invalid_audio"),
    "a data URL without audio": (
        part_of("data:audio/wav;base64,UklGRg=="),
        {},
        "neither|not an audio",
        "invalid_audio",
    ),
    "audio_url": (
        other_part(type="audio_url", audio_url={"url": "http://127.0.0.1:9/a.wav"}),
        {},
        "addresses and paths are never read",
        "invalid_request",
    ),
    "our own part": (other_part(type="audio", path="/etc/passwd"), {}, "never read", "invalid_request"),
    "input_audio with a path": (
        other_part(type="input_audio", input_audio={"data": "UklGRg==", "path": "/etc/passwd"}),
        {},
        "input_audio.path",
        "invalid_request",
    ),
    "too long": (of_bytes(audio_file(clip(3.5))), {}, "lasts 3.5 s, the limit is 3.0 s", "invalid_audio"),
    "too long together": ([user(clip(2.0), clip(1.5))], {}, "content.1: .*3.5 s.* 3 s together", "audio_too_long"),
    "too many clips": ([user(*[clip(0.1)] * 4)], {}, "4 clips were sent; .* 3", "too_many_clips"),
    "more channels than fit": (of_bytes(many_channels()), {}, "8 channels at 192000 Hz are more", "invalid_audio"),
    "the placeholder in a text": ([user("<|audio|>")], {}, "stands for a clip", "invalid_request"),
    "context": ([user("word " * 1000)], {}, "context is 1024", "context_length_exceeded"),
    "max_tokens": (GOOD, {"max_tokens": 21}, "writes up to 20", "max_tokens_too_large"),
    "a text far longer than the context": ([user("word " * 5000)], {}, "25000 characters", "context_length_exceeded"),
    "no messages": ([], {}, "messages: List should have at least 1 item", "invalid_request"),
    "no user's turn": ([{"role": "assistant", "content": "I"}], {}, "has to be the user's", "invalid_request"),
    "a tool's turn": ([{"role": "tool", "content": "I"}], {}, "messages.0", "invalid_request"),
    "audio in a system turn": (
        [{"role": "system", "content": [clip_part(clip(0.1))]}, *GOOD],
        {},
        "messages.0",
        "invalid_request",
    ),
    "n": (GOOD, {"n": 2}, "n: Extra inputs", "invalid_request"),
    "tools": (GOOD, {"tools": [{"type": "function"}]}, "tools: Extra inputs", "invalid_request"),
    "tool_choice": (GOOD, {"tool_choice": "required"}, "tool_choice: Extra inputs", "invalid_request"),
    "modalities": (GOOD, {"modalities": ["text", "audio"]}, "modalities: Extra inputs", "invalid_request"),
    "logprobs": (GOOD, {"logprobs": True}, "logprobs: Extra inputs", "invalid_request"),
    "frequency_penalty": (GOOD, {"frequency_penalty": 1.0}, "frequency_penalty: Extra inputs", "invalid_request"),
    "an unknown field": (GOOD, {"extra_body": {"top_k": 3}}, "top_k: Extra inputs", "invalid_request"),
    "temperature": (GOOD, {"temperature": 3}, "temperature: .*less than or equal to 2", "invalid_request"),
    "top_p": (GOOD, {"top_p": 0}, "top_p: ", "invalid_request"),
    "max_tokens 0": (GOOD, {"max_tokens": 0}, "max_tokens: ", "invalid_request"),
    "stop strings": (GOOD, {"stop": "a"}, "stop: Extra inputs", "invalid_request"),
    "two lengths": (GOOD, {"max_completion_tokens": 5}, "max_completion_tokens: Extra inputs", "invalid_request"),
    "stream_options alone": (GOOD, {"stream_options": {"include_usage": True}}, "stream=true", "invalid_request"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_a_reason(client, case: str) -> None:
    messages, options, reason, code = REFUSED[case]
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        ask(client, messages, **options)
    assert refused.value.code == code and refused.value.type == "invalid_request_error"


def test_a_stream_that_is_refused_has_the_status_of_its_error(client) -> None:
    with pytest.raises(openai.BadRequestError, match="not an audio file"):
        ask(client, of_bytes(b"this is no audio" * 10), stream=True)


@pytest.mark.parametrize("head", ["", "data:audio/wav;base64,", "data:audio/ogg;codecs=opus;base64,"])
def test_base64_with_line_breaks_is_read_also_in_a_data_url(client, head: str) -> None:
    data = head + base64.encodebytes(audio_file(clip(0.5))).decode().replace("\n", "\r\n")
    assert ask(client, part_of(data)).choices[0].message.content == ask(client).choices[0].message.content


def test_good_requests_are_answered_after_all_that(client) -> None:
    assert ask(client).choices[0].message.content


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1},
        {"frequency_penalty": 0},
        {"logprobs": False, "top_logprobs": 0},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"tool_choice": "none", "tools": []},
        {"modalities": ["text"]},
        {"max_completion_tokens": 4},  # as max_tokens
        {"user": "someone"},
        {"extra_body": {"verbosity": None}},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(client, neutral: dict) -> None:
    assert ask(client, **neutral).choices[0].message.content == ask(client).choices[0].message.content


def test_a_field_of_a_part_that_is_null_is_as_if_left_out(client) -> None:
    [turn] = GOOD
    part = {**turn["content"][0], "text": None, "cache_control": None}
    assert ask(client, [{**turn, "content": [part]}]).choices[0].message.content


def test_an_unknown_model_is_a_404(client) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'") as refused:
        ask(client, model="gpt")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_unknown_routes_and_methods_are_errors_in_the_same_form(server) -> None:
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/chat/completions", "GET", 405)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url + path, method=method), timeout=10)
        assert refused.value.code == status and json.load(refused.value)["error"]["message"]
        refused.value.close()


def test_health_answers_head(server) -> None:
    request = urllib.request.Request(server.url + "/health", method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200 and answer.read() == b""


def test_a_conversation_that_the_models_template_refuses_is_a_400(server) -> None:
    processor = tiny_processor(chat_template="{{ raise_exception('only one turn, please') }}")
    with (
        serving(tiny_model(), processor) as running,
        running.client() as client,
        pytest.raises(openai.BadRequestError, match="only one turn, please"),
    ):
        ask(client)


def test_a_fault_of_the_server_is_a_500_without_its_inside(server, client, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as broken:
        broken.setattr(PromptReader, "read_chat", fail)
        with pytest.raises(openai.InternalServerError) as failed:
            ask(client)
    assert failed.value.code == "internal_error" and "secret" not in str(failed.value)
    assert ask(client).choices[0].message.content


def test_the_same_limits_hold_for_emotions(client) -> None:
    long = [clip_part(clip(3.5))]
    for parts, reason in (([clip_part(b"no audio")], "input.0"), ([], "input"), (long, "limit is 3.0 s")):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.post("/emotion", body={"model": NAME, "input": parts}, cast_to=object)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', MANY_WRONG_PARTS])
def test_a_body_that_is_no_request_is_a_400(server, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    error = json.load(response)["error"]
    assert response.status == 400 and error["type"] == "invalid_request_error" and len(error["message"]) < 200
    connection.close()


def test_a_body_that_is_not_json_by_its_header_is_a_415(server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(
        "POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}
    )  # what a web page can send
    response = connection.getresponse()
    assert response.status == 415 and "application/json" in json.load(response)["error"]["message"]
    connection.close()


def test_a_body_that_says_it_is_too_large_is_refused_unread(server) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {10**12}\n\n"
    answer = raw_request(server.port, head)  # ends: the server closes the connection
    assert answer.startswith(b"HTTP/1.1 413") and b"larger than 400000 bytes" in answer


def test_a_body_that_turns_out_too_large_is_refused_at_the_limit(server) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        with pytest.raises((ConnectionError, BrokenPipeError)):
            for _ in range(2000):  # 131 MB, if it were read
                connection.sendall(chunk)
                sent += len(chunk)
    assert sent < 20_000_000  # what fits between the two in the buffers of the system


def test_openais_client_sees_the_413(server, client) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 400000 bytes") as refused:
        ask(client, of_bytes(bytes(2_000_000)))
    assert refused.value.status_code == 413 and refused.value.code == "request_too_large"


def test_a_body_that_never_arrives_is_given_up_and_others_are_answered_meanwhile(server, client, monkeypatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 1.0)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(head.encode() + b'{"model"')
        assert ask(client).choices[0].message.content
        assert slow.recv(65536) == b""


def test_a_body_of_many_values_is_refused_before_it_is_parsed(server, monkeypatch) -> None:
    monkeypatch.setattr(schema.ChatRequest, "model_validate_json", lambda _: pytest.fail("it was parsed"))
    head = "POST /v1/chat/completions HTTP/1.1\nHost: x\nConnection: close\nContent-Type: application/json\n"
    answer = raw_request(server.port, f"{head}Content-Length: {len(MANY_VALUES)}\n\n", MANY_VALUES)
    assert answer.startswith(b"HTTP/1.1 400") and b"up to 100000 are read" in answer


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_half_a_head_is_given_up_also_after_a_whole_request(server, client, monkeypatch, before: bytes) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=4) as slow:
        slow.sendall(before)
        if before:
            answer = b""
            while not answer.endswith(b"}"):
                answer += slow.recv(65536)
        slow.sendall(b"POST /v1/emotion HTTP/1.1\r\nHo")
        assert slow.recv(65536) == b""
    assert ask(client).choices[0].message.content


def test_a_head_in_time_gives_the_answer_all_the_time_it_takes(server, client, monkeypatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.2)
    slow = server.service.engine._model.model.text_model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    assert ask(client, max_tokens=8).choices[0].message.content
    slow.remove()


def test_connections_beyond_the_most_are_refused_at_once_and_the_others_served(monkeypatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    with serving(tiny_model(), tiny_processor()) as running, contextlib.ExitStack() as held:
        idle = [held.enter_context(socket.create_connection(("127.0.0.1", running.port))) for _ in range(3)]
        assert raw_request(running.port, "").startswith(b"HTTP/1.1 503")
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 200")


def test_the_most_connections_are_below_what_the_process_may_open(monkeypatch) -> None:
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (256, 256))
    assert 1 <= connections.most_connections() + 4 * connections.BACKLOG < 256 - len(os.listdir("/dev/fd"))


def test_clients_that_vanish_at_any_point_stop_nothing(server, client) -> None:
    body = json.dumps({"model": NAME, "messages": GOOD, "max_tokens": 20, "stream": True}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for sent, pause_s in ((0, 0), (20, 0), (len(head) + 100, 0), (len(head + body), 0), (len(head + body), 0.05)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall((head + body)[:sent])
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
            time.sleep(pause_s)
    assert ask(client).choices[0].message.content


def test_garbage_in_place_of_http_is_a_400(server, client) -> None:
    assert raw_request(server.port, "\x16\x03\x01 this is no HTTP\n\n").startswith(b"HTTP/1.1 400")
    assert ask(client).choices[0].message.content


def test_the_key_is_asked_for_before_anything_else() -> None:
    with serving(tiny_model(), tiny_processor(), api_key=KEY) as running:
        for wrong in ("another", "", KEY + "x"):
            with (
                running.client(api_key=wrong or "none") as client,
                pytest.raises(openai.AuthenticationError) as refused,
            ):
                ask(client)
            assert refused.value.code == "invalid_api_key"
        with running.client(api_key=KEY) as client:
            assert client.models.list().data and ask(client).choices[0].message.content
        unread = f"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Length: {10**12}\n\n"
        assert raw_request(running.port, unread).startswith(b"HTTP/1.1 401")
        assert urllib.request.urlopen(f"{running.url}/health", timeout=10).status == 200  # for probes, without it


def test_a_recording_that_states_no_length_is_decoded_no_further_than_the_limit() -> None:
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(_Unseekable(stream), mode="w", format="matroska") as container:  # as a browser records it
        track = container.add_stream("flac", rate=16_000, layout="mono")
        for _ in range(400):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(track.encode(frame))
    stream.seek(0)
    with av.open(stream) as container:
        assert container.duration is None
    with (
        serving(tiny_model(), tiny_processor(), limits=LIMITS) as running,
        running.client() as client,
        pytest.raises(openai.BadRequestError, match="the audio lasts 3"),
    ):
        ask(client, of_bytes(stream.getvalue()))


class _Unseekable:
    def __init__(self, stream: io.BytesIO) -> None:
        self.write = stream.write
