"""`relllm push`: the checks, and the transfer as one commit: others see the whole checkpoint or the one before.

Run again after an interruption, it sends only the files that the Hub does not have yet.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .cards import check_card
from .files import take_inventory
from .sharing import PushSettings
from .staging import stage

PACKAGE_PARENT = str(Path(__file__).parent.parent.parent)
_LOAD = """
import sys

options = {}
if sys.argv[2] == "without":
    sys.modules["relllm"] = None  # whoever imports it fails
    options = {"trust_remote_code": True}
else:
    import relllm

from transformers import AutoModel, AutoProcessor

AutoProcessor.from_pretrained(sys.argv[1], **options)
_, info = AutoModel.from_pretrained(sys.argv[1], output_loading_info=True, **options)
if lost := {key: sorted(names)[:4] for key, names in info.items() if names}:
    raise ValueError(f"its weights do not fit its configuration: {lost}")
"""


@dataclass(frozen=True)
class Push:
    """What a push sends, or would send."""

    files: dict[str, int]  # bytes by path in the repository
    left_out: list[str]  # what of the folder stays here
    url: str | None  # of the repository; None after a dry run


def push_checkpoint(settings: PushSettings) -> Push:
    """Check a checkpoint that has a card, and send it to the Hub; where a check fails, nothing was sent."""
    check_card(settings.model)
    left_out = take_inventory(settings.model).left_out
    with stage(settings.model, form=settings.form, with_code=settings.with_code) as staged:
        check_loads(staged, without_package=False)
        if (staged / "modeling_relllm.py").exists():
            check_loads(staged, without_package=True)
        files = file_sizes(staged)
        url = None if settings.dry_run else send_files(staged, settings.repo_id, private=settings.private)
    return Push(files, left_out, url)


def check_loads(folder: Path, *, without_package: bool) -> None:
    """Load model and processor in a fresh process, a full checkpoint offline, with this package or the code files.

    One that does not load is a `RuntimeError` with the last line of the other process.
    """
    light = '"light_checkpoint": true' in (folder / "config.json").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="relllm-load-") as place:
        environment = {**os.environ, "HF_MODULES_CACHE": place, "TRANSFORMERS_VERBOSITY": "error"}
        if not light:
            environment["HF_HUB_OFFLINE"] = "1"
        if not without_package:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", _LOAD, str(folder.resolve()), "without" if without_package else "with"]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        how = "without this package (trust_remote_code=True)" if without_package else "with this package"
        raise RuntimeError(f"The checkpoint does not load in a fresh process {how}: {reason}. Nothing was sent.")


def send_files(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Send every file of a folder, or what links there point at, as one commit, and return the repository's URL.

    A public repository that must be `private` is a `ValueError`.
    """
    api = HfApi()
    repository = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"--private: {repo_id} is there already, and it is public. Make it private first.")
    # not by `upload_folder`: with Xet, huggingface_hub makes several commits of it
    operations = [CommitOperationAdd(name, str(folder / name)) for name in file_sizes(folder)]
    api.create_commit(repo_id, operations, commit_message="Upload a ReLLM with relllm")
    return str(repository)


def file_sizes(folder: Path) -> dict[str, int]:
    """Count the bytes of every file beneath a folder, by its path there, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
