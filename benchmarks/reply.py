"""A reply of 64 tokens to a batch of clips, against the original's procedure with the same modules.

The original encodes a window of 30 s, runs the emotion tower twice, clip by clip, and computes the LoRA in each decode
step to mask it away. Here its LoRA has the scope "text", which acts in decode steps: the same work without the mask.
"""

import torch
from harness import figure, interleave, report
from reference import build_model, build_processor, clips, conversations, original_towers, text_only


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    batch, tokens, rounds = (2, 4, 1) if quick else (8, 64, 3)
    model, masked = build_model(quick=quick), build_model(lora_scope="text", quick=quick)
    waveforms = clips(batch, 5.0)
    cheap, full = (
        conversations(build_processor(model, full_window=window), waveforms, reply=False) for window in (False, True)
    )
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def original() -> None:
        masked.generate(**text_only(full), tower_outputs=original_towers(masked, full, waveforms), **options)

    seconds = interleave(
        {
            "original": original,
            "ours": lambda: model.generate(**cheap, **options),
            "full": lambda: model.generate(**full, **options),
        },
        rounds=rounds,
    )
    rows = [
        figure("reply: original / ours", seconds["original"] / seconds["ours"], ">= 2", seconds=seconds["ours"]),
        figure(
            "reply: original / ours with the 30 s window",
            seconds["original"] / seconds["full"],
            seconds=seconds["full"],
        ),
    ]
    about = f"{tokens} tokens, batch {batch}, 5 s, prompt {cheap['input_ids'].shape[1]}, reference sizes, float32"
    report("reply", rows, about=about)


if __name__ == "__main__":
    main()
