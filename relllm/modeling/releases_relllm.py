"""What differs between the releases of Transformers, asked once, when the model's code is imported."""

import inspect
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

# The key-value cache among the arguments and the outputs of every causal LM: "cache" from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


SKIPS = "allow_is_bidirectional_skip"
KNOWS_SKIPS = SKIPS in inspect.signature(create_bidirectional_mask).parameters


def padding_mask(config: PreTrainedConfig, hidden: Tensor, valid: Tensor) -> Tensor | None:
    """Return the mask with which an encoder's `hidden` states attend to the `valid` ones, `(clips, positions)`.

    On a CPU there is none where all are valid; an accelerator is not asked, which would be a wait for it.
    """
    options = {SKIPS: False} if KNOWS_SKIPS and hidden.device.type != "cpu" else {}
    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid, **options)


def cache_arguments(past_key_values: Cache | None, cache: Any) -> dict[str, Any]:
    """Return the key-value cache, which a caller gives by either name, as the causal LM takes it.

    Before 5.24 continuous batching hands its paged cache, which is none of these, through as `cache`.
    """
    if cache is None or isinstance(cache, Cache):
        return {CACHE: past_key_values if cache is None else cache}
    return {CACHE: past_key_values} | {"cache": cache}
