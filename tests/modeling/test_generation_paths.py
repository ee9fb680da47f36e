"""Faster ways to the same reply: assisted decoding, continuous batching, a compiled static cache.

The reference is `generate` without them, which `test_generation.py` holds against a loop without a cache.
"""

import shutil

import pytest
import torch
from tiny_models import audio_inputs, clip, conversation_inputs, tiny_config, tiny_model, tiny_processor, user_turn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    conversation = [user_turn("Listen: ", clip(0.5), " and ", clip(2.7, seed=1))]
    return dict(conversation_inputs(tiny_processor(), conversation))


class CountingCalls:
    """How often a module runs in a `with` block."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls = module, 0

    def __enter__(self) -> "CountingCalls":
        self.hook = self.module.register_forward_hook(self._count)
        return self

    def _count(self, *_: object) -> None:
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def test_prompt_lookup_writes_the_same_reply(model, inputs) -> None:
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=4), expected)


def test_an_assistant_that_hears_as_well_saves_passes_and_changes_nothing(model, inputs) -> None:
    expected = model.generate(**inputs, **GREEDY)
    twin = tiny_model(layers=2)  # the same weights: all that it proposes is right
    twin.generation_config.num_assistant_tokens = 3
    with CountingCalls(model.model) as whole, CountingCalls(model.model.emotion_tower) as tower:
        assisted = model.generate(**inputs, **GREEDY, assistant_model=twin)
    assert torch.equal(assisted, expected)
    assert whole.calls < 8 and tower.calls == 1
    other = tiny_model(layers=2)  # other weights: what it proposes is wrong, and the reply still right
    nn.init.normal_(other.model.text_model.lm_head.weight)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=other), expected)


def test_a_text_llm_assists_without_the_audio(model, inputs) -> None:
    torch.manual_seed(0)
    reader = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=reader), expected)
    with torch.no_grad():
        heard = {"audio": model.get_audio_features(**audio_inputs(inputs))}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**text, mm_encoder_outputs=heard, **GREEDY, assistant_model=reader)
    assert torch.equal(found, expected)


def test_checking_an_assistants_tokens_costs_no_lora(model, inputs) -> None:
    layer = model.model.text_model.model.layers[0].self_attn.q_proj
    with CountingCalls(layer.lora_A["relllm"]) as lora:
        model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=4)
    assert lora.calls == 1  # the prefill


def test_continuous_batching_answers_text_as_generate_does(model) -> None:
    prompts = [[5, 6, 7, 8, 9], [9, 10, 11], [40, 41, 42, 43, 44, 45, 46]]
    options = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32)  # by default most of the memory
    results = tiny_model(layers=2).generate_batch(
        inputs=prompts, generation_config=options, continuous_batching_config=small, progress_bar=False
    )
    found = [result.generated_tokens for _, result in sorted(results.items())]
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert tokens == alone[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="Inductor needs a C compiler.")
@pytest.mark.timeout(600)
def test_a_static_cache_with_a_compiled_decode_step_writes_the_same_reply() -> None:
    config = tiny_config(layers=2)
    config.text_config.num_hidden_layers = 1
    model = tiny_model(config)
    row = dict(conversation_inputs(tiny_processor(), [user_turn(clip(0.9))]))
    expected = model.generate(**row, **GREEDY)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # by itself Transformers compiles on accelerators only
    torch.compiler.reset()
    found = model.generate(**row, **GREEDY, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(found, expected)
