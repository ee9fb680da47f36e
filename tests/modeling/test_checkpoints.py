"""What is saved comes back: through each Auto class, in each precision, resized."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    LORA,
    clip,
    conversation_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    user_turn,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import relllm
from relllm import ReLLMConfig, ReLLMFeatureExtractor, ReLLMForConditionalGeneration, ReLLMModel, ReLLMProcessor

AUTO_MODELS = (AutoModel, AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq)
CONVERSATIONS = (
    [user_turn("Listen: ", clip(0.5), " and ", clip(2.7, seed=1))],
    [user_turn(clip(0.9, seed=2))],
)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return dict(conversation_inputs(tiny_processor(), list(CONVERSATIONS)))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- the Auto classes ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("auto_class", AUTO_MODELS, ids=lambda cls: cls.__name__)
def test_each_auto_class_gives_a_model_that_replies_as_before(auto_class: type, saved: Path, model, inputs) -> None:
    loaded = auto_class.from_pretrained(saved)
    assert type(loaded) is ReLLMForConditionalGeneration and not loaded.training
    processor = AutoProcessor.from_pretrained(saved)
    found = conversation_inputs(processor, list(CONVERSATIONS))
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
    assert torch.equal(loaded(**found).logits, model(**inputs).logits)
    assert torch.equal(loaded.generate(**found, **GREEDY), model.generate(**inputs, **GREEDY))


def test_the_parts_of_a_checkpoint_load_by_their_auto_classes(saved: Path) -> None:
    assert type(AutoConfig.from_pretrained(saved)) is ReLLMConfig
    assert type(AutoProcessor.from_pretrained(saved)) is ReLLMProcessor
    assert type(AutoFeatureExtractor.from_pretrained(saved)) is ReLLMFeatureExtractor
    assert isinstance(AutoTokenizer.from_pretrained(saved), PreTrainedTokenizerBase)
    base = ReLLMModel.from_pretrained(saved)
    assert type(base) is ReLLMModel


@torch.no_grad()
def test_the_base_model_loads_from_a_full_checkpoint_and_the_other_way_round(saved: Path, model, tmp_path) -> None:
    base, info = ReLLMModel.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in base.state_dict().items())
    base.save_pretrained(tmp_path)
    back, info = ReLLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(back(input_ids=torch.tensor([[1, 40]])).logits, model(input_ids=torch.tensor([[1, 40]])).logits)


def test_a_plain_save_writes_weights_configs_and_no_code(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt"))]
    assert "auto_map" not in json.loads((saved / "config.json").read_text())


def test_saving_with_the_code_files_writes_flat_modules_and_each_auto_class(model, tmp_path: Path) -> None:
    relllm.register_for_auto_class()
    try:
        model.save_pretrained(tmp_path)
        tiny_processor().save_pretrained(tmp_path)
    finally:
        relllm.register_for_auto_class(False)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_relllm.ReLLMConfig"
    for auto_class in AUTO_MODELS:
        assert auto_map[auto_class.__name__] == "modeling_relllm.ReLLMForConditionalGeneration"
    code = {path.name for path in tmp_path.glob("*.py")}
    package = Path(relllm.__file__).parent
    expected = {path.name for folder in ("modeling", "processing") for path in (package / folder).glob("*_relllm.py")}
    assert code == expected


def test_a_plain_save_after_one_with_code_points_at_no_code(model, tmp_path: Path) -> None:
    relllm.register_for_auto_class()
    try:
        model.save_pretrained(tmp_path / "code")
    finally:
        relllm.register_for_auto_class(False)
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
def test_every_fusion_comes_back_bit_for_bit(fusion: str, tmp_path: Path) -> None:
    model = tiny_model(layers=2, fusion=fusion)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items())
    for name in ("emotion_fusion", "lora_config", "lora_scope", "audio_token_id", "emotion_labels"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_a_sharded_checkpoint_comes_back(model, tmp_path: Path, inputs) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_what_trains_is_the_same_after_building_and_after_loading(saved: Path, model) -> None:
    expected = {
        name
        for name, _ in model.named_parameters()
        if "lora_" in name or name.split(".")[1] in ("multi_modal_projector", "emotion_head", "dimension_head")
    }
    assert trained_names(model) == expected
    for auto_class in AUTO_MODELS:
        assert trained_names(auto_class.from_pretrained(saved)) == expected
    assert trained_names(ReLLMForConditionalGeneration(tiny_config(layers=2))) == expected


@torch.no_grad()
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "auto"}], ids=str)
def test_a_checkpoint_loads_in_bfloat16_and_with_a_device_map(options: dict, saved: Path, model, inputs) -> None:
    loaded = AutoModel.from_pretrained(saved, **options)
    found = loaded(**inputs).logits
    assert found.dtype == options.get("dtype", torch.float32)
    valid, expected = inputs["attention_mask"].bool(), model(**inputs).logits
    assert (found.float() - expected)[valid].abs().mean() < 0.05 * expected.std()
    replies = loaded.generate(**inputs, **GREEDY)
    if "dtype" not in options:
        assert torch.equal(replies, model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_is_a_loading_option(implementation: str, saved: Path) -> None:
    loaded = AutoModel.from_pretrained(saved, attn_implementation=implementation)
    parts = (loaded, loaded.model.audio_tower, loaded.model.emotion_tower.encoder, loaded.model.text_model)
    assert {part.config._attn_implementation for part in parts} == {implementation}


def test_a_pickled_checkpoint_is_refused_without_being_opened(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"opening this would raise UnpicklingError")
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unpickle"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=False)


# --- resizing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [330, 310])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_embeddings_keep_the_logits_and_survive_saving(tied: bool, size: int, tmp_path: Path, inputs) -> None:
    model = tiny_model(layers=2, tied=tied)
    expected = model(**inputs).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == size
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(len(weight) == size for weight in stored.values()) == (1 if tied else 2)
    common = min(size, 320)
    for candidate in (model, AutoModel.from_pretrained(tmp_path)):
        logits = candidate(**inputs).logits
        assert logits.shape[-1] == size
        torch.testing.assert_close(logits[..., :common], expected[..., :common], rtol=0, atol=1e-5)
        shared = candidate.get_input_embeddings().weight is candidate.get_output_embeddings().weight
        assert shared == tied
    labels = inputs["input_ids"]
    assert model(**inputs, labels=labels).loss.isfinite()


def test_the_lora_of_a_checkpoint_is_named_apart_from_pefts_default(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    lora = [name for name in stored if "lora_" in name]
    assert len(lora) == 2 * 2 * 7 and all(name.endswith(".relllm.weight") for name in lora)
    assert json.loads((saved / "config.json").read_text())["lora_config"].items() >= LORA.items()
