"""What of a folder belongs to a checkpoint on the Hub, what stays behind, and what stops a push.

Only what is listed goes. Secrets and a corpus's files stop the push although they would not go: somebody should know.
"""

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from relllm.data.corpora.folder import AUDIO_SUFFIXES, OTHER_SUFFIXES
from relllm.modeling.checkpoint_relllm import check_one_form
from relllm.uploads import CARD_FILES, CHECKPOINT_FILES

PACKAGE = Path(__file__).parent.parent
CODE_FILES = {path.name for room in ("modeling", "processing") for path in (PACKAGE / room).glob("*_relllm.py")}
TERMS_FILES = ("LICENSE*", "NOTICE*")
SECRET_FILES = (".env", ".env.*", ".netrc", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "id_ecdsa*", "credentials*")
CORPUS_FILES = (
    *(f"*{suffix}" for suffix in AUDIO_SUFFIXES + OTHER_SUFFIXES),
    *("*.parquet", "*.arrow", "*.jsonl", "*.csv", "*.tsv"),
)
# Whole folders of a run or of a tool, which are not looked into.
SKIPPED_FOLDERS = ("checkpoint-*", "_unfinished", "runs", ".cache", ".git", "__pycache__")
SECRET_TEXT = re.compile(  # of the Hub, OpenAI and others, GitHub, AWS and Slack, where no word goes before
    rb"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,}"
    rb"|A[KS]IA[0-9A-Z]{16}|xox[a-z]-[A-Za-z0-9-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TEXT_SUFFIXES = (
    *("", ".json", ".md", ".py", ".txt", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".sh", ".log", ".ipynb"),
)


@dataclass(frozen=True)
class Inventory:
    """The files of a folder, by what happens to them; paths are relative to it, with `/`."""

    upload: list[str]
    left_out: list[str]  # files and, ending in `/`, whole folders


def take_inventory(folder: Path) -> Inventory:
    """Sort the files of a checkpoint's folder; secrets or a corpus's files in it are a `ValueError` that names all."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder. Give a checkpoint's folder.")
    names = list(_walk_folder(folder))
    check_one_form(folder)
    if problems := [f"- {name}: {problem}" for name in names if (problem := _problem_of(folder, name))]:
        remedy = "Move it elsewhere; if a token was in a file, revoke it."
        raise ValueError("\n".join([f"{folder} holds what must not go to the Hub:", *problems, remedy]))
    belonging = (*CODE_FILES, *TERMS_FILES, *CARD_FILES, *CHECKPOINT_FILES)
    upload = [name for name in names if _matches(name, belonging)]
    return Inventory(upload, [name for name in names if name not in upload])


def _walk_folder(folder: Path) -> Iterator[str]:
    """Yield files, sorted by their path, and skipped folders with a `/` behind."""
    for root, folders, files in os.walk(folder):
        where = Path(root).relative_to(folder)
        skipped = [name for name in folders if _matches(name, SKIPPED_FOLDERS)]
        folders[:] = sorted(set(folders) - set(skipped))
        yield from (f"{(where / name).as_posix()}/" for name in sorted(skipped))
        yield from ((where / name).as_posix() for name in sorted(files))


def _problem_of(folder: Path, name: str) -> str | None:
    """Say why a file must not be in a folder that is pushed; `None` for one that may, and for a folder."""
    path = folder / name
    if name.endswith("/"):
        return None
    if _matches(path.name.lower(), SECRET_FILES):
        return "a file of secrets"
    if _matches(path.name.lower(), CORPUS_FILES):
        return "recordings or rows of a corpus"
    is_text = path.suffix.lower() in TEXT_SUFFIXES and path.is_file()
    return "holds a token or a private key" if is_text and SECRET_TEXT.search(path.read_bytes()) else None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
