"""Operations that a training step, a prefill and a decode step dispatch, each about one kernel on an accelerator.

Counted on the device "meta": an LLM of Qwen2.5-7B's shape in all but the widths (28 layers, so 196 with a LoRA), in
bfloat16 beside what trains in float32, towers' outputs given, in the prefill also what the projector makes of them.
Views, and memory that is only taken, do not count.
"""

import collections
from typing import Any

import torch
from harness import figure, report
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, WhisperConfig

from relllm import ReLLMConfig, ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import ReLLMAudioOutput, TowerOutputs

AUDIO_TOKEN, VOCABULARY = 99, 100
UNLAUNCHED = ("detach", "_unsafe_view", "_reshape_alias", "alias", "lift_fresh")


class CountLaunches(TorchDispatchMode):
    """Counts, by name, the operations inside a `with` block that are more than another view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if not is_view and name not in UNLAUNCHED and not name.startswith(("empty", "new_empty", "sym_")):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def build_meta_model(*, layers: int = 28, lora: bool = True, **fields: object) -> ReLLMForConditionalGeneration:
    """Build the model on the device "meta", narrow but with the paper's number of layers."""
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    size = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = ReLLMConfig(
        audio_config=WhisperConfig(**size, encoder_ffn_dim=16, num_mel_bins=8, max_source_positions=150),
        text_config=text,
        emotion_config=None,
        emotion_fusion="none",
        audio_token_id=AUDIO_TOKEN,
        lora_config={"r": 4, "lora_alpha": 8, "lora_dropout": 0.05} if lora else None,
        **fields,
    )
    with torch.device("meta"):
        return ReLLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def meta_inputs(rows: int = 2, text: int = 6) -> dict[str, Any]:
    """Return ids and towers' outputs of clips of 12 positions each, on the device "meta"."""
    ids = torch.zeros(rows, 12 + text, dtype=torch.long, device="meta")
    frames = torch.zeros(rows, 96, 16, dtype=torch.bfloat16, device="meta")
    towers = TowerOutputs(frames, torch.zeros(rows, dtype=torch.long, device="meta"))
    # Transformers asks a mask whether it is all ones; this says that there is none beside the causal one.
    where = torch.zeros(rows * 12, dtype=torch.long, device="meta")
    masks = {"full_attention": None}
    return {"input_ids": ids, "tower_outputs": towers, "attention_mask": masks, "audio_positions": where}


def count_launches(*, layers: int = 28, lora: bool = True) -> dict[str, collections.Counter[str]]:
    """Return the operations of a training step (reply, emotion, dimensions), a prefill and a decode step."""
    model, inputs = build_meta_model(layers=layers, lora=lora).train(), meta_inputs()
    with CountLaunches() as training:
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        (output.loss + output.emotion_logits.sum() + output.dimensions.sum()).backward()
    model.eval()
    del (
        inputs["audio_positions"],
        inputs["tower_outputs"],
    )  # whose positions are counted before a reply, and that waits for a value
    lengths = torch.zeros(2, dtype=torch.long, device="meta")
    heard = ReLLMAudioOutput(last_hidden_state=torch.zeros(2, 12, 32, device="meta"), lengths=lengths)
    with torch.no_grad():
        with CountLaunches() as prefill:
            cache = model(**inputs, mm_encoder_outputs={"audio": heard}, use_cache=True).past_key_values
        step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": inputs["attention_mask"]}
        with CountLaunches() as decoding:
            model(**step, past_key_values=cache)
    return {"training step": training.counts, "prefill": prefill.counts, "decode step": decoding.counts}


def main(*, quick: bool = False) -> None:
    layers = 2 if quick else 28
    ours, bare = (count_launches(layers=layers, lora=lora) for lora in (True, False))
    rows = []
    for name, counts in ours.items():
        own = counts.total() - bare[name].total()
        goal = {"training step": f"<= {4116 * layers // 28 // 3}", "prefill": f"<= {1568 * layers // 28 // 3}"}
        rows.append(figure(f"{name}: operations of the LoRA", float(own), goal.get(name, "<= 0")))
        rows[-1]["all operations"] = counts.total()
    report("launches", rows, about=f"{layers} layers, device meta, bfloat16; goals are a third of the first count")


if __name__ == "__main__":
    main()
