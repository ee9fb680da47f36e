"""Models spread over several devices, or offloaded: what they say is what they say on one, to the bit.

The cards are those of `placed_tensors`; offload is Accelerate's own, from checkpoints on disk.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from light_checkpoints import build, save_towers
from placed_tensors import CARD, four_layers, several_devices, spread
from tiny_models import (
    clip,
    conversation_inputs,
    tiny_model,
    tiny_processor,
    user_turn,
)
from torch import Tensor
from transformers.integrations.accelerate import infer_auto_device_map

from relllm import ReLLMConfig, ReLLMForConditionalGeneration
from relllm.inference.conversation import Conversation

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # WavLM's masks

READINGS = ("logits", "emotion_logits", "dimensions", "audio_hidden_states", "emotion_embedding", "tower_dimensions")


def placements(model: ReLLMForConditionalGeneration, cards: int) -> list[dict[str, str]]:
    """The different maps that Transformers makes for cards of several sizes; the last card takes the rest."""
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    maps: list[dict[str, str]] = []
    for share in (0.25, 0.3, 0.4, 0.5, 0.7):
        memory = {card: int(whole * share) for card in range(cards - 1)} | {cards - 1: 10 * whole, "cpu": 0}
        found = infer_auto_device_map(model, memory, model._no_split_modules)
        named = {name: f"meta:{card}" for name, card in found.items()}
        if len(set(named.values())) > 1 and named not in maps:
            maps.append(named)
    assert maps
    return maps


def batch_of(config: ReLLMConfig, full_window: bool) -> dict[str, Tensor]:
    """Two rows of unlike length, one with two clips; clips of unlike length, so that the towers group them."""
    turns = [[user_turn("A ", clip(0.5))], [user_turn(clip(1.7), "x", clip(1.0))]]
    return dict(conversation_inputs(tiny_processor(config, full_window=full_window), turns))


def answers(model: ReLLMForConditionalGeneration, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model makes of a batch, and where that lies is the batch's device."""
    with torch.no_grad():
        output = model(**batch, labels=batch["input_ids"])
    found = {name: output[name] for name in (*READINGS, "loss") if output.get(name) is not None}
    assert {value.device for value in found.values()} == {batch["input_ids"].device}
    found["reply"] = model.generate(**batch, max_new_tokens=2, do_sample=False)
    return {name: value.to("cpu") for name, value in found.items()}


def gradients(model: ReLLMForConditionalGeneration, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    output = model.train()(**batch, labels=batch["input_ids"])
    (output.loss + output.emotion_logits.sum() + output.dimensions.sum()).backward()
    return {name: weight.grad.to("cpu") for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("full_window", [True, False])
@pytest.mark.parametrize("cards", [2, 4, 8])
def test_a_model_spread_by_transformers_answers_and_learns_as_on_one_card(
    tmp_path: Path, cards: int, full_window: bool
) -> None:
    tiny_model(four_layers()).save_pretrained(tmp_path)
    model = ReLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    with several_devices():
        batch = {name: value.to(CARD) for name, value in batch_of(model.config, full_window).items()}
        one = spread(model, {"": CARD})
        expected, learnt = answers(one, batch), gradients(one, batch)
        assert learnt
        for places in placements(model, cards):
            several = spread(model, places)
            assert_equal(answers(several, batch), expected)
            assert_equal(gradients(several, batch), learnt)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"fusion": "token", "projector_layers": 1, "lora_scope": "text"},
        {"fusion": "none", "lora_scope": "global"},
        {"audio": "wav2vec2", "text": "gemma", "tied": True},
        {"audio": "wavlm", "text": "gpt2", "emotion": "hubert"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_each_kind_of_tower_fusion_and_scope_may_be_spread(options: dict) -> None:
    config = four_layers(**options)
    model = tiny_model(config)
    with several_devices():
        batch = {name: value.to(CARD) for name, value in batch_of(config, False).items()}
        expected = answers(spread(model, {"": CARD}), batch)
        assert_equal(answers(spread(model, placements(model, 4)[0]), batch), expected)


@pytest.mark.slow
def test_beams_and_a_conversation_run_on_a_spread_model() -> None:
    config = four_layers()
    model, processor = tiny_model(config), tiny_processor(config)
    said: list[tuple] = []
    with several_devices():
        batch = {name: value.to(CARD) for name, value in batch_of(config, False).items()}
        for places in ({"": CARD}, placements(model, 4)[0]):
            placed = spread(model, places)
            beams = placed.generate(**batch, num_beams=2, num_return_sequences=2, max_new_tokens=2, do_sample=False)
            conversation = Conversation(placed, processor)
            turns = [conversation.say(clip(0.4, seed=seed), max_new_tokens=3) for seed in range(2)]
            said.append((beams.tolist(), turns))
    assert said[0] == said[1]


@pytest.mark.parametrize("audio", ["whisper", "wav2vec2", "hubert", "wavlm"])
def test_a_tower_is_never_cut_by_an_inferred_map(audio: str) -> None:
    model = tiny_model(four_layers(audio=audio))
    for cards in (2, 4, 8):
        for places in placements(model, cards):
            whole = ("model.audio_tower", "model.emotion_tower", "model.multi_modal_projector")
            assert set(whole) <= places.keys()


def offload(folder: Path, how: str, out: Path) -> ReLLMForConditionalGeneration:
    load, cpu = ReLLMForConditionalGeneration.from_pretrained, torch.device("cpu")
    if how == "cpu_offload":
        return cpu_offload(load(folder), execution_device=cpu).eval()
    if how == "disk_offload":
        return disk_offload(load(folder), out, execution_device=cpu).eval()
    parts = ["audio_tower", "emotion_tower", "multi_modal_projector", "emotion_head", "dimension_head", "text_model"]
    on_disk = how.split("+")
    places = {f"model.{part}": "disk" if part in on_disk else "cpu" for part in parts}
    return load(folder, device_map=places, offload_folder=out).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speech", "full_window"), [("whisper", True), ("whisper", False), ("wav2vec2", False), ("wavlm", False)]
)
def test_an_offloaded_model_from_disk_differs_by_nothing(tmp_path: Path, speech: str, full_window: bool) -> None:
    model = build(save_towers(tmp_path, speech=speech)).eval()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    batch = batch_of(model.config, full_window)
    expected = answers(model, batch)
    cases = [("full", how) for how in ("audio_tower", "cpu_offload", "disk_offload")]
    for kind, how in [*cases, ("light", "audio_tower+multi_modal_projector+emotion_head")]:
        offloaded = offload(tmp_path / kind, how, tmp_path / f"{kind}-{how}")
        assert any(weight.device.type == "meta" for weight in offloaded.parameters())
        assert offloaded.device == torch.device("cpu")  # and not "meta", where inputs would lose their values
        assert_equal(answers(offloaded, batch), expected)
    with pytest.raises(ValueError, match="offloaded model cannot be saved light"):
        offloaded.save_pretrained(tmp_path / "again", light=True)


@pytest.mark.parametrize("part", ["model", "emotion tower"])
def test_data_parallel_is_refused_with_what_to_run_instead(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model = tiny_model()
    copies = importlib.import_module("torch.nn.parallel.replicate")  # in torch.nn.parallel a function of that name
    monkeypatch.setattr(copies, "_broadcast_coalesced_reshape", lambda *_, **__: [[], []])  # which wants the cards
    with pytest.raises(ValueError, match="accelerate launch --num_processes"):
        copies.replicate(model if part == "model" else model.model.emotion_tower, [0, 1])
