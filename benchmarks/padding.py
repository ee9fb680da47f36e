"""Padding of training batches, in random order and with `train_sampling_strategy="group_by_length"`.

Of the batches as they come, and of what the towers run, which on a CPU make groups of like length of each batch
(Whisper in the cheap mode, a waveform tower with layer norms).

Durations are log-normal around a median of 5 s (sigma 0.6), cut to 1-30 s: about what corpora of emotional speech
have. Replies are 40-240 characters, drawn apart from the duration. Lengths are those that the trainer groups by.
"""

import math

import numpy as np
import torch
from harness import figure, report
from reference import RATE, build_model, build_processor, conversations
from transformers.trainer_pt_utils import LengthGroupedSampler

from relllm import ReLLMProcessor
from relllm.modeling.audio_tower_relllm import CPU_SLACK, group_by_length
from relllm.training.lengths import row_length

BATCH, ACCUMULATION = 8, 2
# The paper's sizes: 6.5e9 weights of the LLM without embeddings, forward and the gradient of its inputs; 50 frames a
# second through 635e6 weights of Whisper's encoder and 150e6 of the emotion tower, forward, and its convolutions.
LLM_GFLOP_PER_POSITION = 2 * 2 * 6.5
TOWERS_GFLOP_PER_S = 50 * 2 * (0.635 + 0.150) + 4.9


def main(*, quick: bool = False) -> None:
    num_rows = 160 if quick else 8000
    model = build_model(quick=True)  # only its token counts matter
    processor = build_processor(model, full_window=False)
    generator = np.random.default_rng(0)
    seconds = np.clip(generator.lognormal(np.log(5.0), 0.6, num_rows), 1.0, 30.0)
    characters = generator.integers(40, 240, num_rows)
    lengths = np.array([_length(processor, *row) for row in zip(seconds, characters, strict=True)])
    positions = lengths + _prompt_length(processor)
    sampler = LengthGroupedSampler(
        BATCH * ACCUMULATION, lengths=lengths.tolist(), generator=torch.Generator().manual_seed(0)
    )
    orders = {"grouped": np.array(list(sampler)), "random": generator.permutation(num_rows)}
    rows = []
    for name, order in orders.items():
        llm, batches = _padding(positions[order]), _padding(seconds[order])
        audio, accelerator = _run_padding(seconds[order], on_cpu=True), _run_padding(seconds[order], on_cpu=False)
        towers = TOWERS_GFLOP_PER_S * seconds.sum()
        weight = towers / (towers + LLM_GFLOP_PER_POSITION * positions.sum())
        goal = "<= 0.1" if name == "grouped" else ""
        rows += [
            figure(f"padding of the LLM's positions, {name}", llm, goal),
            figure(f"padding of the audio the towers run, CPU, {name}", audio, "<= 0.1"),
            figure(f"padding of the audio the towers run, accelerator, {name}", accelerator),
            figure(f"padding of the audio in the batches, {name}", batches),
            figure(
                f"padding of a step's arithmetic, 7B LLM, large towers, accelerator, {name}",
                weight * accelerator + (1 - weight) * llm,
                goal,
            ),
        ]
    report("padding", rows, about=f"{num_rows} rows, log-normal around 5 s, batches of {BATCH}, {ACCUMULATION} a step")


def _length(processor: ReLLMProcessor, seconds: float, characters: int) -> int:
    clip = np.broadcast_to(np.float32(0), round(seconds * RATE))  # only its length is read
    return row_length({"audio": clip, "response": "a" * characters}, processor.feature_extractor)


def _prompt_length(processor: ReLLMProcessor) -> int:
    clip = np.full(RATE, 0.1, dtype=np.float32)
    inputs = conversations(processor, [clip], reply=False)
    return inputs["input_ids"].shape[1] - processor.feature_extractor.count_tokens(len(clip))


def _padding(lengths: np.ndarray) -> float:
    """Share of a batch's positions that are padding, over all batches."""
    batches = lengths[: len(lengths) // BATCH * BATCH].reshape(-1, BATCH)
    return 1 - float(batches.sum() / (BATCH * batches.max(1)).sum())


def _run_padding(lengths: np.ndarray, *, on_cpu: bool) -> float:
    """Likewise, over the groups that the towers make of each batch."""
    run = 0.0
    batches = lengths[: len(lengths) // BATCH * BATCH].reshape(-1, BATCH).tolist()
    for batch in batches:
        groups = group_by_length(batch, CPU_SLACK if on_cpu else 1.0, math.inf)
        run += sum(len(group) * batch[group[0]] for group in groups)
    return 1 - sum(map(sum, batches)) / run


if __name__ == "__main__":
    main()
