"""A training step with the towers' outputs cached, against the step that computes them and the one with no towers.

The step is the trainer's: losses, backward pass, AdamW. A run's loader makes the batches in its workers, beside the
steps, so making one is timed apart: with the cache it reads the clips, hashes them and reads their outputs from files,
which the system still holds in memory here.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
from datasets import Dataset
from harness import figure, interleave, report
from reference import RATE, REPLY, build_model, build_processor, clips
from torch import Tensor

from relllm import ReLLMSFTConfig, ReLLMSFTTrainer

BATCH, SECONDS = 8, 5.0


def main(*, quick: bool = False) -> None:
    torch.set_num_threads(1)
    batch, rounds = (2, 1) if quick else (BATCH, 5)
    with tempfile.TemporaryDirectory() as folder:
        rows = _write_rows(Path(folder), batch)
        trainer = _build_trainer(Path(folder), rows, quick=quick)
        cached = trainer.data_collator
        plain = dataclasses.replace(cached, tower_cache=None)
        step = _step_of(trainer)
        step(cached(rows))  # fills the cache
        batches = {"without": plain(rows), "with": cached(rows)}
        assert "input_features" not in batches["with"]
        given = dict(batches["with"])
        trainer.put_towers(given)  # the towers' outputs, ready in memory
        seconds = interleave(
            {
                "without": lambda: step(batches["without"]),
                "with": lambda: step(batches["with"]),
                "floor": lambda: step(given),
                "batch without": lambda: plain(rows),
                "batch with": lambda: cached(rows),
            },
            rounds=rounds,
        )
    gone = (seconds["without"] - seconds["with"]) / (seconds["without"] - seconds["floor"])
    whole = {name: seconds[name] + seconds[f"batch {name}"] for name in ("with", "without")}
    figures = [
        figure("training step: cached / no towers", seconds["with"] / seconds["floor"], "<= 1.05"),
        figure("share of the towers' time that goes", gone, ">= 0.95"),
        figure("training step: without the cache / with it", seconds["without"] / seconds["with"]),
        figure("making a batch: without the cache / with it", seconds["batch without"] / seconds["batch with"]),
        figure("batch and step in one process: without the cache / with it", whole["without"] / whole["with"]),
    ]
    report("tower_cache", figures, about=f"batch {batch}, {SECONDS:g} s, reference sizes, full window off, one thread")


def _write_rows(folder: Path, number: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for index, waveform in enumerate(clips(number, SECONDS)):
        path = folder / f"clip{index}.flac"
        soundfile.write(path, waveform, RATE)
        labels = {"emotion": "sad", "arousal": 0.3, "dominance": 0.4, "valence": 0.2}
        rows.append({"audio": str(path), "response": REPLY, **labels})
    return rows


def _build_trainer(folder: Path, rows: list[dict[str, object]], *, quick: bool) -> ReLLMSFTTrainer:
    model = build_model(quick=quick)
    settings = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
    return ReLLMSFTTrainer(
        model=model,
        args=ReLLMSFTConfig(output_dir=str(folder / "run"), tower_cache_dir=str(folder / "cache"), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=build_processor(model, full_window=False),
    )


def _step_of(trainer: ReLLMSFTTrainer) -> Callable[[dict[str, Tensor]], None]:
    model = trainer.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    def step(batch: dict[str, Tensor]) -> None:
        trainer.compute_loss(model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
