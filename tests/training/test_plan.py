"""The plan of a run: parameters exactly, memory beside what a real step allocates, speed, the command."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import clip, tiny_config, tiny_emotion_config, tiny_processor, tiny_text_config, tiny_tokenizer
from transformers import AutoConfig
from typer.testing import CliRunner

import relllm.training.planning.memory as plan_memory_module
from relllm import ReLLMConfig, ReLLMForConditionalGeneration
from relllm.cli import app
from relllm.modeling import audio_tower_relllm, lora_relllm
from relllm.training import alignment
from relllm.training.alignment import Alignment, return_heads
from relllm.training.freezing import prepare_trainable, trainable_table
from relllm.training.planning.memory import RowSize, StepSettings, TrainingStep, count_audio_positions
from relllm.training.planning.micro_batch import step_settings
from relllm.training.planning.plan import PlanArguments, parse_bytes, parse_plan

LORA = {"r": 8, "lora_alpha": 8}
FLOAT32 = StepSettings(torch.float32, bf16=False, gradient_checkpointing=False, full_window=False)
BFLOAT16 = StepSettings(torch.bfloat16, bf16=True, gradient_checkpointing=False, full_window=False)
ROW = RowSize(audio_seconds=1.9, prompt_tokens=100, reply_tokens=100)
VOCAB_SIZE, BATCH_SIZE = 320, 4
LARGE_VOCAB_SIZE = 2**14  # of which the logits are more than the rest of a step


def small_config(lora: dict | None = LORA, family: str = "llama", vocab_size: int = VOCAB_SIZE) -> ReLLMConfig:
    """A LLM whose layers outweigh everything else, as in a real one."""
    config = tiny_config(lora=lora)
    text = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return ReLLMConfig(
        audio_config=config.audio_config,
        emotion_config=config.emotion_config,
        text_config=text,
        audio_token_id=config.audio_token_id,
        projector_inner_dim=16,
        lora_config=dict(lora) if lora else None,
    )


def with_checkpointing(settings: StepSettings) -> StepSettings:
    return replace(settings, gradient_checkpointing=True)


def with_teacher(settings: StepSettings) -> StepSettings:
    return replace(settings, teacher=True)


class RealStep:
    """One training step as the trainer makes it: scoped LoRA, fused head, autocast, a padded batch."""

    def __init__(self, config: ReLLMConfig, settings: StepSettings, positions: int) -> None:
        from trl.trainer.utils import add_fused_lm_head

        self.model = ReLLMForConditionalGeneration(config).to(settings.dtype).train()
        prepare_trainable(self.model, settings.unfreeze)
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        add_fused_lm_head(self.model)
        extractor = tiny_processor(config, full_window=settings.full_window).feature_extractor
        self.inputs = dict(extractor([clip(ROW.audio_seconds, seed=seed) for seed in range(BATCH_SIZE)]))
        self.audio_positions = self.inputs.pop("num_audio_tokens")[0]
        input_ids = torch.randint(5, 250, (BATCH_SIZE, positions))
        input_ids[:, : self.audio_positions] = config.audio_token_id
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, -3:] = 0
        labels = input_ids.clone()
        labels[:, : -ROW.reply_tokens] = -100
        self.inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        self.inputs["audio_positions"] = (input_ids == config.audio_token_id).flatten().nonzero().squeeze(1)
        return_heads(self.model, Alignment(temperature=2.0, shifted=True) if settings.teacher else None)
        if settings.teacher:
            read = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            self.inputs |= {f"teacher_{name}": values[:, self.audio_positions :] for name, values in read.items()}
        self.bf16 = settings.bf16

    def loss(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(**self.inputs, fused_lm_head=True)
        return output.loss + output.get("response_kl", 0.0)

    def saved_bytes(self) -> int:
        """What autograd keeps, weights apart."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.loss()
        return sum(saved.values())

    def peak_bytes(self) -> int:
        """The most that a forward and a backward pass have allocated at once."""
        gc.collect()  # what earlier tests left behind is not to be freed in between
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
            self.loss().backward()
        now = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak


@pytest.fixture
def as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step as an accelerator runs it: the LoRA by copies of its weights, Transformers' convolutions in the towers.

    And the fused head's buffer holds 32768 words, whatever the vocabulary; with 320 it would be all there is to see. A
    tile of the KL is as much smaller.
    """
    monkeypatch.setattr(lora_relllm, "WITHOUT_COPIES", ())
    monkeypatch.setattr(audio_tower_relllm, "can_convolve", lambda layers, waveforms: False)
    monkeypatch.setattr(alignment, "TILE_WORDS", 2**20)
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"):
        pytest.skip("this TRL trains by the model's own forward")
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", VOCAB_SIZE)
    monkeypatch.setattr(plan_memory_module, "HEAD_TILE_WORDS", VOCAB_SIZE)


UNFROZEN = StepSettings(
    torch.float32, bf16=False, gradient_checkpointing=False, full_window=False, unfreeze=("text_model",)
)


@pytest.mark.parametrize(
    ("settings", "lora"),
    [(FLOAT32, LORA), (FLOAT32, None), (BFLOAT16, LORA), (UNFROZEN, None)],
    ids=["float32", "no LoRA", "bfloat16", "unfrozen LLM"],
)
def test_activations_are_what_autograd_keeps_within_a_tenth(as_planned, settings, lora) -> None:
    plan = TrainingStep(small_config(lora), settings, ROW)
    step = RealStep(small_config(lora), settings, plan.sequence)
    assert step.audio_positions == plan.audio_positions
    assert plan.memory(BATCH_SIZE).activations == pytest.approx(step.saved_bytes(), rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        FLOAT32,
        with_checkpointing(FLOAT32),
        BFLOAT16,
        with_checkpointing(BFLOAT16),
        with_teacher(FLOAT32),
        with_teacher(with_checkpointing(BFLOAT16)),
    ],
    ids=["float32", "float32 checkpointing", "bfloat16", "bfloat16 checkpointing", "KL", "KL bfloat16 checkpointing"],
)
def test_the_peak_is_about_what_a_step_allocates(as_planned, settings: StepSettings) -> None:
    vocab_size = LARGE_VOCAB_SIZE if settings.teacher else VOCAB_SIZE
    planned = TrainingStep(small_config(vocab_size=vocab_size), settings, ROW)
    plan = planned.memory(BATCH_SIZE)
    step = RealStep(small_config(vocab_size=vocab_size), settings, planned.sequence)
    measured = max(step.peak_bytes() for _ in range(2))
    # Too large by a third at most, which wastes memory, and too small by a quarter, which runs out of it. What the
    # profiler counts of the same step differs by 6 % from one process to the next.
    assert 0.75 < (plan.total - plan.weights - plan.optimizer) / measured < 1.34


@pytest.mark.parametrize("settings", [FLOAT32, BFLOAT16, UNFROZEN], ids=["float32", "bfloat16", "unfrozen"])
def test_weights_gradients_and_optimiser_are_exact(settings: StepSettings) -> None:
    config = small_config()
    model = ReLLMForConditionalGeneration(small_config()).to(settings.dtype)
    prepare_trainable(model, settings.unfreeze)
    step = TrainingStep(config, settings, ROW)
    plan = step.memory(1)
    assert trainable_table(step.model) == trainable_table(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert plan.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sum(parameter.sum() for parameter in trained).backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [state for entry in optimizer.state.values() for state in entry.values() if state.ndim]
    assert plan.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert plan.optimizer == sum(state.nbytes for state in states)


def test_planning_allocates_no_weights() -> None:
    model = TrainingStep(small_config(), FLOAT32, ROW).model
    allocated = {name for name, parameter in model.named_parameters() if parameter.device.type != "meta"}
    assert allocated <= {"model.emotion_tower.wav2vec2.masked_spec_embed"}  # one vector, which wav2vec2 draws at once


@pytest.mark.parametrize("audio_s", [0.3, 1.0, 1.9])
@pytest.mark.parametrize("fusion", ["concat", "token"])
def test_audio_positions_are_the_processors_within_one(audio_s: float, fusion: str) -> None:
    config = tiny_config(fusion=fusion)
    counted = tiny_processor(config).feature_extractor(clip(audio_s))["num_audio_tokens"][0]
    assert abs(count_audio_positions(config, audio_s) - int(counted)) <= 1


def test_what_saves_memory_saves_it_in_the_plan() -> None:
    def total(**changes: object) -> float:
        settings = StepSettings(**{"gradient_checkpointing": False, "full_window": False, **changes})
        return TrainingStep(small_config(), settings, ROW).memory(BATCH_SIZE).total

    assert total(gradient_checkpointing=True) < total()
    assert total(load_in_4bit=True, gradient_checkpointing=True) < total(gradient_checkpointing=True)
    assert total(optimizer="paged_adamw_8bit") < total()
    assert total(dtype=torch.float32) > total()
    assert total(num_processes=2) > total()
    assert total(unfreeze=("audio_tower",)) > total()


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    step = TrainingStep(small_config(), FLOAT32, ROW)
    memory = step.memory(13).total
    assert step.largest_batch(memory) == 13
    assert step.largest_batch(memory - 1) == 12
    assert step.largest_batch(1000.0) == 0


@pytest.mark.parametrize("family", ["gpt2", "gemma", "qwen3"])
def test_every_kind_of_model_can_be_planned(family: str) -> None:
    config = tiny_config(text=family)
    step = TrainingStep(config, FLOAT32, ROW)
    assert step.memory(2).activations > 0 and step.flops() > 0


def counted_flops(settings: StepSettings, vocab_size: int) -> tuple[float, int]:
    """What the plan and what PyTorch counts of a step."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config(vocab_size=vocab_size)
    plan = TrainingStep(config, settings, ROW)
    step = RealStep(config, settings, plan.sequence)
    step.model.set_attn_implementation("eager")  # the CPU's fused attention is not counted
    with FlopCounterMode(display=False) as counter:
        step.loss().backward()
    return BATCH_SIZE * plan.flops(), counter.get_total_flops()


def test_operations_are_those_that_pytorch_counts_within_a_tenth(as_planned) -> None:
    planned, counted = counted_flops(FLOAT32, VOCAB_SIZE)
    assert planned == pytest.approx(counted, rel=0.10)


def test_operations_of_a_kl_are_those_that_pytorch_counts_within_a_tenth(as_planned) -> None:
    with_kl, without = (counted_flops(one, LARGE_VOCAB_SIZE) for one in (with_teacher(FLOAT32), FLOAT32))
    assert with_kl[0] - without[0] == pytest.approx(with_kl[1] - without[1], rel=0.10)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12), ("4096", 4096.0)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24 gallons", "-3GB", "0GB"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="size such as 24GB"):
        PlanArguments(gpu_memory=text)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Configurations of three towers, without weights, and a recipe on them."""
    tiny_config().audio_config.save_pretrained(tmp_path / "speech")
    tiny_emotion_config().save_pretrained(tmp_path / "emotion")
    tiny_text_config().save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    settings = {
        "audio_tower": tmp_path / "speech",
        "emotion_tower": tmp_path / "emotion",
        "text_model": tmp_path / "llm",
        "data": tmp_path / "no-data-is-read",
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 3,
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return path


def test_the_command_plans_a_recipe_from_configurations_alone(recipe: Path) -> None:
    options = ["--config", str(recipe), "--gpu-memory", "1GB", "--audio_seconds", "1.5", "--optim", "sgd"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for part in (
        "multi_modal_projector",
        "peak",
        "A batch of 3 fits",
        "rows of 1.5 s",
        "optimiser sgd",
        "rows a second",
    ):
        assert part in said
    assert not (recipe.parent / "out").exists()


def test_a_batch_that_does_not_fit_is_exit_status_1(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "--config", str(recipe), "--gpu-memory", "1MB"])
    assert result.exit_code == 1
    assert "does not fit" in result.output and "largest batch is 0" in " ".join(result.output.split())


def test_the_precision_is_the_gpus_unless_the_settings_say_otherwise(recipe: Path) -> None:
    for options, expected in (([], True), (["--bf16", "false"], False)):
        args = parse_plan(["--config", str(recipe), *options])[2]
        assert step_settings(args, torch.float32).bf16 is expected
    recipe.write_text(recipe.read_text() + "bf16: false\n")
    assert step_settings(parse_plan(["--config", str(recipe)])[2], torch.float32).bf16 is False
