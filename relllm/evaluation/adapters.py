"""A LoRA of PEFT in the place of a model: the folder that `relllm train-text`, or a user's own TRL, saves."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from relllm.modeling.places_relllm import check_place, find_file

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Of its settings: where the model below is, and what says nothing of what the adapter does.
ELSEWHERE = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type")


def read_adapter(model: str, revision: str = "main") -> dict | None:
    """Return the settings of an adapter, a folder or Hub id; `None` for what has a `config.json`, a whole model."""
    if find_file(model, "config.json", revision) is not None:
        return None
    found = find_file(model, ADAPTER_CONFIG, revision)
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


def base_of(adapter: dict) -> dict[str, str]:
    """Return the place of the model that an adapter is on, as the first arguments of `from_pretrained`."""
    return {
        "pretrained_model_name_or_path": adapter["base_model_name_or_path"],
        "revision": adapter.get("revision") or "main",
    }


def read_config(model: str, revision: str = "main") -> PreTrainedConfig:
    """Return a model's configuration, an adapter's from the model below it, which must be a bare causal LM."""
    adapter = read_adapter(model, revision)
    if adapter is None:
        return AutoConfig.from_pretrained(model, revision=revision)
    base = adapter["base_model_name_or_path"]
    check_place(base, holds="config.json")
    config = AutoConfig.from_pretrained(**base_of(adapter))
    if config.model_type == "relllm":
        raise ValueError(f"{model} is an adapter on the ReLLM {base}. Merge it into that, and give what you save.")
    return config


def load_causal_lm(model: str, *, revision: str, **options: object) -> PreTrainedModel:
    """Load a causal LM, with the adapter on it that `model` may be, as PEFT loads it."""
    adapter = read_adapter(model, revision)
    place = {"pretrained_model_name_or_path": model, "revision": revision} if adapter is None else base_of(adapter)
    loaded = AutoModelForCausalLM.from_pretrained(**place, use_safetensors=True, **options)
    if adapter is None:
        return loaded
    from peft import PeftConfig, PeftModel

    if PeftConfig.from_pretrained(model, revision=revision).is_prompt_learning:
        raise ValueError(f"{model} is a {adapter['peft_type']} adapter, expected a LoRA or another of the weights.")
    return PeftModel.from_pretrained(loaded, model, revision=revision).get_base_model()


def describe_adapter(adapter: dict) -> str:
    """Return what an adapter's settings make of its weights, as a part of a fingerprint."""
    kept = {name: value for name, value in adapter.items() if name not in ELSEWHERE}
    in_order = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in kept.items()}
    return json.dumps(in_order, sort_keys=True)  # PEFT makes lists of sets, in any order
