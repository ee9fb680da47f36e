"""Preference training by pairs, from a checkpoint on disk, against DPO's formula written by hand."""

import json
import math
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset
from light_checkpoints import assert_same_weights, build, save_towers
from tiny_models import audio_part, clip, fill_lora, text_part, tiny_llm, tiny_processor
from torch.nn import functional
from trainers import step_of
from typer.testing import CliRunner

from relllm import EMOTIONS, ReLLMDPOConfig, ReLLMDPOTrainer, ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.cli import app
from relllm.hub.evidence import describe_rewards
from relllm.preferences.dpo import PreferenceCollator, parse_dpo, run_dpo
from relllm.preferences.reference import StartingWeights
from relllm.preferences.refusals import unread_rows
from relllm.training.checkpoints import RunComplete

BETA = 0.3
BIGGER = ("gemma", "mixtral")
CHOSEN = ("That is wonderful news, tell me more!", "I am so sorry.", "You sound upset. What happened?", "Oh no!")
REJECTED = ("Ok.", "I am so tired, tell me nothing.", "You sound.", "That is what happened to you today, then?")
OWN = "own.wav"
RECIPE = Path(__file__).parents[2] / "recipes" / "preference_dpo.yaml"


def asked(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A light checkpoint, as `relllm train` leaves one, with its towers beside it."""
    folder = tmp_path_factory.mktemp("dpo")
    torch.manual_seed(0)
    model = build(save_towers(folder / "towers"), lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1})
    model.save_pretrained(folder / "start", light=True)
    tiny_processor(model.config).save_pretrained(folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Clips of several lengths, one of two windows, and a conversation of two turns with three clips."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"{index}.wav") for index in range(6)]
    for index, duration_s in enumerate((0.5, 0.2, 2.5, 0.4, 0.3, 0.6)):
        soundfile.write(paths[index], clip(duration_s, seed=index), 16_000, subtype="PCM_16")
    turns = [
        {"role": "user", "content": [audio_part(paths[3]), text_part("and then"), audio_part(paths[4])]},
        {"role": "assistant", "content": [text_part("You sound upset.")]},
        {"role": "user", "content": [audio_part(paths[5])]},
    ]
    labels = [{"emotion": [EMOTIONS[index]], "arousal": [0.2 * index]} for index in range(3)]
    labels.insert(1, {"emotion": [None, "sad", "happy"], "arousal": [0.1, None, 0.7]})
    clips = [{"audio": paths[0]}, {"messages": turns}, {"audio": paths[1]}, {"audio": paths[2]}]
    found = [{"audio": None, "messages": None} | one | label for one, label in zip(clips, labels, strict=True)]
    return [{"id": f"row-{i}", **one, "chosen": CHOSEN[i], "rejected": REJECTED[i]} for i, one in enumerate(found)]


def make_trainer(start: Path, out: Path, rows, eval_rows=None, **settings) -> ReLLMDPOTrainer:
    options = {
        **{"output_dir": str(out), "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "weight_decay": 0.0},
        **{"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no"},
        **{"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": False},
        **{"dataloader_pin_memory": False, "log_completions": 0, "train_sampling_strategy": "sequential"},
        **{"beta": BETA, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    return ReLLMDPOTrainer(
        model=ReLLMForConditionalGeneration.from_pretrained(start),
        args=ReLLMDPOConfig(**(options | settings)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
        processing_class=ReLLMProcessor.from_pretrained(start),
    )


@torch.no_grad()
def move(model) -> None:
    """Move what trains away from where it started, so that its ratio to the reference is not 1."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


def log_prob(model, processor, row: dict, reply: str) -> tuple[torch.Tensor, dict]:
    """The log-probability of a reply and of its end, by the model's own forward pass over the one conversation."""
    turns = row["messages"] if row.get("messages") else processor.build_conversation(row["audio"])
    options = {"tokenize": True, "return_dict": True}
    asked = processor.apply_chat_template(turns, add_generation_prompt=True, **options)["input_ids"].shape[1]
    inputs = processor.apply_chat_template([*turns, {"role": "assistant", "content": reply}], **options)
    said = len(processor.tokenizer(f"{reply}<|im_end|>")["input_ids"])
    output = model(**inputs)
    place = slice(asked, asked + said)
    scores = output.logits[0, asked - 1 : asked + said - 1].log_softmax(-1)
    return scores.gather(1, inputs["input_ids"][0, place, None]).sum(), output


def losses_by_hand(model, reference, processor, rows: list[dict]) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """DPO's loss with the losses of the heads, each over all rows at once, and TRL's metrics of the replies."""
    per_pair, emotions, squares, metrics = [], [], [], {"chosen": [], "rejected": [], "logps/chosen": []}
    for row in rows:
        better, heard = log_prob(model, processor, row, row["chosen"])
        worse, _ = log_prob(model, processor, row, row["rejected"])
        with torch.no_grad():
            before = [log_prob(reference, processor, row, row[name])[0] for name in ("chosen", "rejected")]
        per_pair.append(-functional.logsigmoid(BETA * ((better - before[0]) - (worse - before[1]))))
        metrics["chosen"].append(BETA * (better - before[0]).item())
        metrics["rejected"].append(BETA * (worse - before[1]).item())
        metrics["logps/chosen"].append(better.item())
        for index, (name, arousal) in enumerate(zip(row["emotion"], row["arousal"], strict=True)):
            if name is not None:
                emotions.append(-heard.emotion_logits[index].log_softmax(-1)[list(EMOTIONS).index(name)])
            if arousal is not None:
                squares.append((heard.dimensions[index, 0] - arousal) ** 2)
    loss = sum(torch.stack(part).mean() for part in (per_pair, emotions, squares))
    return loss, metrics


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"unfreeze": ["audio_tower"], "emotion_targets": "votes"}, marks=pytest.mark.slow),
        pytest.param({"tower_cache_dir": "cache"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_gradient_and_metrics_are_those_of_the_formula(start: Path, rows, tmp_path: Path, settings: dict) -> None:
    if "tower_cache_dir" in settings:
        settings = {"tower_cache_dir": str(tmp_path / "cache")}
    trainer = make_trainer(start, tmp_path / "run", rows, **settings)
    move(trainer.model)
    model, reference = (ReLLMForConditionalGeneration.from_pretrained(start) for _ in range(2))
    model.load_state_dict(trainer.model.state_dict())
    for copy, original in zip(model.parameters(), trainer.model.parameters(), strict=True):
        copy.requires_grad_(original.requires_grad)
    loss, metrics = losses_by_hand(model.eval(), reference.eval(), trainer.processing_class, rows)
    loss.backward()
    step = step_of(trainer)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(trainer.model.get_input_embeddings()._forward_hooks) <= 1  # checkpointing is off for the reference
    for name in ("chosen", "rejected"):
        assert logged[f"rewards/{name}"] == pytest.approx(sum(metrics[name]) / len(rows), rel=1e-4, abs=1e-5)
    assert logged["logps/chosen"] == pytest.approx(sum(metrics["logps/chosen"]) / len(rows), rel=1e-5)
    right = [better > worse for better, worse in zip(metrics["chosen"], metrics["rejected"], strict=True)]
    assert logged["rewards/accuracies"] == pytest.approx(sum(right) / len(rows))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert step.keys() == gradients.keys()
    for name, gradient in gradients.items():
        wanted = torch.zeros_like(step[name]) if gradient is None else gradient
        torch.testing.assert_close(step[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    "family, emotion", [("gpt2", None), *(pytest.param(one, "emotion", marks=pytest.mark.slow) for one in BIGGER)]
)
def test_at_its_start_every_llm_is_its_own_reference(family: str, emotion, rows, tmp_path: Path) -> None:
    """In the precision of published towers, with a BOS, through dropout, without an emotion tower: −log σ(0)."""
    towers = save_towers(tmp_path / "towers", dtype=torch.bfloat16, text_dtype=torch.bfloat16)
    tiny_llm(family).to(torch.bfloat16).save_pretrained(towers / "llm")
    model = ReLLMForConditionalGeneration.from_towers(
        towers / "speech",
        towers / "llm",
        emotion and towers / emotion,
        lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.5},
        emotion_fusion="concat" if emotion else "none",
        projector_inner_dim=16,
    )
    fill_lora(model)
    model.save_pretrained(tmp_path / "start", light=True)
    tiny_processor(model.config, adds_bos=family == "gemma").save_pretrained(tmp_path / "start")
    trainer = make_trainer(tmp_path / "start", tmp_path / "run", rows, learning_rate=0.1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logged["rewards/chosen"] == logged["rewards/rejected"] == 0 != logged["grad_norm"]


def test_frozen_towers_hear_a_pair_once_for_both_replies_and_the_reference(start: Path, rows, tmp_path: Path) -> None:
    trainer = make_trainer(start, tmp_path, rows)
    base, passes = trainer.model.base_model, []
    for module in (base.audio_tower.layers[0], base.emotion_tower):
        module.register_forward_pre_hook(lambda module, args: passes.append((type(module).__name__, len(args[0]))))
    trainer.train()
    for kind in ("WhisperEncoderLayer", "ReLLMEmotionModel"):
        assert sum(count for name, count in passes if name == kind) == 7  # six clips, one of which has two windows


@pytest.mark.slow
def test_however_an_update_is_divided_its_gradient_is_the_same(start: Path, rows, tmp_path: Path) -> None:
    steps = []
    for size, accumulated in ((1, 8), (4, 2), (3, 3)):  # the last takes 3, 3 and 2
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        more = [*rows, *(row | {"id": f"again {row['id']}", "emotion": row["emotion"][:0]} for row in rows)]
        more = [row | {"emotion": row["emotion"] or [None] * len(row["arousal"])} for row in more]
        trainer = make_trainer(start, tmp_path / str(size), more, **settings)
        move(trainer.model)
        steps.append(step_of(trainer))
    for other in steps[1:]:
        for name, gradient in steps[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_has_the_reference_that_it_began_with(start: Path, rows, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    settings |= {"learning_rate": 1e-2, "gradient_accumulation_steps": 1, "train_sampling_strategy": "random"}
    whole = make_trainer(start, tmp_path / "run", rows, **settings)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    again = make_trainer(start, tmp_path / "again", rows, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(again.model, whole.model)
    logs = [one.state.log_history[3] for one in (whole, again)]
    assert logs[0]["step"] == 4 and logs[0]["rewards/margins"] == logs[1]["rewards/margins"] != 0
    assert (checkpoint / "model.safetensors").stat().st_size < (checkpoint / "optimizer.pt").stat().st_size  # light
    before = {id(parameter): weight for parameter, weight in again.reference.weights}
    began = ReLLMForConditionalGeneration.from_pretrained(start)
    for name, parameter in again.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(before[id(parameter)], began.get_parameter(name))


def test_the_reference_is_in_place_under_autocast_too() -> None:
    """Which keeps casts of a parameter by its object, whatever tensor is in it."""
    layer, inputs = torch.nn.Linear(4, 4), torch.randn(2, 4)
    reference = StartingWeights(layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        began = layer(inputs)
        layer.weight.add_(1.0)
        torch.clear_autocast_cache()
        moved = layer(inputs)
        with reference.in_place():
            assert torch.equal(layer(inputs), began)
        assert torch.equal(layer(inputs), moved) and not torch.equal(moved, began)


@pytest.mark.slow
def test_an_evaluation_measures_pairs_and_heads_and_shows_replies(start: Path, rows, tmp_path: Path) -> None:
    trainer = make_trainer(start, tmp_path, rows, eval_rows=rows, per_device_eval_batch_size=3, log_completions=2)
    move(trainer.model)
    metrics = trainer.evaluate()
    models = trainer.model.eval(), ReLLMForConditionalGeneration.from_pretrained(start).eval()
    loss, found = losses_by_hand(*models, trainer.processing_class, rows)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    predicted = trainer.predict(trainer.eval_dataset).metrics
    assert predicted["test_preference_loss"] == pytest.approx(metrics["eval_preference_loss"])
    assert {"eval_preference_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_ua"} <= metrics.keys()
    lines = [json.loads(line) for line in (tmp_path / "_completions/completions_00000.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reply_of_row"]) for line in lines] == [("row-0", CHOSEN[0]), ("row-2", CHOSEN[2])]


@pytest.mark.slow
def test_an_augmented_clip_is_the_same_for_both_replies(start: Path, rows, tmp_path: Path) -> None:
    settings = {"augment_speed": [0.5, 0.6], "augment_probability": 1.0, "dimension_loss": "ccc"}
    trainer = make_trainer(start, tmp_path, rows, per_device_train_batch_size=4, **settings)
    plain = trainer.data_collator(rows)["input_ids"]
    batch = next(iter(trainer.get_train_dataloader()))
    counts = (batch["input_ids"] == trainer.processing_class.audio_token_id).sum(1)
    assert counts[:4].tolist() == counts[4:].tolist()
    assert (counts[:4] > (plain[:4] == trainer.processing_class.audio_token_id).sum(1)).all()  # slower is longer
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"audio": None}, "1 of 4 rows are no pairs: Row 'row-0' has no audio"),
        ({"audio": None, "messages": asked(text_part("Hello"))}, "has no audio"),
        ({"audio": None, "messages": asked(audio_part(None))}, "has no audio"),
        ({"audio": None, "messages": asked(audio_part(OWN), audio_part(None))}, "has no audio, or a place for some"),
        ({"audio": None, "audios": [OWN]}, "has no audio"),  # a list is for the places in messages
        ({"messages": asked(audio_part(OWN))}, "has clips in its columns and others in its messages"),
        ({"messages": asked(audio_part(OWN), audio_part(None))}, "has clips in its columns and others"),
        ({"messages": asked(audio_part(None)), "audios": [OWN, OWN]}, "has 2 clips in its columns and 1 places"),
        ({"chosen": None, "rejected": None}, "needs `chosen` and `rejected`, a text each"),
        ({"rejected": " "}, "needs `chosen` and `rejected`, a text each"),
        ({"rejected": CHOSEN[0]}, "one reply as `chosen` and as `rejected`"),
    ],
    ids=str,
)
def test_a_row_that_is_no_pair_is_an_error(start: Path, rows, tmp_path: Path, change: dict, message: str) -> None:
    wrong = [rows[0] | change, *rows[1:]]
    with pytest.raises(ValueError, match=message):
        make_trainer(start, tmp_path, wrong)
    collate = PreferenceCollator(ReLLMProcessor.from_pretrained(start), EMOTIONS)
    with pytest.raises(ValueError, match=message.rpartition(": ")[2]):  # of a stream, whose rows nobody has seen
        collate(wrong)


def test_clips_that_are_bytes_are_counted_unread() -> None:
    one = {"audio": {"path": None, "bytes": b"0"}, "audios": [{"path": None, "bytes": b"1"}] * 2}
    clips = Dataset.from_list([one, {"audio": None, "audios": None}, {"audio": None, "audios": []}])
    found = [(row["audio"], row["audios"]) for row in unread_rows(clips)]
    assert found == [(True, [True, True]), (None, []), (None, [])]
    assert next(unread_rows(Dataset.from_list([{"audio": "a.wav", "audios": ["b.wav"]}])))["audios"] == ["b.wav"]


def test_rows_without_any_column_of_a_pair_are_counted() -> None:
    with pytest.raises(ValueError, match="2 of 2 rows are no pairs: .* needs `chosen` and `rejected`"):
        ReLLMDPOTrainer.check_rows(Dataset.from_list([{"audio": "a.wav"}, {"audio": "b.wav"}]), ReLLMDPOConfig())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is set, .*a copy of what trains"),
        ({"sync_ref_model": True}, "sync_ref_model is set"),
        ({"loss_type": ["sigmod"]}, r"loss_type has \['sigmod'\]"),
        ({"truncation_mode": "keep_end"}, "truncation_mode is set, .* nothing is cut"),
        ({"dataset_num_proc": 2}, "dataset_num_proc is set"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is set"),
        ({"pad_token": "<pad>"}, "pad_token is set, .* it is the tokenizer's"),
        ({"max_length": 512}, "max_length=512 would cut through audio"),
        ({"response_loss_weight": 0.0}, "response_loss_weight must be > 0"),
        ({"train_sampling_strategy": "group_by_length"}, "does not know the length of a pair"),
        ({"fsdp": "full_shard"}, "fsdp is set.*Use DDP"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_loads(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReLLMDPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def train_rank(start: Path, rows: list[dict], out: Path) -> None:
    trainer = make_trainer(start, out, rows, per_device_train_batch_size=1, save_strategy="no")
    move(trainer.model)
    step = step_of(trainer)
    if trainer.is_world_process_zero():
        torch.save((step, trainer.state.log_history[0]), out / "step.pt")


@pytest.mark.slow
def test_two_processes_are_one(start: Path, rows, tmp_path: Path, fork_server) -> None:
    ranks = fork_server.run_ranks(train_rank, start, rows, tmp_path)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:]
    found, logged = torch.load(tmp_path / "step.pt")
    trainer = make_trainer(start, tmp_path / "one", rows)
    move(trainer.model)
    for name, gradient in step_of(trainer).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    for name in ("loss", "preference_loss", "emotion_loss", "rewards/margins"):
        assert logged[name] == pytest.approx(trainer.state.log_history[0][name], rel=1e-4), name


def arguments_of(start: Path, rows: list[dict], out: Path) -> list[str]:
    pairs = out.parent / "pairs.jsonl"
    splits = ["train", "train", "validation", "train"]
    lines = [json.dumps(row | {"split": split}) for row, split in zip(rows, splits, strict=True)]
    pairs.write_text("\n".join(lines) + "\n")
    small = ["--dtype", "float32", "--bf16", "false", "--use_cpu", "true", "--dataloader_num_workers", "0"]
    small += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--save_steps", "2"]
    flags = ["--model_name_or_path", str(start), "--data", str(pairs), "--held_out", "", "--disable_tqdm", "true"]
    return ["--config", str(RECIPE), *flags, *small, "--output_dir", str(out)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_recipe_trains_and_says_what_it_is(start: Path, rows, tmp_path: Path) -> None:
    arguments = arguments_of(start, rows, tmp_path / "run")
    settings = {"task": "score-replies", "weights": {"ER": 1.0, "length": -0.1}}
    (tmp_path / "pairs.report.json").write_text(json.dumps({"settings": settings}))
    trainer = run_dpo(*parse_dpo(arguments))
    assert isinstance(trainer, ReLLMDPOTrainer) and trainer.state.global_step == 3
    record = json.loads((tmp_path / "run" / "training_settings.json").read_text())
    assert (record["method"], record["beta"], record["steps_done"]) == ("dpo", 0.1, 3)
    assert describe_rewards(record) == "ER × 1, length × −0.1"  # on the card
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text())["eval_preference_loss"] > 0
    assert_same_weights(ReLLMForConditionalGeneration.from_pretrained(tmp_path / "run"), trainer.model)
    with pytest.raises(RunComplete):
        run_dpo(*parse_dpo(arguments))
    with pytest.raises(ValueError, match="beta: 0.1, now 0.2"):
        run_dpo(*parse_dpo([*arguments, "--beta", "0.2"]))


def test_the_command_takes_its_method_from_a_recipe_or_a_flag(start: Path, rows, tmp_path: Path) -> None:
    arguments = arguments_of(start, [rows[0] | {"audio": None}, *rows[1:]], tmp_path / "run")
    said = CliRunner().invoke(app, ["train", *arguments])
    assert said.exit_code == 1 and "rows are no pairs" in said.stderr
    said = CliRunner().invoke(app, ["train", "--method", "ppo", *arguments])
    assert said.exit_code == 2 and "method is 'ppo'; it is one of sft, dpo" in said.stderr
    said = CliRunner().invoke(app, ["plan", *arguments])
    assert said.exit_code == 2 and "method: dpo is not planned" in said.stderr
    (tmp_path / "fresh.yaml").write_text("method: dpo\naudio_tower: a\ntext_model: b\nemotion_fusion: none\ndata: d\n")
    said = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "fresh.yaml"), "--out", str(tmp_path / "x")])
    assert said.exit_code == 1 and "give model_name_or_path" in said.stderr
