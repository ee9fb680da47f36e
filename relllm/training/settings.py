"""Settings of a run from a YAML file and flags: TRL's parser, with a help page that puts what matters first."""

import argparse
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

REST = "everything else that TRL and Transformers know"


class SettingsParser(TrlParser):
    """A TRL parser for one command; `sections` are the titles of `--help` and the settings listed under each."""

    def __init__(
        self,
        dataclass_types: tuple[type, ...],
        *,
        command: str,
        description: str,
        sections: Mapping[str, Sequence[str]],
    ) -> None:
        super().__init__(
            dataclass_types,
            prog=command,
            usage=f"{command} --config RECIPE.yaml [--setting value …]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.sections = sections

    def parse_settings(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Read one instance of each dataclass from flags, and `--config file.yaml`, whose lines are their defaults.

        It exits with 0 after `--help`, with 2 and a message on a setting that is unknown or wrong.
        """
        # TRL knows `--config file` and not `--config=file`; `--out` is short for `--output_dir`, as in other commands.
        apart = (text.split("=", 1) if text.startswith(("--config=", "--out=")) else [text] for text in arguments)
        split = ["--output_dir" if part == "--out" else part for parts in apart for part in parts]
        if split and split[-1] == "--config":
            self.error("--config needs a file")
        try:
            return self.parse_args_and_config(split)
        except yaml.YAMLError as error:
            self.error(f"The recipe is no YAML: {error}. A line is `name: value`, indented with spaces, not tabs.")
        except (ValueError, TypeError, OSError) as error:
            self.error(str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown"))

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take the lines of a YAML file, each of the kind that its setting has: argparse converts text alone."""
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in config.items():
            kinds = _kinds(hints.get(name, Any))
            if not _fits(value, kinds):
                wanted = f"a list, such as [{value}]" if list in kinds else "one value"
                raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; it takes {wanted}.")
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        """Print the message alone: the usage of some 200 settings would push it off the screen."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} See `{self.prog} --help` for the settings.\n")
        raise AssertionError("argparse's exit returned")

    def format_help(self) -> str:
        """Return usage, description, and the settings section by section."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        # A switch that is on has a second action, `--no_…`; the first one says all.
        actions = {action.dest: action for action in reversed(self._actions)}
        for title, names in self.sections.items():
            formatter.start_section(title)
            formatter.add_arguments([actions.pop(name) for name in names if name in actions])
            formatter.end_section()
        formatter.start_section(REST)
        formatter.add_arguments(list(reversed(actions.values())))
        formatter.end_section()
        return formatter.format_help()


def _kinds(hint: Any) -> set[Any]:
    """Return the classes that a type hint allows: of `list[str] | None` `list` and `NoneType`."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*(_kinds(one) for one in get_args(hint)))
    return {get_origin(hint) or hint}


def _fits(value: object, kinds: set[Any]) -> bool:
    """Tell whether a value of a YAML file may be a setting's, which text may become by conversion."""
    containers = kinds & {list, tuple, dict}
    if Any in kinds or value is None:
        return True
    if isinstance(value, (list, dict)):
        return type(value) in containers
    if isinstance(value, bool):  # YAML's `no` and `true` are words of some settings too
        return not kinds <= {int, float, type(None), *containers}
    return bool(kinds - containers - {type(None)})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--name VALUE` on one line, and the default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == 0 else f" {'|'.join(map(str, action.choices))}" if action.choices else " VALUE"
        return action.option_strings[-1 if action.dest == "help" else 0] + (value if len(value) < 60 else " NAME")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)
