"""Other ways to the same reply, against `generate` as it is: static cache, compiled, assisted, continuous batches.

Weights are random, so how often an assistant is right says nothing; its bounds do. The assistant here is always right:
the model's upper layers are made to add nothing, and the assistant is the model without them. Compiling is done in the
warm-up and timed apart. Every variant is checked to write the same tokens.
"""

import copy
import shutil
import time
from collections.abc import Callable

import torch
from harness import figure, interleave, report
from reference import audio_only, build_model, build_processor, clips, conversations, text_only
from torch import Tensor
from transformers import CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from relllm import ReLLMForConditionalGeneration


@torch.no_grad()
def main(*, quick: bool = False) -> None:
    tokens, rounds = (6, 1) if quick else (48, 5)
    model = build_model(quick=quick)
    row = conversations(build_processor(model, full_window=False), clips(1, 5.0), reply=False)
    heard = {"audio": model.get_audio_features(**audio_only(row))}
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def reply(**more: object) -> Tensor:
        return model.generate(**text_only(row), mm_encoder_outputs=heard, **options, **more)

    variants: dict[str, Callable[[], Tensor]] = {
        "plain": reply,
        "static cache": lambda: reply(cache_implementation="static"),
        "prompt lookup": lambda: reply(prompt_lookup_num_tokens=4),
    }
    compile_seconds = 0.0
    if not quick and shutil.which("cc"):
        compiled = CompileConfig(fullgraph=True)
        compiled._compile_all_devices = True  # by itself Transformers compiles on accelerators only
        variants["static cache, compiled"] = lambda: reply(cache_implementation="static", compile_config=compiled)
        start = time.perf_counter()
        variants["static cache, compiled"]()
        compile_seconds = time.perf_counter() - start
    _check_equal(variants)
    seconds = interleave(variants, rounds=rounds)
    rows = [
        figure(f"reply: plain / {name}", seconds["plain"] / seconds[name], seconds=seconds[name], passes="")
        for name in variants
        if name != "plain"
    ]
    lookup = next(row for row in rows if "lookup" in str(row["what"]))
    lookup["passes"] = _count_passes(model, variants["prompt lookup"])
    rows += [_assisted(quick, tokens, rounds), _continuous(model, quick, rounds)]
    about = f"{tokens} tokens, batch 1, 5 s heard before, reference sizes; compiling took {compile_seconds:.0f} s"
    report("generation", rows, about=about)


def _check_equal(variants: dict[str, Callable[[], Tensor]]) -> None:
    expected = variants["plain"]()
    for name, run in variants.items():
        if not torch.equal(run(), expected):
            raise RuntimeError(f"{name} wrote another reply than plain generation.")


def _count_passes(model: ReLLMForConditionalGeneration, run: Callable[[], Tensor]) -> int:
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    run()
    hook.remove()
    return len(passes)


def _assisted(quick: bool, tokens: int, rounds: int) -> dict[str, object]:
    """A reply with an assistant of a quarter of the layers that is always right: the most that assisting can give."""
    model = build_model(quick=quick)
    layers = model.model.text_model.model.layers
    kept = max(1, len(layers) // 4)
    for layer in layers[kept:]:
        layer.self_attn.o_proj.base_layer.weight.zero_()
        layer.mlp.down_proj.base_layer.weight.zero_()
    assistant = copy.deepcopy(model)
    body = assistant.model.text_model.model
    body.layers, body.config.num_hidden_layers = body.layers[:kept], kept
    assistant.generation_config.num_assistant_tokens = 8
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    row = conversations(build_processor(model, full_window=False), clips(1, 5.0), reply=False)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    variants = {
        "plain": lambda: model.generate(**row, **options),
        "assisted": lambda: model.generate(**row, **options, assistant_model=assistant),
    }
    _check_equal(variants)
    seconds = interleave(variants, rounds=rounds)
    return figure(
        "reply with towers: plain / an assistant of a quarter of the layers, always right",
        seconds["plain"] / seconds["assisted"],
        seconds=seconds["assisted"],
        passes=_count_passes(model, variants["assisted"]),
    )


def _continuous(model: ReLLMForConditionalGeneration, quick: bool, rounds: int) -> dict[str, object]:
    """Text only, which is what Transformers' continuous batching takes: replies of unlike length, against batches."""
    number = 4 if quick else 16
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 200, (24,), generator=generator).tolist() for _ in range(number)]
    lengths = [4 if quick or index % 4 else 48 for index in range(number)]  # one long reply in each batch of four
    pages = ContinuousBatchingConfig(num_blocks=64, page_size=32, max_batch_tokens=256)
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths))

    def continuous() -> None:
        with model.continuous_batching_context_manager(settings, continuous_batching_config=pages) as manager:
            for prompt, length in zip(prompts, lengths, strict=True):
                manager.add_request(prompt, max_new_tokens=length)
            for _ in prompts:
                if manager.get_result(timeout=300) is None:
                    raise RuntimeError("A request was lost.")

    def batches() -> None:
        for start in range(0, number, 4):
            ids = torch.tensor(prompts[start : start + 4])
            length = max(lengths[start : start + 4])
            model.generate(input_ids=ids, max_new_tokens=length, min_new_tokens=length, do_sample=False)

    seconds = interleave({"batches": batches, "continuous": continuous}, rounds=1 if quick else min(rounds, 3))
    return figure(
        "text replies of 4 and 48 tokens: batches of 4 / continuous",
        seconds["batches"] / seconds["continuous"],
        seconds=seconds["continuous"],
        passes="",
    )


if __name__ == "__main__":
    main()
