"""Projected positions in the sequence: where they come to stand, what is refused, and that no device is waited for."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placed_tensors import several_devices, spread
from tiny_models import clip, conversation_inputs, tiny_config, tiny_model, tiny_processor, user_turn
from torch import Tensor
from transformers import masking_utils

from relllm import ReLLMSFTConfig
from relllm.modeling.projector_relllm import place_positions
from relllm.training.collator import ReLLMCollator
from relllm.training.objective import TARGETS, Objective

D = 3


def place_by_loop(embeds: Tensor, mask: Tensor, windows: list[Tensor]) -> Tensor:
    """Position after position into placeholder after placeholder."""
    expected, queue = embeds.clone(), [row for window in windows for row in window]
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            if mask[row, column]:
                expected[row, column] = queue.pop(0)
    assert not queue
    return expected


def random_case(lengths: list[int], rows: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    windows = [torch.randn(length, D, generator=generator) for length in lengths]
    width = sum(lengths) + 4
    order = torch.randperm(rows * width, generator=generator)[: sum(lengths)]
    mask = torch.zeros(rows * width, dtype=torch.bool).index_fill(0, order, True).view(rows, width)
    return torch.randn(rows, width, D, generator=generator), mask, windows


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 6), max_size=5), rows=st.integers(1, 3), seed=st.integers(0, 999))
def test_positions_stand_where_a_loop_would_put_them(lengths: list[int], rows: int, seed: int) -> None:
    embeds, mask, windows = random_case(lengths, rows, seed)
    expected = place_by_loop(embeds, mask, windows)
    packed = torch.cat([*windows, torch.zeros(0, D)])
    assert torch.equal(place_positions(embeds, mask, packed), expected)
    if windows:
        padded = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=float("nan"))
        assert torch.equal(place_positions(embeds, mask, padded, torch.tensor(lengths)), expected)


def test_gradients_reach_the_positions_and_the_text_and_nothing_that_is_padding() -> None:
    embeds, mask, windows = random_case([2, 5, 1], 2, seed=1)
    leaves = [window.requires_grad_() for window in windows]
    weight = torch.randn_like(embeds)
    expected = torch.autograd.grad((place_by_loop(embeds, mask, leaves) * weight).sum(), leaves)
    padded = torch.nn.utils.rnn.pad_sequence([leaf.detach() for leaf in leaves], batch_first=True).requires_grad_()
    text = embeds.clone().requires_grad_()
    (place_positions(text, mask, padded, torch.tensor([2, 5, 1])) * weight).sum().backward()
    for gradient, window in zip(expected, padded.grad, strict=True):
        assert torch.equal(window[: len(gradient)], gradient) and not window[len(gradient) :].any()
    assert torch.equal(text.grad, weight * ~mask[..., None])


@pytest.mark.parametrize(("placeholders", "positions"), [(3, 2), (2, 3), (0, 1), (1, 0)])
def test_unequal_numbers_are_refused_with_both(placeholders: int, positions: int) -> None:
    mask = torch.arange(5)[None] < placeholders
    with pytest.raises(ValueError, match=f"{placeholders} audio placeholder tokens .* makes {positions} positions"):
        place_positions(torch.zeros(1, 5, D), mask, torch.ones(positions, D))
    if positions:
        with pytest.raises(
            ValueError, match=f"{placeholders} audio placeholder tokens .* makes {positions} positions"
        ):
            place_positions(torch.zeros(1, 5, D), mask, torch.ones(1, 4, D), torch.tensor([positions]))


@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
def test_projecting_placing_and_the_llm_never_ask_a_device_for_a_value(fusion: str) -> None:
    """On the device "meta", which has shapes and no values, each such question is an error; forward and backward.

    Without an attention mask, of which Transformers itself asks whether it is all ones.
    """
    config = tiny_config(layers=2, fusion=fusion)
    model = tiny_model(config)
    batch = conversation_inputs(tiny_processor(config), [[user_turn("A ", clip(0.5))], [user_turn(clip(2.7))]])
    audio = {name: value for name, value in batch.items() if name.startswith("input_") and name != "input_ids"}
    towers = model.model.run_towers(**audio)
    with pytest.raises(RuntimeError, match="meta"):  # the check can fail
        torch.ones(2, device="meta").nonzero()
    on_meta = {name: batch[name].to("meta") for name in ("input_ids", "audio_num_windows")}
    towers = type(towers)(**{name: value.to("meta") for name, value in towers.items()})
    model.to("meta").train()
    output = model(**on_meta, tower_outputs=towers, labels=on_meta["input_ids"])
    (output.loss + output.emotion_logits.sum() + output.dimensions.sum()).backward()
    trained = [parameter for parameter in model.model.multi_modal_projector.parameters()]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("scope", ["audio", "text"])
@pytest.mark.parametrize("full_window", [True, False])
def test_towers_never_ask_a_device_for_a_value_either(
    full_window: bool, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a collator's batch to the losses, with clips of unlike length, in training and in its evaluation.

    But for what Transformers itself asks of a mask, whether it is all ones: of the emotion tower's and the LLM's.
    """
    config = tiny_config(layers=2, lora_scope=scope, projector_layers=1)
    asked: list[str] = []
    for kind in ("bidirectional", "causal"):
        name = f"_ignore_{kind}_mask_sdpa"
        monkeypatch.setattr(masking_utils, name, lambda *_, kind=kind: bool(asked.append(kind)))
    model, processor = tiny_model(config), tiny_processor(config, full_window=full_window)
    rows = [{"audio": clip(seconds), "response": "I see.", "emotion": "sad"} for seconds in (0.5, 1.7)]
    batch = ReLLMCollator(processor, config.emotion_labels)(rows)
    targets = {name: batch.pop(name) for name in TARGETS if name in batch}
    with torch.no_grad():
        expected = model(**batch)
    args = ReLLMSFTConfig("unused", use_cpu=True, report_to="none", response_kl_weight=0)
    objective = Objective(args, model)
    targets, batch = ({name: value.to("meta") for name, value in one.items()} for one in (targets, batch))
    counts = objective.count(batch | targets)
    asked.clear()
    output = model.to("meta").train()(**batch)
    assert sorted(asked) == ["bidirectional", "causal"]
    assert output.audio_hidden_states.shape == expected.audio_hidden_states.shape
    (output.loss + sum(term.value for term in objective.terms(output, targets, counts, counts))).backward()
    with torch.no_grad():
        model.eval()(**batch)


@pytest.mark.parametrize("training", [False, True])
def test_an_accelerator_counts_before_a_tower_runs_and_asserts_in_training(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On "meta:0", which is a CPU under another name. In training the collator has counted."""
    config = tiny_config(layers=2)
    batch = conversation_inputs(tiny_processor(config), [[user_turn("A ", clip(0.5))], [user_turn(clip(1.7))]])
    batch["input_ids"][0, (batch["input_ids"][0] == config.audio_token_id).nonzero()[0]] = 5
    count = int((batch["input_ids"] == config.audio_token_id).sum())
    asked: list[Tensor] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asked.append(condition))
    with several_devices(), torch.set_grad_enabled(training):
        model = spread(tiny_model(config), {"": "meta:0"})
        inputs = {name: value.to("meta:0") for name, value in batch.items()}
        if training:
            model(**inputs)
            assert len(asked) == 1 and not asked[0]
            return
        monkeypatch.setattr(type(model.model), "run_towers", None)
        for call in (model, functools.partial(model.generate, max_new_tokens=1)):
            with pytest.raises(ValueError, match=f"{count} audio placeholder tokens .* makes {count + 1} positions"):
                call(**inputs)
