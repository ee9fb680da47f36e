"""Evaluation during training: the heads' metrics without another pass, early stopping on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from processes import ForkServer
from tiny_models import clip, tiny_model, tiny_processor, user_turn
from trainers import make_rows, make_trainer
from transformers import EarlyStoppingCallback

from relllm import EMOTIONS
from relllm.labels import DIMENSIONS
from relllm.metrics import recognition_metrics
from relllm.training.collator import ReLLMCollator
from relllm.training.objective import RunningMeans, keep_labels

NAMES = ("ua", "wa", "macro_f1", "ccc_arousal", "ccc_dominance", "ccc_valence")


def expected_metrics(rows: list[dict], processor) -> dict[str, float]:
    """By the package's evaluation, from one forward pass of the model over all rows at once."""
    model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    targets = {name: batch.pop(name) for name in ("emotion_labels", "dimension_labels", "clips_per_row")}
    with torch.no_grad():
        outputs = model(**batch)
    known = targets["emotion_labels"] != -100
    predicted = outputs.emotion_logits.argmax(-1)[known].tolist()
    metrics = recognition_metrics(targets["emotion_labels"][known].tolist(), predicted, EMOTIONS)
    values = {name: metrics[name] for name in ("ua", "wa", "macro_f1")}
    for index, name in enumerate(DIMENSIONS):
        target = targets["dimension_labels"][:, index]
        x, y = outputs.dimensions[:, index][target.isfinite()].numpy(), target[target.isfinite()].numpy()
        scale = x.var() + y.var() + (x.mean() - y.mean()) ** 2
        values[f"ccc_{name}"] = 2 * np.mean((x - x.mean()) * (y - y.mean())) / scale
    return values


@pytest.mark.parametrize("batch_size", [8, 3])
def test_metrics_are_those_of_the_heads_over_all_clips(tmp_path: Path, processor, batch_size: int) -> None:
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate(Dataset.from_list(rows))
    for name, value in expected_metrics(rows, processor).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name


def test_the_towers_run_once_for_each_batch(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, per_device_eval_batch_size=4)
    passes: list[int] = []
    trainer.model.model.emotion_tower.register_forward_hook(lambda *_: passes.append(1))
    assert "eval_ua" in trainer.evaluate(Dataset.from_list(rows))
    assert len(passes) == 2


def test_mean_losses_of_an_evaluation_do_not_depend_on_its_batches(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    results = []
    for batch_size in (8, 3):
        trainer = make_trainer(rows, tmp_path / "run", processor, per_device_eval_batch_size=batch_size)
        results.append(trainer.evaluate(Dataset.from_list(rows)))
    for name in ("loss", "response_loss", "emotion_loss", "dimension_loss", "emotion_accuracy"):
        assert results[0][f"eval_{name}"] == pytest.approx(results[1][f"eval_{name}"], rel=1e-5), name


def test_several_sets_have_their_own_prefix_and_unlabelled_ones_no_metrics(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    nothing = {"emotion": None, "arousal": None, "dominance": None, "valence": None}
    trainer = make_trainer(rows, tmp_path / "run", processor)
    sets = {"dev": Dataset.from_list(rows), "plain": Dataset.from_list([row | nothing for row in rows])}
    metrics = trainer.evaluate(sets)
    assert {f"eval_dev_{name}" for name in (*NAMES, "emotion_loss")} <= metrics.keys()
    assert "eval_plain_response_loss" in metrics
    assert not {f"eval_plain_{name}" for name in (*NAMES, "emotion_loss")} & metrics.keys()


def test_rows_of_several_clips_and_of_one_are_counted_by_clip(tmp_path: Path, processor) -> None:
    def row(*emotions: str | None) -> dict:
        turn = user_turn(*(clip(0.2, seed=index) for index in range(len(emotions))), "and?")
        return {"messages": [turn, {"role": "assistant", "content": "yes"}], "emotion": list(emotions)}

    rows = [row("sad", None, "happy"), row("angry"), row("sad", "neutral")]
    trainer = make_trainer(make_rows(tmp_path, 1), tmp_path / "run", processor, per_device_eval_batch_size=2)
    trainer.data_collator = ReLLMCollator(processor, EMOTIONS)
    seen: list[torch.Tensor] = []
    measure = trainer._heads_metrics
    trainer._heads_metrics = lambda: (seen.append(torch.cat(trainer._heard)), measure())[1]
    trainer.evaluate(rows)
    clips = seen[0][~seen[0][:, 0].isnan()]
    sad, happy, angry, neutral = (EMOTIONS.index(name) for name in ("sad", "happy", "angry", "neutral"))
    assert clips[:, 0].tolist() == [sad, -100, happy, angry, sad, neutral]


def test_a_head_without_a_loss_has_no_metrics_and_does_not_train(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, emotion_loss_weight=0.0)
    assert not trainer.model.model.emotion_head.weight.requires_grad
    trainer.train()
    assert "emotion_loss" not in trainer.state.log_history[0] and "dimension_loss" in trainer.state.log_history[0]
    metrics = trainer.evaluate(Dataset.from_list(rows))
    assert "eval_ua" not in metrics and "eval_ccc_valence" in metrics


def test_early_stopping_on_ua(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    trainer = make_trainer(
        rows,
        tmp_path / "run",
        processor,
        eval_rows=rows,
        learning_rate=0.0,  # nothing improves
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_ua",
        greater_is_better=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert [entry["eval_ua"] for entry in trainer.state.log_history if "eval_ua" in entry]


WEIGHTS = {"response_loss": 1.0, "emotion_loss": 0.5, "dimension_loss": 2.0}


def expected_losses(rows: list[dict], processor) -> dict[str, float]:
    """The model's own loss and the losses of PyTorch, from one forward pass over all rows at once."""
    model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    emotions, dimensions = batch.pop("emotion_labels"), batch.pop("dimension_labels")
    del batch["clips_per_row"]
    with torch.no_grad():
        outputs = model(**batch)
    known, labelled = emotions != -100, dimensions.isfinite()
    losses = {
        "response_loss": outputs.loss.item(),
        "emotion_loss": torch.nn.functional.cross_entropy(outputs.emotion_logits[known], emotions[known]).item(),
        "dimension_loss": (outputs.dimensions - dimensions)[labelled].square().mean().item(),
    }
    return losses | {"loss": sum(weight * losses[name] for name, weight in WEIGHTS.items())}


@pytest.mark.parametrize("batch_size", [7, 2])
def test_the_loss_of_an_evaluation_is_the_weighted_sum_over_all_items(tmp_path: Path, processor, batch_size) -> None:
    rows = make_rows(tmp_path, 7)
    weights = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}
    trainer = make_trainer(rows, tmp_path / "run", processor, per_device_eval_batch_size=batch_size, **weights)
    metrics = trainer.evaluate(Dataset.from_list(rows))
    for name, value in expected_losses(rows, processor).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_a_concordance_loss_of_an_evaluation_is_that_of_the_whole_set(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    settings = {"dimension_loss": "ccc", "per_device_eval_batch_size": 3}
    metrics = make_trainer(rows, tmp_path / "run", processor, **settings).evaluate(Dataset.from_list(rows))
    expected = expected_metrics(rows, processor)
    mean = np.mean([expected[f"ccc_{name}"] for name in DIMENSIONS])
    assert metrics["eval_dimension_loss"] == pytest.approx(1 - mean, abs=1e-5)


def test_rows_without_labels_count_nowhere() -> None:
    batch = {
        "labels": torch.tensor([[-100, 5], [-100, 6]]),
        "emotion_labels": torch.tensor([0, 1, 2]),
        "dimension_labels": torch.full((3, 3), 0.5),
        "clips_per_row": torch.tensor([2, 1]),
        "teacher_labels": torch.tensor([[7], [8]]),
    }
    kept = keep_labels(batch, 1)
    assert kept["labels"].tolist() == [[-100, 5], [-100, -100]] and kept["teacher_labels"].tolist() == [[7], [-100]]
    assert kept["emotion_labels"].tolist() == [0, 1, -100]
    assert kept["dimension_labels"].isnan().all(1).tolist() == [False, False, True]
    assert batch["emotion_labels"].tolist() == [0, 1, 2]


def evaluate_rank(folder: Path, rows: list[dict]) -> None:
    weights = {f"{name}_weight": weight for name, weight in WEIGHTS.items()}
    trainer = make_trainer(rows, folder / "two", tiny_processor(), per_device_eval_batch_size=2, **weights)
    metrics = trainer.evaluate(Dataset.from_list(rows))
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(metrics))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@pytest.mark.parametrize("count", [7, 5])  # the last batch of two processes repeats one row, or three
def test_two_processes_measure_what_one_does(tmp_path: Path, fork_server: ForkServer, processor, count: int) -> None:
    rows = make_rows(tmp_path, count)
    ranks = fork_server.run_ranks(evaluate_rank, tmp_path, rows)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = expected_metrics(rows, processor) | expected_losses(rows, processor)
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name


# The numbers themselves


def test_running_means_are_over_items_and_start_again() -> None:
    means = RunningMeans(["a", "b"], torch.device("cpu"))
    means.add("train", "a", torch.tensor(6.0), torch.tensor(2))
    means.add("train", "a", torch.tensor(0.0), torch.tensor(1))
    means.add("eval", "b", torch.tensor(5.0), torch.tensor(1))
    assert means.means(means.take("train")) == {"a": 2.0}
    assert means.means(means.take("train")) == {}
    assert means.means(means.take("eval")) == {"b": 5.0}
