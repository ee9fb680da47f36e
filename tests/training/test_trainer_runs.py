"""How a run may be set up: grouped by length, streamed, with workers, in bf16, compiled; and the table it prints."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, IterableDataset
from tiny_models import audio_part, clip, text_part, tiny_config, tiny_model
from trainers import LORA, make_rows, make_trainer, step_of

from relllm import EMOTIONS, ReLLMForConditionalGeneration, ReLLMSFTTrainer
from relllm.data.clips import clip_duration
from relllm.training.collator import ReLLMCollator
from relllm.training.freezing import trainable_table
from relllm.training.lengths import row_length, row_lengths

# Grouped by length


def rows_of_many_lengths(folder: Path, count: int = 48) -> list[dict]:
    rng = np.random.default_rng(0)
    path = folder / "long.wav"
    rows = []
    for index in range(count):
        path = folder / f"{index}.wav"
        soundfile.write(path, clip(float(rng.uniform(0.2, 1.9)), seed=index), 16_000, subtype="PCM_16")
        row = {"id": str(index), "audio": str(path), "response": "word " * int(rng.integers(1, 40))}
        rows.append(row | {"emotion": "sad", "arousal": 0.5})
    return rows


def padding_share(trainer: ReLLMSFTTrainer) -> float:
    """Share of the LLM's positions that is padding, over an epoch."""
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def test_grouping_by_length_pads_less(tmp_path: Path, processor) -> None:
    rows = rows_of_many_lengths(tmp_path)
    shares = {}
    for strategy in ("random", "group_by_length"):
        settings = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 4}
        shares[strategy] = padding_share(make_trainer(rows, tmp_path / "run", processor, **settings))
    assert shares["group_by_length"] < 0.5 * shares["random"]


def test_a_run_grouped_by_length_evaluates_in_the_order_of_its_rows(tmp_path: Path, processor) -> None:
    rows = rows_of_many_lengths(tmp_path, 12)
    settings = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 4}
    trainer = make_trainer(rows, tmp_path / "run", processor, eval_rows=rows, eval_strategy="steps", **settings)
    trainer.train()
    assert trainer.state.log_history[-2]["eval_loss"] > 0
    other = make_trainer(rows, tmp_path / "other", processor, eval_rows=rows, per_device_eval_batch_size=4)
    for grouped, plain in zip(trainer.get_eval_dataloader(), other.get_eval_dataloader(), strict=True):
        assert torch.equal(grouped["input_ids"], plain["input_ids"])


def test_lengths_follow_the_sequence_and_need_no_decoding(
    tmp_path: Path, processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_many_lengths(tmp_path, 16)
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    sequence = batch["attention_mask"].sum(1).numpy()
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    lengths = row_lengths(Dataset.from_list(rows), processor.feature_extractor)
    assert np.corrcoef(lengths, sequence)[0, 1] > 0.95
    encoded = Dataset.from_list(rows).cast_column("audio", Audio(decode=False))
    assert row_lengths(encoded, processor.feature_extractor) == lengths


def test_a_clip_is_measured_wherever_it_is(tmp_path: Path, processor) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, clip(0.5, rate=8000), 8000)
    sources = [str(path), path.read_bytes(), {"path": str(path), "bytes": None}, {"bytes": path.read_bytes()}]
    sources += [
        clip(0.5),
        clip(0.5).tolist(),
        torch.from_numpy(clip(0.5)),
        {"array": clip(0.5), "sampling_rate": 16_000},
    ]
    assert [clip_duration(source, 16_000) for source in sources] == pytest.approx([0.5] * len(sources))
    messages = [
        {"role": "user", "content": [text_part("x" * 40), audio_part(str(path)), audio_part(clip(0.5))]},
        {"role": "assistant", "content": "y" * 20},
    ]
    positions = processor.feature_extractor.count_tokens(8000)
    assert row_length({"messages": messages}, processor.feature_extractor) == 15 + 2 * positions
    for source in ("https://example.org/a.wav", str(tmp_path / "none.wav"), None):
        with pytest.raises(ValueError, match="Row 'x': the length of its audio cannot be read"):
            row_length({"id": "x", "audio": source, "response": "a"}, processor.feature_extractor)


def test_a_column_of_lengths_is_used_as_it_is(tmp_path: Path, processor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"length": index} for index, row in enumerate(make_rows(tmp_path))]
    monkeypatch.setattr("relllm.training.trainer.row_lengths", lambda *_: pytest.fail("measured"))
    trainer = make_trainer(rows, tmp_path / "run", processor, train_sampling_strategy="group_by_length")
    assert sorted(trainer._get_train_sampler()) == list(range(8))


# Streams, workers, number formats


def test_a_stream_trains_for_its_steps_as_the_data_set_would(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    expected = step_of(make_trainer(rows, tmp_path / "run", processor, **settings))
    step = step_of(make_trainer(stream, tmp_path / "run", processor, **settings))
    for name, gradient in expected.items():
        assert torch.equal(step[name], gradient), name
    trainer = make_trainer(stream, tmp_path / "run", processor, **settings, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5  # two and a half times through it


def test_workers_make_the_same_batches(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    steps = [
        step_of(
            make_trainer(rows, tmp_path / "run", processor, dataloader_num_workers=workers, response_kl_weight=1.0)
        )
        for workers in (0, 2)
    ]
    for name, gradient in steps[0].items():
        assert torch.equal(steps[1][name], gradient), name


def test_bf16_computes_in_bfloat16_and_keeps_what_trains_in_float32(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    losses = {}
    for bf16 in (False, True):
        model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
        if bf16:
            model = model.to(torch.bfloat16)
        trainer = make_trainer(rows, tmp_path / "run", processor, model, bf16=bf16, response_kl_weight=1.0)
        step = step_of(trainer)
        losses[bf16] = trainer.state.log_history[0]
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in step.values())
    for row in trainable_table(trainer.model):
        assert row.dtype == ("float32" if row.trainable else "bfloat16"), row
    for name in ("response_loss", "emotion_loss", "dimension_loss", "response_kl"):
        assert losses[True][name] == pytest.approx(losses[False][name], rel=0.15), name


def test_class_weights_weigh_the_emotion(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path)
    class_weights = [1.0, 3.0, 0.5, 2.0, 1.0]
    model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    labels = batch["emotion_labels"]
    audio = {name: batch[name] for name in batch if name.startswith(("input_f", "input_v", "audio"))}
    logits = model.get_audio_features(**audio).emotion_logits
    loss = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor(class_weights))
    loss.backward()
    expected = model.model.emotion_head.weight.grad
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(rows, tmp_path / "run", processor, emotion_class_weights=class_weights, **settings)
    step = step_of(trainer)
    torch.testing.assert_close(step["model.emotion_head.weight"], expected, rtol=1e-4, atol=3e-6)
    assert trainer.state.log_history[0]["emotion_loss"] == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="emotion_class_weights has 2 values"):
        make_trainer(rows, tmp_path / "run", processor, emotion_class_weights=[1.0, 1.0])


def test_votes_teach_the_emotion_that_a_row_has_them_of(tmp_path: Path, processor) -> None:
    rows = [{**row, "emotion_votes": None} for row in make_rows(tmp_path)]
    rows[0] |= {"emotion": None, "emotion_votes": ["sad", "angry", "angry", "other"]}  # no agreement, and yet votes
    rows[1] |= {"emotion": "neutral", "emotion_votes": ["other", "fear"]}  # none for a class of the model
    batch = ReLLMCollator(processor, EMOTIONS, votes=True)(rows)
    votes = batch["emotion_votes"]
    assert votes[0].tolist() == pytest.approx([0, 0, 2 / 3, 1 / 3, 0]) and votes[1].tolist() == [1, 0, 0, 0, 0]
    known = (
        torch.nn.functional.one_hot(batch["emotion_labels"].clamp(min=0), 5) * (batch["emotion_labels"] >= 0)[:, None]
    )
    torch.testing.assert_close(votes[1:], known[1:].float())
    model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    audio = {name: batch[name] for name in batch if name.startswith(("input_f", "input_v", "audio"))}
    logits = model.get_audio_features(**audio).emotion_logits
    loss = torch.nn.functional.cross_entropy(logits, votes, reduction="sum") / votes.sum()
    loss.backward()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "emotion_targets": "votes"}
    trainer = make_trainer(rows, tmp_path / "run", processor, **settings)
    step = step_of(trainer)
    expected = model.model.emotion_head.weight.grad
    torch.testing.assert_close(step["model.emotion_head.weight"], expected, rtol=1e-4, atol=3e-6)
    assert trainer.state.log_history[0]["emotion_loss"] == pytest.approx(loss.item(), rel=1e-5)
    with pytest.raises(ValueError, match="emotion_targets must be"):
        make_trainer(rows, tmp_path / "run", processor, emotion_targets="all")


# What trains


def test_the_table_says_what_trains(tmp_path: Path, processor, capfd: pytest.CaptureFixture) -> None:
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, disable_tqdm=False)
    table = {row.module: row for row in trainable_table(trainer.model)}
    frozen = {"audio_tower", "emotion_tower", "text_model"}
    trained = {"multi_modal_projector", "emotion_head", "dimension_head", "lora"}
    assert table.keys() == frozen | trained
    assert all(table[name].trainable == 0 < table[name].parameters for name in frozen)
    assert all(table[name].trainable == table[name].parameters for name in trained)
    assert sum(row.parameters for row in table.values()) == sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    printed = capfd.readouterr().err
    assert printed.count("What trains") == 1 and all(name in printed for name in table)


def test_the_table_after_a_reload_is_that_before(tmp_path: Path, processor) -> None:
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, unfreeze=["audio_tower"])
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    again = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, loaded, unfreeze=["audio_tower"])
    assert trainable_table(again.model) == trainable_table(trainer.model)
    assert {row.module for row in trainable_table(loaded) if row.trainable} >= {"audio_tower", "lora"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo touches deprecated and unusual things while it traces
def test_a_compiled_run_learns_the_same(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path, 4)
    config = tiny_config(lora=LORA)
    for part in (config.text_config, config.audio_config, config.emotion_config.encoder_config):
        part.num_hidden_layers = 1
    settings = {"per_device_train_batch_size": 4}
    expected = step_of(make_trainer(rows, tmp_path / "run", processor, tiny_model(config), **settings))
    options = {"torch_compile": True, "torch_compile_backend": "eager"}  # traced by Dynamo; Inductor takes minutes
    trainer = make_trainer(rows, tmp_path / "run", processor, tiny_model(config), **settings, **options)
    step = step_of(trainer)
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=3e-6, msg=name)
    compiled = [name for name, module in trainer.model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["model.text_model.model.layers.0"] and trainer.model_wrapped is trainer.model
