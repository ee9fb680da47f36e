"""Rows to write replies to, and a chat model to write them, for the tests of `relllm write-targets`."""

import json
from pathlib import Path

from datasets import Dataset
from tiny_models import tiny_llm, tiny_tokenizer

from relllm.data.replies import targets
from relllm.data.replies.writers import Writer
from relllm.processing.turns_relllm import build_chat_template

TEXTS = ("The bus left.", "I got the job, and my family came over for dinner!", "Nobody called me today, again.")
EMOTIONS = ("neutral", "happy", "sad")


def make_rows(count: int = 7) -> list[dict]:
    return [
        {"id": f"r{i}", "audio": f"audio/r{i}.wav", "text": f"{TEXTS[i % 3]} {i}", "emotion": EMOTIONS[i % 3]}
        for i in range(count)
    ]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def save_chat_model(folder: Path) -> Path:
    """A tiny LLM with a chat template, on disk. Its replies are noise, which every rule but the word count lets by."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = build_chat_template(tokenizer)
    tiny_llm().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_targets(rows: Dataset, out: Path, writer: Writer, *settings: object, **options: object) -> dict:
    """With a writer that is there already."""
    return targets.write_targets(rows, out, lambda: writer, *settings, **options)
