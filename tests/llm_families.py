"""Causal LMs of Transformers by the names of their families: two layers of width 32, random, in milliseconds."""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": 16,
    # of those that route
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    # of those with a state
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": ALTERNATING,
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "qwen3_5_text": HYBRID,
    "gemma": {},
    "gemma2": ALTERNATING,
    "gemma3_text": ALTERNATING,
    "gemma3n_text": {
        **ALTERNATING,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 300,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {
        **ALTERNATING,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 320,
        "global_head_dim": 8,
        "num_experts": None,
    },
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": {},
    "olmo_hybrid": HYBRID,
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "cohere": {},
    "cohere2": ALTERNATING,
    "deepseek_v2": {**MLA, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {**MLA, "head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_oss": ALTERNATING,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {},
    "falcon": {"num_kv_heads": 2, "ffn_hidden_size": 48},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mpt": {},
    "codegen": {"rotary_dim": 4},
    "xglm": {"ffn_dim": 48},
    "biogpt": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "bamba": {"attn_layer_indices": [1]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
        "num_query_groups": 4,
        "kv_channels": 8,
    },
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "exaone4": ALTERNATING,
    "helium": {},
    "nemotron": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "apertus": {},
    "arcee": {},
    "persimmon": {},
    "bitnet": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 8},
    "diffllama": {},
}
NO_CACHE = "does not keep what it has read in Transformers' DynamicCache"
NO_LM = "Transformers has no causal language model of this family"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"state_size": 8, "time_step_rank": 4}, NO_CACHE),
    "mamba2": ({"state_size": 8, "num_heads": 8, "n_groups": 1}, NO_CACHE),
    "falcon_mamba": ({"state_size": 8, "time_step_rank": 4}, NO_CACHE),
    "xlstm": ({"num_heads": 2, "num_blocks": 2, "embedding_dim": 32}, NO_CACHE),
    "rwkv": ({"attention_hidden_size": 32}, NO_CACHE),
    "xlnet": ({"d_inner": 48}, NO_CACHE),
    "minimax": ({**HYBRID, "block_size": 8}, NO_CACHE),
    "recurrent_gemma": (
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
        NO_CACHE,
    ),
    "llama4_text": (
        {"intermediate_size_mlp": 48, "moe_layers": [1], "attention_chunk_size": 64},
        "its body is no part of its own",
    ),
    "bert": ({}, "is an encoder"),
    "qwen2_5_vl_text": ({}, NO_LM),
    "t5": ({"d_model": 32, "d_kv": 8, "d_ff": 48}, NO_LM),
}
COLUMNS = ("reads", "replies", "trains", "is saved", "text alone", "scores")


def family_config(family: str) -> PreTrainedConfig:
    """A configuration of a family, of what of [`COMMON`] it has, and of its own."""
    kind = CONFIG_MAPPING[family]
    own = {field.name for field in dataclasses.fields(kind)}
    names = {name: name if name in own else kind.attribute_map.get(name) for name in COMMON}
    given = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
    return kind(**{names[name]: value for name, value in COMMON.items() if names[name] in own} | given)


def family_table() -> list[str]:
    """The rows of the table in docs/models.md, one a family."""
    rows = [f"| {family} | {' | '.join('yes' for _ in COLUMNS)} |" for family in FAMILIES]
    empty = " | " * (len(COLUMNS) - 1)
    return rows + [f"| {family} | refused: {reason}{empty} |" for family, (_, reason) in REFUSED.items()]
