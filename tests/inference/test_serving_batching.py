"""`server.engine`: requests worked on together, against each alone; what goes wrong stays with its request."""

import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
from served import (
    NAME,
    as_read,
    clip,
    clip_part,
    own_conversation,
    raw_request,
    reply_alone,
    serving,
    user,
    wait_until,
)
from tiny_models import conversation_inputs, tiny_config, tiny_model, tiny_processor

from relllm.inference.inference_settings import BatchSettings, RequestLimits
from relllm.inference.replies import hear
from relllm.inference.server import app, engine
from relllm.inference.server.prompts import PromptReader
from relllm.inference.server.schema import EmotionRequest
from relllm.inference.server.writing import Group, Prompt

CLIPS = [clip(0.3 + 0.25 * index, seed=index) for index in range(6)]
CONVERSATIONS = [([user(f"Number {index}. " * (1 + index), CLIPS[index])], [CLIPS[index]]) for index in range(6)]


def together(number: int) -> BatchSettings:
    """Waits until so many requests are there."""
    return BatchSettings(max_batch_size=number, batch_wait_ms=20_000.0)


def ask(client, messages, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 8, **options})


def ask_all(client, requests: list[dict]) -> list:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: ask(client, **request), requests))


class Gate:
    """Holds the LLM's steps of a model until it is opened, and counts them."""

    def __init__(self, model) -> None:
        self.steps = 0
        self.open = threading.Event()
        self.reached = threading.Event()
        self.handle = model.model.text_model.register_forward_pre_hook(self.step)

    def step(self, *_: object) -> None:
        self.steps += 1
        self.reached.set()
        assert self.open.wait(30)


@pytest.fixture
def gate(model):
    gate = Gate(model)
    yield gate
    gate.open.set()
    gate.handle.remove()


@contextmanager
def busy(model, processor, gate: Gate, **settings: int) -> Iterator[tuple]:
    """A server of one request at a time, a client, threads to ask from, and the request that the gate holds."""
    batches = BatchSettings(max_batch_size=1, **settings)
    with (
        serving(model, processor, settings=batches) as running,
        running.client() as client,
        ThreadPoolExecutor(3) as pool,
    ):
        first = pool.submit(ask, client, CONVERSATIONS[0][0])
        assert gate.reached.wait(10)
        yield running, client, pool, first


def test_a_batch_answers_as_each_request_alone(model, processor) -> None:
    with serving(model, processor, settings=together(6)) as running, running.client() as client:
        answers = ask_all(client, [{"messages": messages} for messages, _ in CONVERSATIONS])
        assert [len(batch) for batch in running.batches] == [6]
    for answer, (messages, waveforms) in zip(answers, CONVERSATIONS, strict=True):
        assert answer.choices[0].message.content == reply_alone(model, processor, messages, waveforms)
        [heard] = hear(model, processor, [as_read(waveforms[0])])
        assert answer.emotion[0]["dimensions"] == pytest.approx(heard.dimensions, abs=1e-5)
        assert answer.emotion[0]["probabilities"] == pytest.approx(heard.probabilities, abs=1e-5)


def test_unlike_settings_share_a_batch_and_each_answers_as_alone(model, processor) -> None:
    settings = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.6, "top_p": 0.7, "seed": 4, "max_tokens": 12},
        {"max_tokens": 2},
        {"temperature": 1.3, "seed": 3},
    ]
    texts_only = [{"role": "user", "content": "No audio here."}]
    conversations = [*CONVERSATIONS[:4], (texts_only, [])]
    with serving(model, processor, settings=together(5)) as running, running.client() as client:
        requests = [{"messages": each, **own} for (each, _), own in zip(conversations, settings, strict=True)]
        answers = ask_all(client, requests)
        assert len(running.batches) == 1
    for answer, (messages, waveforms), own in zip(answers, conversations, settings, strict=True):
        options = {"max_new_tokens": own.get("max_tokens", 8), **own}
        options.pop("max_tokens", None)
        expected = reply_alone(model, processor, messages, waveforms, **options)
        assert answer.choices[0].message.content == expected


def test_the_checkpoints_repetition_penalty_leaves_the_padding_alone(model, processor, monkeypatch) -> None:
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.7)
    plain = [reply_alone(model, processor, *each, repetition_penalty=1.0, max_new_tokens=16) for each in CONVERSATIONS]
    expected = [reply_alone(model, processor, *each, max_new_tokens=16) for each in CONVERSATIONS]
    assert plain != expected
    with serving(model, processor, settings=together(6)) as running, running.client() as client:
        answers = ask_all(client, [{"messages": each, "max_tokens": 16} for each, _ in CONVERSATIONS])
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_hearing_only_shares_a_batch_with_replies(model, processor) -> None:
    body = {"model": NAME, "input": [clip_part(CLIPS[4]), clip_part(CLIPS[5])]}
    messages, waveforms = CONVERSATIONS[1]
    with serving(model, processor, settings=together(2)) as running, running.client() as client:
        with ThreadPoolExecutor(2) as pool:
            emotion = pool.submit(client.post, "/emotion", body=body, cast_to=object)
            answer = pool.submit(ask, client, messages)
            found, completion = emotion.result(), answer.result()
        assert [len(batch) for batch in running.batches] == [2]
    assert completion.choices[0].message.content == reply_alone(model, processor, messages, waveforms)
    for heard, expected in zip(found["data"], hear(model, processor, [as_read(c) for c in CLIPS[4:]]), strict=True):
        assert heard["dimensions"] == pytest.approx(expected.dimensions, abs=1e-5)


def test_a_short_reply_does_not_wait_for_a_long_one(model, processor) -> None:
    ended: dict[int, float] = {}

    def timed(client, length: int) -> None:
        ask(client, CONVERSATIONS[0][0], max_tokens=length)
        ended[length] = time.monotonic()

    with serving(model, processor, settings=together(2)) as running, running.client() as client:
        start = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda length: timed(client, length), (2, 250)))
        assert len(running.batches) == 1
    assert ended[2] - start < 0.6 * (ended[250] - start)


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_ends_when_its_client_has_gone(model, processor, gate, stream: bool) -> None:
    with serving(model, processor, limits=RequestLimits(max_tokens=900)) as running, running.client() as client:
        gone = client.with_options(timeout=1.0)
        if stream:
            gate.open.set()
            answer = ask(gone, CONVERSATIONS[0][0], max_tokens=900, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(gone, CONVERSATIONS[0][0], max_tokens=900)
            gate.open.set()
        wait_until(lambda: running.dropped() == 1)
        assert gate.steps < 600
        assert ask(client, CONVERSATIONS[1][0]).choices[0].finish_reason == "length"


def test_a_client_that_goes_takes_nothing_from_the_rest_of_its_batch(model, processor, gate) -> None:
    messages, waveforms = CONVERSATIONS[2]
    gate.open.set()
    expected = reply_alone(model, processor, messages, waveforms, max_new_tokens=20)
    gate.open.clear()
    with serving(model, processor, settings=together(2)) as running, running.client() as client:
        with ThreadPoolExecutor(2) as pool:
            stays = pool.submit(ask, client, messages, max_tokens=20)
            goes = pool.submit(ask, client.with_options(timeout=1.0), CONVERSATIONS[0][0], max_tokens=500)
            with pytest.raises(openai.APITimeoutError):
                goes.result()
            gate.open.set()
            assert stays.result().choices[0].message.content == expected
        wait_until(lambda: running.dropped() == 1)


def test_a_full_queue_refuses_and_says_when_to_come_back(model, processor, gate) -> None:
    with busy(model, processor, gate, max_queue=2) as (running, client, pool, first):
        waiting = [pool.submit(ask, client, CONVERSATIONS[0][0]) for _ in range(2)]
        wait_until(lambda: running.num_waiting == 2)
        with pytest.raises(openai.RateLimitError, match="2 requests wait") as refused:
            ask(client, CONVERSATIONS[0][0])
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        gate.open.set()
        answers = [each.result().choices[0].message.content for each in (first, *waiting)]
        assert len(set(answers)) == 1 and answers[0]


def test_requests_that_are_being_read_count_as_waiting(model, processor, monkeypatch) -> None:
    read_emotion, read, release = PromptReader.read_emotion, [], threading.Event()

    def held(reader: PromptReader, request: EmotionRequest) -> Prompt:
        read.append(request)
        assert release.wait(30)
        return read_emotion(reader, request)

    def status(client) -> int:
        body = {"model": NAME, "input": [clip_part(CLIPS[0])]}
        try:
            client.post("/emotion", body=body, cast_to=object)
        except openai.RateLimitError as error:
            return error.status_code
        return 200

    monkeypatch.setattr(PromptReader, "read_emotion", held)
    with (
        serving(model, processor, settings=BatchSettings(max_queue=2)) as running,
        running.client() as client,
        ThreadPoolExecutor(10) as pool,
    ):
        asked = [pool.submit(status, client) for _ in range(10)]
        try:
            wait_until(lambda: sum(each.done() for each in asked) == 8)
        finally:
            release.set()
        assert sorted(each.result() for each in asked) == [200] * 2 + [429] * 8
        assert len(read) == 2 and not running.service.engine.being_read


def test_a_client_that_leaves_the_queue_gives_its_place_back(model, processor, gate) -> None:
    with busy(model, processor, gate, max_queue=1) as (running, client, pool, first):
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), CONVERSATIONS[0][0])
        wait_until(lambda: running.num_waiting == 0)
        second = pool.submit(ask, client, CONVERSATIONS[1][0])
        wait_until(lambda: running.num_waiting == 1)
        gate.open.set()
        assert first.result() and second.result()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_a_500_and_the_server_goes_on(
    model, processor, monkeypatch, caplog, stream: bool
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("the device is on fire")

    with serving(model, processor) as running, running.client() as client:
        with monkeypatch.context() as broken:
            broken.setattr(model, "get_audio_features", fail)
            with pytest.raises(openai.InternalServerError, match="the server's log says why") as failed:
                ask(client, CONVERSATIONS[0][0], stream=stream)
        assert failed.value.code == "model_failed" and "fire" not in str(failed.value)
        assert ask(client, CONVERSATIONS[0][0]).choices[0].message.content


def test_a_clip_that_the_model_fails_on_takes_nobody_of_its_batch_with_it(model, processor, monkeypatch) -> None:
    hear_all, bad = model.get_audio_features, len(CLIPS[1])

    def fail(*, input_values_mask: torch.Tensor, **features: torch.Tensor) -> object:
        if bad in input_values_mask.sum(-1).tolist():
            raise RuntimeError("this one")
        return hear_all(input_values_mask=input_values_mask, **features)

    def answer(number: int) -> str:
        try:
            return ask(client, CONVERSATIONS[number][0]).choices[0].message.content
        except openai.InternalServerError as error:
            return error.code

    expected = [reply_alone(model, processor, *conversation) for conversation in CONVERSATIONS[:3]]
    monkeypatch.setattr(model, "get_audio_features", fail)
    with serving(model, processor, settings=together(3)) as running, running.client() as client:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(answer, range(3)))
        assert len(running.batches[0]) == 3
    assert answers == [expected[0], "model_failed", expected[2]]


def test_a_clip_too_short_for_the_towers_is_refused_before_it_reaches_a_batch() -> None:
    config = tiny_config()
    config.emotion_config.encoder_config.conv_kernel = [10, 8, 4]  # 770 samples for a frame
    model, processor = tiny_model(config), tiny_processor(config)
    with serving(model, processor) as running, running.client() as client:
        with pytest.raises(openai.BadRequestError, match=r"messages.0.content.0: .*at least 48.12 ms") as refused:
            ask(client, [user(clip(1.0)[:769])])
        assert refused.value.code == "invalid_audio" and not running.batches
        assert ask(client, [user(clip(1.0)[:770])]).choices[0].message.content


def rows_of(model, batches: list[int], most: int = 99, after: int = 0) -> object:
    """Notes how many rows each step of the LLM has; more than `most` are too many, after some steps."""

    def step(_: object, arguments: tuple, options: dict) -> None:
        rows = next(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)).shape[0]
        batches.append(rows)
        if rows > most and len(batches) > after:
            raise torch.OutOfMemoryError("out of memory")

    return model.model.text_model.register_forward_pre_hook(step, with_kwargs=True)


@pytest.mark.parametrize("after", [0, 4])
def test_a_batch_that_is_too_large_is_halved_and_every_request_answered(model, processor, after: int) -> None:
    options = {"temperature": 1.0, "seed": 7}
    drawn = reply_alone(model, processor, *CONVERSATIONS[5], **options)
    expected = [*(reply_alone(model, processor, *each) for each in CONVERSATIONS[:5]), drawn]
    batches: list[int] = []
    handle = rows_of(model, batches, most=2, after=after)
    try:
        with serving(model, processor, settings=together(6)) as running, running.client() as client:
            requests = [{"messages": messages} for messages, _ in CONVERSATIONS]
            answers = ask_all(client, [*requests[:5], {**requests[5], **options}])
    finally:
        handle.remove()
    assert max(batches) == 6 and [answer.choices[0].message.content for answer in answers] == expected


def test_rows_that_have_ended_are_not_computed_any_more(model, processor) -> None:
    lengths, batches = (2, 5, 20), []
    handle = rows_of(model, batches)
    with serving(model, processor, settings=together(3)) as running, running.client() as client:
        requests = [{"messages": CONVERSATIONS[n][0], "max_tokens": length} for n, length in enumerate(lengths)]
        answers = ask_all(client, requests)
    handle.remove()
    assert batches == [3] * 2 + [2] * 3 + [1] * 15
    for answer, length, conversation in zip(answers, lengths, CONVERSATIONS, strict=False):
        expected = reply_alone(model, processor, *conversation, max_new_tokens=length)
        assert answer.choices[0].message.content == expected


def test_the_cache_of_replies_is_given_back_while_nobody_asks(model, processor, monkeypatch) -> None:
    made: list[weakref.ref] = []

    class Noted(Group):
        def __init__(self, rows: list) -> None:
            super().__init__(rows)
            made.append(weakref.ref(self))

    monkeypatch.setattr(engine, "Group", Noted)
    with serving(model, processor) as running, running.client() as client:
        ask(client, CONVERSATIONS[0][0])
        wait_until(lambda: gc.collect() >= 0 and made[0]() is None)


def test_a_checkpoints_shortest_reply_is_counted_from_its_beginning(model, processor, monkeypatch) -> None:
    messages, waveforms = CONVERSATIONS[1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [n for n in range(len(processor.tokenizer)) if n % 8])
    monkeypatch.setattr(model.generation_config, "min_new_tokens", 6)
    inputs = conversation_inputs(processor, own_conversation(messages, waveforms))
    alone = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :].tolist()
    assert 6 < len(alone) <= 4 + 6  # of rows that begin again after 4 tokens
    with serving(model, processor, settings=together(3)) as running, running.client() as client:
        requests = [{"messages": messages, "max_tokens": length} for length in (2, 4, 20)]
        answer = ask_all(client, requests)[2]
    assert answer.usage.completion_tokens == len(alone)
    assert answer.choices[0].message.content == processor.tokenizer.decode(alone[:-1], skip_special_tokens=True)


@pytest.mark.parametrize("most_groups", [1, 4])
def test_clips_are_heard_and_short_replies_written_while_a_long_one_is(
    model, processor, monkeypatch, most_groups: int
) -> None:
    monkeypatch.setattr(engine, "MOST_GROUPS", most_groups)
    messages, waveforms = CONVERSATIONS[1]
    alone = reply_alone(model, processor, messages, waveforms, max_new_tokens=200)
    expected = [reply_alone(model, processor, *each) for each in CONVERSATIONS]
    slow = model.model.text_model.register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with serving(model, processor) as running, running.client() as client, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, client, messages, max_tokens=200)
        wait_until(lambda: len(running.batches) == 1)
        body = {"model": NAME, "input": [clip_part(CLIPS[4])]}
        found = client.post("/emotion", body=body, cast_to=object)
        answers = ask_all(client, [{"messages": each} for each, _ in CONVERSATIONS])
        assert not long.done()
        slow.remove()
        assert long.result().choices[0].message.content == alone
    [heard] = hear(model, processor, [as_read(CLIPS[4])])
    assert found["data"][0]["dimensions"] == pytest.approx(heard.dimensions, abs=1e-5)
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_health_tells_of_a_model_that_fails_on_everything_until_it_does_not(
    model, processor, monkeypatch, caplog
) -> None:
    failures = []

    def fail(**_: object) -> None:
        failures.append(1)
        raise RuntimeError("the device is lost")

    def health() -> tuple[int, str]:
        status, _, body = raw_request(running.port, head).partition(b"\r\n")
        return int(status.split()[1]), json.loads(body.rpartition(b"\r\n")[2])["status"]

    head = "GET /health HTTP/1.1\nHost: x\nConnection: close\n\n"
    monkeypatch.setattr(engine, "PROBE_EVERY_S", 0.05)
    with serving(model, processor) as running, running.client() as client:
        with monkeypatch.context() as broken:
            broken.setattr(model, "get_audio_features", fail)
            with pytest.raises(openai.InternalServerError):
                ask(client, CONVERSATIONS[0][0])
            wait_until(lambda: health() == (503, "failing"))
            wait_until(lambda: len(failures) >= 4)  # of the request, and of three probes
        assert sum("silence" in record.message for record in caplog.records) == 1
        wait_until(lambda: health() == (200, "ok"))


def test_a_stream_that_waits_says_so_and_is_read_as_ever(model, processor, gate, monkeypatch) -> None:
    monkeypatch.setattr(app, "HEAD_AFTER_S", 0.05)
    monkeypatch.setattr(app, "COMMENT_EVERY_S", 0.05)
    body = json.dumps({"model": NAME, "messages": CONVERSATIONS[1][0], "max_tokens": 8, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(body)}\n\n"
    )
    with busy(model, processor, gate) as (running, client, pool, first):
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as queued:
            queued.sendall(head.replace("\n", "\r\n").encode() + body)
            seen = b""
            while seen.count(b": the request waits") < 2:
                seen += queued.recv(65536)
            assert seen.startswith(b"HTTP/1.1 200")
        stream = pool.submit(lambda: list(ask(client, CONVERSATIONS[1][0], stream=True)))
        wait_until(lambda: running.num_waiting >= 1)
        time.sleep(0.2)
        gate.open.set()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream.result())
        assert first.result() and text == reply_alone(model, processor, *CONVERSATIONS[1])


def test_a_failure_in_the_midst_of_a_stream_is_raised_by_the_client(model, processor) -> None:
    steps = []

    def fail(*_: object) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("the device is on fire")

    handle = model.model.text_model.register_forward_pre_hook(fail)
    try:
        with serving(model, processor) as running, running.client() as client:
            with pytest.raises(openai.APIError, match="the server's log says why"):
                list(ask(client, CONVERSATIONS[0][0], stream=True))
            steps.clear()
            body = json.dumps({"model": NAME, "messages": CONVERSATIONS[0][0], "max_tokens": 8, "stream": True})
            head = "POST /v1/chat/completions HTTP/1.1\nHost: x\nContent-Type: application/json\n"
            answer = raw_request(running.port, f"{head}Content-Length: {len(body)}\n\n", body.encode())
            assert b"model_failed" in answer and not answer.endswith(b"0\r\n\r\n")  # cut off, for what counts answers
            assert ask(client, CONVERSATIONS[0][0]).choices[0].message.content
    finally:
        handle.remove()


def test_many_clients_at_once_lose_nothing_and_get_the_answers_of_each_alone(model, processor) -> None:
    expected = [reply_alone(model, processor, *conversation) for conversation in CONVERSATIONS]
    settings = BatchSettings(max_batch_size=8)
    with serving(model, processor, settings=settings) as running, running.client() as client:
        requests = [{"messages": CONVERSATIONS[number % 6][0]} for number in range(24)]
        answers = ask_all(client, requests)
        assert len(running.batches) < 24
    assert [answer.usage.completion_tokens for answer in answers] == [8] * 24
    assert [answer.choices[0].message.content for answer in answers] == expected * 4


def test_stopping_finishes_what_is_accepted_and_refuses_what_comes(model, processor, gate) -> None:
    with (
        serving(model, processor, grace_s=20) as running,
        running.client() as client,
        ThreadPoolExecutor(2) as pool,
    ):
        accepted = [pool.submit(ask, client, CONVERSATIONS[0][0])]
        assert gate.reached.wait(10)
        accepted.append(pool.submit(ask, client, CONVERSATIONS[1][0]))
        wait_until(lambda: running.num_waiting == 1)
        running.server.should_exit = True
        wait_until(lambda: running.service.engine.status == "stopping")
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, CONVERSATIONS[0][0])
        assert refused.value.status_code == 503 and refused.value.code == "server_stopping"
        gate.open.set()
        assert all(answer.result().choices[0].finish_reason == "length" for answer in accepted)


def test_what_is_unfinished_at_the_end_of_the_grace_period_is_told_so(model, processor) -> None:
    slow = model.model.text_model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        with (
            serving(model, processor, grace_s=0.3, limits=RequestLimits(max_tokens=900)) as running,
            running.client() as client,
            ThreadPoolExecutor(1) as pool,
        ):
            long = pool.submit(ask, client, CONVERSATIONS[0][0], max_tokens=900)
            wait_until(lambda: len(running.batches) == 1)
            running.server.should_exit = True
            with pytest.raises(openai.InternalServerError, match="stopping") as ended:
                long.result(timeout=10)
            assert ended.value.status_code == 503
    finally:
        slow.remove()


def test_a_body_that_does_not_come_holds_the_stop_no_longer_than_the_grace_period(model, processor) -> None:
    head = b"POST /v1/emotion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with serving(model, processor, grace_s=0.3) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as slow:
            slow.sendall(head)
            time.sleep(0.2)
            running.server.should_exit = True
            running.thread.join(5)
        assert not running.thread.is_alive()
