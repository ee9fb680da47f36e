"""`relllm serve` under 50 clients at once: what is lost, what differs from the unbatched answer, how long it takes.

The server is the real command in a process of its own, on the loopback; the clients are threads of this one, each with
OpenAI's client, streaming. Wall time, because a client waits in it: on a busy machine the figures are as busy.
"""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from harness import figure, report
from openai import OpenAI
from reference import RATE, build_model, build_processor, clips, text_only

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor

START_S = 180.0
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Load:
    """How much is asked of the server."""

    clients: int
    requests: int  # of each client
    conversations: int  # that differ; each is answered alone as well
    alone: int  # requests of one client that has the server for itself
    tokens: int
    max_batch_size: int


@dataclass(frozen=True)
class Answer:
    conversation: int
    text: str
    first_text_s: float
    total_s: float


def main(*, quick: bool = False) -> None:
    load = Load(6, 1, 3, 2, 4, 4) if quick else Load(50, 2, 10, 8, 32, 16)
    model = build_model(quick=quick)
    processor = build_processor(model, full_window=False)
    _write_text_only(model, processor)
    waveforms = [
        clip[: round(RATE * (1 + 4 * index / load.conversations))]
        for index, clip in enumerate(clips(load.conversations, 5.0))
    ]  # 1 to 5 s
    files = [_flac(waveform) for waveform in waveforms]
    expected = [_reply_alone(model, processor, data, load.tokens) for data in files]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "reference"
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        del model
        answers, alone, seconds = _measure(checkpoint, files, load)
    sent = load.clients * load.requests
    unlike = sum(answer.text != expected[answer.conversation] for answer in (*answers, *alone))
    rows = [
        figure(f"answers lost, of {sent} by {load.clients} clients at once", float(sent - len(answers)), "<= 0"),
        figure("answers unlike the unbatched one", float(unlike), "<= 0"),
        figure("unbatched answers that differ from each other", float(len(set(expected))), ">= 2"),
        figure("requests a second, all clients / one client alone", _rate(answers, seconds) / _rate_alone(alone)),
        figure("requests a second, all clients", _rate(answers, seconds)),
        *_percentiles("seconds to the end of the reply, all clients", [answer.total_s for answer in answers]),
        *_percentiles("seconds to the first text, all clients", [answer.first_text_s for answer in answers]),
        figure("seconds to the end of the reply, one client alone, median", _quantile(alone, 0.5)),
    ]
    about = (
        f"{load.tokens} tokens, clips of 1 to 5 s, batches of up to {load.max_batch_size}, "
        f"{'tiny' if quick else 'reference'} sizes, float32, wall time"
    )
    report("serving", rows, about=about, clock="wall")


def _write_text_only(model: ReLLMForConditionalGeneration, processor: ReLLMProcessor) -> None:
    """Has random weights write as many letters as they may: no end, and no word that the tokenizer does not have."""
    tokens = range(model.config.text_config.vocab_size)
    texts = processor.tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=True)
    silent = [token for token, text in zip(tokens, texts, strict=True) if not text or not text.isascii()]
    model.generation_config.suppress_tokens = silent


def _measure(checkpoint: Path, files: list[bytes], load: Load) -> tuple[list[Answer], list[Answer], float]:
    """Answers under load, answers to one client alone, and seconds that the load took."""
    log = checkpoint.parent / "log"
    flags = ["--port", "0", "--max-batch-size", str(load.max_batch_size), "--max-queue", str(load.clients)]
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "relllm.cli", "serve", str(checkpoint), *flags]
        environment = {**os.environ, "COLUMNS": "200"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = _wait_for_url(process, log)
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
            _ask(client, files, 0, load.tokens)  # warms up
            alone = [_ask(client, files, number % len(files), load.tokens) for number in range(load.alone)]
            start = time.perf_counter()
            with ThreadPoolExecutor(load.clients) as pool:
                numbers = [(each * load.requests, load.requests) for each in range(load.clients)]
                answers = pool.map(lambda own: _ask_in_turn(client, files, *own, load.tokens), numbers)
                answers = [answer for own in answers for answer in own]
            seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(60)) != 0:
            raise RuntimeError(f"The server ended with {status}: {log.read_text(encoding='utf-8')}")
    finally:
        process.kill()
        process.wait(60)
    return answers, alone, seconds


def _ask_in_turn(client: OpenAI, files: list[bytes], first: int, number: int, tokens: int) -> list[Answer]:
    """One client's requests, one after the other; one that fails is lost and printed."""
    answers = []
    for index in range(first, first + number):
        try:
            answers.append(_ask(client, files, index % len(files), tokens))
        except Exception as error:  # whatever it is, an answer is lost, which is what is counted
            print(f"request {index}: {type(error).__name__}: {error}", file=sys.stderr)
    return answers


def _ask(client: OpenAI, files: list[bytes], conversation: int, tokens: int) -> Answer:
    audio = {"data": base64.b64encode(files[conversation]).decode(), "format": "flac"}
    messages = [{"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}]
    start = time.perf_counter()
    pieces, first_text_s = [], None
    for chunk in client.chat.completions.create(model="reference", messages=messages, max_tokens=tokens, stream=True):
        piece = chunk.choices[0].delta.content
        if piece and first_text_s is None:
            first_text_s = time.perf_counter() - start
        pieces.append(piece or "")
    total_s = time.perf_counter() - start
    return Answer(conversation, "".join(pieces), total_s if first_text_s is None else first_text_s, total_s)


@torch.no_grad()
def _reply_alone(model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, data: bytes, tokens: int) -> str:
    turns = [{"role": "user", "content": [{"type": "audio", "audio": data}]}]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
    heard = model.get_audio_features(
        **{name: value for name, value in inputs.items() if name.startswith(("input_f", "input_v", "audio_"))}
    )
    output = model.generate(
        **text_only(inputs), mm_encoder_outputs={"audio": heard}, max_new_tokens=tokens, do_sample=False
    )
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _wait_for_url(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"at (http://\S+/v1)", log.read_text(encoding="utf-8")):
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"The server did not start: {log.read_text(encoding='utf-8')}")


def _flac(waveform: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, waveform, RATE, format="FLAC")
    return stream.getvalue()


def _rate(answers: list[Answer], seconds: float) -> float:
    return len(answers) / seconds


def _rate_alone(answers: list[Answer]) -> float:
    return len(answers) / sum(answer.total_s for answer in answers)


def _quantile(answers: list[Answer], share: float) -> float:
    return float(np.quantile([answer.total_s for answer in answers], share))


def _percentiles(what: str, seconds: list[float]) -> list[dict[str, object]]:
    return [
        figure(f"{what}, {name}", float(np.quantile(seconds, share)))
        for name, share in (("median", 0.5), ("95 %", 0.95), ("99 %", 0.99))
    ]


if __name__ == "__main__":
    main()
