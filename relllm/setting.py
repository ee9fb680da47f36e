"""One way to declare a setting, from which flags are made, and how the file is read that sets them."""

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

REQUIRED = dataclasses.MISSING
DATA_SET = "A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id."  # the help of the settings that name one
METHODS = ("sft", "dpo", "grpo")  # of `relllm train`


def setting(default: Any, help: str, **told: Any) -> Any:
    """Declare a field of a dataclass of settings; `default` is `REQUIRED` for none, and a list is copied.

    `told` is further metadata for [`~relllm.cli.options.from_settings`]: `min`, `max`, `argument`, `flags`, `place`.
    """
    metadata = {"help": help, **told}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(settings: Any) -> None:
    """Raise a `ValueError` for a setting that its `Literal` does not have, or that is below its `min`."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, value, least = field.name, getattr(settings, field.name), field.metadata.get("min")
        may_lack = type(None) in typing.get_args(hints[name])
        kinds = [kind for kind in typing.get_args(hints[name] | None) if kind is not type(None)]
        choices = [choice for kind in kinds for choice in typing.get_args(kind)]
        is_choice = all(typing.get_origin(kind) is typing.Literal for kind in kinds)
        if is_choice and value not in choices and not (value is None and may_lack):
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if least is not None and value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_limits(settings: Any, limits: Mapping[str, str]) -> None:
    """Raise a `ValueError` for a number that is outside of its interval, such as `"[0, 1)"`; `None` is within."""
    for name, interval in limits.items():
        value, (low, high) = getattr(settings, name), map(float, interval[1:-1].split(","))
        is_open, open_above = interval[0] == "(", interval[-1] == ")"
        if value is None or low < value < high or (value == low and not is_open) or (value == high and not open_above):
            continue
        wanted = f"in {interval}" if high < math.inf else f"{'>' if is_open else 'at least'} {low:g}"
        wanted = f"finite and {wanted}" if value == high == math.inf else wanted
        raise ValueError(f"{name} must be {wanted}, got {value}.")


def read_object(text: str | None, name: str, example: str) -> dict:
    """Return the JSON object that a setting is, empty without one; anything else is a `ValueError`."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {text!r}, expected a JSON object such as {example}.")
    return found


def pick_device(device: str) -> str:
    """Return a device's name; `auto` is the first GPU if there is one."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_engine(engine: str, engine_args: str | None, device: str, own: tuple[str, ...]) -> None:
    """Raise a `ValueError` for settings of `engine` that contradict each other or the command's `own`."""
    if engine == "vllm" and device != "auto":
        raise ValueError(f"vLLM finds the device itself, and device is {device!r}. Leave one of them out.")
    if engine_args is not None and engine != "vllm":
        raise ValueError("engine_args are vLLM's: give --engine vllm with them.")
    arguments = read_object(engine_args, "engine_args", '{"max_model_len": 4096}')
    if taken := sorted(arguments.keys() & set(own)):
        raise ValueError(
            f"engine_args has {', '.join(taken)}, which the command has settings of its own for. Give those."
        )


def read_recipe(path: str | os.PathLike, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the lines of a YAML file over those of the file that its line `base` names; `above` lead to this one."""
    file, trail = Path(path), [*above, Path(path)]
    if file.resolve() in [one.resolve() for one in above]:
        raise ValueError(f"base leads in a circle: {' → '.join(map(str, trail))}. Take one of these lines out.")
    if above and not file.is_file():
        raise FileNotFoundError(f"{above[-1]} has the base {file}, and no such file is there.")
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} must be a YAML mapping, with a line `name: value` for each setting.")
    base = recipe.pop("base", None)
    if base is None:
        return recipe
    if not isinstance(base, str):
        raise ValueError(f"base of {file} is {base!r}; it takes the path of one recipe.")
    return read_recipe(file.parent / base, trail) | recipe


def find_method(arguments: Sequence[str]) -> str:
    """Return the method of `relllm train` that its flags, or else the recipe that they name, ask for."""
    parts = [part for text in arguments for part in (text.split("=", 1) if text.startswith("--") else [text])]
    given = dict(zip(parts, parts[1:], strict=False))
    method: object = given.get("--method")
    if method is None and "--config" in given:
        with suppress(ValueError, OSError, yaml.YAMLError):
            method = read_recipe(given["--config"]).get("method")
    if method not in (None, *METHODS):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(METHODS)}.")
    return str(method or METHODS[0])
