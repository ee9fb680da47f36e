"""What a model says, writes, learns and saves on a card (`make test-gpu`), against float32 on this machine's CPU.

`make test` runs the same on the CPU, which so stands in for the card. `TOLERANCES` are shares of the spread of what is
compared: a card multiplies float32's convolutions in TF32, and bfloat16 has eight bits.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from tiny_models import LORA, clip, conversation_inputs, fill_lora, tiny_config, tiny_model, tiny_processor, user_turn
from torch import Tensor
from trainers import make_rows, make_trainer, step_of
from transformers import AutoModel

from relllm import ReLLMForConditionalGeneration

DEVICE = torch.device(os.environ["RELLM_TEST_DEVICE"])
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.15}

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")]
each_precision = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def differ(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double()).square().mean().sqrt() / expected.double().std())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 with its processor; its LoRA acts."""
    folder = tmp_path_factory.mktemp("card")
    model = tiny_model(tiny_config(lora=LORA))
    fill_lora(model)
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


def batch_of(model: ReLLMForConditionalGeneration, full_window: bool = True) -> dict[str, Tensor]:
    turns = [[user_turn("A ", clip(0.5))], [user_turn(clip(1.7), "x", clip(1.0))]]
    return dict(conversation_inputs(tiny_processor(model.config, full_window=full_window), turns))


def on_card(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@each_precision
@pytest.mark.parametrize("full_window", [True, False])
def test_it_says_what_it_says_on_a_cpu(saved: Path, dtype: torch.dtype, full_window: bool) -> None:
    expected_by = AutoModel.from_pretrained(saved).eval()
    batch = batch_of(expected_by, full_window)
    model = AutoModel.from_pretrained(saved, dtype=dtype).to(DEVICE).eval()
    with torch.no_grad():
        expected, found = expected_by(**batch), model(**on_card(batch))
    valid = batch["attention_mask"].bool()
    assert differ(found.logits.cpu()[valid], expected.logits[valid]) < TOLERANCES[dtype]
    for name in ("emotion_logits", "dimensions", "emotion_embedding"):
        assert differ(found[name], expected[name]) < TOLERANCES[dtype], name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_it_writes_what_it_writes_on_a_cpu(saved: Path, options: dict) -> None:
    expected_by = AutoModel.from_pretrained(saved).eval()
    batch = batch_of(expected_by)
    model = AutoModel.from_pretrained(saved).to(DEVICE).eval()
    asked = {"max_new_tokens": 6, "do_sample": False, **options}
    assert torch.equal(model.generate(**on_card(batch), **asked).cpu(), expected_by.generate(**batch, **asked))


@each_precision
def test_it_learns_what_it_learns_on_a_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    """The gradient of an update of eight rows, from towers in that precision; what trains is in float32."""
    rows, steps = make_rows(tmp_path), []
    for here in (True, False):
        model = tiny_model(tiny_config(lora=LORA | {"lora_dropout": 0.0}))
        fill_lora(model)
        if not here:
            for part in (model.model.audio_tower, model.model.emotion_tower, model.model.text_model):
                frozen = [parameter for parameter in part.parameters() if not parameter.requires_grad]
                for parameter in frozen:
                    parameter.data = parameter.data.to(dtype)
        settings = {"use_cpu": here or DEVICE.type == "cpu", "bf16": not here and dtype == torch.bfloat16}
        trainer = make_trainer(rows, tmp_path / "run", tiny_processor(model.config), model, **settings)
        steps.append(step_of(trainer))
    for name in ("multi_modal_projector.fc1.weight", "emotion_head.weight", "dimension_head.weight"):
        expected, found = (step[f"model.{name}"].cpu().flatten() for step in steps)
        assert torch.cosine_similarity(found, expected, dim=0) > 1 - TOLERANCES[dtype], name


def test_what_is_saved_on_a_card_is_loaded_on_a_cpu(saved: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(saved).to(DEVICE)
    model.save_pretrained(tmp_path)
    expected, found = AutoModel.from_pretrained(saved).state_dict(), AutoModel.from_pretrained(tmp_path).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_wrong_number_of_placeholders_is_an_error_that_a_process_survives(saved: Path) -> None:
    model = AutoModel.from_pretrained(saved).to(DEVICE).eval()
    batch = on_card(batch_of(model))
    wrong = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) == 9, 5)}
    for call in (model, functools.partial(model.generate, max_new_tokens=1)):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"text has \d+ audio placeholder .* makes \d+ positions"),
        ):
            call(**wrong)
    assert model(**batch).logits.isfinite().all()
