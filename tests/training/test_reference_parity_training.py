"""Losses, gradients and optimiser steps against the original RE-LLM and BLSP-Emo code, from raw audio.

Forward passes: `test_reference_parity.py`.
"""

import re

import golden
import pytest
import torch
from golden import GRADIENT_RTOL, SCALARS, hear, recorded, relllm_model
from test_losses import kl_as_trained
from torch import Tensor

from relllm.modeling.lora_relllm import ADAPTER_NAME
from relllm.training.losses import dimension_loss, emotion_loss

FROZEN_BY_ORIGINAL = "model.emotion_head.weight"  # in its optimiser steps only; its gradient is recorded


def losses_of(model, batch: str) -> dict[str, Tensor]:
    """Every loss of the original, by its name there."""
    heard = hear(model, batch)
    speech, text = golden.speech_branch(model, batch, heard), golden.text_branch(model, batch)
    speech_logits = golden.run_llm(model, speech).logits
    with torch.no_grad():
        text_logits = golden.run_llm(model, text).logits
    emotions, dimensions = golden.emotion_targets(batch)
    logits = (speech_logits, text_logits)
    temperature = golden.CONFIG["kd_temperature"]
    return {
        "response_ce": model.loss_function(speech_logits, speech.labels, speech_logits.shape[-1]),
        "input_er": emotion_loss(heard[0].emotion_logits, emotions) / (emotions != -100).sum(),
        "input_er_avd": dimension_loss(heard[0].dimensions, dimensions) / dimensions.isfinite().sum(),
        "response_kl": kl_as_trained(*logits, speech.labels, text.labels, temperature=temperature, shifted=False),
    }


def assert_losses(model, batch: str, expected: dict[str, float]) -> None:
    """Single losses by name; sums are written `total[a,b]`, `sum[a,b]` or `name (a+b)`."""
    for name, value in expected.items():
        listed = re.search(r"[\[(](.*)[\])]", name)
        parts = re.split(r"[,+]", listed[1]) if listed else [name]

        def total(model, parts: list[str] = parts) -> Tensor:
            losses = losses_of(model, batch)
            return sum(losses[part] for part in parts)

        golden.assert_parity(total, model, torch.tensor(value))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("batch", ["b1", "b3"])
@torch.no_grad()
def test_every_loss_is_the_original_one(batch: str, lora: bool):
    expected = SCALARS[f"forward_{batch}_{'lora' if lora else 'nolora'}"]
    assert_losses(relllm_model(lora=lora), batch, expected)


@pytest.mark.parametrize("scope", ["text", "global"])
@torch.no_grad()
def test_losses_with_other_lora_scopes_are_the_original_ones(scope: str):
    assert_losses(relllm_model(scope=scope), "b3", SCALARS[f"scope_{scope}_b3"])


@torch.no_grad()
def test_losses_of_blsp_emo_are_the_original_ones():
    assert_losses(golden.blsp_emo_model(), "b3", SCALARS["blspemo_subsampler_b3_lora"])


@torch.no_grad()
def test_shifted_kl_compares_other_positions_than_the_original():
    """Ours compares, by default, the positions that predict the reply: another number on the same logits."""
    model = relllm_model()
    speech, text = golden.speech_branch(model, "b3", hear(model, "b3")), golden.text_branch(model, "b3")
    logits = golden.run_llm(model, speech).logits, golden.run_llm(model, text).logits
    original = kl_as_trained(*logits, speech.labels, text.labels, shifted=False)
    assert abs(kl_as_trained(*logits, speech.labels, text.labels) - original) > 1e-3 * original


def fresh_model():
    """As recorded, for one test alone, in train mode: the towers are frozen, every dropout is 0."""
    return golden.convert(golden.original_weights()).train()


def total_loss(model) -> Tensor:
    losses = losses_of(model, "b3")
    return losses["input_er"] + losses["response_ce"] + losses["input_er_avd"]


def test_gradients_are_the_original_ones():
    model = fresh_model()
    loss = total_loss(model)
    loss.backward()
    expected = SCALARS["grads_b3_lora"]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected["loss"]), rtol=1e-5, atol=0)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = golden.in_original_names(trained)
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(expected["grad_norm"], rel=GRADIENT_RTOL, abs=1e-7)
    assert torch.stack([g.norm() for g in gradients.values()]).norm().item() == pytest.approx(
        expected["global_grad_norm"], rel=GRADIENT_RTOL
    )
    for name, gradient in recorded("grads_b3_lora").items():
        assert (gradients[name] - gradient).norm() <= GRADIENT_RTOL * gradient.norm(), name


def share_lora_a(model) -> None:
    """One LoRA A for query, key and value of a layer, as the original's fused projection has it.

    Three copies start equal and stay a faithful model, but learn differently: the shared A moves by the sum of their
    gradients, and AdamW normalises that sum, not each part.
    """
    for layer in model.model.text_model.model.layers:
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            projection.lora_A[ADAPTER_NAME].weight = attention.q_proj.lora_A[ADAPTER_NAME].weight


def adamw_settings(setup: str) -> dict[str, float]:
    """The numbers in the description's sentence about the recorded optimiser."""
    number = r"([0-9.e-]+)"
    names = {"lr": "lr", "eps": "eps", "weight_decay": "weight decay", "clip": "clip"}
    found = {name: float(re.search(rf"{words} {number}", setup)[1].rstrip(".")) for name, words in names.items()}
    betas = re.search(rf"betas {number}/{number}", setup)
    return found | {"betas": (float(betas[1]), float(betas[2]))}


def test_adamw_steps_are_the_original_ones():
    recorded_steps = next(case for name, case in SCALARS.items() if name.startswith("adamw_"))
    settings, steps = adamw_settings(recorded_steps["setup"]), recorded_steps["steps"]
    model = fresh_model()
    share_lora_a(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and n != FROZEN_BY_ORIGINAL}
    plain = {name for name in parameters if name.endswith(".bias") or ".layer_norm." in name}
    groups = [
        {"params": [p for n, p in parameters.items() if n not in plain], "weight_decay": settings["weight_decay"]},
        {"params": [p for n, p in parameters.items() if n in plain], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    for step in steps[:-1]:
        loss = total_loss(model)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings["clip"])
        assert loss.item() == pytest.approx(step["loss"], rel=GRADIENT_RTOL)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=GRADIENT_RTOL)
        optimizer.step()
        optimizer.zero_grad()
    assert total_loss(model).item() == pytest.approx(steps[-1]["loss"], rel=GRADIENT_RTOL)
    after = golden.in_original_names({name: parameter.detach() for name, parameter in parameters.items()})
    for name, value in recorded("adamw_after5_b3_lora").items():
        golden.assert_close(after[name], value)
