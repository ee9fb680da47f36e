"""PEFT on top of a ReLLM: its own LoRA is a part of the model below, whatever PEFT does to the adapter above."""

import os
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from light_checkpoints import build, save_towers, trained_names
from packaging.version import Version
from tiny_models import clip, conversation_inputs, tiny_model, tiny_processor, user_turn
from torch import Tensor, nn
from transformers import AutoModel
from transformers.integrations.peft import MIN_PEFT_VERSION

from relllm import ReLLMForConditionalGeneration
from relllm.modeling.lora_relllm import ADAPTER_NAME, ScopedLinear, has_adapters
from relllm.training.freezing import prepare_trainable

# PEFT, on a model that has a LoRA already, or gets a second adapter
pytestmark = [
    pytest.mark.skipif(
        Version(peft.__version__) < Version(MIN_PEFT_VERSION),
        reason=f"the adapters of this Transformers ask for PEFT {MIN_PEFT_VERSION}",
    ),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def folder(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ReLLM on disk whose LoRA acts."""
    folder = tmp_path_factory.mktemp("re-llm")
    build(towers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    conversations = [[user_turn("Listen: ", clip(0.5), " and ", clip(0.7, seed=1))], [user_turn(clip(0.9, seed=2))]]
    return dict(conversation_inputs(tiny_processor(), conversations))


def load(folder: Path) -> ReLLMForConditionalGeneration:
    return AutoModel.from_pretrained(folder)


def settings(**changes: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": r".*text_model.*\.(q_proj|v_proj)", **changes})


def fill(model: nn.Module, name: str = "default") -> None:
    """Give the adapter on top values that are seen."""
    generator = torch.Generator().manual_seed(5)
    for key, parameter in model.named_parameters():
        if f".lora_B.{name}." in key:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.fixture(scope="module")
def below(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the plain ReLLM."""
    return logits(load(folder), inputs)


@pytest.fixture(scope="module")
def both(folder: Path, inputs: dict[str, Tensor], below: Tensor) -> Tensor:
    """Logits of the sum, written out: each product of the adapter added by a hook around our layer."""
    model, source = load(folder), load(folder)
    source.add_adapter(settings())
    fill(source)
    state = source.state_dict()
    for name, layer in model.named_modules():
        if f"{name}.lora_B.default.weight" in state:
            product = 4.0 * state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
            layer.register_forward_hook(lambda _, args, result, product=product: result + args[0] @ product.T)
    expected = logits(model, inputs)
    assert (expected - below).abs().max() > 0.5
    torch.save({"lora": {k: v for k, v in state.items() if ".default." in k}}, folder / "adapter.pt")
    return expected


def give(folder: Path, model: nn.Module) -> nn.Module:
    """Give a model on top of which there is an adapter the values of [`both`]'s."""
    prefix = "base_model.model." if isinstance(model, peft.PeftModel) else ""
    values = torch.load(folder / "adapter.pt")["lora"]
    assert not model.load_state_dict({prefix + k: v for k, v in values.items()}, strict=False).unexpected_keys
    return model


def with_peft(folder: Path) -> peft.PeftModel:
    return give(folder, peft.get_peft_model(load(folder), settings()))


def with_add_adapter(folder: Path) -> ReLLMForConditionalGeneration:
    model = load(folder)
    model.add_adapter(settings())
    return give(folder, model)


WAYS = pytest.mark.parametrize("put", [with_peft, with_add_adapter], ids=["get_peft_model", "add_adapter"])


# --- ours acts as a part of the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [r".*text_model.*\.(q_proj|v_proj)", "all-linear", ["q_proj", "fc1"]])
def test_a_fresh_adapter_on_top_changes_nothing(targets: object, folder: Path, inputs, below: Tensor) -> None:
    wrapped = peft.get_peft_model(load(folder), settings(target_modules=targets))
    torch.testing.assert_close(logits(wrapped, inputs), below, rtol=0, atol=0)
    model = load(folder)
    model.add_adapter(settings(target_modules=targets))
    torch.testing.assert_close(logits(model, inputs), below, rtol=0, atol=0)


@WAYS
def test_an_adapter_on_top_is_added_to_ours(put: Callable, folder: Path, inputs, below, both) -> None:
    torch.testing.assert_close(logits(put(folder), inputs), both, **CLOSE)


def test_a_reloaded_adapter_acts_on_top_of_ours(folder: Path, inputs, both, tmp_path: Path) -> None:
    with_peft(folder).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    torch.testing.assert_close(logits(again, inputs), both, **CLOSE)
    model = load(folder)
    model.load_adapter(tmp_path)
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)


@WAYS
def test_disabling_the_adapter_leaves_the_plain_model(put: Callable, folder: Path, inputs, below, both) -> None:
    model = put(folder)
    if isinstance(model, peft.PeftModel):
        with model.disable_adapter():
            assert torch.equal(logits(model, inputs), below)
    else:
        model.disable_adapters()
        assert torch.equal(logits(model, inputs), below)
        model.enable_adapters()
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)


def test_set_adapter_chooses_among_the_others(folder: Path, inputs, below, both) -> None:
    model = with_add_adapter(folder)
    model.add_adapter(settings(target_modules=r".*text_model.*\.up_proj"), "second")
    assert torch.equal(logits(model, inputs), below)  # the new one is active, alone and zero
    model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, inputs), both, **CLOSE)
    wrapped = with_peft(folder)
    for names in ("default", ["default", ADAPTER_NAME]):  # ours by name too, as was needed before
        wrapped.base_model.set_adapter(names)
        torch.testing.assert_close(logits(wrapped, inputs), both, **CLOSE)


@pytest.mark.filterwarnings("ignore:Adapter default was active:UserWarning")
def test_a_deleted_adapter_leaves_the_plain_model_and_ours_cannot_be_deleted(
    folder: Path, inputs, below, both
) -> None:
    model = with_add_adapter(folder)
    with pytest.raises(ValueError, match="relllm"):
        model.delete_adapter(ADAPTER_NAME)
    trained = trained_names(load(folder))
    assert not trained <= trained_names(model)  # Transformers has frozen our LoRA
    model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), below) and not has_adapters(model)
    assert trained_names(model) == trained
    layer = next(layer for layer in model.modules() if isinstance(layer, ScopedLinear))
    with pytest.raises(ValueError, match="a part of it, which cannot be deleted"):
        layer.delete_adapter(ADAPTER_NAME)


def test_an_adapter_of_our_name_is_refused_and_replaces_nothing(folder: Path, inputs, below) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match="the name of the model's own LoRA. Give your adapter another"):
        model.add_adapter(settings(), ADAPTER_NAME)
    assert torch.equal(logits(model, inputs), below)
    with pytest.raises(ValueError, match="the name of the model's own LoRA"):
        peft.get_peft_model(load(folder), settings(), adapter_name=ADAPTER_NAME)


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
def test_merging_merges_the_adapter_and_keeps_ours(safe: bool, folder: Path, inputs, below, both, tmp_path) -> None:
    merged = with_peft(folder).merge_and_unload(safe_merge=safe)
    assert type(merged) is ReLLMForConditionalGeneration and not has_adapters(merged)
    torch.testing.assert_close(logits(merged, inputs), both, **CLOSE)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), inputs), logits(merged, inputs))
    assert torch.equal(logits(with_peft(folder).unload(), inputs), below)


def test_a_merge_for_a_while_is_undone_and_not_saved(folder: Path, inputs, below, both, tmp_path: Path) -> None:
    wrapped = with_peft(folder)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped, inputs), both, **CLOSE)
    with pytest.raises(ValueError, match=r"\['default'\] are merged .*unmerge_adapter"):
        wrapped.base_model.model.save_pretrained(tmp_path)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped, inputs), both, **CLOSE)


@torch.no_grad()
def test_generate_works_through_an_adapter_on_top(folder: Path, inputs) -> None:
    expected = load(folder).generate(**inputs, **GREEDY)
    assert torch.equal(peft.get_peft_model(load(folder), settings()).generate(**inputs, **GREEDY), expected)


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("kind", [None, "all-linear", "modules_to_save"])
def test_the_model_is_saved_without_the_adapter_which_is_saved_beside_it(
    put: Callable, light: bool, kind: str | None, towers: Path, folder: Path, inputs, below, both, tmp_path: Path
) -> None:
    if kind is None:
        model = put(folder)
    else:  # layers of the towers as well, which get PEFT's names
        options = {"target_modules": "all-linear"} if kind == "all-linear" else {"modules_to_save": ["emotion_head"]}
        model = load(folder)
        if put is with_peft:
            model = peft.get_peft_model(model, settings(**options))
        else:
            model.add_adapter(settings(**options))
        fill(model)
    expected = logits(model, inputs)
    inner = model.base_model.model if put is with_peft else model
    inner.save_pretrained(tmp_path, light=light)
    assert os.path.exists(tmp_path / "default" / "adapter_config.json")
    assert not os.path.exists(tmp_path / "adapter_config.json")
    assert torch.equal(logits(load(tmp_path), inputs), below)
    again = peft.PeftModel.from_pretrained(load(tmp_path), tmp_path / "default")
    torch.testing.assert_close(logits(again, inputs), expected, **CLOSE)
    assert torch.equal(logits(model, inputs), expected)  # it is left as it was


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoraConfig(r=2, target_modules=r".*text_model.*\.q_proj", use_dora=True),
    ],
    ids=["loha", "ia3", "dora"],
)
def test_another_kind_of_adapter_acts_on_top_of_ours(config, folder: Path, inputs, below, tmp_path: Path) -> None:
    model = load(folder)
    wrapped = peft.get_peft_model(model, config)
    torch.testing.assert_close(logits(wrapped, inputs), below, **CLOSE)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped, inputs), below, **CLOSE)
    model.save_pretrained(tmp_path / "below")
    assert torch.equal(logits(load(tmp_path / "below"), inputs), below)
    if isinstance(config, peft.LoraConfig):
        torch.testing.assert_close(logits(wrapped.merge_and_unload(), inputs), below, **CLOSE)
        return
    with pytest.raises(ValueError, match=r"cannot be merged: .* Nothing was changed"):
        wrapped.merge_and_unload()
    torch.testing.assert_close(logits(wrapped, inputs), below, **CLOSE)
    assert torch.equal(logits(wrapped.unload(), inputs), below)  # PEFT alone would have taken ours off with it
    assert not hasattr(model, "peft_config")


# --- training --------------------------------------------------------------------------------------------------------


def test_an_adapter_on_top_trains_and_ours_does_not(folder: Path, inputs) -> None:
    wrapped = peft.get_peft_model(load(folder), settings()).train()
    ours = {name: p.detach().clone() for name, p in wrapped.named_parameters() if ".relllm." in name}
    for name, parameter in wrapped.named_parameters():  # PEFT leaves the projector and the heads as they were
        parameter.requires_grad_(".default." in name)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert ours and all(torch.equal(p, ours[name]) for name, p in wrapped.named_parameters() if name in ours)
    assert all(parameter.any() for name, parameter in wrapped.named_parameters() if ".lora_B.default" in name)


def test_disabling_the_adapter_leaves_what_trains_of_ours(folder: Path) -> None:
    wrapped = with_peft(folder)

    def ours_trains() -> set[bool]:
        return {parameter.requires_grad for name, parameter in wrapped.named_parameters() if ".relllm." in name}

    assert ours_trains() == {True}  # PEFT leaves what trained before
    with wrapped.disable_adapter():
        assert ours_trains() == {True}
    assert ours_trains() == {True}
    wrapped.set_adapter("default")
    assert ours_trains() == {False}


def test_our_trainer_refuses_a_model_with_an_adapter_on_top() -> None:
    model = tiny_model()
    model.add_adapter(settings())
    with pytest.raises(ValueError, match="trains the model below it.*unload"):
        prepare_trainable(model)
