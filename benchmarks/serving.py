"""50 clients with short requests behind a few long ones: `model.generate` in a loop, `relllm serve`, vLLM.

    python benchmarks/serving.py --vllm .cache/vllm/venv/bin/python --real-models DIR

Each answers the same requests from the same checkpoint on disk, one after the other in one run; every answer is
compared with the loop's, which is the model's own to each conversation alone. The servers are the real commands in
processes of their own, on the loopback; the clients are threads of this one, each with OpenAI's client, streaming.
Seconds are wall time, because a client waits in it: on a busy machine they are as busy. The processor time of the
system that answers is beside them.

Without `--real-models` (a folder with `whisper-tiny.en` and `SmolLM2-135M-Instruct`) the weights are random, at the
reference sizes. `--vllm` is a Python that has vLLM and this package; it needs the real models.
"""

import argparse
import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from harness import figure, report
from openai import OpenAI
from real_models import build
from reference import RATE, audio_only, build_model, build_processor, clips, text_only

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor

START_S = 900.0
TIMEOUT_S = 600.0
LONG, SHORT = "Tell a long story about what you hear in this: ", "What is this? Answer in a few words: "


@dataclass(frozen=True)
class Load:
    """How much is asked: `long` requests, then at once a short one by each client."""

    clients: int
    conversations: int  # that differ
    tokens: int
    long: int
    long_tokens: int


@dataclass(frozen=True)
class Request:
    text: str
    clip: bytes
    tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    first_text_s: float
    total_s: float


@dataclass(frozen=True)
class Run:
    """What one system made of the load; a lost answer is `None`."""

    answers: list[Answer | None]
    seconds: float
    processor_s: float
    load_average: float


def main(*, quick: bool = False, vllm: str | None = None, real_models: Path | None = None) -> None:
    load = Load(6, 3, 4, 2, 8) if quick else Load(50, 10, 12, 3, 96)
    if real_models is not None:
        model, processor = build(real_models / "whisper-tiny.en", real_models / "SmolLM2-135M-Instruct")
    else:
        model = build_model(quick=quick)
        processor = build_processor(model, full_window=False)
        _write_text_only(model, processor)
    _use_lora(model)
    files = [_flac(clip[: round(RATE * (1 + index % 3))]) for index, clip in enumerate(clips(load.conversations, 3.0))]
    asked = [Request(LONG, files[index % len(files)], load.long_tokens) for index in range(load.long)]
    asked += [Request(SHORT, files[index % len(files)], load.tokens) for index in range(load.clients)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "re-llm"
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        runs = {"`generate` in a loop": _run_loop(model, processor, asked)}
        del model
        runs["`relllm serve`"] = _run_server(lambda: _serve(checkpoint, load), asked)
        if vllm is not None:
            runs["vLLM"] = _run_server(lambda: _serve_vllm(vllm, checkpoint), asked)
    expected = [answer.text for answer in runs["`generate` in a loop"].answers if answer is not None]
    rows = [figure("unbatched answers that differ from each other", float(len(set(expected))), ">= 2")]
    for name, run in runs.items():
        rows += _rows(name, run, expected, load.long)
    sizes = "tiny sizes" if quick else "Whisper tiny.en and SmolLM2-135M" if real_models else "reference sizes"
    much = f"{load.clients} requests of up to {load.tokens} tokens at once, behind {load.long} of {load.long_tokens}"
    about = f"{much}, clips of 1 to 3 s, {sizes}, float32, wall time"
    report("serving", rows, about=about, clock="wall")


def _rows(name: str, run: Run, expected: list[str], long: int) -> list[dict[str, object]]:
    answers = [answer for answer in run.answers if answer is not None]
    unlike = sum(answer is not None and answer.text != own for answer, own in zip(run.answers, expected, strict=True))
    tokens = sum(answer.tokens for answer in answers)
    shorts, longs = ([answer for answer in part if answer] for part in (run.answers[long:], run.answers[:long]))
    rows = [
        figure(f"{name}: answers lost, of {len(expected)}", float(len(expected) - len(answers)), "<= 0"),
        figure(f"{name}: answers unlike the unbatched one", float(unlike), "<= 0"),
        figure(f"{name}: tokens a second", tokens / run.seconds),
        figure(f"{name}: tokens a second of its processor time", tokens / run.processor_s),
        figure(f"{name}: load average when it began", run.load_average),
    ]
    times = {
        "seconds to the end of a short reply": [answer.total_s for answer in shorts],
        "seconds to the first text of a short reply": [answer.first_text_s for answer in shorts],
        "seconds to the end of a long reply": [answer.total_s for answer in longs],
    }
    for what, seconds in times.items():
        for place, share in (("median", 0.5), ("95 %", 0.95)):
            rows.append(figure(f"{name}: {what}, {place}", float(np.quantile(seconds, share))))
    return rows


@torch.no_grad()
def _use_lora(model: ReLLMForConditionalGeneration) -> None:
    """A fresh LoRA does nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.01)


def _write_text_only(model: ReLLMForConditionalGeneration, processor: ReLLMProcessor) -> None:
    """Has random weights write as many letters as they may: no end, and no word that the tokenizer does not have."""
    tokens = range(model.config.text_config.vocab_size)
    texts = processor.tokenizer.batch_decode([[token] for token in tokens], skip_special_tokens=True)
    silent = [token for token, text in zip(tokens, texts, strict=True) if not text or not text.isascii()]
    model.generation_config.suppress_tokens = silent


@torch.no_grad()
def _run_loop(model: ReLLMForConditionalGeneration, processor: ReLLMProcessor, asked: list[Request]) -> Run:
    """Answers one request after the other, all of which came at once."""
    before, answers = os.getloadavg()[0], []
    processor_s, start = time.process_time(), time.perf_counter()
    for request in asked:
        content = [{"type": "text", "text": request.text}, {"type": "audio", "audio": request.clip}]
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        heard = {"audio": model.get_audio_features(**audio_only(inputs))}
        options = {"max_new_tokens": request.tokens, "do_sample": False}
        written = model.generate(**text_only(inputs), mm_encoder_outputs=heard, **options)
        tokens = written[0, inputs["input_ids"].shape[1] :]
        text, end = processor.decode(tokens, skip_special_tokens=True), time.perf_counter() - start
        answers.append(Answer(text, len(tokens), end, end))
    return Run(list(answers), time.perf_counter() - start, time.process_time() - processor_s, before)


def _run_server(serve: Callable, asked: list[Request]) -> Run:
    with serve() as (url, process), OpenAI(base_url=url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        _ask(client, asked[-1])  # warms up
        before, processor_s, start = os.getloadavg()[0], _processor_s(process), time.perf_counter()
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda request: _ask(client, request), asked))
        seconds = time.perf_counter() - start
        return Run(answers, seconds, _processor_s(process) - processor_s, before)


def _ask(client: OpenAI, request: Request) -> Answer | None:
    """One that fails is lost and printed."""
    audio = {"data": base64.b64encode(request.clip).decode(), "format": "flac"}
    content = [{"type": "text", "text": request.text}, {"type": "input_audio", "input_audio": audio}]
    options = {"max_tokens": request.tokens, "temperature": 0}
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    start, pieces, first_text_s, tokens = time.perf_counter(), [], None, 0
    try:
        messages = [{"role": "user", "content": content}]
        for chunk in client.chat.completions.create(model="re-llm", messages=messages, **options):
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece and first_text_s is None:
                first_text_s = time.perf_counter() - start
            pieces.append(piece or "")
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    except Exception as error:  # whatever it is, an answer is lost, which is what is counted
        print(f"{request.text}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    total_s = time.perf_counter() - start
    return Answer("".join(pieces), tokens, total_s if first_text_s is None else first_text_s, total_s)


@contextmanager
def _serve(checkpoint: Path, load: Load) -> Iterator[tuple[str, subprocess.Popen]]:
    flags = ["--port", "0", "--max-queue", str(load.clients + load.long)]
    command = [sys.executable, "-m", "relllm.cli", "serve", str(checkpoint), *flags]
    with _started(command, checkpoint.parent / "serve.log", r"at (http://\S+/v1)") as (found, process):
        yield found, process


@contextmanager
def _serve_vllm(python: str, checkpoint: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """With as many rows as the small server has, and uncompiled: compiled it is no faster on a CPU (measured)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--served-model-name", "re-llm", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.1"]
    command += ["--kv-cache-memory-bytes", str(2**30)]
    own = {"VLLM_PLUGINS": "relllm", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    ready = r"(Application startup complete)"
    with _started(command, checkpoint.parent / "vllm.log", ready, **own) as (_, process):
        yield f"http://127.0.0.1:{port}/v1", process


@contextmanager
def _started(command: list[str], log: Path, ready: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """What the log says when the server is ready, and its process, which is ended by a signal."""
    with log.open("w", encoding="utf-8") as output:
        environment = {**os.environ, "COLUMNS": "200", **variables}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + START_S
        while (found := re.search(ready, log.read_text(encoding="utf-8"))) is None:
            if time.monotonic() > end or process.poll() is not None:
                raise RuntimeError(f"The server did not start: {log.read_text(encoding='utf-8')[-4000:]}")
            time.sleep(0.1)
        yield found[1], process
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(60)) != 0:
            raise RuntimeError(f"The server ended with {status}: {log.read_text(encoding='utf-8')[-4000:]}")
    finally:
        process.kill()
        process.wait(60)


def _processor_s(process: subprocess.Popen) -> float:
    """Processor time of a process and of those that it started (Linux)."""
    parents, ticks = {}, {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        number = int(place.parent.name)
        parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {process.pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(number, 0) for number in family) / os.sysconf("SC_CLK_TCK")


def _flac(waveform: np.ndarray) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, waveform, RATE, format="FLAC")
    return stream.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="a Python with vLLM and this package")
    parser.add_argument("--real-models", type=Path)
    arguments = parser.parse_args()
    if arguments.vllm and not arguments.real_models:  # of random weights' texts, it would write what is suppressed
        parser.error("--vllm needs --real-models")
    main(**vars(arguments))
