"""Which LLMs fit a ReLLM, the one inside a model that also sees, and those that read token ids in every layer."""

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .releases_relllm import CACHE


def build_causal_lm(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a causal LM with fresh weights in the default precision; a `ValueError` if its family cannot be that."""
    check_family(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    check_causal_lm(model)
    return model


def check_family(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` if no model of a configuration can be the LLM."""
    parts = [part for name in config.sub_configs if (part := getattr(getattr(config, name, None), "model_type", ""))]
    reason = None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        reason = "Transformers has no causal language model of this family"
    elif parts:
        reason = f"it is put together from others ({', '.join(parts)}) and has no language model to take out"
    elif "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        reason = "its experts are chosen by token ids, which audio has not"
    if reason is not None:
        raise ValueError(_refusal(config.model_type, reason))


def find_llm_loader(source: str | os.PathLike, options: Mapping[str, Any]) -> type:
    """Return the Auto class that loads an LLM, or a model with one in it; raise what [`build_causal_lm`] raises.

    No weight has been read by then; `options` are those of `from_pretrained`.
    """
    config, _ = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **options)
    with torch.device("meta"):
        build_causal_lm(config.get_text_config(decoder=True))
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def check_causal_lm(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if a model cannot be the LLM, with the reason: what it takes, and how it is called."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    reason = None
    if "inputs_embeds" not in takes:
        reason = "its forward takes no inputs_embeds, in the place of which the audio positions come"
    elif not _keeps_a_cache(model):
        reason = "it does not keep what it has read in Transformers' DynamicCache, from which replies and scores go on"
    elif model.base_model is model:
        reason = "its body is no part of its own (base_model_prefix), and training runs the body without the head"
    elif type(model.base_model).__name__.endswith("DecoderWrapper"):
        reason = "it is the decoder of an encoder-decoder, which counts positions without regard to padding"
    elif "encoder_hidden_states" in takes and not getattr(config, "is_decoder", True):
        reason = "it is an encoder, in which each position sees those behind it (is_decoder=False)"
    elif _has_deep_head(model):
        reason = "its head is more than a matrix product, and training computes the loss by that alone"
    elif (width := model.get_input_embeddings().embedding_dim) != config.hidden_size:
        reason = f"its token embeddings have the width {width}, not its hidden size {config.hidden_size}"
    if reason is not None:
        raise ValueError(_refusal(config.model_type, reason))


def take_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the causal LM inside a model that also sees (Gemma 3, Mistral 3, …), with which it shares its weights."""
    if (config := model.config.get_text_config(decoder=True)) is model.config:
        return model
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    config = copy.deepcopy(config)
    config.tie_word_embeddings = head.weight is embeddings.weight  # the whole model's configuration rules
    with torch.device("meta"):  # its parts are put in below
        llm = build_causal_lm(config)
    body = model.get_decoder()
    if type(body) is not type(llm.base_model):
        reason = f"its language model, a {type(body).__name__}, is not the body of a {type(llm).__name__}"
        raise ValueError(_refusal(model.config.model_type, reason))
    setattr(llm, llm.base_model_prefix, body)
    llm.set_output_embeddings(head)
    if model.generation_config is not None:
        llm.generation_config = model.generation_config
    return llm


def aux_loss_weight(model: PreTrainedModel) -> float:
    """Return what a mixture of experts weighs the loss of its routers with; JetMoE has a name of its own for it."""
    own: dict[str, Any] = vars(model)
    return own["aux_loss_coef"] if "aux_loss_coef" in own else own["router_aux_loss_coef"]


def reads_token_ids(model: PreTrainedModel) -> bool:
    """Tell whether an LLM adds an embedding of the token itself in every layer, as Gemma 3n and 4 do."""
    return bool(getattr(model.config, "hidden_size_per_layer_input", 0))


def per_layer_inputs(model: PreTrainedModel, input_ids: Tensor | None, audio_token_id: int) -> dict[str, Tensor]:
    """Return what such an LLM adds, `(batch, sequence, layers, width)`, by the name of its argument.

    At audio positions it is the padding token's, as in Transformers' own Gemma 3n and Gemma 4 at what is not text.
    """
    if input_ids is None:
        raise ValueError(
            f"{type(model).__name__} reads token ids in every layer, and got inputs_embeds alone. Pass input_ids, or "
            "per_layer_inputs beside inputs_embeds."
        )
    config, table = model.config, model.base_model.embed_tokens_per_layer
    padding = config.pad_token_id or 0
    text_ids = input_ids.masked_fill(input_ids == audio_token_id, padding)
    text_ids = text_ids.masked_fill(text_ids >= config.vocab_size_per_layer_input, 0)  # as Gemma 3n
    return {"per_layer_inputs": table(text_ids).unflatten(-1, (config.num_hidden_layers, -1))}


def _keeps_a_cache(model: PreTrainedModel) -> bool:
    """Tell whether all that an LLM knows of the past is in the cache that `generate` makes, some of it as keys."""
    return (
        CACHE in inspect.signature(model.forward).parameters
        and model._supports_default_dynamic_cache()
        and not hasattr(model.base_model, "_setup_cache")  # a state in the layers themselves
        and any(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)
    )


def _has_deep_head(model: PreTrainedModel) -> bool:
    """Tell whether an LLM has weights outside its body that are not those of its output embeddings."""
    inside = {id(weight) for part in (model.base_model, model.get_output_embeddings()) for weight in part.parameters()}
    return any(id(weight) not in inside for weight in model.parameters())


def _refusal(family: str, reason: str) -> str:
    return (
        f"{family!r} cannot be the LLM: {reason}. Use another causal LM; docs/models.md lists the families that are "
        "tested."
    )
