"""`per_device_train_batch_size: auto`: the card's memory chooses how many rows go through at once, the recipe how many
an update has. The card is a fake one here, which runs out of memory as PyTorch says it.
"""

import dataclasses
import types
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from trainers import LORA, make_rows, make_trainer, step_of

from relllm import ReLLMSFTConfig
from relllm.training.planning import micro_batch
from relllm.training.planning.memory import RowSize, StepSettings, TrainingStep
from relllm.training.planning.micro_batch import MicroBatch, choose_micro_batch, list_micro_batches
from relllm.training.run import parse_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
AUTO = {"per_device_train_batch_size": "auto", "rows_per_update": 8, "gradient_checkpointing": "auto"}


@dataclasses.dataclass
class Card:
    """A step takes 1 GB a row, a quarter of it with checkpointing; `tried` are rows and checkpointing of each step."""

    memory: float = 100e9
    free: float = 100e9
    tried: list[tuple[int, bool]] = dataclasses.field(default_factory=list)
    tasks: list[int] = dataclasses.field(default_factory=list)  # of all rows, where there are several


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card, try_step = Card(), micro_batch.MicroBatchMixin._try_step

    def noted(self, batch: dict, checkpointing: bool) -> None:
        card.tried.append((len(batch["labels"]), checkpointing))
        card.tasks += batch["row_tasks"].tolist() if "row_tasks" in batch else []
        try_step(self, batch, checkpointing)

    def peak(device: torch.device, run) -> float:
        run()
        rows, checkpointing = card.tried[-1]
        taken = rows * (0.25e9 if checkpointing else 1e9)
        if taken > card.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return taken

    monkeypatch.setattr(micro_batch.MicroBatchMixin, "_try_step", noted)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: card.free)
    monkeypatch.setattr(micro_batch, "peak_bytes", peak)
    return card


@pytest.mark.parametrize(
    ("memory", "rows", "checkpointing", "tried"),
    [
        (8e9, 8, False, [(8, False)]),
        (4e9, 4, False, [(8, False), (4, False)]),  # 4 rows have 512 positions: checkpointing would gain nothing
        (3e9, 8, True, [(8, False), (4, False), (8, True)]),
        (0.3e9, 1, True, [(8, False), (4, False), (8, True), (4, True), (2, True), (1, True)]),
    ],
)
def test_what_runs_out_of_memory_is_halved_and_the_update_keeps_its_rows(
    tmp_path, processor, card, capsys, memory, rows, checkpointing, tried
):
    card.memory = memory
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, **AUTO)
    trainer.train()
    args = trainer.args
    assert card.tried == tried and trainer.state.global_step == 1
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (rows, 8 // rows)
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == rows
    assert trainer.model.base_model.text_model.is_gradient_checkpointing is checkpointing
    how = "with" if checkpointing else "without"
    assert f"8 rows an update: {rows} at once × {8 // rows} × 1 processes, {how} grad" in capsys.readouterr().out


def test_what_was_tried_leaves_no_trace_in_gradients_chance_and_log(tmp_path, processor, card):
    """Against 2 × 4 rows, in float64; the LoRA's dropout is off, because masks are drawn for each micro-batch."""
    rows, card.memory, steps, logs = make_rows(tmp_path), 4e9, [], []
    plain = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for settings in (plain, AUTO):
        trainer = make_trainer(rows, tmp_path / "run", processor, tiny_model(lora=LORA).double(), **settings)
        state = torch.get_rng_state()
        trainer.fit_micro_batch()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        steps.append(step_of(trainer))
        logs.append(trainer.state.log_history[0])
    for name, gradient in steps[0].items():
        assert (steps[1][name] - gradient).norm() <= 1e-12 * gradient.norm(), name
    for name in ("loss", "response_loss", "emotion_loss", "num_tokens"):
        assert float(logs[0][name]) == pytest.approx(float(logs[1][name])), name


def test_what_is_tried_is_the_longest_task_whatever_an_epoch_draws(tmp_path, processor, card):
    rows = [row for row in make_rows(tmp_path) if row["emotion"]]
    rows[0] |= {"response": None}
    tasks = {"recognition": 99, "transcription": 9, "reply": 1}
    make_trainer(rows, tmp_path / "run", processor, tasks=tasks, **AUTO).fit_micro_batch()
    assert set(card.tasks) == {1, 2} and card.tasks.count(1) == 1


def test_the_plan_says_what_is_not_tried_at_all(tmp_path, processor, card):
    step = TrainingStep(tiny_config(lora=LORA), StepSettings(torch.float32, bf16=False), RowSize(0.5, 60, 12))
    args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **AUTO)
    choices = list_micro_batches(args, 128)
    assert choices == [MicroBatch(8, False), MicroBatch(4, False), *(MicroBatch(size, True) for size in (8, 4, 2, 1))]
    step.settings = dataclasses.replace(step.settings, gradient_checkpointing=False)
    between = (step.memory(4).total + step.memory(8).total) / 2
    assert choose_micro_batch(choices, step, between) == [MicroBatch(4, False)]
    assert choose_micro_batch(choices, step, 1.0) == [MicroBatch(1, True)]  # whatever the plan says
    assert choose_micro_batch(choices, step, 1.0, lambda choice: False) == []


def test_rows_that_cannot_train_are_an_error_with_the_memory(tmp_path, processor, card):
    card.free = 0.1e9
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, **AUTO)
    with pytest.raises(RuntimeError, match=r"1 rows of \d+ positions do not train in the 0.1 GB"):
        trainer.train()


def test_on_a_cpu_it_is_the_papers_and_says_so(tmp_path, processor, capsys):
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, **AUTO)
    trainer.fit_micro_batch()
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (2, 4)
    said = "2 at once × 4 × 1 processes, with gradient checkpointing (nobody tells the memory of a cpu)."
    assert said in capsys.readouterr().out


def test_memory_is_what_the_device_says(monkeypatch):
    """Free on the card and free in what PyTorch has reserved there; the peak of a call is above what was there."""
    module = types.SimpleNamespace(
        mem_get_info=lambda device: (10, 100),
        memory_reserved=lambda device: 30,
        memory_allocated=lambda device: 25,
        reset_peak_memory_stats=lambda device: None,
        max_memory_allocated=lambda device: 40,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert micro_batch.free_bytes(torch.device("cuda", 0)) == 15
    assert micro_batch.peak_bytes(torch.device("cuda", 0), lambda: None) == 15
    assert micro_batch.free_bytes(torch.device("cpu")) is None


def settings_of(tmp_path: Path, *flags: str) -> ReLLMSFTConfig:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_device_train_batch_size: auto\ngradient_checkpointing: auto\nrows_per_update: 32\n")
    required = ["--data", "x", "--model_name_or_path", "y", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    return parse_arguments(["--config", str(recipe), "--report_to", "none", *required, *flags])[1]


def test_a_recipe_says_auto_and_a_flag_a_number(tmp_path, monkeypatch):
    args = settings_of(tmp_path)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 16)
    assert {"per_device_train_batch_size", "gradient_checkpointing"} <= args.automatic
    args = settings_of(tmp_path, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8")
    assert (args.per_device_train_batch_size, args.automatic) == (4, {"gradient_checkpointing"})
    monkeypatch.setenv("WORLD_SIZE", "4")  # of four processes each has its share
    args.per_device_train_batch_size, args.gradient_accumulation_steps = "auto", 8
    args._share_update()
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension_loss": "ccc"}, "ccc is of the rows that go through at once"),
        ({"gradient_accumulation_steps": 3}, "follows from rows_per_update"),
        ({"per_device_train_batch_size": 4}, r"rows_per_update is 8, and 4 × 8 × 1 processes are 32"),
    ],
)
def test_what_contradicts_the_rows_of_an_update_is_an_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **(AUTO | settings))
