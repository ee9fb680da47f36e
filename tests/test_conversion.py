"""Conversion of the original's checkpoints: every weight finds its place; nothing is lost, guessed or unpickled."""

import json
from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_tokenizer
from torch import Tensor

from relllm import ReLLMForConditionalGeneration
from relllm.conversion import convert_config, convert_original_checkpoint, convert_weights
from relllm.labels import DIMENSIONS

TOKEN = {"audio_token_id": 1}


def relllm_options() -> dict:
    return {**TOKEN, "emotion_config": golden.CONFIG["wav2vec2"], "emotion_labels": labels()}


def labels() -> list[str]:
    return [f"class {i}" for i in range(golden.CONFIG["num_emotions"])]


def used_weights() -> dict[str, Tensor]:
    """RE-LLM's weights without those that the original never reads."""
    unused = ("adapter.", "w2v2_adapter.", "w2v2_hidden2emotion.")
    return {name: weight for name, weight in golden.original_weights().items() if not name.startswith(unused)}


def convert(weights: dict[str, Tensor], **changes) -> ReLLMForConditionalGeneration:
    return convert_original_checkpoint(weights, golden.original_config(**changes), **relllm_options())


def write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> None:
    """In two files, as a large checkpoint is, with the configurations beside them."""
    names = sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{i + 1}-of-00002.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "blsp2", **golden.original_config()}))
    (folder / "wav2vec2.json").write_text(json.dumps({"model_type": "wav2vec2", **golden.CONFIG["wav2vec2"]}))


def test_fused_projection_and_gates_go_where_qwen2_has_them():
    weights = golden.without_lora(golden.original_weights())
    layer = convert(weights, lora_config={}).model.text_model.model.layers[0]
    prefix = "qwen_model.transformer.h.0"
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    assert torch.equal(torch.cat([part.weight for part in attention]), weights[f"{prefix}.attn.c_attn.weight"])
    assert torch.equal(torch.cat([part.bias for part in attention]), weights[f"{prefix}.attn.c_attn.bias"])
    assert torch.equal(layer.mlp.gate_proj.weight, weights[f"{prefix}.mlp.w2.weight"])
    assert torch.equal(layer.mlp.up_proj.weight, weights[f"{prefix}.mlp.w1.weight"])


def test_the_end_of_a_turn_ends_the_replies_of_what_was_converted():
    """Qwen's `generation_config` knows `<|endoftext|>` alone, and its turns end with `<|im_end|>`."""
    config = golden.original_config()
    tokenizer = tiny_tokenizer()
    options = {**relllm_options(), "tokenizer": tokenizer}
    config["qwen_config"] = {**config["qwen_config"], "eos_token_id": 7}
    model = convert_original_checkpoint(golden.original_weights(), config, **options)
    assert model.generation_config.eos_token_id == [7, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    grown = golden.original_weights()
    for name in [name for name in grown if name.endswith(("wte.weight", "lm_head.weight"))]:
        grown[name] = torch.zeros(151_936, grown[name].shape[1])
    config["qwen_config"] = {**config["qwen_config"], "vocab_size": 151_936}
    model = convert_original_checkpoint(grown, config, **relllm_options())
    assert model.generation_config.eos_token_id == [7, 151_645]


def test_split_lora_is_the_fused_one():
    """Product of B and A, layer by layer: the three parts, one after another, are the original's update."""
    weights = golden.original_weights()
    attention = convert(weights).model.text_model.model.layers[0].self_attn
    fused = "qwen_model.model.transformer.h.0.attn.c_attn.lora_{}.default.weight"
    update = weights[fused.format("B")] @ weights[fused.format("A")]
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    ours = [part.lora_B["relllm"].weight @ part.lora_A["relllm"].weight for part in parts]
    torch.testing.assert_close(torch.cat(ours).detach(), update, rtol=0, atol=1e-6)


def test_dimension_head_is_reordered_by_name():
    weights = golden.original_weights()
    head = convert(weights).model.dimension_head.weight
    for row, name in enumerate(golden.DIMENSIONS_OF_ORIGINAL_TARGETS):
        assert torch.equal(head[DIMENSIONS.index(name)], weights["hidden2w2v2.weight"][row])


def test_lora_settings_are_kept_with_the_new_layer_names():
    config = convert_config(golden.original_config(lora_scope="text"), **relllm_options())
    assert config.lora_config["r"] == golden.CONFIG["lora"]["r"]
    assert config.lora_config["lora_alpha"] == golden.CONFIG["lora"]["lora_alpha"]
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(config.lora_config["target_modules"]) == attention | {"gate_proj", "up_proj", "down_proj"}
    assert config.lora_scope == "text"
    some = convert_config(golden.original_config(lora_config={"r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}),
                          **relllm_options())  # fmt: skip
    assert set(some.lora_config["target_modules"]) == {"q_proj", "k_proj", "v_proj"}


def test_directory_with_several_files_is_read_and_saved_again(tmp_path: Path):
    (tmp_path / "original").mkdir()
    write_checkpoint(tmp_path / "original", golden.original_weights())
    options = {**relllm_options(), "emotion_config": tmp_path / "original" / "wav2vec2.json"}
    model = convert_original_checkpoint(tmp_path / "original", **options)
    for name, weight in convert(golden.original_weights()).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    model.save_pretrained(tmp_path / "ours")
    again = ReLLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_weights_that_the_original_never_reads_are_listed():
    weights = used_weights() | {"adapter.fc1.weight": torch.ones(2), "w2v2_adapter.fc2.bias": torch.ones(1)}
    config = convert_config(golden.original_config(), **relllm_options())
    assert convert_weights(weights, config)[1] == ["adapter.fc1.weight", "w2v2_adapter.fc2.bias"]


def test_blsp_emo_without_dimension_head_starts_it_at_zero():
    weights = {name: weight for name, weight in golden.original_weights().items() if not name.startswith("w2v2")}
    if "adapter.fc1.weight" not in weights:
        pytest.skip(f"weights.safetensors in {golden.FOLDER} lacks BLSP-Emo's adapter.")
    del weights["hidden2w2v2.weight"]
    model = convert_original_checkpoint(weights, golden.original_config(), **TOKEN, emotion_labels=labels())
    assert model.config.emotion_fusion == "none" and model.model.emotion_tower is None
    assert (model.model.dimension_head.weight == 0).all()


# What is refused


@pytest.mark.parametrize("extra", ["w2v2cat_adapter.fc9.weight", "qwen_model.model.transformer.h.0.attn.c_attn.what",
                                   "something.else", "whisper_model.conv3.weight"])  # fmt: skip
def test_unknown_weight_is_an_error_with_its_name(extra: str):
    with pytest.raises(ValueError, match=extra.rsplit(".", 1)[-1]):
        convert(used_weights() | {extra: torch.ones(3)})


@pytest.mark.parametrize("name, ours", [
    ("hidden2emotion.weight", "emotion_head.weight"),
    ("hidden2w2v2.weight", "dimension_head.weight"),
    ("w2v2.classifier.out_proj.bias", "classifier.out_proj.bias"),
    ("qwen_model.model.lm_head.weight", "lm_head.weight"),
    ("qwen_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight", "q_proj.lora_A"),
])  # fmt: skip
def test_missing_weight_is_an_error_with_its_name(name: str, ours: str):
    weights = used_weights()
    del weights[name]
    with pytest.raises(ValueError, match=ours):
        convert(weights)


def test_emotion_tower_without_its_configuration_is_refused():
    options = {**relllm_options(), "emotion_config": None}
    with pytest.raises(ValueError, match="Those of `model.emotion_tower` .* want an emotion_config"):
        convert_original_checkpoint(golden.original_weights(), golden.original_config(), **options)


def test_weight_of_another_shape_is_refused():
    weights = used_weights()
    weights["hidden2emotion.weight"] = weights["hidden2emotion.weight"][:-1]
    with pytest.raises(ValueError, match="emotion_head.weight has shape"):
        convert(weights)


@pytest.mark.parametrize("field, value", [("no_bias", False), ("rotary_pct", 0.5), ("tie_word_embeddings", True),
                                          ("kv_channels", 7)])  # fmt: skip
def test_llm_that_qwen2_cannot_stand_for_is_refused(field: str, value: bool | float):
    with pytest.raises(ValueError, match=str(value)):
        convert_config(
            golden.original_config(qwen_config={**golden.CONFIG["qwen_v1"], field: value}), **relllm_options()
        )


def test_lora_that_trains_biases_is_refused():
    with pytest.raises(ValueError, match="trains biases"):
        convert_config(
            golden.original_config(lora_config={**golden.CONFIG["lora"], "bias": "all"}), **relllm_options()
        )


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd"):
        convert_config(golden.original_config(conv_kernel_sizes="4,4"), **relllm_options())


def test_emotion_labels_must_be_as_many_as_the_classes():
    options = {**relllm_options(), "emotion_labels": ["calm", "tense", *labels()]}
    with pytest.raises(ValueError, match="emotion_labels names"):
        convert_config(golden.original_config(), **options)


def test_pickled_weights_are_refused_unread(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (tmp_path / "config.json").write_text(json.dumps(golden.original_config()))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="pickled weights"):
            convert_original_checkpoint(path, **relllm_options())


def test_empty_directory_and_lone_state_dict_say_what_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        convert_original_checkpoint(tmp_path, **relllm_options())
    with pytest.raises(ValueError, match="Pass it as `config`"):
        convert_original_checkpoint(used_weights(), **relllm_options())
