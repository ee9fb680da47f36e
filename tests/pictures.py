"""Pictures that are written without being drawn, where a test asks no more than that: test_plots draws each kind."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock


def write_blank(figure: object, path: str | Path, **options: object) -> None:
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")


@contextlib.contextmanager
def blank_pictures() -> Iterator[None]:
    from matplotlib.figure import Figure

    with mock.patch.object(Figure, "savefig", write_blank):
        yield
