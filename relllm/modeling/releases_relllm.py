"""What differs between the releases of Transformers, asked once, when the model's code is imported."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

# The key-value cache among the arguments and the outputs of every causal LM: "cache" from 5.24 on.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
