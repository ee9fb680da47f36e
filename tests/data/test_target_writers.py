"""The writers of replies: a local LLM in batches, an endpoint with its failures."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset
from target_rows import make_rows, read_lines, save_chat_model, write_lines, write_targets
from tiny_models import tiny_llm, tiny_tokenizer
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.data_settings import Sampling, TargetSettings
from relllm.data.journal import journal_path
from relllm.data.replies.targets import make_request
from relllm.data.replies.writers import EndpointWriter, LocalWriter, Request
from relllm.processing.prompts_relllm import SYSTEM_PROMPT, WRITER_PROMPT

SAMPLING = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat-model"))


# --- a local model ---------------------------------------------------------------------------------------------------


def test_a_batch_writes_what_each_prompt_alone_gives(chat_model: Path) -> None:
    requests = [make_request(row, TargetSettings("m")) for row in make_rows(5)]
    together = LocalWriter.from_pretrained(str(chat_model), SAMPLING, batch_size=4)
    alone = LocalWriter.from_pretrained(str(chat_model), SAMPLING, batch_size=1)
    batched = {reply.id: reply for batch in together.write(requests, ()) for reply in batch}
    assert batched == {reply.id: reply for batch in alone.write(requests, ()) for reply in batch}
    assert len(batched) == 5 and len({reply.text for reply in batched.values()}) > 1


def test_the_writer_reads_the_frozen_prompts_through_the_models_own_template(chat_model: Path) -> None:
    writer = LocalWriter.from_pretrained(str(chat_model), SAMPLING)
    request = make_request({"id": "a", "text": "The {bus} left.", "emotion": "sad"}, TargetSettings("m"))
    asked = writer.tokenizer.decode(writer._prompt(request))
    assert asked == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
        "Continue the following sentence that reflects a 'sad' emotion tone in a coherent style: The {bus} left."
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_a_system_turn_gets_its_text_before_the_users(chat_model: Path) -> None:
    writer = LocalWriter.from_pretrained(str(chat_model), SAMPLING)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    writer.tokenizer.chat_template = refusing + "{{ messages[0]['content'] }}"
    again = LocalWriter(writer.model, writer.tokenizer, SAMPLING)
    assert again.tokenizer.decode(again._prompt(Request("a", "Be kind.", "Hello."))) == "Be kind.\n\nHello."


def test_a_model_without_a_chat_template_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        LocalWriter(tiny_llm(), tiny_tokenizer(), SAMPLING)


def test_sampling_is_the_same_whatever_was_done_before(chat_model: Path) -> None:
    requests = [make_request(row, TargetSettings("m")) for row in make_rows(6)]
    writer = LocalWriter.from_pretrained(
        str(chat_model), Sampling(max_new_tokens=8, temperature=1.0, seed=3), batch_size=2
    )
    everything = {reply.id: reply for batch in writer.write(requests, ()) for reply in batch}
    rest = {reply.id: reply for batch in writer.write(requests, {"r1", "r4"}) for reply in batch}
    assert rest == {row_id: reply for row_id, reply in everything.items() if row_id not in {"r1", "r4"}}


# --- an endpoint -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


Answer = Callable[[dict, Message, int], tuple[int, object]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server on this machine: `answer(body, headers, number)` gives status and content, or "drop"."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        lock, counted = threading.Lock(), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    counted.append(self.path)
                    number = len(counted)
                status, content = answer(body, self.headers, number)
                if content == "drop":
                    self.close_connection = True
                    return
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that has timed out
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text: str, reason: str = "stop") -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}


def echo(body: dict, headers: Message, number: int) -> tuple[int, dict]:
    return 200, completion(f"You told me about number {body['messages'][-1]['content'].split()[-1]}.")


def endpoint_writer(url: str, **options: object) -> EndpointWriter:
    return EndpointWriter(url, "chat", SAMPLING, **{"concurrency": 3, **options})


def ask(writer: EndpointWriter, count: int = 5) -> dict[str, str]:
    requests = [make_request(row, TargetSettings("m")) for row in make_rows(count)]
    return {reply.id: reply.text for batch in writer.write(requests, ()) for reply in batch}


def test_the_endpoint_gets_openais_request_with_the_key(serve, monkeypatch) -> None:
    seen = []

    def answer(body, headers, number):
        seen.append((body, headers["Authorization"]))
        return echo(body, headers, number)

    monkeypatch.setenv("TEST_API_KEY", "s3cret")
    writer = endpoint_writer(serve(answer), api_key_env="TEST_API_KEY", extra_body={"top_k": 5, "temperature": None})
    assert ask(writer) == {f"r{i}": f"You told me about number {i}." for i in range(5)}
    body, key = next((body, key) for body, key in seen if body["messages"][1]["content"].endswith("left. 0"))
    assert key == "Bearer s3cret"
    assert body == {
        "model": "chat",
        "max_tokens": 8,
        "top_k": 5,
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": WRITER_PROMPT.format(emotion="neutral") + "The bus left. 0"},
        ],
    }


def test_without_a_variable_no_key_is_sent_not_even_openais_own(serve, monkeypatch) -> None:
    seen = []

    def answer(body, headers, number):
        seen.append(headers)
        return echo(body, headers, number)

    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    ask(endpoint_writer(serve(answer)), 1)
    assert "Authorization" not in seen[0] and "s3cret" not in str(seen)


@pytest.mark.parametrize("failure", [(500, {}), (429, {}), (503, {}), (520, {}), (529, {}), (200, "drop")])
def test_a_failure_that_passes_is_tried_again(serve, failure) -> None:
    url = serve(lambda body, headers, number: failure if number in (1, 2, 5) else echo(body, headers, number))
    assert ask(endpoint_writer(url)) == {f"r{i}": f"You told me about number {i}." for i in range(5)}


@pytest.mark.parametrize(
    "error",
    [
        {"message": "You exceeded your current quota.", "code": "insufficient_quota"},
        {"message": "Your team has used all available credits."},
    ],
)
def test_spent_credit_is_not_waited_for(serve, error: dict) -> None:
    asked: list[str] = []

    def answer(body: dict, headers: Message, number: int) -> tuple[int, object]:
        asked.append(body["messages"][-1]["content"])
        return (429, {"error": error}) if number > 2 else echo(body, headers, number)

    with pytest.raises(PermissionError, match=f"{error['message']}.*What is written is kept"):
        ask(endpoint_writer(serve(answer), concurrency=1))
    assert len(set(asked)) == len(asked) <= 4  # no row again; the next one was on its way


@pytest.mark.parametrize("status", [429, 503, *range(520, 527), 529])
def test_an_endpoint_that_has_answered_is_waited_for(serve, status, monkeypatch) -> None:
    """Longer than the client itself tries: twelve failures, at three tries each."""
    monkeypatch.setattr("relllm.data.replies.writers.PAUSE_S", 0.01)
    url = serve(lambda body, headers, number: (status, {}) if 2 <= number < 14 else echo(body, headers, number))
    writer = endpoint_writer(url, concurrency=1, max_retries=2)
    assert ask(writer) == {f"r{i}": f"You told me about number {i}." for i in range(5)}


@pytest.mark.parametrize("answer", [{"choices": []}, {"choices": None}, {}, completion(""), completion(None)])
def test_an_answer_without_a_reply_is_a_row_without_one(serve, tmp_path: Path, answer: dict) -> None:
    url = serve(lambda body, headers, number: (200, answer) if number == 2 else echo(body, headers, number))
    rows = Dataset.from_list(make_rows(4))
    writer = endpoint_writer(url, concurrency=1)
    report = write_targets(rows, tmp_path / "out.jsonl", writer, TargetSettings("chat"), progress=False)
    assert report["written"] == 3 and report["dropped"]["rejected"]["ids"] == ["r1"]


def test_if_all_replies_are_empty_the_reason_is_said_and_the_next_run_asks_again(serve, tmp_path: Path) -> None:
    rows, out, settings = Dataset.from_list(make_rows(4)), tmp_path / "out.jsonl", TargetSettings("chat")
    silent = endpoint_writer(serve(lambda *request: (200, completion("", "length"))))
    with pytest.raises(ValueError, match="rejected 4 .*an empty answer, finish_reason 'length'"):
        write_targets(rows, out, silent, settings, progress=False)
    assert not out.exists()
    assert write_targets(rows, out, endpoint_writer(serve(echo)), settings, progress=False)["written"] == 4
    with pytest.raises(ValueError, match="no reply to 10 rows in a row, the last: an empty answer"):
        ask(silent, 30)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, PermissionError, "--api-key-env"), (403, PermissionError, "may not"), (404, ValueError, "ends in /v1")],
)
def test_a_failure_that_stays_stops_the_run_and_says_what_to_do(serve, status, error, message) -> None:
    asked = []

    def answer(body, headers, number):
        asked.append(number)
        return status, {"error": {"message": "no such thing"}}

    with pytest.raises(error, match=rf"(?s)chat/completions: HTTP {status}.*no such thing.*{message}"):
        ask(endpoint_writer(serve(answer)), 50)
    assert len(asked) <= 12  # not all fifty


def test_a_server_that_stays_down_is_named_and_what_is_written_is_kept(serve, tmp_path: Path) -> None:
    def answer(body, headers, number):
        return (500, {}) if body["messages"][1]["content"].endswith(" 4") else echo(body, headers, number)

    rows, out = Dataset.from_list(make_rows(5)), tmp_path / "out.jsonl"
    with pytest.raises(ConnectionError, match="keeps failing, at row 'r4' with: HTTP 500"):
        writer = endpoint_writer(serve(answer), max_retries=2, concurrency=1, patience_s=0)
        write_targets(rows, out, writer, TargetSettings("chat"), progress=False)
    assert len(read_lines(journal_path(out))) == 1 + 4
    report = write_targets(rows, out, endpoint_writer(serve(echo)), TargetSettings("chat"), progress=False)
    assert report["written"] == 5
    assert [row["response"] for row in read_lines(out)] == [f"You told me about number {i}." for i in range(5)]


def test_a_time_out_and_a_closed_port_are_connection_errors(serve) -> None:
    def slow(body, headers, number):
        time.sleep(0.3)
        return echo(body, headers, number)

    with pytest.raises(ConnectionError, match="timed out"):
        ask(endpoint_writer(serve(slow), timeout_s=0.05, max_retries=1), 1)
    with pytest.raises(ConnectionError, match="refused"):
        ask(endpoint_writer("http://127.0.0.1:9/v1", max_retries=1), 1)


def test_a_rejected_row_is_reported_and_ten_in_a_row_stop_the_run(serve, tmp_path: Path) -> None:
    def answer(body, headers, number):
        text = body["messages"][1]["content"]
        return (400, {"error": "context too long"}) if text.endswith(" 2") else echo(body, headers, number)

    report = write_targets(
        Dataset.from_list(make_rows(4)),
        tmp_path / "out.jsonl",
        endpoint_writer(serve(answer)),
        TargetSettings("chat"),
        progress=False,
    )
    assert report["written"] == 3 and report["dropped"]["rejected"]["ids"] == ["r2"]
    assert "context too long" in report["dropped"]["rejected"]["texts"][0]
    with pytest.raises(ValueError, match=r"no reply to \d+ rows in a row, the last: HTTP 400"):
        ask(endpoint_writer(serve(lambda *request: (400, {"error": "bad model"}))), 50)


def test_the_token_limit_and_the_content_filter_are_told_apart(serve) -> None:
    requests = [Request("a", "", "x")]
    for reason, finished, rejected in (("stop", True, None), ("length", False, None), ("content_filter", True, "yes")):
        url = serve(lambda *request, reason=reason: (200, completion("Well", reason)))
        (reply,) = next(endpoint_writer(url).write(requests, ()))
        assert (reply.finished, bool(reply.rejected)) == (finished, bool(rejected))


def test_a_missing_key_or_a_bare_host_is_an_error(monkeypatch) -> None:
    monkeypatch.delenv("TEST_API_KEY", raising=False)
    with pytest.raises(ValueError, match="variable TEST_API_KEY is empty"):
        endpoint_writer("http://127.0.0.1/v1", api_key_env="TEST_API_KEY")
    with pytest.raises(ValueError, match="must start with http"):
        endpoint_writer("localhost:8000")


def test_the_command_says_what_is_wrong_with_the_key(serve, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "metadata.jsonl", make_rows(2))
    url = serve(lambda *request: (401, {"error": "bad key"}))
    options = ["--endpoint", url, "--text-model", "chat", "--out", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(app, ["write-targets", str(data), *options])
    assert result.exit_code == 1 and "--api-key-env" in result.output and "stopped" in result.output


def test_the_command_writes_through_an_endpoint(serve, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "s3cret")
    data = write_lines(tmp_path / "metadata.jsonl", make_rows(4))
    options = ["--endpoint", serve(echo), "--text-model", "chat", "--out", str(tmp_path / "out.jsonl")]
    options += ["--api-key-env", "TEST_API_KEY", "--extra-body", '{"top_k": 5}']
    result = CliRunner().invoke(app, ["write-targets", str(data), *options])
    assert result.exit_code == 0, result.output
    assert [row["response"] for row in read_lines(tmp_path / "out.jsonl")] == [
        f"You told me about number {i}." for i in range(4)
    ]
    report = (tmp_path / "out.report.json").read_text()
    assert "s3cret" not in report + result.output and "top_k" in report
