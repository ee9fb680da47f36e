"""Tables as labs have them: JSON Lines and CSV, in the separator and the encoding that a spreadsheet wrote them in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from relllm.labels import DIMENSIONS

from .journal import write_whole
from .parsing import decode_text

_TOO_MANY = "\0"  # no name of a column


def read_table(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield number and fields of each row of a `.jsonl`, `.csv`, `.tsv` or `.parquet` file; errors name the line."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    return _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}): {line.strip():.80}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is {type(row).__name__}, expected one object for a row.")
            yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Read an empty field as missing, the dimensions as numbers (also with decimal commas), all else as text."""
    text, _ = decode_text(path)
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=_TOO_MANY, delimiter=max(",;\t", key=header.count))
    for fields in reader:
        if _TOO_MANY in fields:
            raise ValueError(f"{path}, line {reader.line_num} has more fields than the header. Quote its commas.")
        row: dict[str, str | float | None] = {name: value or None for name, value in fields.items()}
        for name in (name for name in fields if name.strip().lower() in DIMENSIONS and fields[name]):
            try:
                row[name] = parse_number(fields[name])
            except ValueError as error:
                wrong = f"{name} is {fields[name]!r}, expected a number"
                raise ValueError(f"{path}, line {reader.line_num}: {wrong}.") from error
        yield reader.line_num, row


def write_table(rows: Sequence[Mapping], path: Path) -> None:
    """Write rows, which may lack columns, as `.csv`, `.jsonl` or `.parquet`; the file is complete or not there."""
    with write_whole(path) as partial:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
            return
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            if path.suffix == ".csv":
                write_csv(rows, file)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(rows: Sequence[Mapping], file: TextIO) -> None:
    """Write rows with every column that one of them has, in the order in which they come."""
    writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def parse_number(text: str) -> float:
    """Return a number as it is written, also with a decimal comma."""
    return float(text.replace(",", "."))
