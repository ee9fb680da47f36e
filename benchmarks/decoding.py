"""A decode step with a LoRA of audio scope, against the bare LLM's own `generate`.

The time of a long reply less that of one token, over the steps between: the prefill is in neither. Both write the same
number of tokens from prompts of the same length, greedily, with the same generation settings.
"""

import torch
from harness import figure, interleave, report
from reference import audio_only, build_model, build_processor, clips, conversations, text_only
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    steps, rounds = (2, 1) if quick else (32, 15)
    rows = []
    for batch in (1, 2) if quick else (1, 8):
        seconds = _step_seconds(batch, steps=steps, rounds=rounds, quick=quick)
        for name, goal in (("audio scope", "<= 1.02"), ("global scope", "")):
            what = f"decode step, LoRA of {name} / bare LLM, batch {batch}"
            ratio = seconds[name] / seconds["bare"]
            rows.append(figure(what, ratio, goal, ms=1000 * seconds[name], bare_ms=1000 * seconds["bare"]))
    report("decoding", rows, about=f"{steps} greedy steps after a 5 s clip, reference sizes, float32")


def _step_seconds(batch: int, *, steps: int, rounds: int, quick: bool) -> dict[str, float]:
    model, everywhere = (build_model(lora_scope=scope, quick=quick) for scope in ("audio", "global"))
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.generation_config.suppress_tokens = model.generation_config.suppress_tokens
    inputs = conversations(build_processor(model, full_window=False), clips(batch, 5.0), reply=False)
    text, heard = text_only(inputs), {"audio": model.get_audio_features(**audio_only(inputs))}

    def write(name: str, length: int) -> None:
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        if name == "bare":
            bare.generate(**text, **options)
        else:
            chosen = model if name == "audio scope" else everywhere
            chosen.generate(**text, mm_encoder_outputs=heard, **options)

    names = ("bare", "audio scope", "global scope")
    variants = {(name, length): (lambda n=name, k=length: write(n, k)) for name in names for length in (1, 1 + steps)}
    seconds = interleave(variants, rounds=rounds)
    return {name: (seconds[name, 1 + steps] - seconds[name, 1]) / steps for name in names}


if __name__ == "__main__":
    main()
