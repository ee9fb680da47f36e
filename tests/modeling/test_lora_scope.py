"""Scoped LoRA: it acts where its scope says and nowhere else, in every way a model is run.

The reference is the same LLM without PEFT, whose linear layers add the low-rank product at the masked positions.
"""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from tiny_models import (
    LLM_FAMILIES,
    MOE_FAMILIES,
    audio_inputs,
    clip,
    conversation_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    user_turn,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relllm import ReLLMForConditionalGeneration
from relllm.modeling import lora_relllm
from relllm.modeling.lora_relllm import ADAPTER_NAME, ScopedLinear, compile_layers, copy_lora

SCOPES = ("audio", "text", "global")
CHECKPOINTING = {"reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}
TEXT_IDS = torch.tensor([[1, 40, 41, 42, 43, 2]])


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    conversations = [[user_turn("Listen: ", clip(0.5), " and ", clip(0.3))], [user_turn(clip(0.9))]]
    return dict(conversation_inputs(tiny_processor(), conversations))


@pytest.fixture(scope="module")
def models() -> dict[str, ReLLMForConditionalGeneration]:
    return {scope: tiny_model(layers=2, lora_scope=scope) for scope in SCOPES}


def bare_llm(model: ReLLMForConditionalGeneration) -> PreTrainedModel:
    """The LLM alone, without PEFT, with the same weights."""
    state = {
        name.replace(".base_layer.", "."): weight
        for name, weight in model.model.text_model.state_dict().items()
        if "lora_" not in name
    }
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.load_state_dict(state)
    return bare


def reference_llm(model: ReLLMForConditionalGeneration, mask: Tensor) -> PreTrainedModel:
    """The LLM alone; each layer that has a LoRA adds scaling · B A x at the masked positions, written out."""
    reference = bare_llm(model)
    state = model.model.text_model.state_dict()
    scaling = model.config.lora_config["lora_alpha"] / model.config.lora_config["r"]

    def add_lora(product: Tensor) -> Callable:
        return lambda layer, args, result: result + mask[..., None] * scaling * (args[0] @ product.T)

    for name, layer in reference.named_modules():
        if f"{name}.lora_A.{ADAPTER_NAME}.weight" in state:
            assert isinstance(layer, (nn.Linear, Conv1D))
            a, b = (state[f"{name}.lora_{part}.{ADAPTER_NAME}.weight"] for part in "AB")
            layer.register_forward_hook(add_lora(b @ a))
    return reference


def merged_embeddings(model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Token embeddings with the projected frames put in one by one."""
    audio = model.get_audio_features(**audio_inputs(inputs))
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).clone()
    positions = (inputs["input_ids"] == model.config.audio_token_id).nonzero().tolist()
    assert len(positions) == len(audio.pooler_output)
    for (row, column), frame in zip(positions, audio.pooler_output, strict=True):
        embeddings[row, column] = frame
    return embeddings


def scope_mask(scope: str, is_audio: Tensor) -> Tensor:
    return {"audio": is_audio, "text": ~is_audio, "global": torch.ones_like(is_audio)}[scope].float()


@contextmanager
def count_lora_calls(model: nn.Module) -> Iterator[list[str]]:
    """Names of the LoRA matrices that run inside the block."""
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if name.endswith((f"lora_A.{ADAPTER_NAME}", f"lora_B.{ADAPTER_NAME}"))
    ]
    assert hooks
    yield calls
    for hook in hooks:
        hook.remove()


# --- where it acts ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", LLM_FAMILIES + MOE_FAMILIES)
def test_text_only_input_gives_exactly_the_base_llms_logits(family: str) -> None:
    model = tiny_model(layers=2, text=family)
    assert torch.equal(model(input_ids=TEXT_IDS).logits, bare_llm(model)(TEXT_IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", LLM_FAMILIES + MOE_FAMILIES)
def test_each_scope_equals_a_hand_written_masked_lora(family: str, scope: str, inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2, text=family, lora_scope=scope)
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    reference = reference_llm(model, scope_mask(scope, is_audio))
    run = {"inputs_embeds": merged_embeddings(model, inputs), "attention_mask": inputs["attention_mask"]}
    expected = reference(**run).logits
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], rtol=1e-4, atol=2e-5)
    plain = bare_llm(model)(**run).logits
    assert (plain - expected)[valid].abs().max() > 0.05  # the LoRA is not too small to see


@torch.no_grad()
def test_a_decode_step_of_audio_scope_runs_no_lora_and_the_others_run_all(
    models: dict[str, ReLLMForConditionalGeneration], inputs: dict[str, Tensor]
) -> None:
    for scope, model in models.items():
        with count_lora_calls(model) as calls:
            past = model(**inputs, use_cache=True).past_key_values
        matrices = sorted(set(calls))
        assert sorted(calls) == matrices and len(matrices) == 2 * 2 * 7  # A and B, layers, linear layers
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        with count_lora_calls(model) as calls:
            model(input_ids=torch.tensor([[40], [41]]), attention_mask=mask, past_key_values=past)
        assert sorted(calls) == ([] if scope == "audio" else matrices)


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_generate_runs_the_lora_at_prefill_and_afterwards_as_the_scope_says(
    scope: str, models: dict[str, ReLLMForConditionalGeneration], inputs: dict[str, Tensor]
) -> None:
    with count_lora_calls(models[scope]) as calls:
        models[scope].generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    steps = 1 if scope == "audio" else 4
    assert len(calls) == steps * len(set(calls)) and calls


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_stepwise_decoding_equals_one_pass_over_the_whole_text(
    scope: str, models: dict[str, ReLLMForConditionalGeneration], inputs: dict[str, Tensor]
) -> None:
    model = models[scope]
    reply = torch.tensor([[40, 41, 42], [50, 51, 52]])
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], reply], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(reply)], dim=1),
    }
    expected = model(**whole).logits[:, -3:]
    outputs, attention_mask = model(**inputs, use_cache=True), inputs["attention_mask"]
    for index in range(3):
        attention_mask = torch.cat([attention_mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        outputs = model(
            input_ids=reply[:, index : index + 1],
            attention_mask=attention_mask,
            past_key_values=outputs.past_key_values,
        )
        torch.testing.assert_close(outputs.logits[:, 0], expected[:, index], rtol=1e-4, atol=3e-5)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(
    model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor], *, teacher: bool = False
) -> dict[str, Tensor]:
    """Of the language-modelling loss; optionally with a text-only pass between forward and backward."""
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    if teacher:
        with torch.no_grad():
            model(input_ids=TEXT_IDS)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # PyTorch, on the teacher pass
@pytest.mark.parametrize("teacher", [False, True], ids=["alone", "teacher-between"])
@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_checkpointing_changes_no_gradient(
    scope: str, kind: str, teacher: bool, inputs: dict[str, Tensor]
) -> None:
    model = tiny_model(layers=2, lora_scope=scope, lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}).train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(CHECKPOINTING[kind])
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    found = gradients(model, inputs, teacher=teacher)
    assert found.keys() >= expected.keys()
    assert sum("lora_" in name and bool(gradient.any()) for name, gradient in expected.items()) == 2 * 2 * 7
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


def test_gradients_equal_those_of_the_hand_written_lora(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    found = gradients(model, inputs)
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    with torch.no_grad():
        embeddings = merged_embeddings(model, inputs)
    factors = {}
    reference = bare_llm(model)
    state = model.model.text_model.state_dict()
    for name, layer in reference.named_modules():
        if f"{name}.lora_A.{ADAPTER_NAME}.weight" in state:
            a, b = (state[f"{name}.lora_{part}.{ADAPTER_NAME}.weight"].clone().requires_grad_() for part in "AB")
            factors[name] = (a, b)
            layer.register_forward_hook(
                lambda _, args, result, a=a, b=b: result + is_audio[..., None] * 2.0 * (args[0] @ a.T @ b.T)
            )
    run = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    reference(**run, labels=inputs["input_ids"]).loss.backward()
    for name, (a, b) in factors.items():
        for part, factor in (("A", a), ("B", b)):
            gradient = found[f"model.text_model.{name}.lora_{part}.{ADAPTER_NAME}.weight"]
            torch.testing.assert_close(gradient, factor.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LoRA at the positions that are given, or at all times its mask, by copies of its parameters."""
    monkeypatch.setattr(lora_relllm, "_find_positions", lambda mask: None)
    monkeypatch.setattr(lora_relllm, "WITHOUT_COPIES", ())


def with_positions(model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that say where the audio is, as a collator's do."""
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    return {**inputs, "audio_positions": is_audio.flatten().nonzero().squeeze(1)}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # PyTorch, on the teacher pass
@pytest.mark.parametrize("given", [False, True], ids=["mask", "positions"])
@pytest.mark.parametrize("scope", SCOPES)
def test_copies_of_the_parameters_give_in_float64_what_each_layers_own_modules_give(
    scope: str, given: bool, inputs: dict[str, Tensor], as_on_an_accelerator: None
) -> None:
    """Logits and gradients, with ranks and scalings of their own in layers that share an input, also checkpointed."""
    lora = {"r": 4, "lora_alpha": 6, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}
    model = tiny_model(layers=2, lora_scope=scope, lora=lora).double()
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    results = []
    for places in (("cpu",), ()):
        if not places and given:
            exact = with_positions(model, exact)
        with mock.patch.object(lora_relllm, "WITHOUT_COPIES", places), count_copied() as layers:
            logits = model(**exact).logits[exact["attention_mask"].bool()]
            assert len(layers) == (0 if places else 2 * 7)
            results.append({"logits": logits.detach(), **gradients(model, exact)})
    model.train().enable_input_require_grads()
    for settings in CHECKPOINTING.values():
        model.gradient_checkpointing_enable(settings)
        found = gradients(model, exact, teacher=True)
        results.append({"logits": logits.detach(), **{name: found[name] for name in results[0] if name in found}})
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(result[name], value, rtol=1e-9, atol=1e-11, msg=name)


@contextmanager
def count_copied() -> Iterator[list[str]]:
    """Names of the layers that add their LoRA by the pass's copies inside the block."""
    calls: list[str] = []
    add = ScopedLinear._share_product
    with mock.patch.object(
        ScopedLinear, "_share_product", lambda layer, *args: calls.append(layer.layer_name) or add(layer, *args)
    ):
        yield calls


@pytest.mark.parametrize("given", [False, True], ids=["mask", "positions"])
def test_dropout_takes_its_share_once_for_all_that_read_the_same(given: bool, as_on_an_accelerator: None) -> None:
    """With A of ones and B of ones a layer adds, to each output, rank times the sum of what dropout left, scaled."""
    model = tiny_model(layers=2, lora={"r": 2, "lora_alpha": 2, "lora_dropout": 0.25}).model
    layers = [getattr(model.get_decoder().layers[0].self_attn, f"{name}_proj") for name in ("q", "k", "v")]
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        torch.nn.init.ones_(parameter)
    mask = torch.arange(400)[None] % 2 == 0
    x = torch.ones(1, 400, layers[0].in_features)
    positions = mask.flatten().nonzero().squeeze(1) if given else None
    with model.train().lora_scope.use(mask, copy_lora(model.text_model, x), positions):
        added = [(layer(x) - layer.base_layer(x))[0, :, 0] for layer in layers]
        again = (layers[0](x) - layers[0].base_layer(x))[0, :, 0]
    assert torch.allclose(added[0], added[1], atol=1e-4) and torch.allclose(added[0], added[2], atol=1e-4)
    assert not added[0][~mask[0]].any() and not torch.allclose(again, added[0])  # another input, another draw
    left = added[0][mask[0]] / 2 / layers[0].in_features * 0.75  # the share that was kept
    assert abs(left.mean() - 0.75) < 4 * (0.25 * 0.75 / (200 * layers[0].in_features)) ** 0.5


def test_positions_that_are_not_the_placeholders_are_refused(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    right = with_positions(model, inputs)["audio_positions"]
    repeated = torch.cat([right, right[-1:]])
    for wrong in (right + 1, right[1:], right[:1].expand(len(right)), right.flip(0), repeated):
        with pytest.raises(ValueError, match="audio_positions are not those of the placeholders"):
            model(**inputs, audio_positions=wrong)
    tokens = [model.generate(**one, max_new_tokens=3, num_beams=2) for one in (inputs, with_positions(model, inputs))]
    assert torch.equal(*tokens)


def test_in_bfloat16_what_trains_is_float32_and_its_gradients_are_those_of_float32(
    inputs: dict[str, Tensor], as_on_an_accelerator: None
) -> None:
    model = tiny_model(layers=2)
    expected = gradients(model, inputs)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with count_copied() as layers:
        found = gradients(model, inputs)
    assert len(layers) == 2 * 7
    for name in (name for name in expected if "lora_" in name):
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.15 * expected[name].norm(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo touches deprecated and unusual things while it traces
@pytest.mark.parametrize("given", [False, True], ids=["mask", "positions"])
@pytest.mark.parametrize("scope", SCOPES)
def test_compiled_decoder_layers_are_one_graph_without_a_break(
    scope: str, given: bool, inputs: dict[str, Tensor], as_on_an_accelerator: None
) -> None:
    """Three layers share one in training, one with gradient checkpointing and one in a prefill without a cache."""
    config = tiny_config(layers=2, lora_scope=scope)
    config.text_config.num_hidden_layers = 3
    model, graphs = tiny_model(config), CompileCounter()
    inputs = {**(with_positions(model, inputs) if given else inputs), "use_cache": False}

    def logits() -> Tensor:
        with torch.no_grad():
            return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]

    plain, expected = logits(), gradients(model.train(), inputs)
    torch.compiler.reset()
    compile_layers(model.model.text_model, backend=graphs)
    results = [gradients(model, inputs)]
    assert graphs.frame_count == 1
    assert torch.equal(logits(), plain) and graphs.frame_count == 1  # without a gradient all is as before
    model.generate(**{**inputs, "use_cache": True}, max_new_tokens=2)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    results.append(gradients(model, inputs))
    compiled = graphs.frame_count
    assert compiled in (1, 2)  # Transformers 5.18 has no need of a second one
    for layer in model.model.get_decoder().layers:
        layer.compile(backend=graphs, fullgraph=True)
    torch.testing.assert_close(logits(), plain, rtol=1e-4, atol=2e-5)
    assert graphs.frame_count == compiled + 1
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_a_text_only_batch_keeps_the_lora_in_the_graph_with_zero_gradients() -> None:
    model = tiny_model(layers=2).train()
    model(input_ids=TEXT_IDS, labels=TEXT_IDS).loss.backward()
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert lora and all(parameter.grad is not None and not parameter.grad.any() for parameter in lora)


# --- the shortest way where the LoRA acts nowhere --------------------------------------------------------------------


def decode_step(model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of one more token."""
    cache = model(**inputs, use_cache=True).past_key_values
    mask = pad_mask(inputs)
    return model(input_ids=torch.full((len(mask), 1), 7), attention_mask=mask, past_key_values=cache).logits


def pad_mask(inputs: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)


@torch.no_grad()
def test_a_decode_step_goes_past_pefts_forward(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(layers=2)
    cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor([[7], [7]]), "attention_mask": pad_mask(inputs)}
    for layer in lora_layers(model):  # the way it would be without: PEFT's own layer, which has no active adapter
        layer.__class__ = PeftLinear
    expected = model(**step, past_key_values=copy.deepcopy(cache)).logits
    for layer in lora_layers(model):
        layer.__class__ = ScopedLinear
    assert torch.equal(model(**step, past_key_values=copy.deepcopy(cache)).logits, expected)
    monkeypatch.setattr(PeftLinear, "forward", None)
    model(**step, past_key_values=cache)


@torch.no_grad()
def test_another_adapter_and_hooks_of_the_base_layer_act_in_a_decode_step(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    expected = decode_step(model, inputs)
    seen: list[nn.Module] = []
    hooks = [
        layer.base_layer.register_forward_hook(lambda module, *_: seen.append(module)) for layer in lora_layers(model)
    ]
    assert torch.equal(decode_step(model, inputs), expected) and len(seen) == 2 * len(hooks)
    for hook in hooks:
        hook.remove()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model, "more"
    )
    for layer in lora_layers(model):
        layer.set_adapter(["more"])
    assert not torch.allclose(decode_step(model, inputs), expected, atol=1e-3)


@torch.no_grad()
def test_a_model_with_a_lora_can_be_pickled(inputs: dict[str, Tensor]) -> None:
    layer = lora_layers(tiny_model(layers=2))[0]
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(1, 3, layer.in_features)
    assert type(twin) is ScopedLinear and torch.equal(twin(x), layer(x))


@torch.no_grad()
def test_a_layer_that_packs_positions_is_refused_by_its_shape(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    layer = lora_layers(model)[0]
    mask = torch.tensor([[True, False, True]])
    with model.model.lora_scope.use(mask), pytest.raises(ValueError, match=r"\(2, .*some positions of \(1, 3\)"):
        layer(torch.randn(2, layer.in_features))


@torch.no_grad()
def test_a_layer_that_gets_all_positions_in_one_row_has_the_lora_at_its_own(inputs: dict[str, Tensor]) -> None:
    """As OPT's MLP."""
    model = tiny_model(layers=2)
    layer = lora_layers(model)[0]
    x = torch.randn(2, 3, layer.in_features)
    for mask in (torch.tensor([[True, False, True], [False, True, False]]), torch.zeros(2, 3, dtype=torch.bool)):
        with model.model.lora_scope.use(mask):
            expected = layer(x).flatten(0, 1)
            torch.testing.assert_close(layer(x.flatten(0, 1)), expected)
            model.model.lora_scope.positions = None  # as on an accelerator
            torch.testing.assert_close(layer(x.flatten(0, 1)), expected)


# --- copies, threads, saving -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_deep_copy_has_a_lora_of_its_own(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    expected = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert twin.model.lora_scope is not model.model.lora_scope
    assert torch.equal(twin(**inputs).logits, expected)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    assert not torch.allclose(twin(**inputs).logits, expected, atol=1e-3)
    assert torch.equal(model(**inputs).logits, expected)


def test_two_threads_with_different_inputs_do_not_disturb_each_other(inputs: dict[str, Tensor]) -> None:
    model = tiny_model(layers=2)
    jobs = {"audio": inputs, "text": {"input_ids": TEXT_IDS}}
    with torch.no_grad():
        expected = {name: model(**job).logits for name, job in jobs.items()}
    different: list[str] = []

    def run(name: str) -> None:
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(model(**jobs[name]).logits, expected[name]):
                    different.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("audio", "text", "audio")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert different == []


@torch.no_grad()
@pytest.mark.parametrize("scope", SCOPES)
def test_saving_and_loading_keeps_the_lora_and_its_scope(
    scope: str, models: dict[str, ReLLMForConditionalGeneration], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    models[scope].save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded, info = ReLLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(**inputs).logits, models[scope](**inputs).logits)
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad and "lora_" in name]
    assert len(trained) == 2 * 2 * 7


# --- merging and PEFT's contract -------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("scope", ["audio", "text"])
def test_merging_a_partial_scope_is_refused_with_the_reason(scope: str, safe: bool) -> None:
    model = tiny_model(layers=2, lora_scope=scope)
    for layer in lora_layers(model):
        before = layer.get_base_layer().weight.clone()
        with pytest.raises(ValueError, match=f"scope '{scope}' cannot be merged.*some positions"):
            layer.merge(safe_merge=safe, adapter_names=[ADAPTER_NAME])
        assert torch.equal(layer.get_base_layer().weight, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
def test_merging_the_global_scope_keeps_the_answers_and_can_be_undone(
    family: str, safe: bool, inputs: dict[str, Tensor]
) -> None:
    model = tiny_model(layers=2, text=family, lora_scope="global")
    expected = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    for layer in lora_layers(model):
        layer.merge(safe_merge=safe, adapter_names=[ADAPTER_NAME])
    with count_lora_calls(model) as calls:
        torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], rtol=1e-4, atol=3e-5)
    assert calls == []
    for layer in lora_layers(model):
        layer.unmerge()
    torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], rtol=1e-4, atol=3e-5)
