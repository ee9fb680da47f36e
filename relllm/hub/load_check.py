"""Does a checkpoint load for somebody else? Asked of a fresh process, with this package and without it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE_PARENT = str(Path(__file__).parent.parent.parent)
_WITHOUT_PACKAGE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "relllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
options = {"trust_remote_code": True}
"""
_WITH_PACKAGE = """
import sys
import relllm
options = {}
"""
_LOAD = """
from transformers import AutoModel, AutoProcessor

AutoProcessor.from_pretrained(sys.argv[1], **options)
_, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True, **options)
if lost := {key: sorted(names)[:4] for key, names in info.items() if names}:
    raise ValueError(f"its weights do not fit its configuration: {lost}")
"""


def check_loads(folder: Path, *, without_package: bool) -> None:
    """Loads model and processor in a fresh process.

    Args:
        folder (`Path`): The checkpoint. A light one loads its towers from the Hub; a full one must load offline.
        without_package (`bool`): With the code files in `folder` instead of this package.

    Raises:
        RuntimeError: If it does not load; with the last line of the other process.
    """
    light = '"light_checkpoint": true' in (folder / "config.json").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="relllm-load-") as place:
        environment = {**os.environ, "HF_MODULES_CACHE": place, "TRANSFORMERS_VERBOSITY": "error"}
        if not light:
            environment["HF_HUB_OFFLINE"] = "1"
        if not without_package:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        code = (_WITHOUT_PACKAGE if without_package else _WITH_PACKAGE) + _LOAD
        command = [sys.executable, "-c", code, str(folder.resolve())]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        how = "without this package (trust_remote_code=True)" if without_package else "with this package"
        raise RuntimeError(f"The checkpoint does not load in a fresh process {how}: {reason}. Nothing was sent.")


__all__ = ["check_loads"]
