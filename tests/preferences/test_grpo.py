"""Reward training from a checkpoint on disk: each number against a formula that goes row by row, without padding."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from grpo_runs import NEEDS_TRL, Vowels, grpo_trainer, save_start, spoken_rows
from processes import ForkServer
from safetensors.torch import load_file
from tiny_models import text_part
from torch.nn import functional

from relllm import EMOTIONS, ReLLMForConditionalGeneration
from relllm.modeling.hearing_relllm import ReLLMHearing
from relllm.preferences import grpo_config
from relllm.preferences.grpo import ReLLMGRPOTrainer
from relllm.preferences.grpo_config import ReLLMGRPOConfig

pytestmark = [pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"), NEEDS_TRL]
GROUP, TEMPERATURE, CLIP, BETA = 4, 0.7, 0.2, 0.5
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "reward"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return spoken_rows(tmp_path_factory.mktemp("clips"))


def in_groups(rows: list[dict]) -> list[dict]:
    return [dict(row) for row in rows for _ in range(GROUP)]


def prompt_of(row: dict, processor) -> dict[str, torch.Tensor]:
    """A row's inputs up to the reply, alone."""
    conversation = row.get("messages") or processor.build_conversation(row["audio"])
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)


def scored_alone(model, processor, row: dict, reply: torch.Tensor):
    """Log-probabilities of a reply to a row, `(tokens,)`, and what the heads say of its clips."""
    inputs = dict(prompt_of(row, processor))
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], reply[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model(**inputs)
    log_probs = (output.logits[0, length - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return log_probs.gather(-1, reply[:, None])[:, 0], output.emotion_logits, output.dimensions


IN_HALF = pytest.param("llama", "bfloat16", marks=pytest.mark.slow)


@pytest.mark.parametrize("llm, dtype", [("llama", "float32"), ("gpt2", "float32"), IN_HALF])
def test_log_probabilities_are_those_of_the_models_forward(
    llm: str, dtype: str, rows: list[dict], tmp_path: Path
) -> None:
    start = save_start(tmp_path, llm, getattr(torch, dtype))
    trainer = grpo_trainer(start, tmp_path / "run", rows, temperature=TEMPERATURE, num_iterations=2)
    assert trainer.model.dtype == getattr(torch, dtype)
    drawn = trainer._generate_and_score_completions(in_groups(rows))
    assert drawn["old_per_token_logps"].shape == drawn["completion_ids"].shape == (4 * GROUP, 6)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.2, "rtol": 0.05}
    for index, row in enumerate(in_groups(rows)):
        reply = drawn["completion_ids"][index][drawn["completion_mask"][index].bool()]
        with torch.no_grad():
            expected, _, _ = scored_alone(trainer.model.eval(), trainer.processing_class, row, reply)
        for name in ("old_per_token_logps", "ref_per_token_logps"):
            torch.testing.assert_close(drawn[name][index, : len(reply)].float(), expected.float(), **near)


def test_replies_are_those_of_generate_with_the_same_seed(start: Path, rows: list[dict], tmp_path: Path) -> None:
    trainer = grpo_trainer(start, tmp_path, rows, temperature=TEMPERATURE, max_completion_length=9)
    torch.manual_seed(5)
    drawn = trainer._generate_and_score_completions(in_groups(rows))
    model, processor = ReLLMForConditionalGeneration.from_pretrained(start), trainer.processing_class
    spoken = [row.get("messages") or processor.build_conversation(row["audio"]) for row in in_groups(rows)]
    inputs = processor.apply_chat_template(spoken, tokenize=True, return_dict=True, add_generation_prompt=True)
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": TEMPERATURE, "max_new_tokens": 9}
    options |= {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}  # the model's own distribution
    expected = model.generate(**inputs, **options, eos_token_id=trainer.eos_token_ids)[
        :, inputs["input_ids"].shape[1] :
    ]
    found = drawn["completion_ids"]
    assert torch.equal(found, expected[:, : found.shape[1]]) and len({tuple(one) for one in found.tolist()}) == 16


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_loss_and_gradients_follow_the_formula(loss_type: str, start: Path, rows: list[dict], tmp_path: Path) -> None:
    weights = {"emotion_loss_weight": 0.3, "dimension_loss_weight": 0.6, "response_loss_weight": 0.8}
    options = {"temperature": TEMPERATURE, "num_iterations": 2, "beta": BETA, "epsilon": CLIP, **weights}
    trainer = grpo_trainer(start, tmp_path, rows, loss_type=loss_type, per_device_train_batch_size=16, **options)
    model, processor = trainer.model.train(), trainer.processing_class
    drawn = trainer._generate_and_score_completions(in_groups(rows))
    replies = [ids[mask.bool()] for ids, mask in zip(drawn["completion_ids"], drawn["completion_mask"], strict=True)]
    torch.manual_seed(1)
    with torch.no_grad():  # an update has moved the model away from where the replies were drawn
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(model, drawn)
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()

    reference = ReLLMForConditionalGeneration.from_pretrained(start)  # the start, and where the replies were drawn
    texts = [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]
    scores = torch.tensor(Vowels()(rows, texts)).view(-1, GROUP)
    advantages = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    assert torch.allclose(drawn["advantages"], advantages, atol=1e-5)
    of_replies, emotions, dimensions, clipped = [], [], [], 0
    for row, reply, advantage in zip(in_groups(rows), replies, advantages, strict=True):
        log_probs, emotion, values = scored_alone(model, processor, row, reply)
        with torch.no_grad():
            before, _, _ = scored_alone(reference, processor, row, reply)
        ratio = (log_probs - before).exp()
        clipped += int(((ratio - 1).abs() > CLIP).sum())
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        kl = (before - log_probs).exp() - (before - log_probs) - 1
        of_replies.append(-gain + BETA * kl * ratio)  # TRL weighs its estimate of the KL by the ratio
        known = [index for index, name in enumerate(row["emotion"]) if name]
        targets = torch.tensor([EMOTIONS.index(row["emotion"][index]) for index in known])
        emotions.append(functional.cross_entropy(emotion[known], targets, reduction="none"))
        arousal = torch.tensor([float("nan") if value is None else value for value in row["arousal"]])
        dimensions.append((values[:, 0] - arousal)[~arousal.isnan()].square())
    policy = (
        torch.cat(of_replies).mean() if loss_type == "dapo" else torch.stack([r.mean() for r in of_replies]).mean()
    )
    expected = 0.8 * policy + 0.3 * torch.cat(emotions).mean() + 0.6 * torch.cat(dimensions).mean()
    assert clipped > 3
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    assert found.keys() == {name for name, one in model.named_parameters() if one.requires_grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4, msg=name)


def updated(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: one.detach() for name, one in trainer.model.named_parameters() if one.requires_grad}


def test_an_update_is_the_same_however_its_replies_are_divided(start: Path, rows: list[dict], tmp_path: Path) -> None:
    whole = updated(grpo_trainer(start, tmp_path, rows, seed=3))
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = updated(grpo_trainer(start, tmp_path, rows, seed=3, gradient_checkpointing=True, **divided))
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_the_reward_rises(start: Path, rows: list[dict], tmp_path: Path) -> None:
    options = {"num_generations": 8, "per_device_train_batch_size": 32, "unfreeze": ["text_model"], "beta": 0.02}
    options |= {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0, "max_completion_length": 12}
    options |= {"optim": "adamw_torch", "learning_rate": 3e-3, "max_grad_norm": 1.0, "max_steps": 20}
    trainer = grpo_trainer(start, tmp_path, rows, **options)
    trainer.train()
    found = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.15  # the share of vowels: from 0.14 to 0.4


def test_the_towers_hear_a_clip_once_for_its_group(start: Path, rows: list[dict], tmp_path: Path, monkeypatch) -> None:
    heard: list[int] = []
    run = ReLLMHearing.run_towers

    def counted(self, *args, **features):
        heard.append(len(features["input_features"]))
        return run(self, *args, **features)

    monkeypatch.setattr(ReLLMHearing, "run_towers", counted)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_iterations": 2}
    trainer = grpo_trainer(start, tmp_path, rows, max_steps=2, learning_rate=0.01, **options)
    trainer.train()
    assert heard == [7]  # windows of six clips: replies, two log-probabilities, two updates of four steps


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(
    start: Path, rows: list[dict], tmp_path: Path
) -> None:
    options = {
        "temperature": TEMPERATURE,
        "max_steps": 5,
        "save_steps": 1,
        "save_strategy": "steps",
        "learning_rate": 0.05,
        "beta": 1.0,
    }
    whole = grpo_trainer(start, tmp_path / "run", rows, **options)
    expected = updated(whole)
    again = grpo_trainer(start, tmp_path / "run", rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))  # within the second epoch
    for name, weight in expected.items():
        assert torch.equal(again.model.get_parameter(name), weight), name
    lines = [[one["kl"] for one in run.state.log_history if "kl" in one] for run in (whole, again)]
    assert lines[0] == lines[1] and lines[0][-1] > 0
    drawn = again._generate_and_score_completions(in_groups(rows[:1]))  # of which the reference is still the start
    with torch.no_grad():
        first = ReLLMForConditionalGeneration.from_pretrained(start)
        expected_log_probs, _, _ = scored_alone(first, again.processing_class, rows[0], drawn["completion_ids"][0])
    found = drawn["ref_per_token_logps"][0]
    torch.testing.assert_close(found, expected_log_probs, atol=1e-5, rtol=1e-5)
    checkpoint = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "checkpoint-5")
    assert all(torch.equal(checkpoint.get_parameter(name), weight) for name, weight in expected.items())


@pytest.mark.slow
def test_an_evaluation_between_updates_leaves_the_replies_in_use(
    start: Path, rows: list[dict], tmp_path: Path
) -> None:
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05, "per_device_eval_batch_size": 8}
    ends = []
    for when in ("no", "steps"):
        trainer = grpo_trainer(start, tmp_path, rows, rows, **options, eval_strategy=when, eval_steps=1)
        ends.append(updated(trainer))
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight), name
    history = next(one for one in trainer.state.log_history if "eval_reward" in one)
    assert {"eval_rewards/vowels/mean", "eval_ua", "eval_kl", "eval_grpo_loss"} <= history.keys()


class GivenReplies(ReLLMGRPOTrainer):
    """Its replies follow from the row and the place in its group: two processes draw each its own."""

    def _draw_replies(self, prompts, trainer):
        generator, seen, replies = torch.Generator(), dict.fromkeys((one.row["id"] for one in self._spoken), 0), []
        for one in self._spoken:
            generator.manual_seed(10 * len(one.input_ids) + seen[one.row["id"]])
            seen[one.row["id"]] += 1
            replies.append(torch.randint(5, 200, (3 + seen[one.row["id"]],), generator=generator).tolist())
        return {"prompt_ids": [one.input_ids for one in self._spoken], "completion_ids": replies, "logprobs": None}


def save_given(start: Path, out: Path, rows: list[dict], at_once: int) -> None:
    options = {"per_device_train_batch_size": at_once, "max_steps": 2, "learning_rate": 0.05, "beta": 1.0}
    options |= {"per_device_eval_batch_size": at_once}  # of the third row's replies on one process alone
    trainer = grpo_trainer(start, out, rows, rows[:3], kind=GivenReplies, **options)
    trainer.train()
    trainer.save_model()
    (out / f"metrics-{trainer.args.process_index}.json").write_text(json.dumps(trainer.evaluate()))


@pytest.mark.slow
def test_two_processes_update_as_one(start: Path, rows: list[dict], fork_server: ForkServer, tmp_path: Path) -> None:
    """What differs are the draws: each process has random numbers of its own."""
    fork_server.run(save_given, start, tmp_path / "one", rows, 8)
    ranks = fork_server.run_ranks(save_given, start, tmp_path / "two", rows, 4)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:] + ranks[1].stderr[-2000:]
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4, msg=name)
    two, one = (json.loads((tmp_path / name / "metrics-0.json").read_text()) for name in ("two", "one"))
    for name in ("eval_ua", "eval_emotion_loss", "eval_dimension_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize(
    "row", [{"id": "x", "audio": None}, {"id": "x", "messages": [{"role": "user", "content": [text_part("hi")]}]}]
)
def test_a_row_without_audio_is_an_error(row: dict, start: Path, rows: list[dict], tmp_path: Path) -> None:
    trainer = grpo_trainer(start, tmp_path, rows)
    with pytest.raises(ValueError, match="Row 'x' has no audio, or a place for some and none"):
        trainer._generate_and_score_completions(in_groups([row]))
    with pytest.raises(ValueError, match=r"1 of 5 rows have no audio.*\(rows 'x'\)"):
        ReLLMGRPOTrainer.check_rows(Dataset.from_list([*rows, {"audio": None, **row}]), ReLLMGRPOConfig(use_cpu=True))


def test_rows_without_what_a_reward_needs_are_named_before_a_model_is_loaded(
    start: Path, rows: list[dict], tmp_path: Path, monkeypatch
) -> None:
    judged = ReLLMGRPOConfig(rewards={"judge": 1, "length": -1}, use_cpu=True)
    texts = [["a", " "], ["", "b"], None, ["c"]]
    wanting = Dataset.from_list([row | {"text": text} for row, text in zip(rows, texts, strict=True)])
    with pytest.raises(ValueError, match=r"2 of 4 rows have no text, which the reward judge needs \(rows '0', '2'\)"):
        ReLLMGRPOTrainer.check_rows(wanting, judged)
    with pytest.raises(ValueError, match="4 of 4 rows have no text"):
        ReLLMGRPOTrainer.check_rows(wanting.select_columns("audio"), judged)
    ReLLMGRPOTrainer.check_rows(wanting.select([1, 3]), judged)
    monkeypatch.setattr(Vowels, "needs", ("text",))  # of Python, by no name
    with pytest.raises(ValueError, match=r"which the reward vowels needs \(rows '2'\)"):
        grpo_trainer(start, tmp_path, [row | {"text": " " if row["id"] == "2" else "hm"} for row in rows])


class Told(Vowels):
    """Knows no number for what `unknown` names, and keeps the rows that it is told."""

    def __init__(self, name: str, unknown: tuple[int, ...] = ()) -> None:
        self.name, self.unknown, self.rows = name, unknown, []

    def __call__(self, rows, replies) -> list[float]:
        self.rows += rows
        values = super().__call__(rows, replies)
        return [float("nan") if index in self.unknown else value for index, value in enumerate(values)]


def test_rewards_are_told_of_the_last_clip_and_a_reply_of_which_one_is_unknown_has_none(
    start: Path, rows: list[dict], tmp_path: Path
) -> None:
    judge, measured = Told("judge", (0,)), Told("measured", (1,))
    rewards = [(Vowels(), 1.0), (judge, 2.0), (measured, 0.0)]
    trainer = grpo_trainer(start, tmp_path, rows, rewards=rewards)
    drawn = trainer._generate_and_score_completions(in_groups([rows[3] | {"text": ["so", "and", "then"]}]))
    assert drawn["advantages"][0] == 0 and bool((drawn["advantages"][1:] != 0).all())
    assert drawn["advantages"][1:].mean().abs() < 1e-6  # their group's baseline does not know the first
    assert [(row["emotion"], row["text"]) for row in judge.rows] == [("happy", "then")] * GROUP


def test_an_emotion_that_no_training_taught_is_not_heard_in_an_evaluation_either(
    start: Path, rows: list[dict], tmp_path: Path
) -> None:
    unlabelled = [{"id": row["id"], "audio": row["audio"]} for row in rows[:2]]
    reward, untaught = Told("emotion"), {"emotion_loss_weight": 0.0, "dimension_loss_weight": 0.0}
    trainer = grpo_trainer(start, tmp_path, unlabelled, unlabelled, rewards=[(reward, 1.0)], readings=[], **untaught)
    trainer.evaluate()
    assert {row["heard"] for row in reward.rows} == {None}
    reward.needs = ("emotion", "heard")
    with pytest.raises(ValueError, match="2 of 2 rows have no emotion or heard"):
        grpo_trainer(start, tmp_path, unlabelled, rewards=[(reward, 1.0)], readings=[], **untaught)


def test_rows_that_accelerate_repeats_have_no_labels(
    start: Path, rows: list[dict], tmp_path: Path, monkeypatch
) -> None:
    trainer = grpo_trainer(start, tmp_path, rows)
    trainer.model.eval()
    monkeypatch.setattr(GradientState, "end_of_dataloader", property(lambda state: True))
    monkeypatch.setattr(GradientState, "remainder", property(lambda state: 5))
    spoken = trainer._listen(in_groups(rows[:2]))
    assert [int(one.labels["emotion_labels"]) >= 0 for one in spoken] == [True] * 5 + [False] * 3
    assert [bool(one.labels["dimension_labels"].isfinite().any()) for one in spoken] == [True] * 5 + [False] * 3
    trainer.model.train()
    assert all(int(one.labels["emotion_labels"]) >= 0 for one in trainer._listen(in_groups(rows[:2])))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_vllm": True}, "use_vllm is set, and reward training cannot go with it: it would need the new weights"),
        ({"sync_ref_model": True}, "no second model"),
        ({"tower_cache_dir": "x"}, "hear a clip once for its group"),
        ({"augment_speed": [0.9, 1.1]}, "augments is set"),
        ({"unfreeze": ["audio_tower"]}, r"unfreeze has \['audio_tower'\]"),
        ({"rewards": "warmth=1"}, "Unknown reward 'warmth'"),
        ({"rewards": "ER"}, "expected names with weights"),
        ({"rewards": "ER=1,ER=2"}, "expected each name once"),
        ({"num_iterations": 3, "save_steps": 2}, "save_steps is 2, .*Take a multiple of 3"),
        ({"num_iterations": 3, "save_steps": 0.1}, "save_steps is 0.1, a share of the steps; .*Give steps"),
        ({"num_iterations": 3, "save_strategy": "best", **EVALUATED}, "eval_steps is 2, .*Take a multiple of 3"),
        ({"train_sampling_strategy": "group_by_length"}, "would part groups"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ReLLMGRPOConfig(output_dir=str(tmp_path), **settings)


def test_an_older_trl_is_refused_by_its_release(monkeypatch) -> None:
    monkeypatch.setattr(grpo_config, "FusedCausalLMOutput", None)
    with pytest.raises(ImportError, match=r"needs TRL 1\.16, and so Python 3\.11; this is TRL \d"):
        ReLLMGRPOConfig(use_cpu=True)


def test_an_evaluation_that_would_part_groups_is_refused(start: Path, rows: list[dict], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 6 replies at once, and a group is 4. Make per_device_eval_batch_size"):
        grpo_trainer(start, tmp_path, rows, rows, per_device_eval_batch_size=6)  # by eval_strategy "no"
    grpo_trainer(start, tmp_path, rows, rows, per_device_eval_batch_size=6, num_generations_eval=3)


def test_tools_are_refused(model, processor) -> None:
    with pytest.raises(ValueError, match="tools: not taken here"):
        ReLLMGRPOTrainer(model, processing_class=processor, rewards=[(Vowels(), 1.0)], tools=[print])


def test_a_launch_that_shards_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP is set.*Use DDP"):
        ReLLMGRPOConfig(output_dir=str(tmp_path))
