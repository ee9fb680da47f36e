"""Peak memory of a training step, against plain Transformers and PEFT on the same LLM over as many positions.

Ours is the trainer's own step: both towers, projector, heads, the reply's cross-entropy as TRL computes it in pieces.
The plain one is the LLM with an ordinary LoRA, its own loss, and no audio at all. Each in a fresh process; counted is
the peak of the resident set over two steps, from after the imports on (Linux).
"""

import multiprocessing
import tempfile
from collections.abc import Callable

import torch
from harness import figure, report, reset_peak, resident_mib
from reference import REPLY, SIZES, audio_only, build_model, build_processor, clips, conversations, text_only

STEPS = 2


def main(*, quick: bool = False) -> None:
    batch = 2 if quick else 8
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measured = {name: pool.apply(measure, (name, batch, quick)) for name in ("ours", "whole logits", "plain")}
    plain = measured["plain"]
    rows = []
    for name, goal in (("ours", "<= 1.0"), ("whole logits", ""), ("plain", "")):
        sizes = measured[name]
        what = f"peak memory of a training step / plain Transformers and PEFT: {name}"
        step = _added(sizes) / _added(plain)
        rows.append(figure(what, sizes["peak"] / plain["peak"], goal, step_alone=step, **sizes))
    report("memory", rows, about=f"MiB; batch {batch}, 5 s, reference sizes, float32, AdamW, {STEPS} steps")


def _added(sizes: dict[str, float]) -> float:
    return sizes["peak"] - sizes["weights"]


def measure(name: str, batch: int, quick: bool) -> dict[str, float]:
    """MiB above what the imports take: after building the model, and at the peak of the steps.

    Args:
        name (`str`): `"ours"`, `"whole logits"` (ours, without TRL's cross-entropy in pieces) or `"plain"`.
        batch (`int`): Clips.
        quick (`bool`): Tiny.
    """
    import peft  # noqa: F401  # both sides import all of it before the memory is read for the first time
    from trl import SFTTrainer  # noqa: F401

    from relllm import ReLLMSFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    before = resident_mib()
    step = plain(batch, quick) if name == "plain" else ours(batch, quick, fused=name == "ours")
    weights = resident_mib()
    reset_peak()
    for _ in range(STEPS):
        step()
    return {"weights": weights - before, "peak": resident_mib(peak=True) - before}


def ours(batch: int, quick: bool, *, fused: bool) -> Callable[[], None]:
    """The trainer's step."""
    from datasets import Dataset

    from relllm import ReLLMSFTConfig, ReLLMSFTTrainer

    model = build_model(quick=quick).train()
    processor = build_processor(model, full_window=False)
    rows = [
        {"audio": clip, "response": REPLY, "emotion": "happy", "arousal": 0.5, "dominance": 0.5, "valence": 0.5}
        for clip in clips(batch, 5.0)
    ]
    settings = ReLLMSFTConfig(
        output_dir=tempfile.mkdtemp(prefix="relllm-memory-"),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=batch,
        use_cpu=True,
    )
    dataset = Dataset.from_list([{"response": REPLY}])
    trainer = ReLLMSFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=processor)
    inputs = trainer.data_collator(rows)
    optimizer = _optimizer(model)

    def step() -> None:
        if fused:
            trainer.training_step(model, dict(inputs), num_items_in_batch=(inputs["labels"] >= 0).sum())
        else:
            features = text_only(inputs) | audio_only(inputs)
            model(**features, labels=inputs["labels"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain(batch: int, quick: bool) -> Callable[[], None]:
    """The LLM of the same sizes with PEFT's LoRA, reading as many positions."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    reference = build_model(quick=quick)
    inputs = conversations(build_processor(reference, full_window=False), clips(batch, 5.0), reply=True)
    text_config = reference.config.text_config
    del reference
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **SIZES["lora"])
    model = get_peft_model(AutoModelForCausalLM.from_config(text_config), lora).train()
    optimizer = _optimizer(model)
    text = text_only(inputs)

    def step() -> None:
        model(**text, labels=text["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)


if __name__ == "__main__":
    main()
