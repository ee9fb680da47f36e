"""The alignment loss in training: the teacher and what it reads, the gradients of all of it."""

from pathlib import Path

import pytest
import torch
from llm_families import family_config
from processes import ForkServer
from tiny_models import audio_part, clip, text_part, tiny_config, tiny_llm, tiny_model, tiny_processor, user_turn
from torch import nn
from trainers import build, make_rows, make_trainer, step_of
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from relllm import EMOTIONS, ReLLMSFTConfig
from relllm.training import alignment as alignment_module
from relllm.training.alignment import TEACHER_INPUTS, Alignment, FusedCausalLMOutput, check_head, head_logits, teach
from relllm.training.collator import ReLLMCollator
from relllm.training.objective import TARGETS

KL_ALONE = {"response_loss_weight": 0.0, "emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0}


def bare_llm_logits(model, batch) -> torch.Tensor:
    """The LLM reads, with no LoRA; written out, not by the package's own teacher."""
    with torch.no_grad():
        llm = model.model.text_model
        return llm(input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits


def kl_written_out(speech, text, speech_labels, text_labels, temperature: float, shifted: bool) -> torch.Tensor:
    """KL(text || speech), position by position: before each of the reply's tokens, or at it as the original code."""
    terms = []
    for row in range(len(speech)):
        heard, read = (
            (labels[row] != -100).nonzero().flatten() - int(shifted) for labels in (speech_labels, text_labels)
        )
        for at_speech, at_text in zip(heard, read, strict=True):
            wanted = torch.softmax(text[row, at_text] / temperature, dim=-1)
            said = torch.softmax(speech[row, at_speech] / temperature, dim=-1)
            terms.append((wanted * (wanted / said).log()).sum())
    return torch.stack(terms).mean()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions at a time, so that a batch has many tiles and the last is not full."""
    monkeypatch.setattr(alignment_module, "TILE_WORDS", 1000)


@pytest.mark.parametrize("shifted", [True, False])
def test_gradient_is_that_of_the_losses_written_out(small_tiles, tmp_path: Path, shifted: bool) -> None:
    rows = make_rows(tmp_path)
    model, processor, weights = build()
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True)(rows)
    has_text = torch.tensor([row["text"] is not None for row in rows])
    names = ("labels", "emotion_labels", "dimension_labels", "clips_per_row")
    inputs = {name: value for name, value in batch.items() if name not in (*TEACHER_INPUTS, *names)}
    outputs = model(**inputs, labels=batch["labels"])
    taught = bare_llm_logits(model, batch)[has_text]
    logits, labels = outputs.logits[has_text], batch["labels"][has_text]
    loss = outputs.loss + 0.7 * kl_written_out(
        logits, taught, labels, batch["teacher_labels"][has_text], temperature=3.0, shifted=shifted
    )
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in expected)
    settings = weights | {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0}
    settings |= {"kl_temperature": 3.0, "kl_shifted": shifted, "gradient_accumulation_steps": 2}
    trainer = make_trainer(rows, tmp_path / "run", processor, model, per_device_train_batch_size=4, **settings)
    step = step_of(trainer)
    assert step.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=3e-6, msg=name)


@pytest.mark.slow
def test_gradients_agree_however_the_batch_is_accumulated(tmp_path: Path) -> None:
    """In float64; each gradient against its own norm."""
    rows = make_rows(tmp_path)
    steps, logs = {}, {}
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        model, processor, settings = build()
        settings = settings | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(rows, tmp_path / f"{batch}", processor, model.double(), **settings)
        steps[batch], logs[batch] = step_of(trainer), trainer.state.log_history[0]
    names = ("response_loss", "emotion_loss", "dimension_loss", "response_kl")
    assert set(names) <= logs[8].keys()
    for batch in (4, 2, 1):
        for name, gradient in steps[8].items():
            assert (steps[batch][name] - gradient).norm() <= 1e-12 * gradient.norm(), name
        for name in names:
            assert logs[batch][name] == pytest.approx(logs[8][name], rel=1e-5), name


@pytest.mark.parametrize(
    "settings, tolerance",
    [
        ({}, 1e-6),
        ({"unfreeze": ["text_model"], "gradient_checkpointing": True}, 1e-6),  # the head learns as well
        ({"unfreeze": ["text_model"], "bf16": True}, 3e-2),
    ],
)
def test_tiles_change_no_gradient(tmp_path: Path, monkeypatch, settings: dict, tolerance: float) -> None:
    rows = make_rows(tmp_path, 4)
    steps, logs = [], []
    for words in (2**23, 1000, 1):
        monkeypatch.setattr(alignment_module, "TILE_WORDS", words)
        model, processor, weights = build()
        model = model if "bf16" in settings else model.double()
        options = {"per_device_train_batch_size": 4, **KL_ALONE, **weights, **settings}
        trainer = make_trainer(rows, tmp_path / "run", processor, model, **options)
        steps.append(step_of(trainer))
        logs.append(trainer.state.log_history[0]["response_kl"])
    assert logs[1:] == pytest.approx([logs[0]] * 2, rel=tolerance)
    for step in steps[1:]:
        for name, gradient in steps[0].items():
            assert (step[name] - gradient).norm() <= tolerance * gradient.norm(), name


def train_rank(folder: Path, rows: list[dict]) -> None:
    alignment_module.TILE_WORDS = 1000  # this process alone
    for more in ({}, KL_ALONE):
        model, processor, settings = build()
        trainer = make_trainer(
            rows,
            folder / "run",
            processor,
            model,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **settings,
            **more,
        )
        step = step_of(trainer)
        if trainer.is_world_process_zero():
            torch.save((step, trainer.state.log_history[0]), folder / f"{len(more)}.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(fork_server: ForkServer, tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    ranks = fork_server.run_ranks(train_rank, tmp_path, rows)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    for more in ({}, KL_ALONE):
        model, processor, settings = build()
        settings = settings | more | {"per_device_train_batch_size": 8}
        alone = make_trainer(rows, tmp_path / "one", processor, model, **settings)
        expected = step_of(alone)
        step, log = torch.load(tmp_path / f"{len(more)}.pt", weights_only=True)
        assert step.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name.removeprefix("module.")], gradient, rtol=1e-4, atol=3e-6)
        losses = [name for name in log if name.endswith(("_loss", "_kl"))]
        assert len(losses) == (1 if more else 4)
        for name in losses:
            assert log[name] == pytest.approx(alone.state.log_history[0][name], rel=1e-4), name


def test_without_a_weight_the_reply_adds_nothing_and_the_head_is_not_run(tmp_path: Path) -> None:
    rows = make_rows(tmp_path)
    steps, names = {}, {}
    for weight in (0.0, 1.0, 2.0):
        model, processor, settings = build()
        settings = settings | {"response_loss_weight": weight, "per_device_train_batch_size": 4}
        trainer = make_trainer(rows, tmp_path / "run", processor, model.double(), **settings)
        steps[weight], names[weight] = step_of(trainer), trainer.state.log_history[0].keys()
    for name, gradient in steps[0.0].items():  # a weighted sum is linear in its weight
        expected = 2 * steps[1.0][name] - steps[2.0][name]
        assert (gradient - expected).norm() <= 1e-6 * steps[1.0][name].norm(), name  # TRL's head computes in float32
    of_the_reply = {"response_loss", "entropy", "mean_token_accuracy"}
    assert of_the_reply <= names[1.0] and not of_the_reply & names[0.0] and "response_kl" in names[0.0]


def test_weights_that_zero_3_has_spread_get_no_gradient_without_the_llm() -> None:
    """Out of their module's forward they are empty: a gradient of their shape could not be added."""
    model, _, _ = build()
    base = model.base_model
    assert alignment_module._nothing(base).requires_grad
    for parameter in base.parameters():
        parameter.ds_id = 0  # DeepSpeed's mark
    nothing = alignment_module._nothing(base)
    assert nothing.item() == 0 and not nothing.requires_grad


def test_without_a_weight_and_a_teacher_a_head_that_is_not_finite_does_no_harm(tmp_path: Path) -> None:
    model, processor, _ = build()
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    ran = []
    model.model.text_model.base_model.register_forward_hook(lambda *_: ran.append(True))
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, model, response_loss_weight=0.0)
    step = step_of(trainer)
    assert not ran
    assert all(gradient.isfinite().all() for gradient in step.values())
    assert all(gradient.abs().max() == 0 for name, gradient in step.items() if "lora_" in name)
    assert step["model.emotion_head.weight"].abs().max() > 0
    metrics = trainer.evaluate(trainer.train_dataset)
    assert "eval_response_loss" not in metrics and metrics["eval_loss"] > 0


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 4)
    steps = []
    for checkpointing, reentrant in ((False, False), (True, False), (True, True)):
        model, processor, settings = build()
        trainer = make_trainer(
            rows,
            tmp_path / "run",
            processor,
            model,
            per_device_train_batch_size=4,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
            **settings,
        )
        steps.append(step_of(trainer))
    for step in steps[1:]:
        for name, gradient in steps[0].items():
            assert torch.equal(step[name], gradient), name


def test_the_teacher_reads_the_conversation_with_the_transcript_in_the_place_of_the_audio(tmp_path: Path) -> None:
    _, processor, _ = build()
    rows = make_rows(tmp_path, 4)
    processor.instruction = "Reply to this: "
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True)(rows)
    for index, row in enumerate(rows[:3]):
        conversation = processor.build_conversation("", instruction="Reply to this: ", response=row["response"])
        conversation[1]["content"][-1] = text_part(row["text"])
        expected = processor.apply_chat_template(conversation, tokenize=False)
        length = batch["teacher_attention_mask"][index].sum()
        ids, labels = batch["teacher_input_ids"][index, :length], batch["teacher_labels"][index, :length]
        assert processor.tokenizer.decode(ids) == expected
        assert processor.tokenizer.decode(labels[labels != -100]) == row["response"] + "<|im_end|>"
    assert rows[3]["text"] is None and (batch["teacher_labels"][3] == -100).all()


def test_clips_side_by_side_and_in_several_turns_are_replaced_in_order() -> None:
    _, processor, _ = build()
    parts = [audio_part(clip(0.3)), audio_part(clip(0.4, seed=1)), text_part("and"), audio_part(clip(0.2, seed=2))]
    messages = [
        user_turn(*parts),
        {"role": "assistant", "content": "yes"},
        user_turn(clip(0.2)),
        {"role": "assistant", "content": "no"},
    ]
    row = {"messages": messages, "text": ["one", "two", "three", "four"]}
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True)([row])
    said = processor.tokenizer.decode(batch["teacher_input_ids"][0])
    assert "onetwoandthree<|im_end|>" in said and "user\nfour<|im_end|>" in said and "<|audio|>" not in said
    partly = ReLLMCollator(processor, EMOTIONS, teacher=True)([row | {"text": ["one", None, "three", "four"]}])
    assert (partly["teacher_labels"] == -100).all()


def test_no_transcript_at_all_contributes_nothing(tmp_path: Path) -> None:
    rows = [row | {"text": None} for row in make_rows(tmp_path)]
    rows = [*rows, make_rows(tmp_path)[0]]  # with a transcript, and not in the one update
    steps = []
    for on in (False, True):
        model, processor, settings = build()
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **(settings if on else {})}
        trainer = make_trainer(rows, tmp_path / "run", processor, model, **settings)
        steps.append(step_of(trainer))
    for name, gradient in steps[0].items():
        torch.testing.assert_close(steps[1][name], gradient, rtol=0, atol=0)
    assert "response_kl" not in trainer.state.log_history[0]


def test_without_a_kl_nothing_is_made_for_a_teacher(tmp_path: Path) -> None:
    _, processor, _ = build()
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", processor)
    assert not any("teacher" in name for name in trainer.data_collator(make_rows(tmp_path, 2)))


def test_the_teacher_has_neither_lora_nor_dropout_and_leaves_the_modes_as_they_were(tmp_path: Path) -> None:
    config = tiny_config(text="gpt2", lora={"r": 4, "lora_dropout": 0.5})
    config.text_config.resid_pdrop = 0.5
    model, processor = tiny_model(config).train(), tiny_processor(config)
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True)(make_rows(tmp_path, 2))
    alignment = Alignment(temperature=2.0, shifted=True)
    modes = [module.training for module in model.modules()]
    with model.model.lora_scope.use(True):  # as in a forward pass
        taught = head_logits(model.model.text_model, teach(model.model, batch, alignment))
    assert [module.training for module in model.modules()] == modes and any(modes)
    model.eval()
    expected = bare_llm_logits(model, batch)[:, :-1][batch["teacher_labels"][:, 1:] != -100]
    torch.testing.assert_close(taught, expected)


def test_losses_are_logged_in_evaluation(tmp_path: Path) -> None:
    model, processor, settings = build()
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, model, **settings)
    metrics = trainer.evaluate(trainer.train_dataset)
    names = {"response_loss", "emotion_loss", "dimension_loss", "response_kl"}
    assert {f"eval_{name}" for name in names} <= metrics.keys()


@pytest.mark.skipif(FusedCausalLMOutput is None, reason="This TRL (of Python 3.10) has no fused pass to compare with.")
def test_a_pass_that_is_not_fused_returns_the_same_divergences(tmp_path: Path) -> None:
    """As the TRL of Python 3.10 trains."""
    model, processor, settings = build()
    rows = make_rows(tmp_path)
    trainer = make_trainer(rows, tmp_path / "run", processor, model, **settings)
    batch = trainer.data_collator(rows)
    inputs = {name: value for name, value in batch.items() if name not in TARGETS}
    with torch.no_grad():
        plain, fused = trainer.model(**inputs), trainer.model(**inputs, fused_lm_head=True)
    for name in ("response_kl", "emotion_logits", "dimensions"):
        torch.testing.assert_close(plain[name], fused[name])
    assert plain.response_kl > 0 and plain.logits.shape[:2] == batch["input_ids"].shape


# The head of the LLM


@pytest.mark.parametrize(
    "family, options",
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("phi", {}),  # a head with a bias
    ],
)
def test_logits_of_chosen_positions_are_the_llms_own(family: str, options: dict) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    if llm.get_output_embeddings().bias is not None:
        nn.init.normal_(llm.get_output_embeddings().bias)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(head_logits(llm, llm.base_model(ids).last_hidden_state), llm(ids).logits)
    check_head(llm)


@pytest.mark.parametrize("family", ["falcon_h1", "hyperclovax", "minicpm3"])
def test_logits_that_are_scaled_by_another_name_are_the_llms_own(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {family}")
    llm = AutoModelForCausalLM.from_config(family_config(family)).eval()
    check_head(llm)
    scale = {"falcon_h1": "lm_head_multiplier"}.get(family, "logits_scaling")
    assert getattr(llm.config, scale) != 1


def test_training_refuses_an_llm_whose_scaling_trl_does_not_know(tmp_path: Path) -> None:
    if "inkling_text" not in CONFIG_MAPPING:
        pytest.skip("this release of Transformers has no inkling_text")
    config = tiny_config(fusion="none")
    config.text_config = family_config("inkling_text")
    with pytest.raises(ValueError, match="InklingForCausalLM changes its logits after the head"):
        make_trainer(make_rows(tmp_path), tmp_path / "run", tiny_processor(config), tiny_model(config))


def test_an_llm_with_a_head_unlike_all_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm()
    forward = llm.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(llm, "forward", doubled)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the head"):
        check_head(llm)


def test_losses_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"kl_temperature": 0.0}, "kl_temperature must be > 0"),
        ({"response_kl_weight": -1.0}, "response_kl_weight must be at least 0"),
        ({"response_kl_weight": 1.0, "label_smoothing_factor": 0.1}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
