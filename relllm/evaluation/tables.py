"""A table of text, as Markdown, LaTeX (booktabs) or in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable

DASH = "–"  # a cell without a value

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{mark: "\\" + mark for mark in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "−": "$-$",
        "≥": r"$\geq$",
        "±": r"$\pm$",
    }
)


@dataclass(frozen=True)
class Table:
    """Cells of text under one or two lines of header, as many in each row as there are columns."""

    name: str  # for file names and labels
    title: str  # a sentence
    header: list[tuple[str, str]]  # for each column its group (a data set; empty for none) and its name
    num_stubs: int  # how many columns at the left are words; the others are numbers
    rows: list[list[str]]
    notes: list[str]  # sentences below


def to_markdown(table: Table) -> str:
    """Return the table with its title and notes; a column's group stands before its name."""
    names = [f"{group} {name}".strip() for group, name in table.header]
    rules = [":--" if index < table.num_stubs else "--:" for index in range(len(names))]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (names, rules, *table.rows)]
    lines = [f"## {table.title}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in table.notes), ""])


def to_latex(table: Table) -> str:
    r"""Return a `table*` that needs `\usepackage{booktabs}` only; groups span their columns."""
    from pandas import DataFrame, MultiIndex

    escaped = [[text.translate(_LATEX) for text in texts] for texts in (*zip(*table.header, strict=True), *table.rows)]
    groups, names, *rows = escaped
    frame = DataFrame(rows, columns=MultiIndex.from_arrays([groups, names]) if any(groups) else names)
    latex = frame.style.hide(axis="index").to_latex(
        environment="table*",
        position_float="centering",
        hrules=True,
        column_format="l" * table.num_stubs + "r" * (len(names) - table.num_stubs),
        multicol_align="c",
        caption=" ".join((table.title + ".", *table.notes)).translate(_LATEX),
        label=f"tab:{table.name}",
    )
    rules, last = "", 0
    for group, columns in groupby(groups):
        first, last = last + 1, last + len(list(columns))
        rules += rf"\cmidrule(lr){{{first}-{last}}}" * bool(group)
    latex = latex.replace("\\centering\n", "\\centering\n\\small\n", 1)
    return latex.replace(" \\\\\n", f" \\\\\n{rules}\n", 1) if rules else latex


def show_table(table: Table, console: Console) -> None:
    """Print a table without its notes; where the console is too narrow for it, a paragraph for each row."""
    drawn = RichTable(title=table.title, title_justify="left")
    for index, (group, name) in enumerate(table.header):
        justify: Literal["left", "right"] = "left" if index < table.num_stubs else "right"
        drawn.add_column(f"{group}\n{name}" if group else name, justify=justify)
    for row in table.rows:
        drawn.add_row(*row)
    if console.measure(drawn, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(drawn)
        return
    console.print(table.title, style="italic", soft_wrap=False)
    for row in table.rows:
        cells = zip(table.header, row, strict=True)
        said = [f"{group} {name} {cell}".strip() for (group, name), cell in cells if cell not in ("", DASH)]
        console.print(Padding(", ".join(said), (0, 0, 0, 2)), soft_wrap=False)
