"""What ends a run before its last step: an evaluation that no longer improves, a stream too short for an update."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from light_checkpoints import save_towers, saved_names, trained_names
from light_runs import checkpoint, new_model
from light_runs import make_trainer as make_light_trainer
from safetensors.torch import load_file
from tiny_models import tiny_processor
from trainers import make_rows, make_trainer
from transformers import EarlyStoppingCallback

from relllm import ReLLMSFTTrainer


def test_early_stopping_brings_back_the_light_checkpoint_of_the_best_ua(tmp_path: Path, monkeypatch) -> None:
    measured = iter((0.2, 0.5, 0.4, 0.5, 0.3))  # what a tiny model learns in five steps is chance
    monkeypatch.setattr(ReLLMSFTTrainer, "_heads_metrics", lambda _: {"ua": next(measured)})
    trainer = make_light_trainer(
        tmp_path,
        new_model(save_towers(tmp_path / "towers")),
        max_steps=40,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ua",
        greater_is_better=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
    trainer.train()
    values = [entry["eval_ua"] for entry in trainer.state.log_history if "eval_ua" in entry]
    best = values.index(max(values)) + 1  # the first, where several are equal
    assert best == 2 and trainer.state.global_step == len(values) == best + 3
    assert trainer.state.best_metric == max(values)
    assert trainer.state.best_model_checkpoint == str(checkpoint(tmp_path, best))
    assert saved_names(checkpoint(tmp_path, best)) == trained_names(trainer.model)
    kept, last = (load_file(checkpoint(tmp_path, step) / "model.safetensors") for step in (best, best + 3))
    assert all(torch.equal(trainer.model.get_parameter(name), weight) for name, weight in kept.items())
    assert not all(torch.equal(last[name], weight) for name, weight in kept.items())


def stream(rows: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def test_a_stream_too_short_for_an_update_is_refused(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(stream(make_rows(tmp_path, 5)), tmp_path / "run", tiny_processor(), **settings)
    with pytest.raises(ValueError, match=r"fewer than the 8 rows .* \(2 × 4 × 1 process"):
        trainer.train()


def test_a_stream_that_ends_amid_an_update_goes_on_with_its_next_pass(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    settings |= {"learning_rate": 1e-3}
    trainer = make_trainer(stream(make_rows(tmp_path, 5)), tmp_path / "run", tiny_processor(), **settings)
    trainer.train()
    assert trainer.state.global_step == 3


def test_files_shared_out_among_processes_that_end_at_unlike_times_are_refused(tmp_path: Path, monkeypatch) -> None:
    rows = Dataset.from_list(make_rows(tmp_path, 4))
    files, one = rows.to_iterable_dataset(num_shards=2), rows.to_iterable_dataset()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = make_trainer(files, tmp_path / "run", tiny_processor(), **settings)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    others = iter((2, 1))  # batches that the other process reads of its files
    gather = lambda counts: torch.cat([counts, torch.tensor([next(others)])])  # noqa: E731
    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    batches = iter(trainer.get_train_dataloader())
    assert len(trainer.get_batch_samples(batches, 2, trainer.args.device)[0]) == 2
    with pytest.raises(ValueError, match="The 2 files of the training stream are shared out among 2 processes"):
        trainer.get_batch_samples(batches, 2, trainer.args.device)
    with pytest.raises(ValueError, match="reads a stream of several files on several processes"):
        trainer.evaluate(files)
    assert not isinstance(trainer.get_eval_dataloader(one).dataset, IterableDataset)  # wrapped, and ends for all alike


@pytest.mark.parametrize("steps, said", [(2, True), (0.5, False)])
def test_a_warm_up_that_outlasts_the_run_is_said(tmp_path: Path, caplog, steps: float, said: bool) -> None:
    make_trainer(make_rows(tmp_path), tmp_path / "run", tiny_processor(), max_steps=2, warmup_steps=steps).train()
    assert ("warmup_steps is 2, and the run has 2 steps" in caplog.text) == said
