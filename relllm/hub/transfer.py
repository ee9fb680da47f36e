"""`relllm push` and `relllm pull`: the checks, the transfer, and errors of the Hub in one sentence.

The transfer is huggingface_hub's. A push is one commit: others see the whole checkpoint or the one before. Run again
after an interruption, it sends only the files that the Hub does not have yet; a pull only those that are not here.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from .cards import check_card
from .files import take_inventory
from .load_check import check_loads
from .staging import Form, stage

logger = logging.get_logger(__name__)

WAITS_S = (1.0, 4.0)  # before the second and the third attempt; huggingface_hub retries single requests by itself
Result = TypeVar("Result")


@dataclass(frozen=True)
class Push:
    """What a push sends, or would send."""

    repo_id: str
    files: dict[str, int]  # bytes by path in the repository
    left_out: list[str]  # what of the folder stays here
    url: str | None  # of the repository; None after a dry run


def push_checkpoint(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    with_code: bool = False,
    form: Form | None = None,
    dry_run: bool = False,
) -> Push:
    """Checks a checkpoint and sends it to the Hub.

    Args:
        folder (`Path`): The checkpoint, with a card of [`relllm.hub.cards.write_card`].
        repo_id (`str`): `org/name`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Demand that the repository be private.
        with_code (`bool`, *optional*, defaults to `False`): With the code files, for `trust_remote_code=True`.
        form (`str`, *optional*): `"light"` or `"full"`; by default what the checkpoint is.
        dry_run (`bool`, *optional*, defaults to `False`): All checks, nothing sent.

    Returns:
        [`Push`]: The exact files.

    Raises:
        FileNotFoundError, NotADirectoryError, RuntimeError, ValueError: If a check fails; nothing was sent.
        PermissionError, ConnectionError: If the Hub refuses, or cannot be reached.
    """
    check_card(folder)
    left_out = take_inventory(folder).left_out
    with stage(folder, form=form, with_code=with_code) as staged:
        check_loads(staged, without_package=False)
        if (staged / "modeling_relllm.py").exists():
            check_loads(staged, without_package=True)
        files = file_sizes(staged)
        url = None if dry_run else send_files(staged, repo_id, private=private)
    return Push(repo_id, files, left_out, url)


def pull_checkpoint(repo_id: str, out: Path, *, revision: str = "main") -> dict[str, int]:
    """Downloads a repository into a folder.

    Args:
        repo_id (`str`): `org/name`.
        out (`Path`): Made if it is not there. Files in it that the repository has too are replaced where they differ.
        revision (`str`, *optional*, defaults to `"main"`): Branch, tag or commit.

    Returns:
        `dict` of `str` to `int`: The files and their sizes in bytes.

    Raises:
        FileNotFoundError: If there is no such repository or revision.
        PermissionError, ConnectionError: If the Hub refuses, or cannot be reached.
        OSError: If a file did not arrive whole.
    """
    api = HfApi()
    with clear_hub_errors(repo_id, revision=revision):
        commit = _retry(lambda: api.repo_info(repo_id, revision=revision).sha)
        tree = _retry(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
        snapshot_download(repo_id, revision=commit, local_dir=out)
    files = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    # Where the Hub fails in between, snapshot_download returns a folder as it is, with a warning.
    for name, size in files.items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise OSError(f"{name} of {repo_id} did not arrive whole in {out}. Run the same command again.")
    return files


@contextlib.contextmanager
def clear_hub_errors(repo_id: str, *, revision: str | None = None) -> Iterator[None]:
    """What the Hub says, as a built-in exception with the remedy."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        cause = _hub_error(error)
        if cause is None:
            raise
        raise _explain(cause, repo_id, revision) from error


def send_files(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Sends every file of a folder as one commit, and only those that the repository does not have yet.

    Args:
        folder (`Path`): With the files, or links to them.
        repo_id (`str`): `org/name`; made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Demand that the repository be private.

    Returns:
        `str`: The repository's URL.

    Raises:
        ValueError: If the repository is public and must not be.
        FileNotFoundError, PermissionError, ConnectionError, OSError: If the Hub refuses, or cannot be reached.
    """
    with clear_hub_errors(repo_id):
        return _send(folder, repo_id, private=private)


def _send(folder: Path, repo_id: str, *, private: bool) -> str:
    api = HfApi()
    repository = _retry(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
    if private and not _retry(lambda: api.repo_info(repo_id)).private:
        raise ValueError(f"--private: {repo_id} is there already, and it is public. Make it private first.")

    def commit() -> None:  # with new operations each time: they remember what the Hub had
        operations = [CommitOperationAdd(name, str(folder / name)) for name in file_sizes(folder)]
        api.create_commit(repo_id, operations, commit_message="Upload a ReLLM with relllm")

    _retry(commit)
    return str(repository)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file beneath a folder, by its path there, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _retry(call: Callable[[], Result]) -> Result:
    """Again after a failure of the server or the connection; what is there already is not sent again."""
    for wait_s in WAITS_S:
        try:
            return call()
        except (HTTPError, RuntimeError) as error:
            cause = _hub_error(error)
            if cause is None or (isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500):
                raise
            logger.warning(f"The Hub failed ({cause}). Trying again in {wait_s:g} s.")
            time.sleep(wait_s)
    return call()


def _hub_error(error: BaseException) -> HTTPError | None:
    """The error of HTTP in a chain of causes: huggingface_hub wraps those of an upload and of a download."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    return cause


def _explain(error: HTTPError, repo_id: str, revision: str | None) -> OSError:
    if not isinstance(error, HfHubHTTPError):
        return ConnectionError(
            f"The connection to the Hub failed ({type(error).__name__}: {error}). Run the same command again: it goes "
            "on with what is missing."
        )
    status = error.response.status_code
    if status == 401:
        return PermissionError(
            f"The Hub does not know you, or {repo_id} does not exist (401). Log in with `hf auth login`, or set "
            "HF_TOKEN, and look at the name."
        )
    if status == 403:
        return PermissionError(
            f"The Hub knows you, and you may not do this to {repo_id} (403). Ask its owner, or use a token with write "
            "access to it."
        )
    if status == 404:
        at = f" at the revision {revision!r}" if revision is not None else ""
        return FileNotFoundError(f"The Hub has no {repo_id}{at} (404). Look at the name; a private one needs a token.")
    if status >= 500:
        return ConnectionError(
            f"The Hub failed ({status}), also after several attempts. Run the same command again later: it goes on "
            "with what is missing."
        )
    return OSError(f"The Hub refused ({status}): {error.server_message or error}.")


__all__ = ["Push", "clear_hub_errors", "file_sizes", "pull_checkpoint", "push_checkpoint", "send_files"]
