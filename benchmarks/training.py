"""A training step against the original's procedure with the same modules: forward, backward, AdamW.

The original encodes a window of 30 s and runs the emotion tower twice, clip by clip; both compute the LoRA at all
positions and mask it. "Towers' outputs given" is a step whose frames and embeddings were computed before: the least
that a cache of them can cost.
"""

from collections.abc import Callable

import torch
from harness import figure, interleave, report
from reference import (
    audio_only,
    build_model,
    build_processor,
    clips,
    conversations,
    original_towers,
    text_only,
)

from relllm.modeling.modeling_relllm import ReLLMCausalLMOutput


def main(*, quick: bool = False) -> None:
    batch, rounds = (2, 1) if quick else (8, 3)
    model = build_model(quick=quick).train()
    waveforms = clips(batch, 5.0)
    cheap, full = (
        conversations(build_processor(model, full_window=window), waveforms, reply=True) for window in (False, True)
    )
    towers_inputs = [cheap[name] for name in audio_only(cheap) if name != "audio_num_windows"]
    with torch.no_grad():
        given = model.model.run_towers(*towers_inputs)
    text = text_only(cheap)
    emotions = torch.randint(0, 5, (batch,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    def step(forward: Callable[[], ReLLMCausalLMOutput]) -> None:
        output = forward()
        emotion_loss = torch.nn.functional.cross_entropy(output.emotion_logits, emotions)
        (output.loss + emotion_loss + output.dimensions.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    options = {"labels": cheap["input_ids"], "use_cache": False}
    seconds = interleave(
        {
            "original": lambda: step(
                lambda: model(**text, tower_outputs=original_towers(model, full, waveforms), **options)
            ),
            "ours": lambda: step(lambda: model(**cheap, **options)),
            "full": lambda: step(lambda: model(**full, **options)),
            "given": lambda: step(lambda: model(**text, tower_outputs=given, **options)),
            "towers": lambda: model.model.run_towers(*towers_inputs),
        },
        rounds=rounds,
    )
    original, ours, without_towers = seconds["original"], seconds["ours"], seconds["given"]
    rows = [
        figure("training step: original / ours", original / ours, ">= 2.5", seconds=ours),
        figure("training step: original / ours, towers' outputs given", original / without_towers, ">= 6"),
        figure(
            "share of the towers' time that goes when given", (ours - without_towers) / seconds["towers"], ">= 0.95"
        ),
        figure("training step: original / ours with the 30 s window", original / seconds["full"]),
    ]
    for row, name in zip(rows, ("ours", "given", "towers", "full"), strict=True):
        row["seconds"] = seconds[name]
    positions = cheap["input_ids"].shape[1]
    report("training", rows, about=f"batch {batch}, 5 s, {positions} positions, reference sizes, float32")


if __name__ == "__main__":
    main()
