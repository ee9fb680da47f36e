"""Which files on the Hub are a checkpoint's, and a folder that is sent there as one commit with what it replaces.

`relllm push` and the trainers' `push_to_hub` share this; Transformers' own uploads only add.
"""

import fnmatch
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

CARD_FILES = ("README.md", "evaluation.json", "plots/*.png")
CHECKPOINT_FILES = (
    *("training_settings.json", "config.json", "generation_config.json", "processor_config.json"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
# Of a checkpoint that was there before: the above, what a loader would prefer to it, and what another run wrote.
REPLACED_FILES = (
    *(*CHECKPOINT_FILES, "*_relllm.py", "*.safetensors", "*.safetensors.index.json", "pytorch_model*"),
    *("adapter_config.json", "training_args.bin"),
)


def find_replaced(there: Iterable[str], staged: Container[str], also: Sequence[str] = ()) -> list[str]:
    """List what of a repository's files belongs to the checkpoint before and not to the one that comes; never terms,
    nor what lies in folders of a person's own. `also` are patterns of more.
    """
    ours = [(pattern, pattern.count("/")) for pattern in (*REPLACED_FILES, *also)]
    return sorted(
        name
        for name in there
        if name not in staged and any(depth == name.count("/") and fnmatch.fnmatchcase(name, p) for p, depth in ours)
    )


def file_sizes(folder: Path) -> dict[str, int]:
    """Count the bytes of every file beneath a folder, by its path there, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


@contextmanager
def replacing_uploads(api: HfApi) -> Iterator[None]:
    """Have a Hub's `upload_folder`, which would only add, send one commit that also removes what of a checkpoint it
    replaces. A card, its evidence and its figures stay, because a trainer writes none.
    """

    def upload_folder(
        *,
        repo_id: str,
        folder_path: str,
        path_in_repo: str = "",
        ignore_patterns: Sequence[str] = (),
        run_as_future: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str,
    ) -> object:
        def send() -> CommitInfo:
            ignored = [*ignore_patterns, *DEFAULT_IGNORE_PATTERNS]
            names = set(filter_repo_objects(file_sizes(Path(folder_path)), ignore_patterns=ignored))
            place = f"{path_in_repo}/" if path_in_repo else ""
            found = api.list_repo_files(repo_id, revision=revision, token=token)
            there = [name.removeprefix(place) for name in found if name.startswith(place)]
            removed = [CommitOperationDelete(place + name) for name in find_replaced(there, names)]
            added = [CommitOperationAdd(place + name, str(Path(folder_path, name))) for name in sorted(names)]
            return api.create_commit(
                repo_id, [*added, *removed], commit_message=commit_message, revision=revision, token=token
            )

        return api.run_as_future(send) if run_as_future else send()  # one after the other, in a thread

    vars(api)["upload_folder"] = upload_folder  # of this object, before its class's
    try:
        yield
    finally:
        del vars(api)["upload_folder"]
