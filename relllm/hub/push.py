"""`relllm push`: the checks, and the transfer as one commit: others see the whole checkpoint or the one before.

What of the one before does not come again goes in the same commit. Run again after an interruption, it sends only the
files that the Hub does not have yet.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from relllm.uploads import CARD_FILES, file_sizes, find_replaced

from .cards import check_card, check_measured
from .files import take_inventory
from .sharing import PushSettings
from .staging import leave_out_digests, stage

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
    removed: list[str]  # what of the repository goes
    unseen: str | None  # why a dry run could not look at the repository
    url: str | None  # of the repository or the pull request; None after a dry run


def push_checkpoint(settings: PushSettings) -> Push:
    """Check a checkpoint that has a card, and send it to the Hub; where a check fails, nothing was sent."""
    check_card(settings.model)
    left_out = take_inventory(settings.model).left_out
    with stage(settings.model, form=settings.form, with_code=settings.with_code) as staged:
        if not settings.row_digests:
            leave_out_digests(staged)
        check_measured(staged)
        if not settings.no_load:
            check_loads(staged, without_package=False)
            if (staged / "modeling_relllm.py").exists():
                check_loads(staged, without_package=True)
        files = file_sizes(staged)
        if settings.dry_run:
            return Push(files, left_out, *_look_ahead(settings, files), None)
        url, removed = send_files(staged, settings)
    return Push(files, left_out, removed, None, url)


def check_loads(folder: Path, *, without_package: bool) -> None:
    """Load model and processor in a fresh process, a full checkpoint offline, or raise its last line."""
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


def send_files(folder: Path, settings: PushSettings) -> tuple[str, list[str]]:
    """Send every file of a folder, or what links there point at, as one commit that also removes what was replaced.

    Return the URL of the repository or the pull request, and what was removed.
    """
    api, repo_id = HfApi(), settings.repo_id
    repository = api.create_repo(repo_id, private=settings.private or None, exist_ok=True)
    if settings.private and not api.model_info(repo_id).private:
        raise ValueError(f"--private: {repo_id} is there already, and it is public. Make it private first.")
    if settings.tag and settings.tag in [tag.name for tag in api.list_repo_refs(repo_id).tags]:
        raise ValueError(f"--tag {settings.tag}: {repo_id} has that tag already. Choose another, or delete it there.")
    if settings.revision != "main":
        api.create_branch(repo_id, branch=settings.revision, exist_ok=True)
    before = api.model_info(repo_id, revision=settings.revision)
    additions = [CommitOperationAdd(name, str(folder / name)) for name in file_sizes(folder)]
    there = [file.rfilename for file in before.siblings or ()]
    removed = find_replaced(there, {op.path_in_repo for op in additions}, CARD_FILES)
    # not by `upload_folder`: with Xet, huggingface_hub makes several commits of it
    done = api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name) for name in removed)],
        commit_message=settings.message,
        revision=settings.revision,
        create_pr=settings.create_pr,
        parent_commit=before.sha,  # a push of somebody else meanwhile is an error of the Hub
    )
    _check_arrived(api, repo_id, done.pr_revision or done.oid, additions, removed)
    if settings.tag:
        api.create_tag(repo_id, tag=settings.tag, revision=done.oid)
    return done.pr_url or str(repository), removed


def _check_arrived(
    api: HfApi, repo_id: str, revision: str, additions: Sequence[CommitOperationAdd], removed: Sequence[str]
) -> None:
    """Hold what the Hub says of the files at a commit or pull request against the digests of what was sent."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    wrong = [name for name in removed if name in there]
    for sent in additions:
        found = there.get(sent.path_in_repo)
        if found is not None and found.lfs is not None:
            same = found.lfs.sha256 == sent.upload_info.sha256.hex()
        else:
            same = found is not None and found.blob_id == git_hash(Path(str(sent.path_or_fileobj)).read_bytes())
        wrong += [] if same else [sent.path_in_repo]
    if wrong:
        named = ", ".join(wrong)
        raise RuntimeError(f"{repo_id} does not hold at {revision[:12]} what was sent: {named}. Run it again.")


def _look_ahead(settings: PushSettings, staged: Container[str]) -> tuple[list[str], str | None]:
    """List what of the repository would go, or say why that is not known."""
    try:
        before = HfApi().model_info(settings.repo_id, revision=settings.revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return [], "it is not there yet, or your token may not see it"
    except (OSError, HTTPError) as error:  # offline among them
        return [], str(error)
    return find_replaced([file.rfilename for file in before.siblings or ()], staged, CARD_FILES), None
