"""Tasks: the draws, what each puts before the LLM, and their losses, from rows of every kind of missing label."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from light_checkpoints import save_towers
from light_runs import make_trainer as make_light_trainer
from light_runs import new_model
from processes import ForkServer
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_processor
from trainers import LORA, TRANSCRIPTS, make_rows, make_trainer, step_of

from relllm import EMOTIONS, ReLLMSFTConfig
from relllm.evaluation.asking import Questions, answer_tokens, render_prompts
from relllm.processing.prompts_relllm import TRANSCRIPTION_PROMPT, recognition_prompt
from relllm.training.augmentation import EpochCallback
from relllm.training.collator import ReLLMCollator
from relllm.training.tasks import GIVEN_TASK, TaskMix, TaskRows

MIX = {"reply": 1.0, "recognition": 0.5, "transcription": 0.25}


def mix(weights: dict[str, float] = MIX, **options: object) -> TaskMix:
    return TaskMix(weights, **{"seed": 0, **options})


# Draws


def test_the_weights_are_the_shares_of_the_rows_in_every_epoch_and_over_the_epochs_of_a_row() -> None:
    rows = [{"id": f"{index}", "text": "a", "response": "b", "emotion": "sad"} for index in range(2000)]
    drawn = mix()
    table = []
    for epoch in range(20):
        drawn.epoch = epoch
        table.append([list(MIX).index(drawn.draw(row)) for row in rows])
    for index, share in enumerate(np.array(list(MIX.values())) / sum(MIX.values())):
        assert (np.array(table) == index).mean(axis=1) == pytest.approx(share, abs=0.05)
        assert (np.array(table) == index).mean(axis=0) == pytest.approx(share, abs=0.15)
    again, other = mix(), mix(seed=1)
    assert [list(MIX).index(again.draw(row)) for row in rows] == table[0]
    assert [list(MIX).index(other.draw(row)) for row in rows] != table[0]


def test_a_row_is_taught_what_it_has() -> None:
    assert {mix().draw({"id": f"{index}", "emotion": "sad"}) for index in range(20)} == {"recognition"}
    both = {mix().draw({"id": f"{index}", "emotion": "sad", "text": "a"}) for index in range(50)}
    assert both == {"recognition", "transcription"}
    with pytest.raises(ValueError, match=r"Row 'x' has nothing for any of the tasks reply, .*it has \['id', 'text'\]"):
        mix().draw({"id": "x", "text": " ", "response": None})


# What the LLM reads


def row_of(rows: list[dict], task: str, index: int = 0) -> dict:
    return {**rows[index], GIVEN_TASK: (task, False)}


def test_the_question_about_the_emotion_is_the_one_that_an_evaluation_asks(tmp_path: Path, processor) -> None:
    row = row_of(make_rows(tmp_path, 1), "recognition")
    batch = ReLLMCollator(processor, EMOTIONS, mix=mix())([row])
    tokenizer, template = processor.tokenizer, processor.chat_template
    prompt = render_prompts(tokenizer, template, Questions(("ser",), tuple(EMOTIONS)), audio=True)["recognition"]
    positions = int((batch["input_ids"] == processor.audio_token_id).sum())
    asked = tokenizer(prompt.replace("<|audio|>", "<|audio|>" * positions), add_special_tokens=False)["input_ids"]
    answer = answer_tokens(tokenizer, template, row["emotion"])
    assert batch["input_ids"][0, : len(asked) + len(answer)].tolist() == asked + answer
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert learned[: len(answer)] == answer and tokenizer.decode(learned[len(answer) :]).strip() == ""


def test_options_are_drawn_anew_for_each_row_and_epoch() -> None:
    drawn, labels = mix(draws_options=True), list(EMOTIONS)
    orders = []
    for epoch in (0, 1):
        drawn.epoch = epoch
        orders += [tuple(drawn.order({"id": f"{index}"}, labels)) for index in range(200)]
    assert len(set(orders)) > 100 and orders[:200] != orders[200:]
    for label in labels:  # each stands in each place as often
        assert np.mean([order.index(label) for order in orders]) == pytest.approx(2, abs=0.3)
    assert "options: sad, happy, or neutral." in recognition_prompt(["sad", "happy", "neutral"], in_order=False)
    assert mix().order({"id": "0"}, labels) == labels


def test_a_transcript_answers_its_question_and_the_teacher_compares_replies_alone(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path, 3)
    given = [row_of(rows, task, index) for index, task in enumerate(("transcription", "reply", "recognition"))]
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True, mix=mix())(given)
    assert batch["row_tasks"].tolist() == [2, 0, 1]
    text = processor.decode(batch["input_ids"][0])
    assert TRANSCRIPTION_PROMPT.strip() in text and TRANSCRIPTS[0] in text and "empathetic" not in text
    assert (batch["teacher_labels"] != -100).any(1).tolist() == [False, True, False]
    plain = ReLLMCollator(processor, EMOTIONS, teacher=True)([rows[1]])
    labels = batch["teacher_labels"][1]
    assert labels[labels != -100].tolist() == plain["teacher_labels"][plain["teacher_labels"] != -100].tolist()


# Losses


def naive_losses(rows: list[dict], processor) -> dict[str, float]:
    """One row and task at a time, by PyTorch, over the tokens of each task; and the answers that are right."""
    model = tiny_model(lora=LORA)
    collate = ReLLMCollator(processor, EMOTIONS, mix=mix())
    sums: dict[str, list[float]] = {task: [] for task in MIX}
    named = []
    for row in rows:
        able = {"reply": True, "recognition": row["emotion"] is not None, "transcription": row["text"] is not None}
        for task in (task for task in MIX if able[task]):
            batch = collate([{**row, GIVEN_TASK: (task, False)}])
            labels = batch.pop("labels")[0, 1:]
            for name in ("emotion_labels", "dimension_labels", "clips_per_row", "row_tasks"):
                batch.pop(name)
            with torch.no_grad():
                log_probs = model(**batch).logits[0, :-1].log_softmax(-1)
            places = (labels != -100).nonzero()[:, 0].tolist()
            sums[task] += [-log_probs[place, labels[place]].item() for place in places]
            if task == "recognition":
                named.append(all(log_probs[place].argmax() == labels[place] for place in places))
    losses = {f"{task}_loss": float(np.mean(values)) for task, values in sums.items()}
    everything = [value for values in sums.values() for value in values]
    return losses | {"response_loss": float(np.mean(everything)), "recognition_accuracy": float(np.mean(named))}


def test_an_evaluation_has_the_loss_of_each_task_over_all_rows(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    plain = make_trainer(rows, tmp_path / "run", processor, model=tiny_model(lora=LORA))
    heads = plain.evaluate(Dataset.from_list(rows))
    expected = naive_losses(rows, processor)
    for size in (16, 3):
        trainer = make_trainer(rows, tmp_path / "run", processor, tasks=MIX, per_device_eval_batch_size=size)
        metrics = trainer.evaluate(Dataset.from_list(rows))
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
        for name in ("emotion_loss", "dimension_loss", "ua", "ccc_arousal"):  # each clip counts once
            assert metrics[f"eval_{name}"] == pytest.approx(heads[f"eval_{name}"], rel=1e-4), name


def test_a_step_is_that_of_its_rows_as_the_tasks_that_were_drawn(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(rows, tmp_path / "run", processor, tasks=MIX, **settings)
    step = step_of(trainer)
    tasks = [mix(seed=trainer.args.seed).draw(row) for row in rows]
    assert len(set(tasks)) > 1
    batch = ReLLMCollator(processor, EMOTIONS, mix=mix())([row_of(rows, task, i) for i, task in enumerate(tasks)])
    model = trainer.model
    fresh = make_trainer(rows, tmp_path / "run", processor).model
    targets = {name: batch.pop(name) for name in ("emotion_labels", "dimension_labels", "row_tasks", "clips_per_row")}
    output = fresh.train()(**batch)
    known, labelled = targets["emotion_labels"] != -100, targets["dimension_labels"].isfinite()
    loss = output.loss + torch.nn.functional.cross_entropy(
        output.emotion_logits[known], targets["emotion_labels"][known]
    )
    (loss + (output.dimensions - targets["dimension_labels"])[labelled].square().mean()).backward()
    for name, weight in fresh.named_parameters():
        if name in step and weight.grad is not None:
            torch.testing.assert_close(step[name], weight.grad, rtol=1e-3, atol=3e-6)
    log = trainer.state.log_history[0]
    assert {f"{task}_loss" for task in set(tasks)} <= log.keys() and model is trainer.model


def train_rank(folder: Path, rows: list[dict]) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3}
    trainer = make_trainer(rows, folder / "two", tiny_processor(), tasks=MIX, **settings)
    before = trainer.evaluate(Dataset.from_list(rows))
    trainer = make_trainer(rows, folder / "two", tiny_processor(), tasks=MIX, **settings)
    step = step_of(trainer)
    if trainer.is_world_process_zero():
        torch.save((before, step, trainer.state.log_history[-2]), folder / "two.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path, fork_server: ForkServer, processor) -> None:
    rows = make_rows(tmp_path)
    ranks = fork_server.run_ranks(train_rank, tmp_path, rows)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:] + ranks[1].stderr[-3000:]
    before, step, log = torch.load(tmp_path / "two.pt", weights_only=True)
    alone = make_trainer(rows, tmp_path / "one", processor, tasks=MIX, per_device_train_batch_size=8)
    for name, value in naive_losses(rows, processor).items():
        assert before[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    for name, gradient in step_of(alone).items():
        torch.testing.assert_close(step[name if name in step else f"module.{name}"], gradient, rtol=1e-3, atol=3e-6)
    for name in [name for name in alone.state.log_history[0] if name.endswith("_loss")]:
        assert log[name] == pytest.approx(alone.state.log_history[0][name], rel=1e-4), name


@pytest.mark.slow
def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    settings = {"tasks": {"reply": 1, "recognition": 1}, "recognition_options": "drawn", "save_steps": 1}
    make_light_trainer(tmp_path, new_model(towers), **settings).train()
    weights = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    for step in (5, 6):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / f"first-{step}")
    trainer = make_light_trainer(tmp_path, new_model(towers, seed=7), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))  # in the second epoch
    assert trainer.data_collator.mix.epoch == 1
    again = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []


def test_one_callback_counts_the_epochs_of_tasks_and_augmentation(tmp_path: Path, processor) -> None:
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 3}
    trainer = make_trainer(
        make_rows(tmp_path), tmp_path / "run", processor, tasks=MIX, augment_gain_db=[-3, 3], **settings
    )
    trainer.train()
    assert trainer._mix.epoch == trainer._augmentation.epoch == 2
    assert sum(isinstance(one, EpochCallback) for one in trainer.callback_handler.callbacks) == 1


def test_a_stream_is_taught_tasks_too(tmp_path: Path, processor) -> None:
    stream = Dataset.from_list(make_rows(tmp_path)).to_iterable_dataset()
    settings = {"tasks": {"recognition": 1}, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    rows = [row for row in make_rows(tmp_path) if row["emotion"]]
    trainer = make_trainer(Dataset.from_list(rows).to_iterable_dataset(), tmp_path / "run", processor, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["recognition_loss"] > 0
    with pytest.raises(ValueError, match="Row 'row-1' has nothing for any of the tasks recognition"):
        make_trainer(stream, tmp_path / "run", processor, **settings).train()


def test_rows_of_messages_are_asked_about_their_only_clip(tmp_path: Path, processor) -> None:
    row = make_rows(tmp_path, 1)[0]
    part = {"type": "audio", "path": row["audio"]}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": [{"type": "text", "text": "Oh."}]}]
    batches = [
        ReLLMCollator(processor, EMOTIONS, mix=mix())([{**one, GIVEN_TASK: ("recognition", False)}])
        for one in (row, {"messages": turns, "emotion": ["sad"]} | {"emotion": [row["emotion"]]})
    ]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert len(TaskRows(Dataset.from_list([{"messages": turns, "emotion": "sad"}]), list(MIX))) == 2


# What is refused


def test_a_task_that_no_row_feeds_is_refused_with_the_counts(tmp_path: Path, processor) -> None:
    rows = [row | {"text": None} for row in make_rows(tmp_path)]
    with pytest.raises(
        ValueError, match=r"'transcription' is given, and none of 8 .* reply: 8, recognition: 6, transc"
    ):
        make_trainer(rows, tmp_path / "run", processor, tasks=MIX)
    rows = [row | {"response": None} for row in make_rows(tmp_path)]
    with pytest.raises(
        ValueError, match=r"2 of 8 of the training rows have nothing for .*recognition \(rows row-1, row-"
    ):
        make_trainer(rows, tmp_path / "run", processor, tasks="recognition")


def test_settings_are_a_mapping_or_text_and_say_what_they_take(tmp_path: Path) -> None:
    for given in ({"reply": 1, "recognition": 0.5}, "reply, recognition=0.5"):
        args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, tasks=given)
        assert args.task_shares == {"reply": 1.0, "recognition": 0.5}
        json.dumps(args.to_dict())
    wrong = {
        "'sing'": {"tasks": "reply,sing"},
        "each name once": {"tasks": "reply=0"},
        "such as a=1,b=0.5": {"tasks": "reply=much"},
        "teaches none": {"tasks": "reply,recognition", "response_loss_weight": 0},
        "compares replies": {"tasks": "recognition", "response_kl_weight": 1},
        "recognition_options": {"recognition_options": "random"},
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
