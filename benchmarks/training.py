"""A training step against the original's procedure with the same modules: forward, losses, backward, AdamW.

Ours is the trainer's step. The original encodes a window of 30 s and runs the emotion tower twice, clip by clip, by
Transformers' own modules; it computes the LoRA at all positions and masks it, and the LLM's head at all positions. Its
optimizer is what Transformers' Trainer took then, AdamW parameter by parameter; ours is today's default. "Towers'
outputs given" is a step whose frames and embeddings were computed before: the least that a cache of them can cost.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from datasets import Dataset
from harness import figure, interleave, report
from reference import REPLY, audio_only, build_model, build_processor, clips, original_towers
from torch import Tensor

from relllm import ReLLMForConditionalGeneration, ReLLMSFTConfig, ReLLMSFTTrainer
from relllm.modeling import lora_relllm

LABELS = {"emotion": "happy", "arousal": 0.5, "dominance": 0.4, "valence": 0.6}


def main(*, quick: bool = False) -> None:
    batch, rounds = (2, 1) if quick else (8, 5)
    model = build_model(quick=quick).train()
    waveforms = clips(batch, 5.0)
    rows = [{"audio": clip, "response": REPLY, **LABELS} for clip in waveforms]
    trainers = {window: _build_trainer(model, full_window=window) for window in (False, True)}
    batches = {window: dict(trainer.data_collator(rows)) for window, trainer in trainers.items()}
    towers_inputs = {name: batches[False][name] for name in audio_only(batches[False]) if name != "audio_num_windows"}
    with torch.no_grad():
        given = model.model.run_towers(**towers_inputs)
    without_audio = {name: value for name, value in batches[False].items() if name not in towers_inputs}
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, plain = trainers[False].create_optimizer(), torch.optim.AdamW(parameters, lr=2e-5)

    def step(window: bool, inputs: dict[str, Tensor]) -> None:
        _update(trainers[window].compute_loss(model, dict(inputs)), ours)

    def original() -> None:
        with _lora_everywhere():
            _update(original_loss(model, batches[True], waveforms), plain)

    variants: dict[str, Callable[[], object]] = {
        "original": original,
        "ours": lambda: step(False, batches[False]),
        "full": lambda: step(True, batches[True]),
        "given": lambda: step(False, {**without_audio, "tower_outputs": given}),
        "towers": lambda: model.model.run_towers(**towers_inputs),
    }
    seconds = interleave(variants, rounds=rounds)
    whole = seconds["original"]
    rows_of_table = [
        figure("training step: original / ours", whole / seconds["ours"], ">= 2.5"),
        figure("training step: original / ours, towers' outputs given", whole / seconds["given"], ">= 6"),
        figure(
            "share of the towers' time that goes when given",
            (seconds["ours"] - seconds["given"]) / seconds["towers"],
            ">= 0.95",
        ),
        figure("training step: original / ours with the 30 s window", whole / seconds["full"]),
    ]
    for row, name in zip(rows_of_table, ("ours", "given", "towers", "full"), strict=True):
        row |= {"seconds": seconds[name], "original_seconds": whole}
    positions = batches[False]["input_ids"].shape[1]
    report("training", rows_of_table, about=f"batch {batch}, 5 s, {positions} positions, reference sizes, float32")


UNREAD = {"audio": "unread.wav", "response": REPLY, "emotion": "happy", "arousal": 0.5}


def _build_trainer(model: ReLLMForConditionalGeneration, *, full_window: bool) -> ReLLMSFTTrainer:
    settings = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "use_cpu": True}
    return ReLLMSFTTrainer(
        model=model,
        args=ReLLMSFTConfig(output_dir=tempfile.mkdtemp(prefix="relllm-training-"), **settings),
        train_dataset=Dataset.from_list(
            [{"audio": "unread.wav", "response": REPLY, "emotion": "happy", "arousal": 0.5}]
        ),
        processing_class=build_processor(model, full_window=full_window),
    )


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def original_loss(model: ReLLMForConditionalGeneration, inputs: dict, waveforms: list) -> Tensor:
    """Reply, emotion and dimensions, by the model's own forward: logits at all positions."""
    output = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        tower_outputs=original_towers(model, inputs, waveforms),
        labels=inputs["labels"],
        use_cache=False,
    )
    emotion_loss = torch.nn.functional.cross_entropy(output.emotion_logits, inputs["emotion_labels"])
    return output.loss + emotion_loss + (output.dimensions - inputs["dimension_labels"]).square().mean()


@contextlib.contextmanager
def _lora_everywhere() -> Iterator[None]:
    """The LoRA at all positions, times its mask, as the original has it: ours on a CPU leaves the others out."""
    with mock.patch.object(lora_relllm, "_find_positions", return_value=None):
        yield


if __name__ == "__main__":
    main()
