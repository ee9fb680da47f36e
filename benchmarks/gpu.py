"""One card at the paper's sizes, with random weights: Whisper-large's encoder, wav2vec2-large with 12 layers, an LLM
of Qwen2.5-7B's shape, in bfloat16, what trains in float32. Nothing is downloaded.

`make bench-gpu`, or `python benchmarks/gpu.py`: made for 4 minutes and a card of 80 GB. `results/gpu.json` has the
card's name and its measured ceilings: a large matrix product, a large copy. Not part of `make bench`.
"""

import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import soundfile
import torch
from datasets import Dataset
from harness import figure, interleave, read_clock, report
from reference import (
    RATE,
    REPLY,
    audio_only,
    build_model,
    build_processor,
    clips,
    conversations,
    text_only,
    tokenizer,
)
from torch import Tensor
from training import LABELS, original_loss
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from relllm import ReLLMConfig, ReLLMEmotionConfig, ReLLMForConditionalGeneration, ReLLMSFTConfig, ReLLMSFTTrainer
from relllm.modeling import audio_tower_relllm
from relllm.training.planning.memory import StepSettings, TrainingStep
from relllm.training.planning.micro_batch import row_size

Rows = list[dict[str, object]]
RAGGED_S = (1.0, 2.0, 3.5, 5.0, 8.0, 12.0, 18.0, 27.0)
NUM_TOKENS = 17


def main(*, quick: bool = False) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        sys.exit("No CUDA device here: `make bench` measures a CPU.")
    tflops, rows = ceilings(device, 256 if quick else 8192)
    model = build_model(quick=True) if quick else build_on(device)
    batches, rounds = ((1, 2), 1) if quick else ((1, 8), 5)
    for batch in batches:
        rows += prefill(model, batch, rounds) + decoding(model, batch, rounds)
    rows += ragged(model, rounds)
    rows += static_decoding(model)
    rows += step(model, batches[-1], rounds, quick) + training(model, tflops, quick)
    report("gpu", rows, about="random weights, " + ("tiny" if quick else "the paper's sizes, bfloat16"))


def build_on(device: torch.device) -> ReLLMForConditionalGeneration:
    """Return the model at the paper's sizes, made on the device."""
    tokens = tokenizer()
    whisper = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    wav2vec2 = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 4096}
    norms = {"conv_dim": (512,) * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    qwen = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    words = {"vocab_size": 152_064, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokens.eos_token_id}
    encoder = AutoConfig.for_model("wav2vec2", **wav2vec2, **norms)
    config = ReLLMConfig(
        audio_config=AutoConfig.for_model("whisper", num_mel_bins=80, decoder_layers=1, **whisper),
        emotion_config=ReLLMEmotionConfig(encoder_config=encoder),
        text_config=AutoConfig.for_model(
            "qwen2", intermediate_size=18_944, tie_word_embeddings=False, **qwen, **words
        ),
        audio_token_id=tokens.convert_tokens_to_ids("<|audio|>"),
        projector_inner_dim=512,
        lora_config={"r": 16, "lora_alpha": 16, "lora_dropout": 0.05},
    )
    with torch.device(device):
        return ReLLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def ceilings(device: torch.device, size: int) -> tuple[float, Rows]:
    """Return what the card multiplies, in TFLOP/s, and that with what it copies as rows of the table."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleave({"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, rounds=7, warmups=3)
    tflops = 2 * size**3 / seconds["product"] / 1e12
    copied = 2 * len(source) / seconds["copy"] / 1e9  # read and written
    return tflops, [figure(f"product {size}³, TFLOP/s", tflops), figure("copy, GB/s", copied)]


def inputs_of(model: ReLLMForConditionalGeneration, waveforms: list, *, full_window: bool) -> dict[str, Tensor]:
    batch = conversations(build_processor(model, full_window=full_window), waveforms, reply=False)
    return {name: value.to(model.device) for name, value in batch.items()}


@torch.no_grad()
def prefill(model: ReLLMForConditionalGeneration, batch: int, rounds: int) -> Rows:
    """The LLM with the LoRA and without it, and all of it against its parts, over the full window."""
    inputs = inputs_of(model, clips(batch, 8.0 if rounds > 1 else 1.0), full_window=True)
    audio, text = audio_only(inputs), text_only(inputs)
    heard = {"audio": model.get_audio_features(**audio)}
    others = {**text, "input_ids": text["input_ids"].where(text["input_ids"] != model.config.audio_token_id, 5)}
    towers = {name: value for name, value in audio.items() if name != "audio_num_windows"}
    variants: dict[str, Callable[[], object]] = {
        "LoRA": lambda: model(**text, mm_encoder_outputs=heard, logits_to_keep=1),
        "none": lambda: model(**others, logits_to_keep=1),
        "all": lambda: model(**inputs, logits_to_keep=1),
        "towers": lambda: model.model.run_towers(**towers),
    }
    seconds = interleave(variants, rounds=rounds, warmups=2)
    parts = seconds["LoRA"] + seconds["towers"]
    return [
        figure(f"LLM prefill with / without the LoRA, batch {batch}", seconds["LoRA"] / seconds["none"], "<= 1.1"),
        figure(f"prefill with both towers / the parts, batch {batch}", seconds["all"] / parts, "<= 1.1"),
        figure(f"prefill with both towers, ms, batch {batch}", 1e3 * seconds["all"]),
    ]


@torch.no_grad()
def decoding(model: ReLLMForConditionalGeneration, batch: int, rounds: int) -> Rows:
    """A decode step against the bare LLM's: the LoRA of audio scope computes nothing in it."""
    inputs = inputs_of(model, clips(batch, 1.0), full_window=False)
    heard, text = {"audio": model.get_audio_features(**audio_only(inputs))}, text_only(inputs)
    with torch.device(model.device):
        bare = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config), dtype=model.dtype).eval()
    bare.generation_config.pad_token_id = model.generation_config.pad_token_id = 0
    bare.generation_config.suppress_tokens = model.generation_config.suppress_tokens

    def write(which: str, tokens: int) -> object:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        if which == "bare":
            return bare.generate(**text, **options)
        return model.generate(**text, mm_encoder_outputs=heard, **options)

    pairs = [(which, tokens) for which in ("bare", "ours") for tokens in (1, NUM_TOKENS)]
    seconds = interleave({pair: lambda pair=pair: write(*pair) for pair in pairs}, rounds=rounds)
    token = {w: (seconds[w, NUM_TOKENS] - seconds[w, 1]) / (NUM_TOKENS - 1) for w in ("bare", "ours")}
    return [
        figure(f"decode step / the bare LLM's, batch {batch}", token["ours"] / token["bare"], "<= 1.02"),
        figure(f"decode step, ms, batch {batch}", 1e3 * token["ours"]),
    ]


def static_decoding(model: ReLLMForConditionalGeneration) -> Rows:
    """A token with a static cache, and what compiling takes, which Transformers does on a card."""
    inputs = inputs_of(model, clips(1, 5.0), full_window=False)

    def write(tokens: int) -> float:
        start = read_clock()
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model.generate(**inputs, **options, cache_implementation="static")
        return read_clock() - start

    first, longer, short = write(33), [write(33) for _ in range(3)], [write(1) for _ in range(3)]
    token = (statistics.median(longer) - statistics.median(short)) / 32
    return [
        figure("static cache, compiled: ms a token", 1e3 * token, "<= 5"),
        figure("static cache: seconds to compile", first - longer[0], "<= 20"),
    ]


@torch.no_grad()
def ragged(model: ReLLMForConditionalGeneration, rounds: int) -> Rows:
    """Clips of unlike length through the towers: as one batch, and in groups as on a CPU."""
    seconds_of = RAGGED_S if rounds > 1 else (0.5, 1.0)
    audio = audio_only(inputs_of(model, [clips(1, one)[0] for one in seconds_of], full_window=False))
    towers = {name: value for name, value in audio.items() if name != "audio_num_windows"}

    def in_groups() -> None:
        grouped = {"_needs_sizes": lambda *_: True, "_limits": lambda *_: (0.5, float("inf"))}
        with mock.patch.multiple(audio_tower_relllm, **grouped):
            model.model.run_towers(**towers)

    found = interleave({"whole": lambda: model.model.run_towers(**towers), "groups": in_groups}, rounds=rounds)
    return [
        figure("ragged batch through the towers: as it is run / in groups", found["whole"] / found["groups"], "<= 1")
    ]


def build_trainer(model: ReLLMForConditionalGeneration, rows: Rows, **settings: object) -> ReLLMSFTTrainer:
    on_cpu = model.device.type == "cpu"
    options = {"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = ReLLMSFTConfig(
        **{"output_dir": tempfile.mkdtemp(), "use_cpu": on_cpu, "bf16": not on_cpu, "log_completions": 0},
        **{"warmup_steps": 1, "logging_steps": 1000} | options | settings,
    )
    processor = build_processor(model, full_window=True)
    return ReLLMSFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor)


def step(model: ReLLMForConditionalGeneration, batch: int, rounds: int, quick: bool) -> Rows:
    """A step against the original's procedure, and how many kernels it launches and how long they run."""
    model.train()
    waveforms = clips(batch, 1.0 if quick else 5.0)
    trainer = build_trainer(model, [{"audio": "unread.wav", "response": REPLY, **LABELS}])
    batch_of = trainer.data_collator([{"audio": clip, "response": REPLY, **LABELS} for clip in waveforms])
    inputs = {name: value.to(model.device) for name, value in batch_of.items()}
    towers = {name: inputs[name] for name in audio_only(inputs) if name != "audio_num_windows"}
    with torch.no_grad(), trainer.accelerator.autocast():
        given = {name: value for name, value in inputs.items() if name not in towers}
        given["tower_outputs"] = model.model.run_towers(**towers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = {"ours": trainer.create_optimizer(), "original": torch.optim.AdamW(trained, lr=2e-5, foreach=False)}

    def update(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        with trainer.accelerator.autocast():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: update(lambda: trainer.compute_loss(model, dict(inputs)), optimizers["ours"]),
        "given": lambda: update(lambda: trainer.compute_loss(model, dict(given)), optimizers["ours"]),
        "original": lambda: update(lambda: original_loss(model, inputs, waveforms), optimizers["original"]),
    }
    seconds = interleave(variants, rounds=rounds)
    rows = [
        figure(f"original / ours, batch {batch}", seconds["original"] / seconds["ours"], ">= 5"),
        figure(
            f"original / ours, towers' outputs given, batch {batch}", seconds["original"] / seconds["given"], ">= 7"
        ),
    ]
    return rows + (kernels(variants["ours"], seconds["ours"], batch) if torch.cuda.is_available() else [])


def kernels(run: Callable[[], object], seconds: float, batch: int) -> Rows:
    """How many kernels a call launches, and the share of `seconds` in which one runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in found) / 1e6
    launched = float(sum(event.count for event in found))
    return [
        figure(f"kernels launched in a step of {batch}", launched, "<= 3500"),
        figure(f"share of a step of {batch} in which the card is busy", busy / seconds, ">= 0.85"),
    ]


def training(model: ReLLMForConditionalGeneration, tflops: float, quick: bool) -> Rows:
    """The trainer's loop: rows a second and their share of the measured product, and the peak of memory."""
    seconds, folder = 1.0 if quick else 8.0, Path(tempfile.mkdtemp())
    rows = []
    for index, clip in enumerate(clips(8 if quick else 64, seconds)):
        soundfile.write(folder / f"{index}.wav", clip, RATE)
        rows.append({"audio": str(folder / f"{index}.wav"), "response": REPLY, **LABELS})
    workers = 0 if quick else 6
    auto = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto"}
    eight = {"per_device_train_batch_size": 2 if quick else 8, "gradient_accumulation_steps": 1}
    runs: Mapping[str, tuple[dict, str]] = {
        "2 × 8, checkpointing": ({"gradient_checkpointing": True}, ""),
        "the recipe, chosen by memory": (auto, ">= 40"),
        "8 rows": (eight, ">= 45"),
    }
    table: Rows = []
    for name, (settings, goal) in runs.items():
        clock = _Clock()
        model.gradient_checkpointing_disable()  # of the run before
        steps = 2 if quick else 4
        trainer = build_trainer(model, rows, max_steps=steps, dataloader_num_workers=workers, **settings)
        trainer.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        update = statistics.median(end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False))
        args = trainer.args
        a_second = args.per_device_train_batch_size * args.gradient_accumulation_steps / update
        size = row_size(trainer.data_collator(rows[:1]), model.config)
        settings_of = StepSettings(model.dtype, bool(args.bf16), bool(args.gradient_checkpointing))
        flops = TrainingStep(model.config, settings_of, size).flops()
        table.append(figure(f"training, {name}: rows a second", a_second, goal))
        share = a_second * flops / 1e12 / tflops
        table.append(figure(f"training, {name}: share of the product", share, ">= 0.3" if goal else ""))
        if torch.cuda.is_available():
            table.append(figure(f"training, {name}: peak, GB", torch.cuda.max_memory_allocated() / 1e9))
        model.zero_grad(set_to_none=True)
        del trainer
        gc.collect()
    return table


class _Clock(TrainerCallback):
    """The time at the end of each update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


if __name__ == "__main__":
    main()
