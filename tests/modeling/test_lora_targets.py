"""Which layers of an LLM get the LoRA: what the user names, before and after saving, and nothing drawn anew."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from light_checkpoints import assert_same_model, build, save_towers
from safetensors.torch import load_file, save_file
from tiny_models import MOE_FAMILIES, clip, conversation_inputs, fill_lora, tiny_llm, tiny_processor, user_turn
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from relllm import ReLLMForConditionalGeneration, ReLLMModel
from relllm.modeling.lora_relllm import LoraScope, ScopedLinear, inject_scoped_lora

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALL = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in LINEAR}
QUERIES = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers"), layers=2)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return dict(conversation_inputs(tiny_processor(), [user_turn("Listen: ", clip(0.5))]))


def layers_with_lora(model: nn.Module) -> set[str]:
    return {
        name.rpartition("text_model.")[2] for name, module in model.named_modules() if isinstance(module, ScopedLinear)
    }


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


# --- the layers that are named ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora, expected",
    [
        ({}, ALL),
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"}, {f"model.layers.0.{LINEAR[i]}" for i in (0, 2)}),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, {"model.layers.0.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"]}, QUERIES),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        ({"exclude_modules": ["q_proj"]}, ALL - QUERIES),
        ({"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1.*": 2}}, QUERIES),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "use_rslora": True}, QUERIES),
    ],
    ids=["default", "all-linear", "expression", "path", "ending", "layer", "exclude", "ranks", "gaussian"],
)
def test_the_lora_is_in_the_layers_that_are_named_before_and_after_saving(
    lora: dict, expected: set[str], towers: Path, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build(towers, lora={"r": 4, **lora})
    assert layers_with_lora(model) == expected
    recorded, given = model.config.lora_config["target_modules"], lora.get("target_modules", "all-linear")
    assert set(recorded) == ALL if given == "all-linear" else recorded == given
    for light in (False, True):
        model.save_pretrained(tmp_path / str(light), light=light)
        found = AutoModel.from_pretrained(tmp_path / str(light))
        assert_same_model(found, model)
        assert layers_with_lora(found) == expected
        assert torch.equal(logits(found, inputs), logits(model, inputs))


def test_ranks_and_alphas_of_a_layer_are_its_own(towers: Path) -> None:
    lora = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\..*": 2}}
    layers = build(towers, lora=lora).model.text_model.model.layers
    assert layers[0].self_attn.q_proj.scaling == {"relllm": 4.0} and layers[0].self_attn.q_proj.r == {"relllm": 2}
    assert layers[0].mlp.up_proj.scaling == {"relllm": 2.0} and layers[1].mlp.up_proj.scaling == {"relllm": 0.5}


def test_a_gaussian_start_is_narrower_where_the_rank_is_higher(towers: Path) -> None:
    for rank in (2, 16):
        lora = {"r": rank, "init_lora_weights": "gaussian"}
        model = ReLLMForConditionalGeneration.from_towers(towers / "speech", towers / "llm", lora=lora)
        drawn = torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])
        assert abs(drawn.std() * rank - 1) < 0.1
        assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_an_older_checkpoint_that_recorded_the_ends_of_names_loads_the_same(
    towers: Path, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = build(towers)
    for light in (False, True):
        folder = tmp_path / str(light)
        model.save_pretrained(folder, light=light)
        config = json.loads((folder / "config.json").read_text())
        config["lora_config"]["target_modules"] = sorted(name.rpartition(".")[2] for name in LINEAR)
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(AutoModel.from_pretrained(folder), inputs), logits(model, inputs))


# --- what cannot act is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*before the LLM's weights"),
        ({"bias": "all"}, "bias='all'.*stays frozen.*unfreeze"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*stays frozen"),
        ({"use_dora": True}, "use_dora=True.*only plain LoRA"),
        ({"task_type": "CAUSAL_LM", "alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*only plain LoRA"),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters=.*only plain LoRA"),
        ({"ranks": 4}, "ranks=4"),
        ({"rank_pattern": {"c_proj": 8}}, r"names \['c_proj'\], and the LLM has no such layer"),
        ({"exclude_modules": ["c_proj"]}, r"names \['c_proj'\], and the LLM has no such layer"),
        ({"target_modules": ["q_proj", "query"]}, r"names \['query'\].*as \['model.layers.0"),
        ({"target_modules": r".*text_model.*q_proj"}, "the LLM has no such layer"),
        ({"target_modules": "*q_proj"}, "no regular expression: nothing to repeat"),
        ({"target_modules": ["lm_head"]}, r"match lm_head \(Linear\).*Leave it out"),
        ({"target_modules": ["embed_tokens"]}, r"match model.embed_tokens \(Embedding\)"),
        ({"target_modules": r"model\.layers\.0"}, r"match model.layers.0 \(LlamaDecoderLayer\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_without_effect_is_refused_with_the_reason(option: dict, message: str, towers: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(towers, lora={"r": 4, **option})


def test_another_kind_than_lora_is_refused_by_its_name(towers: Path) -> None:
    with pytest.raises(ValueError, match="got a LoHaConfig"):
        build(towers, lora=peft.LoHaConfig())
    everything = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()  # as in an adapter_config.json
    assert layers_with_lora(build(towers, lora=everything)) == QUERIES


# --- weights are never drawn anew ------------------------------------------------------------------------------------


@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("cls", [AutoModel, ReLLMForConditionalGeneration, ReLLMModel], ids=lambda cls: cls.__name__)
def test_a_checkpoint_without_a_lora_gets_a_fresh_one(
    cls: type, light: bool, towers: Path, inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    bare = build(towers, lora=None, dtype=torch.bfloat16)
    bare.save_pretrained(tmp_path / "bare", light=light)
    lora = {"r": 4, "target_modules": r".*layers\.0\..*q_proj"}
    found, info = cls.from_pretrained(tmp_path / "bare", lora_config=lora, lora_scope="text", output_loading_info=True)
    assert layers_with_lora(found) == {"model.layers.0.self_attn.q_proj"} and found.config.lora_scope == "text"
    assert {name.rpartition("q_proj.")[2] for name in info["missing_keys"]} == {
        f"lora_{part}.relllm.weight" for part in "AB"
    }
    expected = (bare.model if cls is ReLLMModel else bare).state_dict()
    own = {name.replace(".base_layer.", "."): weight for name, weight in found.state_dict().items()}
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    assert not any(weight.any() for name, weight in own.items() if "lora_B" in name)
    fill_lora(found)
    found.save_pretrained(tmp_path / "again")
    assert_same_model(cls.from_pretrained(tmp_path / "again"), found)


@pytest.mark.parametrize("part", ["text_model.model.layers.1.mlp", "audio_tower.layers.0", "multi_modal_projector"])
def test_a_checkpoint_that_lacks_weights_is_refused(part: str, towers: Path, tmp_path: Path) -> None:
    build(towers).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(f"model.{part}")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (AutoModel, ReLLMModel):
        with pytest.raises(ValueError, match=rf"lacks {len(weights) - len(kept)} weights .*{part}"):
            cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("other", [{"r": 4, "target_modules": ["v_proj"]}, None], ids=["other", "none"])
def test_other_targets_than_a_checkpoints_own_are_refused(
    other: dict | None, light: bool, towers: Path, tmp_path: Path
) -> None:
    build(towers, lora={"r": 4, "target_modules": ["q_proj"]}).save_pretrained(tmp_path, light=light)
    config = AutoConfig.from_pretrained(tmp_path)
    config.lora_config = other
    with pytest.raises(ValueError, match=r"(lacks|has) .* weights .*lora_config"):
        AutoModel.from_pretrained(tmp_path, config=config)


def test_heads_that_a_checkpoint_lacks_are_drawn(towers: Path, tmp_path: Path) -> None:
    build(towers).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    heads = {name for name in weights if "_head." in name and "lm_head" not in name}
    assert len(heads) == 2
    kept = {name: weight for name, weight in weights.items() if name not in heads}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == heads


# --- mixtures of experts, and what else is not run position by position ----------------------------------------------


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def experts(request, towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers on disk, with a mixture of experts for an LLM."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(towers, folder, dirs_exist_ok=True)
    tiny_llm(request.param, layers=2).save_pretrained(folder / "llm")
    return folder


def test_experts_and_routers_are_left_out_and_the_log_says_so(
    experts: Path, inputs: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("relllm.modeling.lora_relllm.logger.warning_once", said.append)
    model = build(experts)
    assert layers_with_lora(model) == {name for name in ALL if "self_attn" in name}
    assert "leaves out 4 modules" in said[0] and "mlp.experts" in said[0] and "mlp.gate" in said[0]
    for light in (False, True):
        model.save_pretrained(tmp_path / str(light), light=light)
        found = AutoModel.from_pretrained(tmp_path / str(light))
        assert torch.equal(logits(found, inputs), logits(model, inputs))


@pytest.mark.parametrize("named", [["experts"], ["gate"], r".*mlp\.(experts|gate)"])
def test_experts_and_routers_that_are_named_are_refused(named: list[str] | str, experts: Path) -> None:
    with pytest.raises(ValueError, match=r"match model\.layers\.0\.mlp\.\w+ \(\w+\).*not in embeddings, experts"):
        build(experts, lora={"r": 4, "target_modules": named})


def test_the_routers_logits_and_their_loss_are_those_of_the_bare_llm(experts: Path) -> None:
    model = build(experts).eval()
    bare = AutoModelForCausalLM.from_pretrained(experts / "llm").eval()
    ids = torch.tensor([[1, 40, 41, 42, 43, 2]])
    found = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected = bare(input_ids=ids, labels=ids, output_router_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(found.router_logits, expected.router_logits, strict=True))
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)
    assert model(input_ids=ids).router_logits is None


def tiny(family: str, **fields: object) -> nn.Module:
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**common, **fields}))


@pytest.mark.parametrize(
    "family, fields, without",
    [
        (
            "deepseek_v3",
            {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "intermediate_size": 40}
            | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
            | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
            {"kv_b_proj", "up_proj of experts"},
        ),
        ("mamba2", {"head_dim": 8, "num_heads": 8, "state_size": 4, "n_groups": 1}, {"out_proj", "conv1d"}),
        ("mamba", {"state_size": 4}, {"x_proj", "dt_proj", "out_proj", "conv1d"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_whose_weights_are_used_elsewhere_are_left_out(family: str, fields: dict, without: set[str]) -> None:
    """DeepSeek's `kv_b_proj` reads the cache again in each step; the kernels of a state space take weights."""
    model = tiny(family, **fields)
    inject_scoped_lora(model, {"r": 2}, "audio", LoraScope())
    names = layers_with_lora(model)
    assert names and not {name.rpartition(".")[2] for name in names} & without
    assert not any("experts" in name for name in names)
    for name in without - {"up_proj of experts"}:
        with pytest.raises(ValueError, match="match|no such layer"):
            inject_scoped_lora(tiny(family, **fields), {"r": 2, "target_modules": [name]}, "audio", LoraScope())
