"""Where a checkpoint or a data set is: a path on this machine or an id of the Hub, and never the one for the other."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

TABLES = (".jsonl", ".csv", ".parquet")
SHOWN = 6


class PlaceError(FileNotFoundError):
    """There is no checkpoint, or no data, where a user says it is."""


def check_place(
    place: str | os.PathLike, *, holds: str | Sequence[str] | None = None, repo_type: str | None = "model"
) -> None:
    """Raise a [`PlaceError`] for a path where nothing is, rather than have it looked for on the Hub.

    A name is a path if it is written like one (`./x`, `a/b/c`, `x.jsonl`), if its folder is here, or if something here
    has nearly that name. An id of the Hub of which this is true is known by being in the Hub's cache.

    Args:
        holds (`str`, *optional*): A file that a folder must have, such as `config.json`, or several of which it must
            have one.
        repo_type (`str`, *optional*, defaults to `"model"`): What it would be on the Hub; or `"dataset"`; `None` for
            what is on this machine only.
    """
    name = str(place)
    path = Path(os.path.expanduser(name))
    if path.exists():
        wanted = [holds] if isinstance(holds, str) else list(holds or ())
        if wanted and not any((path / one).is_file() for one in wanted):
            depths = [depth + one for depth in ("*/", "*/*/") for one in wanted]
            inside = sorted({str(found.parent) for depth in depths for found in path.glob(depth)})
            raise PlaceError(
                f"{name} is no folder with a {' or '.join(wanted)}; {_there_is(inside) or _listing(path)}."
            )
        return
    written = (
        repo_type is None or name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in TABLES
    )
    nearest = _nearest(path)
    if not written:
        beside_others = "/" in name and path.parent.is_dir()
        if not (beside_others or nearest) or _is_cached(name, str(repo_type)):
            return
    what = "file or folder" if holds is None else "folder"
    remedy = "" if written else f" If it is an id of the Hub, `hf download {name} --repo-type {repo_type}` it first."
    raise PlaceError(f"No {what} {name}; {_there_is([nearest] if nearest else []) or _listing(path)}.{remedy}")


def find_file(place: str, name: str, revision: str = "main") -> str | None:
    """Return where a file of a folder or Hub id is; `None` where there is none."""
    from transformers.utils.hub import cached_file

    quietly = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
    return cached_file(place, name, revision=revision, **dict.fromkeys(quietly, False))


def _nearest(path: Path) -> str | None:
    """Return what is there with nearly the same name in each part."""
    found = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if not (found / part).exists():
            near = difflib.get_close_matches(part, _names(found), n=1, cutoff=0.75)
            if not near:
                return None
            part = near[0]
        found /= part
    return str(found)


def _is_cached(name: str, repo_type: str) -> bool:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"{repo_type}s--{name.replace('/', '--')}").is_dir()


def _there_is(places: list[str]) -> str:
    return f"there is {', '.join(places[:SHOWN])}" if places else ""


def _listing(path: Path) -> str:
    """Say what is in the first of the folders around a path that exists."""
    folder = next((one for one in (path, *path.parents) if one.is_dir()), Path("."))
    names = _names(folder)
    if not names:
        return f"{folder.absolute()} is empty"
    return f"{folder.absolute()} holds {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []
