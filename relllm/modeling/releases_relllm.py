"""What differs between the releases of Transformers, asked once, when the model's code is imported."""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# The key-value cache among the arguments and the outputs of every causal LM: "cache" from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def cache_arguments(past_key_values: Cache | None, cache: Any) -> dict[str, Any]:
    """Return the key-value cache, which a caller gives by either name, as the causal LM takes it.

    Before 5.24 continuous batching hands its paged cache, which is none of these, through as `cache`.
    """
    if cache is None or isinstance(cache, Cache):
        return {CACHE: past_key_values if cache is None else cache}
    return {CACHE: past_key_values} | {"cache": cache}
