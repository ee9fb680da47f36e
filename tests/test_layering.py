"""Who may import whom, and how large the house may be, read from the syntax tree without importing anything.

Data flows one way: labels → processing, modeling → data, training, evaluation, inference, conversion → demo →
cli. The Hub rooms, `modeling/` and `processing/`, are copied as flat files beside a checkpoint: they import only
siblings of their own folder, and Transformers finds those imports with a regular expression over the whole text.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "relllm"
HUB_ROOMS = ("modeling", "processing")
# A room is a folder of the package or a module beside it; it may import the rooms listed here, and itself.
BASE = {"labels", "setting", "processing", "modeling"}
BELOW_HUB = BASE | {"tower_outputs", "uploads", "data", "inference", "training", "evaluation", "metrics", "plots"}
BELOW_DEMO = BELOW_HUB | {"preferences", "conversion", "hub"}
MAY_IMPORT = {
    "labels": set(),
    "setting": set(),
    "metrics": {"labels"},
    "plots": {"labels", "metrics"},
    "uploads": set(),
    "processing": set(),
    "modeling": set(),
    "tower_outputs": {"modeling", "processing"},
    "data": BASE | {"plots"},
    "training": BASE | {"data", "metrics", "tower_outputs", "uploads"},
    "inference": BASE | {"data", "plots"},
    "evaluation": BASE | {"data", "inference", "metrics", "plots", "tower_outputs"},
    "conversion": BASE,
    "preferences": BELOW_HUB,
    "hub": BASE | {"data", "evaluation", "uploads"},
    "demo": BELOW_DEMO,
    "cli": BELOW_DEMO | {"demo"},
    "__init__": BELOW_DEMO,
    "__main__": {"cli"},
}
# Loaded only where they are used: some are extras, and each costs start-up time.
HEAVY = {"datasets", "fastapi", "gradio", "matplotlib", "peft", "sounddevice", "trl", "uvicorn"}
VLLM_FOLDER = ("inference", "vllm")
LIGHT_ROOMS = (*HUB_ROOMS, "__init__", "cli")
# As in `transformers.dynamic_module_utils.get_relative_imports`: docstrings and comments count.
HUB_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)")


def room_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported_modules(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Yields line and absolute name of every import in a file: `a.b` for `from a import b`."""
    own = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def imports_at_load(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Yields line and top-level package of the imports that run, unguarded by `try`, when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            yield from imports_at_load(node.orelse)
        elif isinstance(node, (ast.If, ast.With, ast.For, ast.ClassDef)):
            yield from imports_at_load([*node.body, *getattr(node, "orelse", [])])


def direction_errors(path: Path, package: Path) -> Iterator[str]:
    room = room_of(path, package)
    where = path.relative_to(package)
    if room not in MAY_IMPORT:
        yield f"{where}: the room {room!r} is not in MAY_IMPORT of this test. Add it with the rooms it may import."
        return
    for line, name in imported_modules(path, package):
        parts = name.split(".")
        if parts[0] != package.name or parts[-1] == "__version__":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        is_room = (package / target).is_dir() or (package / f"{target}.py").exists()
        if not is_room and room not in ("demo", "cli"):
            yield f"{where}:{line}: imports {name} from the package itself. Import it from the room that defines it."
        elif is_room and target != room and target not in MAY_IMPORT[room]:
            allowed = ", ".join(sorted(MAY_IMPORT[room])) or "no other room"
            yield f"{where}:{line}: {room} imports {name}, it may import {allowed}."


def hub_file_errors(path: Path, package: Path) -> Iterator[str]:
    where = path.relative_to(package)
    text = path.read_text()
    siblings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level == 1 and node.module and (path.parent / f"{node.module}.py").exists():
                siblings.add(node.lineno)
            else:
                written = "." * node.level + (node.module or "")
                yield f"{where}:{node.lineno}: imports from {written!r}. Write `from .sibling import name`."
    for line, name in imported_modules(path, package):
        if name.split(".")[0] == package.name and line not in siblings:
            yield f"{where}:{line}: imports {name}, which is absent on the Hub. Write `from .sibling import name`."
    for line, content in enumerate(text.splitlines(), start=1):
        if HUB_IMPORT.match(content) and line not in siblings:
            yield f"{where}:{line}: Transformers reads {content.strip()!r} as an import. Reword the line."


def flatness_errors(package: Path) -> Iterator[str]:
    seen: dict[str, Path] = {}
    for room in HUB_ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            where = path.relative_to(package)
            if path.parent != package / room:
                yield f"{where}: {room}/ becomes flat files on the Hub. Move the file up."
            if path.name != "__init__.py" and path.name in seen:
                yield f"{where}: {seen[path.name]} has the same name, and both become one file on the Hub. Rename one."
            seen.setdefault(path.name, where)


def load_errors(path: Path, package: Path) -> Iterator[str]:
    for line, name in imports_at_load(ast.parse(path.read_text()).body):
        if name in HEAVY:
            yield f"{path.relative_to(package)}:{line}: imports {name} at load. Import it where it is used."


def engine_errors(path: Path, package: Path) -> Iterator[str]:
    """vLLM is imported in its own folder alone, and that folder where it is used."""
    where = path.relative_to(package)
    if where.parts[:2] == VLLM_FOLDER:
        return
    for line, name in imported_modules(path, package):
        if name.split(".")[0] == "vllm":
            yield f"{where}:{line}: imports {name}. Do it in {'/'.join(VLLM_FOLDER)}/."
    own = [package.name, *where.parent.parts]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            if [*base, *(node.module or "").split(".")][:3] == [package.name, *VLLM_FOLDER]:
                yield f"{where}:{node.lineno}: imports {node.module} at load. Import it where it is used."


def top_level_names(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name


def name_errors(package: Path) -> Iterator[str]:
    """Two files of one name, or two public functions or classes of one name: neither can be searched for."""
    files: dict[str, Path] = {}
    names: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        if path.stem not in ("__init__", "__main__"):
            if path.name in files:
                yield f"{where}: {files[path.name]} has the same name. Rename one."
            files.setdefault(path.name, where)
        for name in top_level_names(path):
            if name in names:
                yield f"{where}: {name} is also in {names[name]}. Give one a more telling name."
            names.setdefault(name, where)


def imported_files(path: Path, package: Path) -> set[Path]:
    """The files of the package that a file imports, also inside functions and for type checking."""
    own = [package.name, *path.relative_to(package).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = own[: len(own) - node.level + 1] if node.level else []
        base = [*base, *(node.module or "").split(".")] if node.module else base
        if base[0] == package.name:
            targets = (package.joinpath(*base[1:], name) for name in ("", *(alias.name for alias in node.names)))
            found |= {target.with_suffix(".py") for target in targets if target.with_suffix(".py").is_file()}
    return found - {path}


def circle_errors(package: Path) -> Iterator[str]:
    """Files that import each other, over however many steps."""
    reached = {path: imported_files(path, package) for path in sorted(package.rglob("*.py"))}
    grown = True
    while grown:
        grown = False
        for path, seen in reached.items():
            further = set().union(*(reached[other] for other in seen), seen)
            grown |= further != seen
            reached[path] = further
    for path, seen in reached.items():
        if path in seen:
            with_it = sorted(str(other.relative_to(package)) for other in seen if path in reached[other])
            yield f"{path.relative_to(package)}: imports in a circle: {', '.join(with_it)}."


MOST_LINES, MOST_FILES = 700, 18


def size_errors(package: Path) -> Iterator[str]:
    """Files and folders that have outgrown a reader."""
    for path in sorted(package.rglob("*.py")):
        if (lines := len(path.read_text().splitlines())) > MOST_LINES:
            yield f"{path.relative_to(package)}: {lines} lines, at most {MOST_LINES}. Split it by what it does."
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES:
            yield f"{folder.relative_to(package)}/: {count} files, at most {MOST_FILES}. Merge some."


def layering_errors(package: Path) -> list[str]:
    """Reads a package's files and returns one message for each broken rule, with file and line."""
    errors = [*flatness_errors(package), *name_errors(package), *circle_errors(package), *size_errors(package)]
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        errors += [*direction_errors(path, package), *engine_errors(path, package)]
        if room in HUB_ROOMS:
            errors += hub_file_errors(path, package)
        if room in LIGHT_ROOMS:
            errors += load_errors(path, package)
    return errors


def write_package(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "relllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "relllm"


def test_the_package_keeps_its_layers() -> None:
    assert (PACKAGE / "__init__.py").exists()
    assert layering_errors(PACKAGE) == []


SOUND = {
    "__init__.py": '__version__ = "0"\nfrom .modeling.tower import Tower\n\n\ndef lazy():\n    import trl\n',
    "labels.py": "",
    "processing/__init__.py": "",
    "processing/sound.py": "import numpy\n",
    "modeling/__init__.py": "from .tower import Tower\n",
    "modeling/scope.py": '"""From .scope to .tower."""\ntry:\n    import peft\nexcept ImportError:\n    peft = None\n',
    "modeling/tower.py": "def build():\n    from .scope import (\n        LoraScope,\n    )\n\n    return LoraScope\n",
    "data/rows.py": "from ..labels import EMOTIONS\nimport datasets\n",
    "training/trainer.py": "import trl\nfrom relllm import __version__\nfrom relllm.data import rows\n",
    "evaluation/plots.py": "import matplotlib\nfrom ..data.rows import Row\n",
    "inference/vllm/plugin.py": "from vllm import LLM\n",
    "demo.py": "from . import evaluation, training\n",
    "cli.py": "def main():\n    from .demo import run\n",
}
BROKEN = {
    "evaluation imports training": ({"evaluation/a.py": "from ..training.trainer import T\n"}, "evaluation/a.py:1"),
    "so inside a function": ({"evaluation/a.py": "def f():\n    import relllm.training\n"}, "evaluation/a.py:2"),
    "a room imports cli": ({"demo.py": "from . import cli\n"}, "demo.py:1"),
    "labels imports upwards": ({"labels.py": "from .modeling import tower\n"}, "labels.py:1"),
    "a room imports the package": ({"training/trainer.py": "from relllm import Tower\n"}, "training/trainer.py:1"),
    "a room is unknown": ({"utils.py": ""}, "utils.py: the room"),
    "modeling imports processing": ({"modeling/a.py": "from ..processing.sound import f\n"}, "modeling/a.py:1"),
    "modeling imports relllm": ({"modeling/a.py": "from relllm.modeling.tower import Tower\n"}, "absent on the Hub"),
    "a Hub file imports its folder": ({"processing/a.py": "from . import sound\n"}, "processing/a.py:1"),
    "a sibling does not exist": ({"processing/a.py": "from .gone import f\n"}, "processing/a.py:1"),
    "a docstring reads as an import": (
        {"modeling/a.py": '"""See\nfrom .tower import Tower\n"""\n'},
        "modeling/a.py:2",
    ),
    "a Hub room has a subfolder": ({"modeling/deep/a.py": ""}, "Move the file up"),
    "two Hub files share a name": ({"modeling/sound.py": ""}, "Rename one"),
    "peft at load in modeling": ({"modeling/a.py": "import peft.tuners\n"}, "imports peft at load"),
    "two files share a name": ({"data/trainer.py": ""}, "Rename one"),
    "two public names are one": (
        {"data/a.py": "class Tower:\n    pass\n", "data/b.py": "def Tower(): ...\n"},
        "telling",
    ),
    "a circle of two": (
        {"data/a.py": "from .b import f\n", "data/b.py": "def f():\n    from .a import g\n"},
        "circle: data/a.py, data/b.py",
    ),
    "a file without end": ({"data/a.py": "x = 1\n" * 701}, "701 lines"),
    "a crowded folder": ({f"data/a{number}.py": "" for number in range(18)}, "19 files"),
    "vllm in another folder": ({"inference/a.py": "def f():\n    from vllm import LLM\n"}, "inference/a.py:2"),
    "its folder at load": (
        {"evaluation/a.py": "from ..inference.vllm import register\n"},
        "imports inference.vllm at",
    ),
    "trl at load in cli": ({"cli.py": "if True:\n    from trl import SFTTrainer\n"}, "imports trl at load"),
}


def test_a_sound_package_breaks_no_rule(tmp_path: Path) -> None:
    assert layering_errors(write_package(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_rule_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    errors = layering_errors(write_package(tmp_path, SOUND | files))
    assert any(message in error for error in errors), errors
