"""The help pages of the training commands, from the source of their settings: importing TRL takes ten seconds."""

import argparse
import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

DECLARED = {  # where settings are, and the words that some of them take
    "relllm": ("training/**/*.py", "preferences/*.py"),
    "transformers": ("trainer_utils.py", "training_args.py"),
    "trl": tuple(f"trainer/{name}_config.py" for name in ("base", "sft", "dpo", "grpo")),
}
ROWS = ("RowsSettings", "SplitSettings")
LORA = ("LoraSettings",)
MODEL_AND_DATA = {"model and data": (*ROWS, *LORA, "ReLLMScriptArguments")}
LOSSES = {"losses, and where the paper's recipe differs from TRL": ("PaperConfig", "ReLLMSettings", "ReLLMSFTConfig")}
AUGMENTATION = {"augmentation of the training clips (off by default)": ("AugmentationSettings",)}
CACHE = {"cache of the frozen towers' outputs (off by default)": ("TowerCacheSettings",)}
REST = "everything else that TRL and Transformers know"


# Of each command: the class of its trainer's settings, and sections of classes of settings.
PAGES: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "train": ("ReLLMSFTConfig", {**MODEL_AND_DATA, **LOSSES, **AUGMENTATION, **CACHE}),
    "train --method dpo": (
        "ReLLMDPOConfig",
        {**MODEL_AND_DATA, "pairs, and the losses of the heads": ("ReLLMDPOConfig", "ReLLMSettings")}
        | {**AUGMENTATION, **CACHE},
    ),
    "train --method grpo": (
        "ReLLMGRPOConfig",
        {**MODEL_AND_DATA, "rewards, and where this differs from TRL": ("ReLLMGRPOConfig", "ReLLMSettings")},
    ),
    "train-emotion": (
        "EmotionTrainingConfig",
        {
            "model and data": ("RowsSettings", "EmotionScriptArguments"),
            "where audEERING's recipe differs from Transformers' defaults": ("EmotionTrainingConfig",),
            **AUGMENTATION,
        },
    ),
    "train-text": (
        "TextTrainingConfig",
        {
            "model and data": (*ROWS, *LORA, "TextScriptArguments"),
            "where RE-LLM's recipe differs from TRL's": ("PaperConfig", "TextTrainingConfig"),
        },
    ),
    "plan": ("ReLLMSFTConfig", {"the GPU and the rows": ("RowSize", "PlanArguments"), **MODEL_AND_DATA, **LOSSES}),
}


class DeclaredSetting(NamedTuple):
    """A setting as its source declares it; what only an import would tell is `None`."""

    default: Any
    help: str | None
    choices: list[str] | None


def show_training_help(command: str, about: str) -> str:
    """Return the page of a command of `PAGES`: what it does, and its settings section by section."""
    (trainer, kinds_of), classes = PAGES[command], _parse_classes()
    sections = {
        title: [name for kind in kinds for name, _ in _fields(classes[kind])] for title, kinds in kinds_of.items()
    }
    settings = read_settings((*(kind for kinds in kinds_of.values() for kind in kinds), trainer), classes)
    listed = {name for names in sections.values() for name in names}
    sections[REST] = [name for name in settings if name not in listed]
    parser = argparse.ArgumentParser(
        usage=f"relllm {command} --config RECIPE.yaml [--setting value …]",
        description=about,
        formatter_class=_HelpFormatter,
        add_help=False,
    )
    for title, names in sections.items():
        group = parser.add_argument_group(title)
        for name in dict.fromkeys(names):
            one = settings[name]
            group.add_argument(f"--{name}", default=one.default, help=one.help, choices=one.choices)
    return parser.format_help()


def read_settings(kinds: Iterable[str], classes: Mapping[str, ast.ClassDef]) -> dict[str, DeclaredSetting]:
    """Return the settings of some classes and of those they inherit from, in the order that dataclasses have."""
    found: dict[str, DeclaredSetting] = {}
    for kind in kinds:
        node = classes.get(kind)
        if node is not None:
            found |= read_settings(reversed(_names(node.bases)), classes)
            found |= {name: _read_field(one, node, classes) for name, one in _fields(node)}
    return found


@functools.cache
def _parse_classes() -> dict[str, ast.ClassDef]:
    classes: dict[str, ast.ClassDef] = {}
    for package, patterns in DECLARED.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"Training needs {package}. Install it with `pip install 'relllm[train]'`.")
        for file in (file for pattern in patterns for file in sorted(Path(spec.origin).parent.glob(pattern))):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return classes


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(line.value, ast.Call):
            yield line.target.id, line


def _read_field(line: ast.AnnAssign, node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> DeclaredSetting:
    """Read `name: type = field(default=…, metadata={"help": …})`, or `setting(default, help)` in its place."""
    call = line.value
    assert isinstance(call, ast.Call)
    told = {one.arg: one.value for one in call.keywords} | dict(zip(("default", "help"), call.args, strict=False))
    if isinstance(metadata := told.get("metadata"), ast.Dict):
        told |= {_value(name): value for name, value in zip(metadata.keys, metadata.values, strict=True)}
    choices = _value(told.get("choices")) or _choices(line.annotation, classes)
    return DeclaredSetting(_value(told.get("default"), node), _value(told.get("help")), choices)


def _choices(annotation: ast.expr, classes: Mapping[str, ast.ClassDef]) -> list[str] | None:
    """Return the words of a `Literal`, or the values of an enumeration, that a type has."""
    for part in ast.walk(annotation):
        if isinstance(part, ast.Subscript) and _names([part.value]) == ["Literal"]:
            words = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            return [_value(word) for word in words] if len(words) > 1 else None
        enum = classes.get(part.id) if isinstance(part, ast.Name) else None
        if enum is not None and any("Enum" in base for base in _names(enum.bases)):
            return [str(_value(line.value)) for line in enum.body if isinstance(line, ast.Assign)]
    return None


def _value(node: ast.expr | None, within: ast.ClassDef | None = None) -> Any:
    """Return what an expression is worth; of a name, what its class assigns to it at last."""
    if isinstance(node, ast.Name) and within is not None:
        lines = [line for line in ast.walk(within) if isinstance(line, ast.Assign)]
        return _value(next((line.value for line in reversed(lines) if _names(line.targets) == [node.id]), None))
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _names(nodes: Iterable[ast.expr]) -> list[str]:
    return [ast.unparse(node) for node in nodes]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """`--name VALUE` on one line, and the default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = f" {'|'.join(map(str, action.choices))}" if action.choices else " VALUE"
        return action.option_strings[0] + (value if len(value) < 60 else " NAME")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)
