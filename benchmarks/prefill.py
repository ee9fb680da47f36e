"""Prefill with both towers, against the sum of its parts run alone: speech tower, emotion tower, LLM.

The LLM alone is one without a LoRA, over as many positions. The projector and the LoRA are on our side only.
"""

import torch
from harness import figure, interleave, report
from reference import audio_only, build_model, build_processor, clips, conversations, text_only
from transformers import AutoModelForCausalLM

from relllm import ReLLMForConditionalGeneration
from relllm.modeling.audio_tower_relllm import encode_audio


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    model = build_model(quick=quick)
    rows = [_prefill(model, batch, 1 if quick else rounds) for batch, rounds in ((1, 11), (8, 3))]
    report("prefill", rows, about="5 s clips, reference sizes, float32; shares are of the sum of the parts")


def _prefill(model: ReLLMForConditionalGeneration, batch: int, rounds: int) -> dict[str, object]:
    core = model.model
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    inputs = conversations(build_processor(model, full_window=False), clips(batch, 5.0), reply=False)
    text, heard = text_only(inputs), {"audio": model.get_audio_features(**audio_only(inputs))}
    seconds = interleave(
        {
            "all": lambda: model(**inputs, logits_to_keep=1),
            "speech": lambda: encode_audio(core.audio_tower, inputs["input_features"], inputs["input_features_mask"]),
            "emotion": lambda: core.emotion_tower(inputs["input_values"], inputs["input_values_mask"]),
            "llm": lambda: bare(**text, logits_to_keep=1),
            "llm with LoRA": lambda: model(**text, mm_encoder_outputs=heard, logits_to_keep=1),
        },
        rounds=rounds,
    )
    parts = seconds["speech"] + seconds["emotion"] + seconds["llm"]
    shares = {name: seconds[name] / parts for name in ("speech", "emotion", "llm", "llm with LoRA")}
    what = f"prefill with towers / sum of the parts, batch {batch}, {inputs['input_ids'].shape[1]} positions"
    return figure(what, seconds["all"] / parts, "<= 1.05", seconds=seconds["all"], **shares)


if __name__ == "__main__":
    main()
