"""One way to declare a setting: a field of a dataclass with its default and its help, from which flags are made."""

import dataclasses
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
