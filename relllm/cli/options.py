"""A command's flags from the dataclass of its settings, so that each is declared, and explained, once.

A field is an option: its name is the flag, its default the flag's, `metadata` what Typer shows and checks:
`{"help": "…"}`, and where it applies `"min"` and `"max"`, `"envvar"`, `"argument": True` (no flag in front), `"flags"`
(other spellings) and `"place"` (one of `HOLDS`, or a `"dataset"`, which is looked for before anything is loaded). A
field that is a tuple is given with commas. `output_dir` may be written `--out`.

The dataclasses live in their rooms, in files that import nothing heavy: `relllm --help` reads them all.
"""

import dataclasses
import inspect
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from relllm.modeling.places_relllm import PlaceError, check_place

UsageError: type[Any] = typer.BadParameter.__bases__[0]  # Typer's own copy of Click is private
ALIASES = {"output_dir": ["--out"]}
HOLDS = {"checkpoint": "config.json", "checkpoint or adapter": ("config.json", "adapter_config.json")}
KEYWORD = inspect.Parameter.KEYWORD_ONLY
WIDTH_OF_PIPES = 200  # a table's, where there is no terminal to ask


def _make_console(*, stderr: bool = False) -> Console:
    """Return a console that shows what it is given letter by letter: a name with brackets is no markup."""
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else WIDTH_OF_PIPES
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)


console = _make_console()  # of every command
messages = _make_console(stderr=True)


def from_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command: each of its parameters that is a dataclass becomes one option (or argument) a field.

    @app.command()
    @from_settings
    def evaluate(settings: EvaluationSettings, folds: Annotated[str | None, typer.Option(help="…")] = None): ...
    """
    hints = typing.get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    settings: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    own = [one for one in inspect.signature(function).parameters.values() if one.name not in settings]
    parameters = []
    for kind in settings.values():
        kinds = typing.get_type_hints(kind)
        parameters += [_parameter(field, kinds[field.name]) for field in dataclasses.fields(kind)]
    parameters += [one.replace(annotation=hints[one.name], kind=KEYWORD) for one in own]

    def command(**given: Any) -> None:
        for name, kind in settings.items():
            fields = {field.name: _split(given.pop(field.name), field) for field in dataclasses.fields(kind)}
            try:
                given[name] = kind(**fields)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            _check_places(given[name])
        try:
            function(**given)
        except KeyboardInterrupt as error:
            goes_on = re.search(r"[^.;]*the same command goes on[^.;]*", function.__doc__ or "")
            raise KeyboardInterrupt(f"{goes_on[0]}." if goes_on else "") from error
        except OSError as error:
            places = [place for name in settings for place, _ in _places(given[name])]
            ids = [place for place in places if not os.path.exists(os.path.expanduser(place))]
            if "huggingface.co" not in str(error) or not ids:
                raise
            raise OSError(f"{' or '.join(ids)}: no folder here, and of the Hub: {error}") from error

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = function.__name__, escape(function.__doc__ or "")
    return command


def same_flag(name: str) -> str:
    """`--output_dir` is `--output-dir`: Click asks this of every name that it defines and that it is given."""
    return name.replace("_", "-")


class PlainCommands(TyperGroup):
    """The commands, each of whose expected errors is one line; of a wrong use the exit status is 2, of a failure 1.

    Expected are those that say what a user can do. The traceback is shown with `--debug`, or in Python's development
    mode.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command as Click does."""
        cause: BaseException
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # here a closed pipe is an error that ends the command quietly
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as error:
            cause, status, line = error, 130, f"stopped by Ctrl-C. {error}"
        except (ImportError, OSError, ValueError) as error:
            cause, status, line = error, 2 if isinstance(error, PlaceError) else 1, f"stopped: {error}"
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # shows the help
                raise
            own = getattr(error, "ctx", None)
            command = own.command_path if own is not None else f"{ctx.command_path} {ctx.invoked_subcommand}"
            cause, status = error, 2
            line = f"{command}: {error.format_message()} See `{command} --help`."
        messages.print(" ".join(line.split()), style="red")
        if ctx.params.get("debug") or sys.flags.dev_mode:
            traceback.print_exception(cause)
        raise typer.Exit(status) from cause


def _check_places(settings: Any) -> None:
    """Look for the device, checkpoints and data that settings name; `{fold}` in a name stands for several."""
    _check_device(getattr(settings, "device", "auto"))
    for place, kind in _places(settings):
        if kind == "dataset":
            check_place(place, repo_type="dataset")
        elif "{" not in place:
            check_place(place, holds=HOLDS[kind])


def _places(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield each place that settings name, with what is to be there."""
    for field in dataclasses.fields(settings):
        if "place" in field.metadata and (place := getattr(settings, field.name)) is not None:
            yield str(place), field.metadata["place"]


def _check_device(device: str) -> None:
    """Raise a `typer.BadParameter` for what is no device, or one that is not there."""
    if device == "auto":
        return
    import torch

    try:
        wanted = torch.device(device)
        count = torch.get_device_module(wanted).device_count()
    except RuntimeError as error:  # "meta" among them, which holds no numbers
        raise typer.BadParameter(f"device is {device!r}, expected cpu, cuda, cuda:1, … or auto.") from error
    if (wanted.index or 0) >= count:
        found = f"{count} of that kind, counted from 0" if count else "no such device (no GPU)"
        raise typer.BadParameter(f"device is {device!r}, and PyTorch finds {found}. Leave it to auto, or take cpu.")


def _parameter(field: dataclasses.Field, kind: Any) -> inspect.Parameter:
    """Make one option or argument, as Typer takes it from a signature."""
    told = field.metadata
    limits = {name: told[name] for name in ("min", "max", "envvar") if name in told}
    limits["help"] = escape(told["help"])  # Typer reads markup in it, and would eat what is in brackets
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    if "tuple[" in str(kind):
        kind = str if default is inspect.Parameter.empty else str | None
        default = ",".join(default) if isinstance(default, tuple) else default
    if told.get("argument"):
        info: Any = typer.Argument(**limits)
    else:
        flag = "--" + field.name.replace("_", "-")
        flag += f"/--no{flag[1:]}" if kind is bool and default else ""
        info = typer.Option(flag, *told.get("flags", ALIASES.get(field.name, [])), **limits)
    return inspect.Parameter(field.name, KEYWORD, default=default, annotation=Annotated[kind, info])


def _split(value: Any, field: dataclasses.Field) -> Any:
    """Make a tuple of what was written with commas; return anything else as it is."""
    if isinstance(value, str) and "tuple[" in str(field.type):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
