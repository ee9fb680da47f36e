"""One way to declare a setting: a field of a dataclass with its default and its help, from which flags are made."""

import dataclasses
import json
from typing import Any

REQUIRED = dataclasses.MISSING


def setting(default: Any, help: str, **told: Any) -> Any:
    """Declare a field of a dataclass of settings.

    Args:
        default (`Any`): `REQUIRED` for none; a list is copied for each instance.
        help (`str`): What `--help` says of it.
        told: Further metadata for the command line, as in [`~relllm.cli.options.from_settings`]: `min`, `max`,
            `argument`, `flags`, `place`.
    """
    metadata = {"help": help, **told}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_engine(engine: str, engine_args: str | None, device: str, own: tuple[str, ...]) -> None:
    """Raise a `ValueError` for settings of `engine` that contradict each other, and for arguments that are no object
    or that name what the command has a setting of its `own` for.
    """
    if engine == "vllm" and device != "auto":
        raise ValueError(f"vLLM finds the device itself, and device is {device!r}. Leave one of them out.")
    if engine_args is not None and engine != "vllm":
        raise ValueError("engine_args are vLLM's: give --engine vllm with them.")
    try:
        arguments = json.loads(engine_args or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f'engine_args is {engine_args!r}, expected a JSON object such as {{"max_model_len": 4096}}.')
    if taken := sorted(arguments.keys() & set(own)):
        raise ValueError(
            f"engine_args has {', '.join(taken)}, which the command has settings of its own for. Give those."
        )
