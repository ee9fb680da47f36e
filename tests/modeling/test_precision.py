"""Towers as they lie on disk, in each precision that a checkpoint is asked for; what was trained stays float32."""

from pathlib import Path

import pytest
import torch
from light_checkpoints import build, save_towers, trained_names
from peft.tuners.lora.layer import LoraLayer
from tiny_models import (
    LORA,
    RATE,
    audio_inputs,
    clip,
    fill_lora,
    tiny_config,
    tiny_emotion_tower,
    tiny_model,
    tiny_processor,
)
from torch import Tensor, nn
from trainers import make_rows, make_trainer
from transformers import AutoModel, BitsAndBytesConfig
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.cli import app
from relllm.cli.talking import load_relllm
from relllm.demo.tiny_towers import make_tiny_towers
from relllm.evaluation.asking import Questions
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.predicting import load_predictor
from relllm.inference.inference_settings import CheckpointSettings
from relllm.modeling import emotion_tower_relllm
from relllm.modeling.audio_tower_relllm import masked_mean
from relllm.modeling.checkpoint_relllm import NEVER_QUANTIZED, quantize_llm_alone
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.modeling.projector_relllm import ConvProjector
from relllm.training.building import build_model
from relllm.training.config import ReLLMScriptArguments

HALVES = (torch.bfloat16, torch.float16)
ASKED = (None, "auto", torch.float32, *HALVES)
BUILT = {  # of the speech and emotion towers, and of the LLM
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "as published": (torch.float32, torch.bfloat16),
}


@pytest.fixture(scope="module", params=BUILT)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model of towers on disk, without `dtype`, and the folder with its checkpoints, full and light."""
    folder = tmp_path_factory.mktemp("built")
    towers = save_towers(folder, dtype=BUILT[request.param][0], text_dtype=BUILT[request.param][1])
    model = build(towers, emotion_fusion="token" if request.param == "bfloat16" else "concat").eval()
    processor = tiny_processor(model.config)
    for kind in ("full", "light"):
        model.save_pretrained(folder / kind, light=kind == "light")
        processor.save_pretrained(folder / kind)
    return model, folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers as they are published: speech and emotion in float32, the LLM in bfloat16."""
    return save_towers(tmp_path_factory.mktemp("published"), text_dtype=torch.bfloat16)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    return tiny_processor(model.config).apply_request(clip(0.5))


def assert_trained_alike(found: nn.Module, expected: nn.Module) -> None:
    """What trains is the same to the bit, and float32."""
    assert trained_names(found) == trained_names(expected)
    for name in trained_names(expected):
        weight = found.get_parameter(name)
        assert weight.dtype == torch.float32 and torch.equal(weight, expected.get_parameter(name).float()), name


def test_a_model_of_published_towers_hears_replies_and_takes_the_llms_precision(built) -> None:
    model, _ = built
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    assert frozen == {model.dtype}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    inputs = inputs_of(model)
    assert model(**inputs).logits.dtype == model.dtype
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("kind", ["full", "light"])
@torch.no_grad()
def test_each_load_hears_and_replies_in_the_precision_that_was_asked_for(built, kind: str, asked) -> None:
    model, folder = built
    loaded = AutoModel.from_pretrained(folder / kind, **({} if asked is None else {"dtype": asked}))
    expected = asked if isinstance(asked, torch.dtype) else model.dtype
    assert {weight.dtype for weight in loaded.parameters() if not weight.requires_grad} == {expected}
    assert loaded.dtype == expected
    assert_trained_alike(loaded, model)
    inputs = inputs_of(model)
    output, wanted = loaded(**inputs), model(**inputs)
    assert output.logits.dtype == expected and output.emotion_logits.dtype == torch.float32
    difference = (output.logits.float() - wanted.logits.float()).abs().mean()
    assert difference < 0.05 * wanted.logits.float().std()
    assert loaded.generate(**inputs, max_new_tokens=2).shape == (1, inputs["input_ids"].shape[1] + 2)
    positions = loaded.get_audio_features(**audio_inputs(inputs)).pooler_output
    assert positions.isfinite().all() and positions.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "asked"), [("full", None), ("light", torch.bfloat16)])
def test_a_training_step_on_it_is_saved_and_comes_back_to_the_bit(asked, kind: str, built, tmp_path: Path) -> None:
    _, folder = built
    model = AutoModel.from_pretrained(folder / kind, **({} if asked is None else {"dtype": asked}))
    before = {name: model.get_parameter(name).clone() for name in trained_names(model)}
    options = {"learning_rate": 1e-3, "light_checkpoints": kind == "light"}
    trainer = make_trainer(make_rows(tmp_path), tmp_path / "run", tiny_processor(model.config), model, **options)
    trainer.train()
    assert any(not torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    trainer.save_model()
    for again in (None, *HALVES):
        loaded = AutoModel.from_pretrained(tmp_path / "run", **({} if again is None else {"dtype": again}))
        assert_trained_alike(loaded, model)
        assert loaded.dtype == (again or model.dtype)


def test_a_tower_that_trained_comes_back_in_float32_as_well(published: Path, tmp_path: Path) -> None:
    model = build(published)
    for tower in (model.model.audio_tower, model.model.emotion_tower):
        tower.float().requires_grad_(True)
        for weight in tower.parameters():
            weight.data += 1e-4
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    for kind in ("full", "light"):
        loaded = AutoModel.from_pretrained(tmp_path / kind)
        assert loaded.dtype == torch.bfloat16 and loaded.model.audio_tower.dtype == torch.float32
        state = loaded.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
        loaded.generate(**inputs_of(model), max_new_tokens=2)
    loaded.model.to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "rounded")
    assert AutoModel.from_pretrained(tmp_path / "rounded").model.audio_tower.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_tower_comes_back_in_the_precision_in_which_it_was_saved(half: torch.dtype, tmp_path: Path) -> None:
    model = build(save_towers(tmp_path))
    model.model.audio_tower.to(half)
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    for kind in ("full", "light"):
        loaded = AutoModel.from_pretrained(tmp_path / kind)
        assert (loaded.model.audio_tower.dtype, loaded.model.emotion_tower.dtype) == (half, torch.float32)
        assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
        assert torch.equal(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)
        for asked in (torch.float32, torch.bfloat16, "float16"):
            loaded = AutoModel.from_pretrained(tmp_path / kind, dtype=asked)
            assert {loaded.dtype} == {weight.dtype for weight in loaded.parameters() if not weight.requires_grad}


def test_auto_leaves_each_tower_as_its_checkpoint_says(published: Path, tmp_path: Path) -> None:
    model = build(published, dtype="auto")
    model.save_pretrained(tmp_path)
    for found in (model, AutoModel.from_pretrained(tmp_path)):
        towers = (found.model.audio_tower, found.model.emotion_tower, found.model.text_model)
        assert [tower.dtype for tower in towers] == [torch.float32, torch.float32, torch.bfloat16]
        assert found(**inputs_of(model)).logits.dtype == torch.bfloat16


def test_a_precision_for_each_part_is_refused(published: Path, tmp_path: Path) -> None:
    build(published).save_pretrained(tmp_path)
    asked = {"": torch.float32, "text_config": torch.bfloat16}
    with pytest.raises(ValueError, match="names a precision for each part, and a ReLLM takes one"):
        AutoModel.from_pretrained(tmp_path, dtype=asked)
    with pytest.raises(ValueError, match="names a precision for each part"):
        build(published, dtype=asked)


def test_what_merge_writes_is_what_was_trained(published: Path, tmp_path: Path) -> None:
    model = build(published)
    model.save_pretrained(tmp_path / "light", light=True)
    tiny_processor(model.config).save_pretrained(tmp_path / "light")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "light"), "--out", str(tmp_path / "full")])
    assert done.exit_code == 0, done.output
    merged = AutoModel.from_pretrained(tmp_path / "full")
    assert_trained_alike(merged, model)
    assert merged.dtype == torch.bfloat16


@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@torch.no_grad()
def test_a_global_lora_merges_into_an_llm_in_half_precision(published: Path, safe: bool) -> None:
    model = build(published, lora_scope="global").eval()
    inputs = inputs_of(model)
    expected = model(**inputs).logits.float()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for change in (lambda layer: layer.merge(safe_merge=safe), lambda layer: layer.unmerge()):
        for layer in layers:
            change(layer)
            assert layer.get_base_layer().weight.dtype == torch.bfloat16
        assert (model(**inputs).logits.float() - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_commands_load_in_the_precision_that_they_are_told(published: Path, tmp_path: Path, dtype: str) -> None:
    model = build(published)
    model.save_pretrained(tmp_path, light=True)
    tiny_processor(model.config).save_pretrained(tmp_path)
    place = str(tmp_path)
    serves, processor = load_relllm(CheckpointSettings(model=place, device="cpu", dtype=dtype))
    settings = EvaluationSettings(place, "rows", tmp_path, dtype=dtype)
    evaluates = load_predictor(settings, "re-llm", Questions(("recognition",), ("neutral", "sad")), "cpu").model
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "projector_inner_dim": 16}
    trains, _ = build_model(ReLLMScriptArguments(model_name_or_path=place, dtype=dtype, data="rows", **lora))
    for loaded in (serves, evaluates, trains):
        assert loaded.dtype == loaded.model.audio_tower.dtype == getattr(torch, dtype)
        assert_trained_alike(loaded, model)
        loaded.generate(**processor.apply_request(clip(0.5)), max_new_tokens=1)


def taps_off_centre(convolutions: list[nn.Conv1d]) -> list[Tensor]:
    """Gradients that are zero where the input was one frame, the others being the convolution's zeros."""
    grads = [conv.weight.grad.clone() for conv in convolutions]
    for grad in grads:
        grad[..., grad.shape[-1] // 2] = 0
    return grads


def test_one_frame_gives_the_projector_its_gradient_in_bfloat16() -> None:
    """oneDNN leaves parts of it unwritten; it is made where NaN lay before."""
    torch.manual_seed(0)
    projector = ConvProjector(tiny_config()).bfloat16()
    frames, length = (
        torch.randn(2, 1, projector.config.projector_input_size, dtype=torch.bfloat16),
        torch.ones(2).long(),
    )
    first, shows = projector.conv_layers[0], False
    for direct in (True, False):
        for _ in range(10):
            projector.zero_grad()
            junk = [torch.full_like(conv.weight, torch.nan) for conv in projector.conv_layers for _ in range(4)]
            del junk
            if direct:
                first(frames.transpose(1, 2)).float().sum().backward()
                shows |= not all((grad == 0).all() for grad in taps_off_centre([first]))
            else:
                projector(frames, length).hidden_states.float().square().sum().backward()
                assert all((grad == 0).all() for grad in taps_off_centre(list(projector.conv_layers)))
    if not shows:
        pytest.skip("this processor writes the whole gradient")


# --- quantised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "light"])
@pytest.mark.parametrize("bits", [4, 8])
def test_in_4_and_8_bit_the_llm_alone_is_quantised(bits: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_tiny_towers(tmp_path)  # whose widths fit bitsandbytes' blocks of 64
    model = ReLLMForConditionalGeneration.from_towers(
        tmp_path / "speech", tmp_path / "llm", tmp_path / "emotion", lora=LORA, dtype=torch.bfloat16
    )
    fill_lora(model)
    model.save_pretrained(tmp_path / kind, light=kind == "light")
    own = ["down_proj"] if bits == 4 else None
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=own)
    loaded = AutoModel.from_pretrained(tmp_path / kind, quantization_config=settings)
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules()}
    taken = {name for name, found in kinds.items() if found in ("Linear4bit", "Linear8bitLt")}
    body = {name for name in kinds if ".text_model.model.layers." in name and name.endswith("base_layer")}
    assert taken == {name for name in body if own is None or "down_proj" not in name} and taken
    assert settings.llm_int8_skip_modules == own
    assert_trained_alike(loaded, model)
    inputs = ReLLMProcessor.from_config(model.config, tmp_path / "llm").apply_request(clip(0.5))
    found, expected = loaded(**inputs), model(**inputs)
    assert torch.equal(found.emotion_logits, expected.emotion_logits)
    difference = (found.logits.float() - expected.logits.float()).abs().mean()
    assert difference < (0.3 if bits == 4 else 0.05) * expected.logits.float().std()
    assert loaded.generate(**inputs, max_new_tokens=2).shape[0] == 1
    loaded.save_pretrained(tmp_path / "again")
    assert_trained_alike(AutoModel.from_pretrained(tmp_path / "again"), model)


def test_a_users_own_list_of_what_is_not_quantised_is_joined_to_ours() -> None:
    given = {"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": ["q_proj"]}
    found = quantize_llm_alone(given).modules_to_not_convert
    assert found == ["q_proj", "q_proj.base_layer", *NEVER_QUANTIZED]
    with pytest.raises(ValueError, match="AqlmConfig has no list of modules to leave out"):
        quantize_llm_alone({"quant_method": "aqlm"})


# --- means -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_means_over_many_frames_are_those_of_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """1499 in bfloat16 is 1496, and the sum of these frames is no float16."""
    lengths = torch.tensor([1499, 701])
    frames = (60 + torch.randn(2, 1499, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = torch.stack([row[:size].double().mean(0) for row, size in zip(frames, lengths, strict=True)])
    assert torch.equal(masked_mean(frames, lengths), expected.to(dtype))
    tower = tiny_emotion_tower().to(dtype)
    wide = frames.repeat(1, 1, tower.config.hidden_size // 4)
    encoded = BaseModelOutput(last_hidden_state=wide), lengths
    monkeypatch.setattr(emotion_tower_relllm, "encode_audio", lambda *_: encoded)
    embedding = tower(torch.zeros(2, RATE, dtype=dtype)).embedding
    assert torch.equal(embedding[:, :4], expected.to(dtype)) and embedding.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_means_over_windows_are_those_of_float64(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    lengths, windows = torch.tensor([1499, 1499, 701]), torch.tensor([3])
    generator = torch.Generator().manual_seed(0)
    width, emotion = model.config.audio_config.hidden_size, model.config.emotion_config.hidden_size
    frames, embedding, dimensions = (
        torch.rand(3, *shape, generator=generator).to(dtype) for shape in ((1499, width), (emotion,), (3,))
    )
    towers = TowerOutputs(frames, lengths, emotion_embedding=embedding, dimensions=dimensions)
    heard = model.get_audio_features(tower_outputs=towers, audio_num_windows=windows)
    share = (lengths.double() / lengths.sum())[:, None]
    for found, given in ((heard.emotion_embedding, embedding), (heard.tower_dimensions, dimensions)):
        assert torch.equal(found, (share * given.double()).sum(0, keepdim=True).to(dtype))
    exact = tiny_model().get_audio_features(tower_outputs=towers, audio_num_windows=windows)
    torch.testing.assert_close(heard.emotion_logits.float(), exact.emotion_logits, rtol=0.05, atol=0.05)
