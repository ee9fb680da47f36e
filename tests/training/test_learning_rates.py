"""Learning rates of the projector and the heads beside the LoRA's: what moves how far, what is logged and resumed."""

import re
from pathlib import Path

import pytest
import torch
from light_checkpoints import save_towers
from light_runs import checkpoint, new_model
from light_runs import make_trainer as make_light_trainer
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import tiny_processor
from trainers import make_rows, make_trainer, step_of

from relllm import ReLLMSFTConfig
from relllm.training.freezing import draw_table, trainable_table

RATES = {"projector_learning_rate": 0.25, "heads_learning_rate": 3.0}
RATE_OF = {"multi_modal_projector": 0.25, "emotion_head": 3.0, "dimension_head": 3.0}


def rate_of(name: str) -> float:
    return next((rate for part, rate in RATE_OF.items() if part in name), 1.0)


def test_each_part_moves_by_its_own_rate_times_the_gradient(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    gradient = step_of(make_trainer(rows, tmp_path / "a", tiny_processor()))
    step = step_of(make_trainer(rows, tmp_path / "b", tiny_processor(), **RATES))
    assert gradient.keys() == step.keys() and {rate_of(name) for name in step} == {0.25, 1.0, 3.0}
    for name, one in gradient.items():
        torch.testing.assert_close(step[name], rate_of(name) * one, rtol=1e-3, atol=1e-6, msg=name)


def test_weight_decay_is_transformers_in_every_group(tmp_path: Path) -> None:
    settings = {"weight_decay": 0.3, "optim": "adamw_torch"}
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "a", tiny_processor(), **settings, **RATES)
    groups = trainer.create_optimizer().param_groups
    found = {id(weight): (group["lr"], group["weight_decay"]) for group in groups for weight in group["params"]}
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert found == {id(w): (rate_of(name), 0.3 if name in decayed else 0.0) for name, w in trained.items()}
    assert groups[0]["lr"] == 1.0 and sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.slow
def test_they_are_logged_warmed_up_and_resumed_to_the_bit(tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    settings = {"projector_learning_rate": 4e-2, "heads_learning_rate": 1e-3, "logging_steps": 1}
    trainer = make_light_trainer(tmp_path, new_model(towers), **settings)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logs][:3] == pytest.approx([0, 5e-3, 1e-2])
    for entry in logs:
        assert entry["projector_learning_rate"] == pytest.approx(4 * entry["learning_rate"])
        assert entry["heads_learning_rate"] == pytest.approx(0.1 * entry["learning_rate"])
    end = load_file(checkpoint(tmp_path, 6) / "model.safetensors")
    again = make_light_trainer(tmp_path, new_model(towers, seed=7), **settings)
    again.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    assert all(torch.equal(again.model.get_parameter(name), weight) for name, weight in end.items())


def test_the_table_of_what_trains_says_them(tmp_path: Path) -> None:
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "a", tiny_processor(), dimension_loss_weight=0, **RATES)
    console = Console(width=120)
    with console.capture() as printed:
        console.print(draw_table(trainable_table(trainer.model), trainer.args))
    said = {(cells := re.split(r"\s*│\s*", line.strip("│ ")))[0]: cells for line in printed.get().split("\n")}
    rates = {part: said[part][3] for part in ("lora", "multi_modal_projector", "emotion_head", "dimension_head")}
    assert rates == {"lora": "1", "multi_modal_projector": "0.25", "emotion_head": "3", "dimension_head": "-"}


def test_a_rate_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no head trains"):
        ReLLMSFTConfig(heads_learning_rate=1e-3, emotion_loss_weight=0, dimension_loss_weight=0)
    with pytest.raises(ValueError, match="projector_learning_rate must be at least 0, got -1"):
        ReLLMSFTConfig(projector_learning_rate=-1)
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "a", tiny_processor(), **RATES)
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # as in `optimizers=`
    with pytest.raises(ValueError, match=r"this optimizer \(SGD\) divides the weights otherwise"):
        trainer.create_optimizer()
