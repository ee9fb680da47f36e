"""Settings of a run from a YAML file and flags: TRL's parser, with a help page that puts what matters first; and what
of Transformers' settings is checked before anything is loaded.
"""

import argparse
import difflib
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from .config import AUTO, CHECKPOINTING, ReLLMSFTConfig

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
        for action in self._actions:
            named = action.dest in ("per_device_train_batch_size", *CHECKPOINTING)
            if named and ReLLMSFTConfig in dataclass_types and action.nargs != 0:
                action.type = _or_auto(action.type)

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
            if "--config" in split:
                place = split.index("--config")
                self.take_recipe(read_recipe(split[place + 1]))
                del split[place : place + 2]
            return self.parse_args_into_dataclasses(split)
        except yaml.YAMLError as error:
            self.error(f"The recipe is no YAML: {error}. A line is `name: value`, indented with spaces, not tabs.")
        except (ValueError, TypeError, OSError) as error:
            self.error(str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown"))

    def take_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Take the lines of a recipe as defaults, each of the kind that its setting has: argparse converts text alone.

        As in TRL's, `env` is a mapping of environment variables to set.
        """
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for name, value in recipe.items():
            kinds = {dict} if name == "env" else _kinds(hints.get(name, Any))
            if not _fits(value, kinds):
                wanted = "a mapping" if kinds == {dict} else "one value"
                wanted = f"a list, such as [{value}]" if list in kinds else wanted
                raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; it takes {wanted}.")
        os.environ.update({name: str(value) for name, value in (recipe.get("env") or {}).items()})
        settings = {name: value for name, value in recipe.items() if name != "env"}
        if unknown := self.set_defaults_with_config(**settings)[::2]:
            name = unknown[0].removeprefix("--")
            near = difflib.get_close_matches(name, hints, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}, a line of the recipe, is no setting.{meant}")

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


def read_recipe(path: str | os.PathLike, above: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the lines of a YAML file over those of the file that its line `base` names, relative to it, and so on.

    `above` are the files that lead here. What is no mapping, and a circle, is a `ValueError`.
    """
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


def check_trainer(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Raise a `ValueError` (or `ImportError`) for what Transformers would refuse once the model is loaded, or later.

    `metrics` are those of an evaluation, without `eval_`; what begins with one of these and `_` is one as well.
    """
    for name, least in {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 0,
    }.items():
        if getattr(args, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs}, and no max_steps is given: nothing would train."
        )
    checkpoint = args.resume_from_checkpoint
    if isinstance(checkpoint, str) and not os.path.isfile(os.path.join(checkpoint, TRAINER_STATE_NAME)):
        raise FileNotFoundError(f"resume_from_checkpoint: {checkpoint} is no checkpoint with a {TRAINER_STATE_NAME}.")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if not any(metric == name or metric.startswith(f"{name}_") for name in metrics):
        raise ValueError(f"metric_for_best_model: no evaluation of this run has {metric!r}, but {', '.join(metrics)}.")
    if not args.optim_target_modules:  # with which an optimizer asks for the model
        Trainer.get_optimizer_cls_and_kwargs(args)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(max(args.max_steps, 1)),
            num_training_steps=max(args.max_steps, 1),
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs {args.lr_scheduler_kwargs}: {error}.") from error
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except RuntimeError as error:
        raise ImportError(f"report_to {args.report_to}: {error}") from error


def _or_auto(kind: Any) -> Any:
    return lambda text: text if text == AUTO else kind(text)


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
