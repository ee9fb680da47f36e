"""Settings of a run from a YAML file and flags, by TRL's parser, and what is checked before anything is loaded."""

import copy
import difflib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import AutoTokenizer, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, TrlParser

from relllm.setting import check_limits, read_recipe

from .config import AUTO, CHECKPOINTING, ReLLMSFTConfig

LOSS_TYPES = ("nll", "dft")  # TRL's
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
NOT_NEGATIVE = ("dataloader_num_workers", "learning_rate", "weight_decay", "warmup_steps", "adam_epsilon")
LIMITS = {  # outside, Transformers takes it for something else, or finds out once the model is loaded
    **dict.fromkeys((*COUNTS, "save_total_limit", "eval_accumulation_steps"), "[1, inf)"),
    **dict.fromkeys(NOT_NEGATIVE, "[0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
}


class SettingsParser(TrlParser):
    """A TRL parser for one command, whose `--help` is [`~relllm.cli.training_help.show_training_help`]."""

    def __init__(self, dataclass_types: tuple[type, ...], *, command: str) -> None:
        super().__init__(dataclass_types, prog=command, add_help=False, allow_abbrev=False)
        for action in self._actions:
            named = action.dest in ("per_device_train_batch_size", *CHECKPOINTING)
            if named and ReLLMSFTConfig in dataclass_types and action.nargs != 0:
                own: Any = action.type
                action.type = lambda text, own=own: text if text == AUTO else own(text)

    @classmethod
    def of(cls, command: str, *kinds: type) -> Callable[[Sequence[str]], tuple[Any, ...]]:
        """Return what reads the settings of a command: an instance of each of these dataclasses."""
        return lambda arguments: cls(kinds, command=command).parse_settings(arguments)

    def parse_settings(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Read one instance of each dataclass from flags over the lines of `--config FILE`; exit with 2 on error."""
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
        """Take the lines of a recipe as defaults, each of its setting's kind; `env` are environment variables."""
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


def check_metric(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Raise a `ValueError` for a `metric_for_best_model` that is not of an evaluation's, named without `eval_`."""
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if args.eval_strategy != "no" and metric not in metrics:
        raise ValueError(f"metric_for_best_model: no evaluation of this run has {metric!r}, but {', '.join(metrics)}.")


def check_trainer(args: TrainingArguments) -> None:
    """Raise what Transformers and TRL would raise once the model is loaded or later, or would pass over."""
    check_limits(args, LIMITS)
    if args.save_strategy == "steps" and args.save_steps <= 0:
        raise ValueError(f"save_steps is {args.save_steps}: nothing would be saved. save_strategy: no says so.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ValueError(f"num_train_epochs is {args.num_train_epochs}, and no max_steps is given: nothing trains.")
    checkpoint = args.resume_from_checkpoint
    if isinstance(checkpoint, str) and not os.path.isfile(os.path.join(checkpoint, TRAINER_STATE_NAME)):
        raise FileNotFoundError(f"resume_from_checkpoint: {checkpoint} is no checkpoint with a {TRAINER_STATE_NAME}.")
    if not args.optim_target_modules:  # with which an optimizer asks for the model
        _check_optimizer(args)
    if isinstance(args, SFTConfig):
        if args.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {args.loss_type!r}.")
        path = args.chat_template_path
        if path is not None and not (path.endswith((".jinja", ".j2")) and os.path.isfile(path)):
            raise ValueError(f"chat_template_path must be a file that ends in .jinja or .j2, got {path!r}.")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs liger-kernel. Install it with `pip install liger-kernel`.")
    if args.torch_compile:
        try:  # what is not called is not compiled
            torch.compile(torch.nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(f"torch_compile_backend and torch_compile_mode: {error}") from error
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


def check_tokens(args: TrainingArguments, place: str, revision: str = "main") -> None:
    """Raise a `ValueError` for an `eos_token` or `pad_token` that the tokenizer at a place does not know."""
    given = {name: token for name in ("eos_token", "pad_token") if (token := getattr(args, name, None)) is not None}
    known = AutoTokenizer.from_pretrained(place, revision=revision).get_vocab() if given else {}
    for name, token in given.items():
        if token not in known:
            raise ValueError(f"{name} is {token!r}, which is no token of {place}. Leave it out, or name one.")


def _check_optimizer(args: TrainingArguments) -> None:
    pairs = [part.strip().split("=") for part in (args.optim_args or "").split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"optim_args is {args.optim_args!r}, expected name=value, and a comma between several.")
    Trainer.get_optimizer_cls_and_kwargs(args)
    if unread := [name for name, _ in pairs if not _is_read(args, name)]:
        raise ValueError(f"optim_args has {unread}, which optim: {args.optim.value} does not read. Leave them out.")


def _is_read(args: TrainingArguments, name: str) -> bool:
    """Tell whether an optimizer reads a name in `optim_args`: Transformers passes over others without a word."""
    tried, found = copy.copy(args), []
    for given in (None, f"{name}=0.5", f"{name}=1"):
        tried.optim_args = given
        try:
            found.append(Trainer.get_optimizer_cls_and_kwargs(tried)[1])
        except (ValueError, AttributeError):  # it is a whole number, or a name of a kind
            return True
    return any(one != found[0] for one in found[1:])


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
