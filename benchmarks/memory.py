"""Peak memory of a training step, against the same step written by hand in plain Transformers and PEFT.

Ours is the trainer's own step: both towers, projector, heads, the reply's cross-entropy. By hand it is Transformers'
Whisper encoder (over 30 s, the only window it takes) and wav2vec2 on the whole batch without a graph, the same
projector and heads, PEFT's LoRA at all positions and the LLM's own loss over all of them. "Text only" is that LLM and
LoRA reading as many positions, with no audio at all, so not the same step. Each in a fresh process; counted is the
peak of the resident set over two steps, from after the imports on (Linux).
"""

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping

import torch
from harness import figure, report, reset_peak, resident_mib
from reference import REPLY, SIZES, audio_only, build_model, build_processor, clips, conversations, text_only
from torch import Tensor, nn

from relllm import ReLLMConfig

STEPS = 2


def main(*, quick: bool = False) -> None:
    batch = 2 if quick else 8
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measured = {name: pool.apply(measure, (name, batch, quick)) for name in STEPS_OF}
    rows = []
    for name, other, goal in (
        ("ours", "by hand", "<= 1.0"),
        ("ours, the LLM's own loss", "by hand", ""),
        ("ours", "text only", ""),
        ("by hand", "text only", ""),
    ):
        sizes, reference = measured[name], measured[other]
        step = _added(sizes) / _added(reference)
        what = f"peak memory of a training step: {name} / {other}"
        rows.append(figure(what, sizes["peak"] / reference["peak"], goal, step_alone=step, **sizes))
    report("memory", rows, about=f"MiB; batch {batch}, 5 s, reference sizes, float32, AdamW, {STEPS} steps")


def _added(sizes: dict[str, float]) -> float:
    return sizes["peak"] - sizes["weights"]


def measure(name: str, batch: int, quick: bool) -> dict[str, float]:
    """MiB above what the imports take: after building the model, and at the peak of the steps.

    Args:
        name (`str`): Of `STEPS_OF`.
        batch (`int`): Clips.
        quick (`bool`): Tiny.
    """
    import peft  # noqa: F401  # both sides import all of it before the memory is read for the first time
    from trl import SFTTrainer  # noqa: F401

    from relllm import ReLLMSFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    before = resident_mib()
    step = STEPS_OF[name](batch, quick)
    weights = resident_mib()
    reset_peak()
    for _ in range(STEPS):
        step()
    return {"weights": weights - before, "peak": resident_mib(peak=True) - before}


def ours(batch: int, quick: bool, *, fused: bool = True) -> Callable[[], None]:
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
    dataset = Dataset.from_list([{"audio": "unread.wav", "response": REPLY, "emotion": "happy", "arousal": 0.5}])
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


class ByHand(nn.Module):
    """The model as one would write it without this package, in the cases that the step needs.

    Args:
        config ([`ReLLMConfig`]): For the sizes; `emotion_fusion="concat"`.
    """

    def __init__(self, config: ReLLMConfig) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoModelForCausalLM

        super().__init__()
        self.audio = AutoModel.from_config(config.audio_config).get_encoder().eval().requires_grad_(False)
        self.emotion = AutoModel.from_config(config.emotion_config.encoder_config).eval().requires_grad_(False)
        width, out = config.projector_input_size, config.text_config.hidden_size
        kernels = config.projector_kernel_sizes
        widths = [width] * (len(kernels) - 1) + [out]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, 2 * wide, kernel, stride=2, padding=kernel // 2)
            for kernel, wide in zip(kernels, widths, strict=True)
        )
        self.fc1 = nn.Linear(out, config.projector_inner_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_inner_dim, out, bias=False)
        self.norm = nn.LayerNorm(out)
        self.emotion_head = nn.Linear(out, len(config.emotion_labels), bias=False)
        self.dimension_head = nn.Linear(out, 3, bias=False)
        llm = AutoModelForCausalLM.from_config(config.text_config)
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **SIZES["lora"])
        self.llm = get_peft_model(llm, lora).train()
        self.audio_token_id = config.audio_token_id

    def forward(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The loss: reply, emotion 0 and dimensions 0.5, of clips that are equally long."""
        lengths = (inputs["input_features_mask"].sum(-1) - 1) // 2 + 1
        with torch.no_grad():
            frames = self.audio(inputs["input_features"]).last_hidden_state[:, : int(lengths.max())]
            embedding = self.emotion(inputs["input_values"]).last_hidden_state.mean(1)
        hidden = torch.cat([frames, embedding[:, None].expand(-1, frames.shape[1], -1)], dim=-1).transpose(1, 2)
        for convolution in self.convolutions:
            hidden = nn.functional.glu(convolution(hidden), dim=1)
        hidden = hidden.transpose(1, 2)
        hidden = self.norm(hidden + self.fc2(nn.functional.gelu(self.fc1(hidden))))
        pooled = hidden.mean(1)
        embeddings = self.llm.get_input_embeddings()(inputs["input_ids"])
        audio = (inputs["input_ids"] == self.audio_token_id).unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(audio, hidden)
        output = self.llm(
            inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=labels, use_cache=False
        )
        emotions = torch.zeros(len(pooled), dtype=torch.long)
        emotion_loss = nn.functional.cross_entropy(self.emotion_head(pooled), emotions)
        return output.loss + emotion_loss + (self.dimension_head(pooled) - 0.5).square().mean()


def by_hand(batch: int, quick: bool) -> Callable[[], None]:
    """The same step in plain Transformers and PEFT."""
    reference = build_model(quick=quick)
    inputs = conversations(build_processor(reference, full_window=True), clips(batch, 5.0), reply=True)
    config = reference.config
    del reference
    model = ByHand(config)
    optimizer = _optimizer(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.audio_token_id, -100)

    def step() -> None:
        model(inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def text_alone(batch: int, quick: bool) -> Callable[[], None]:
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


STEPS_OF = {
    "ours": ours,
    "ours, the LLM's own loss": functools.partial(ours, fused=False),
    "by hand": by_hand,
    "text only": text_alone,
}


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)


if __name__ == "__main__":
    main()
