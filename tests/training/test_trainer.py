"""`ReLLMSFTTrainer`: what it learns from, how it normalises, what it leaves alone."""

import numpy as np
import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, DatasetDict
from scipy.special import log_softmax
from sklearn.utils.class_weight import compute_class_weight
from tiny_models import audio_part, clip, text_part, tiny_config, tiny_model, tiny_processor
from trainers import KL, REPLIES, make_rows, make_trainer, step_of
from transformers import AutoModel

from relllm import EMOTIONS, ReLLMSFTConfig, ReLLMSFTTrainer
from relllm.training.collator import ReLLMCollator
from relllm.training.lengths import row_length
from relllm.training.objective import TARGETS


def test_labels_are_the_reply_and_its_end_and_nothing_else(tmp_path, processor):
    rows = make_rows(tmp_path, 3)
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == row["response"] + "<|im_end|>"


def test_a_template_that_marks_no_reply_is_an_error_with_the_remedy(tmp_path):
    parts = "{% for p in m.content %}{{ p.text if p.type == 'text' else '<|audio|>' }}{% endfor %}"
    own = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{parts}{% endif %}{% endfor %}"
    unmarked = tiny_processor(chat_template=own.replace("{parts}", parts))
    with pytest.raises(ValueError, match="generation %}.*without `chat_template`"):
        ReLLMCollator(unmarked, EMOTIONS)(make_rows(tmp_path, 1))


def test_what_was_trained_ends_its_replies_as_it_learnt_to(tmp_path, processor):
    """A base LLM's own end is another; the checkpoint names both."""
    model = tiny_model()
    model.generation_config.eos_token_id = 7
    trainer = make_trainer(make_rows(tmp_path, 1), tmp_path / "run", processor, model)
    trainer.save_model()
    loaded = AutoModel.from_pretrained(tmp_path / "run")
    assert loaded.generation_config.eos_token_id == [7, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_gradients_agree_however_the_batch_is_accumulated(tmp_path, processor):
    """In float64, so that the order of sums leaves nothing; each gradient against its own norm."""
    rows = make_rows(tmp_path)
    steps = {}
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make_trainer(
            rows,
            tmp_path / f"{batch}",
            processor,
            tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}).double(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        steps[batch] = step_of(trainer)
    for batch in (4, 2, 1):
        for name, gradient in steps[8].items():
            assert (steps[batch][name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_the_response_loss_scores_the_next_token_of_the_reply(tmp_path, processor):
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, emotion_loss_weight=0.0, dimension_loss_weight=0.0)
    batch = trainer.data_collator(rows)
    batch["labels"][0, 0] = 7  # a first token is never predicted
    inputs = {name: value for name, value in batch.items() if name not in ("labels", *TARGETS)}
    with torch.no_grad():
        scores = log_softmax(trainer.model.eval()(**inputs).logits.double().numpy(), axis=-1)
    terms = [
        -scores[row, position - 1, label]
        for row, labels in enumerate(batch["labels"].tolist())
        for position, label in enumerate(labels)
        if label != -100 and position > 0
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(np.mean(terms), rel=1e-6)
    share = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1000))
    assert share.item() == pytest.approx(np.sum(terms) / 1000, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_mixture_of_experts_trains_with_its_auxiliary_loss_beside_the_replys(tmp_path, processor, accumulation):
    rows = make_rows(tmp_path)
    model = tiny_model(text="mixtral", lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    weights = {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0, "router_aux_loss_coef": 0.5}
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(rows, tmp_path / "run", processor, model, learning_rate=0.0, **weights, **batches)
    batch = trainer.data_collator(rows)
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    with torch.no_grad():
        plain = model(**inputs, output_router_logits=False).loss.item()
        uneven = [
            model(**{k: v for k, v in trainer.data_collator(part).items() if k not in TARGETS}).aux_loss.item()
            for part in (rows[i : i + 8 // accumulation] for i in range(0, 8, 8 // accumulation))
        ]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["response_loss"] == pytest.approx(plain, rel=1e-4)
    assert logged["aux_loss"] == pytest.approx(np.mean(uneven), rel=1e-4)
    assert logged["loss"] == pytest.approx(plain + 0.5 * np.mean(uneven), rel=1e-4)
    assert model.generate(input_ids=torch.tensor([[1, 40, 41]]), max_new_tokens=3).shape[1] > 3


@pytest.mark.parametrize("num_items", [None, torch.tensor(5)])
def test_a_batch_without_a_reply_has_a_loss_of_zero_with_a_gradient(tmp_path, processor, num_items):
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, emotion_loss_weight=0.0, dimension_loss_weight=0.0)
    batch = trainer.data_collator(rows)
    batch["labels"][:] = -100
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
    loss.backward()
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
    assert loss.item() == 0 and gradients and all(gradient.abs().max() == 0 for gradient in gradients)


def test_gradient_is_that_of_the_losses_written_out(tmp_path, processor):
    rows = make_rows(tmp_path)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    model = tiny_model(lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
    batch = ReLLMCollator(processor, EMOTIONS)(rows)
    emotions, targets = batch.pop("emotion_labels"), batch.pop("dimension_labels")
    outputs = model(**batch)
    known = emotions != -100
    squared = (outputs.dimensions - targets)[targets.isfinite()] ** 2
    emotion = torch.nn.functional.cross_entropy(outputs.emotion_logits[known], emotions[known])
    (outputs.loss + 0.5 * emotion + 2.0 * squared.mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trainer = make_trainer(
        rows, tmp_path / "run", processor, emotion_loss_weight=0.5, dimension_loss_weight=2.0, **settings
    )
    step = step_of(trainer)
    assert step.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=3e-6, msg=name)


def test_unlabelled_rows_train_the_reply_alone(tmp_path, processor):
    rows = [
        row | {"emotion": None, "arousal": None, "dominance": None, "valence": None} for row in make_rows(tmp_path)
    ]
    rows = [*rows, make_rows(tmp_path)[0]]  # labelled, and not in the one update
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(rows, tmp_path / "run", processor, **settings)
    step = step_of(trainer)
    assert step["model.emotion_head.weight"].abs().max() == 0
    assert step["model.dimension_head.weight"].abs().max() == 0
    assert any(value.abs().max() > 0 for value in step.values())
    logged = trainer.state.log_history[0]
    assert "emotion_loss" not in logged and "dimension_loss" not in logged and logged["response_loss"] > 0


def test_losses_are_logged_by_name_in_training_and_evaluation(tmp_path, processor):
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, per_device_train_batch_size=4)
    trainer.train()
    names = {"response_loss", "emotion_loss", "dimension_loss", "emotion_accuracy"}
    assert names <= trainer.state.log_history[0].keys()
    metrics = trainer.evaluate(Dataset.from_list(rows))
    assert {f"eval_{name}" for name in names} <= metrics.keys()


def test_what_is_frozen_stays_to_the_bit_and_what_trains_moves(tmp_path, processor):
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, learning_rate=0.1, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    trained = ("multi_modal_projector", "emotion_head", "dimension_head", "lora_")
    assert moved and all(any(part in name for part in trained) for name in moved)
    assert {part for part in trained if any(part in name for name in moved)} == set(trained)


def test_unfreeze_trains_a_tower(tmp_path, processor):
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, unfreeze=["audio_tower"])
    step = step_of(trainer)
    assert any("audio_tower" in name and value.abs().max() > 0 for name, value in step.items())
    assert not any("emotion_tower" in name for name in step)


def test_conversations_with_several_clips_take_a_label_for_each(tmp_path, processor):
    row = {
        "messages": [
            {"role": "user", "content": [audio_part(clip(0.3)), text_part("and"), audio_part(clip(0.4, seed=1))]},
            {"role": "assistant", "content": REPLIES[0]},
        ],
        "emotion": ["sad", None],
    }
    batch = ReLLMCollator(processor, EMOTIONS)([row])
    assert batch["emotion_labels"].tolist() == [EMOTIONS.index("sad"), -100]
    with pytest.raises(ValueError, match="1 values of 'emotion' for 2 clips"):
        ReLLMCollator(processor, EMOTIONS)([row | {"emotion": "sad"}])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response": None}, "Row 'row-0' needs `audio` and `response`"),
        ({"emotion": "fear"}, r"Row 'row-0' has the emotion \['fear'\]"),
        ({"arousal": 3.0}, r"Row 'row-0' has dimension targets \[3.0\] outside"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "without an assistant turn"),
    ],
)
def test_a_bad_row_is_named(tmp_path, processor, change, message):
    row = make_rows(tmp_path, 1)[0] | change
    with pytest.raises(ValueError, match=message):
        ReLLMCollator(processor, EMOTIONS)([row])


ASKED = "How do I feel?"


def messages_of(content: object, before: str | None = None) -> list[dict]:
    system = [] if before is None else [{"role": "system", "content": before}]
    return [*system, {"role": "user", "content": content}, {"role": "assistant", "content": "You sound sad."}]


@pytest.mark.parametrize(
    "columns, equal_to",
    [
        ({"messages": messages_of(ASKED), "audio": 0}, [0, ASKED]),  # TRL: before the first user's words
        ({"messages": messages_of(ASKED), "audios": [0, 1]}, [0, 1, ASKED]),
        ({"messages": messages_of(f"Well: <audio>{ASKED}<audio>"), "audios": [0, 1]}, ["Well: ", 0, ASKED, 1]),
        ({"messages": messages_of([text_part(ASKED), {"type": "audio"}]), "audios": [1]}, [ASKED, 1]),
        ({"messages": messages_of([text_part(ASKED), {"type": "audio", "path": None}]), "audio": 1}, [ASKED, 1]),
    ],
)
def test_clips_in_columns_of_their_own_are_in_the_conversation(tmp_path, processor, columns, equal_to) -> None:
    paths = [row["audio"] for row in make_rows(tmp_path, 2)]
    for name in ("audio", "audios"):
        if name in columns:
            value = columns[name]
            columns = {**columns, name: paths[value] if isinstance(value, int) else [paths[one] for one in value]}
    parts = [text_part(one) if isinstance(one, str) else audio_part(paths[one]) for one in equal_to]
    collate = ReLLMCollator(processor, EMOTIONS)
    batch, expected = collate([columns]), collate([{"messages": messages_of(parts)}])
    assert batch.keys() == expected.keys() and "input_features" in batch
    for name, value in expected.items():
        assert torch.equal(batch[name], value) or name == "dimension_labels", name
    assert row_length(columns, processor.feature_extractor) == row_length(
        {"messages": messages_of(parts)}, processor.feature_extractor
    )


def test_clips_without_a_place_and_places_without_a_clip_are_named(tmp_path, processor) -> None:
    collate, path = ReLLMCollator(processor, EMOTIONS), make_rows(tmp_path, 1)[0]["audio"]
    with pytest.raises(ValueError, match="Row 'a' has 2 clips in its columns and 1 places"):
        collate([{"id": "a", "messages": messages_of(f"<audio>{ASKED}"), "audios": [path, path]}])
    with pytest.raises(ValueError, match="no user's message"):
        collate([{"id": "a", "messages": messages_of(ASKED)[1:], "audio": path}])
    own = collate([{"messages": messages_of([audio_part(path)]), "audio": path}])  # its parts name their clips
    assert own["clips_per_row"].tolist() == [1]
    with pytest.raises(ValueError, match="Row 'a' has clips in its columns and others in its messages"):
        collate([{"id": "a", "messages": messages_of([audio_part(path)]), "audio": f"other-{path}"}])
    with pytest.raises(ValueError, match="Row 'a' has `<audio>` in text beside parts that name their clips"):
        collate([{"id": "a", "messages": [*messages_of([audio_part(path)]), *messages_of("And <audio>")]}])
    said = collate([{"messages": messages_of("I wrote <audio> here.")}])  # words, where no column has a clip
    assert "input_features" not in said


def test_the_heads_train_without_replies(tmp_path, processor) -> None:
    rows = [{**row, "response": None} for row in make_rows(tmp_path, 4)]
    with pytest.raises(ValueError, match="4 of 4 of the training rows have no reply .*row-0, row-1, row-2"):
        make_trainer(rows, tmp_path / "run", processor)
    step = step_of(make_trainer(rows, tmp_path / "run", processor, response_loss_weight=0.0))
    assert step["model.emotion_head.weight"].abs().max() > 0 and step["model.dimension_head.weight"].abs().max() > 0


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"Emotion": "sad"}, {}, "emotion_loss_weight is 1.0, and no training row has an `emotion`; .*'Emotion'"),
        ({"emotion": "sad"}, {}, "dimension_loss_weight is 1.0, and no training row has any of arousal"),
        ({"text": ""}, KL, "response_kl_weight is 0.7, and no training row has a transcript"),
        ({"emotion": "boredom"}, {}, r"none of the model's .*: 'boredom' in 2 .rows 0, 1.*emotion_labels"),
        ({"emotion": "sad", "valence": 3.5}, {}, "valence goes from 3.5 to 3.5, and 2 of 2 values are outside"),
    ],
)
def test_rows_that_feed_no_loss_or_no_class_stop_before_the_first_step(
    tmp_path, processor, change: dict, settings: dict, message: str
) -> None:
    bare = [
        {"id": str(index), "audio": row["audio"], "response": "Oh."}
        for index, row in enumerate(make_rows(tmp_path, 2))
    ]
    off = {} if "weight is 1.0" in message else {"dimension_loss_weight": 0.0}
    off |= {"emotion_loss_weight": 0.0} if "text" in change else {}
    with pytest.raises(ValueError, match=message):
        make_trainer([row | change for row in bare], tmp_path / "run", processor, **off, **settings)


def test_a_stream_that_feeds_a_loss_with_nothing_stops_at_its_first_update(tmp_path, processor) -> None:
    rows = [{**row, "arousal": None, "dominance": None, "valence": None} for row in make_rows(tmp_path, 4)]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="dimension_loss has a weight, and no row of the stream's first update"):
        make_trainer(stream, tmp_path / "run", processor, gradient_accumulation_steps=2).train()
    settings = {"gradient_accumulation_steps": 2, "dimension_loss_weight": 0.0}
    make_trainer(stream, tmp_path / "run", processor, **settings).train()


def test_balanced_class_weights_are_scikit_learns(tmp_path, processor) -> None:
    rows = make_rows(tmp_path, 8)
    names = [row["emotion"] for row in rows if row["emotion"] is not None]
    present = [name for name in EMOTIONS if name in names]
    expected = dict(zip(present, compute_class_weight("balanced", classes=np.array(present), y=names), strict=True))
    trainer = make_trainer(rows, tmp_path / "run", processor, emotion_class_weights=["balanced"])
    assert trainer.objective.class_weights.tolist() == pytest.approx([expected.get(name, 0.0) for name in EMOTIONS])
    with pytest.raises(ValueError, match="takes numbers >= 0, or `balanced`, got 'equal'"):
        ReLLMSFTConfig(output_dir=str(tmp_path), emotion_class_weights=["equal"])


def test_a_class_label_trains_its_name(tmp_path, processor) -> None:
    rows = Dataset.from_list([{**row, "emotion": index} for index, row in enumerate(make_rows(tmp_path, 2))])
    rows = rows.cast_column("emotion", ClassLabel(names=["Sadness", "neutral"]))
    trainer = make_trainer(rows, tmp_path / "run", processor)
    assert next(iter(trainer.get_train_dataloader()))["emotion_labels"].tolist() == [
        EMOTIONS.index("sad"),
        EMOTIONS.index("neutral"),
    ]


def test_audio_columns_are_left_encoded_for_the_processor(tmp_path, processor):
    dataset = Dataset.from_list(make_rows(tmp_path)).cast_column("audio", Audio())
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor)
    trainer = ReLLMSFTTrainer(
        model=trainer.model, args=trainer.args, train_dataset=dataset, processing_class=processor
    )
    assert trainer.train().training_loss > 0


@pytest.mark.slow
def test_loss_falls_when_the_trainer_runs_for_a_while(tmp_path, processor):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 30, "per_device_train_batch_size": 8}
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor, **settings, gradient_accumulation_steps=1)
    trainer.train()
    for name in ("response_loss", "emotion_loss", "dimension_loss"):
        losses = [entry[name] for entry in trainer.state.log_history if name in entry]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"packing": True}, "packing=True"),
        ({"max_length": 100}, "max_length=100"),
        ({"emotion_loss_weight": -1.0}, "emotion_loss_weight must be at least 0"),
        ({"unfreeze": ["whisper"]}, "unfreeze has"),
        ({"dimension_loss": "mae"}, "dimension_loss must be"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True in .* leave it out"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_wrong_arguments_of_the_trainer_are_refused(tmp_path, processor):
    from peft import LoraConfig

    rows = Dataset.from_list(make_rows(tmp_path))
    args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="loaded ReLLMForConditionalGeneration, got str"):
        ReLLMSFTTrainer(model="org/model", args=args, train_dataset=rows, processing_class=processor)
    with pytest.raises(TypeError, match="must be a ReLLMProcessor"):
        ReLLMSFTTrainer(model=tiny_model(), args=args, train_dataset=rows, processing_class=processor.tokenizer)
    with pytest.raises(ValueError, match="carries its own LoRA"):
        ReLLMSFTTrainer(
            model=tiny_model(), args=args, train_dataset=rows, processing_class=processor, peft_config=LoraConfig()
        )
    with pytest.raises(ValueError, match="this model has none"):
        args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, unfreeze=["emotion_tower"])
        model = tiny_model(tiny_config(fusion="none"))
        ReLLMSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": [{"response": "Oh."}]}, r"train_dataset must be .* got list.*Dataset\.from_list"),
        ({"train_dataset": DatasetDict(train=Dataset.from_list([{"a": 1}]))}, r"train_dataset=data\['train'\]"),
        ({"eval_dataset": [{"response": "Oh."}]}, r"eval_dataset must be .* got list"),
        ({"eval_dataset": {"a": [{"response": "Oh."}]}}, r"eval_dataset\['a'\] must be .* got list"),
    ],
)
def test_data_of_another_kind_is_refused_with_what_is_wanted(changes: dict, message: str) -> None:
    model, processor = tiny_model(), tiny_processor()
    with pytest.raises(TypeError, match=message):
        ReLLMSFTTrainer(model, ReLLMSFTConfig("o", use_cpu=True), processing_class=processor, **changes)
