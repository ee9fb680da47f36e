"""A table of text, as Markdown, LaTeX (booktabs) or in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable

DASH = "–"  # a cell without a value

_LATEX = {
    "\\": r"\textbackslash{}",
    **{mark: "\\" + mark for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Table:
    """Cells of text under one or two lines of header, as many in each row as there are columns."""

    name: str  # for file names and labels
    title: str  # a sentence
    header: list[tuple[str, str]]  # for each column its group (a data set; empty for none) and its name
    num_stubs: int  # how many columns at the left are words; the others are numbers
    rows: list[list[str]]
    notes: list[str]  # sentences below

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.name}: the row {row} has {len(row)} cells, expected {len(self.header)}.")


def to_markdown(table: Table) -> str:
    """Return the table with its title and notes; a column's group stands before its name."""
    names = [_mark_down(f"{group} {name}".strip()) for group, name in table.header]
    rules = [":--" if index < table.num_stubs else "--:" for index in range(len(names))]
    rows = [names, rules, *([_mark_down(cell) for cell in row] for row in table.rows)]
    lines = [f"## {table.title}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in table.notes), ""])


def to_latex(table: Table) -> str:
    r"""Return a `table*` that needs `\usepackage{booktabs}` only; groups span their columns."""
    columns = "l" * table.num_stubs + "r" * (len(table.header) - table.num_stubs)
    lines = [r"\begin{table*}", r"\centering", r"\small", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    groups = [(group, len(list(members))) for group, members in groupby(group for group, _ in table.header)]
    if any(group for group, _ in groups):
        lines += _group_lines(groups)
    lines += [_latex_row(_escape(name) for _, name in table.header), r"\midrule"]
    lines += [_latex_row(_escape(cell) for cell in row) for row in table.rows]
    caption = " ".join(_escape(sentence) for sentence in (table.title + ".", *table.notes))
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", rf"\label{{tab:{table.name}}}"]
    return "\n".join([*lines, r"\end{table*}", ""])


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
        cells = [f"{group} {name} {cell}".strip() for (group, name), cell in zip(table.header, row, strict=True)]
        said = [shown for shown, cell in zip(cells, row, strict=True) if cell not in ("", DASH)]
        console.print(Padding(", ".join(said), (0, 0, 0, 2)), soft_wrap=False)


def _mark_down(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _escape(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _group_lines(groups: list[tuple[str, int]]) -> list[str]:
    """Return a row of groups over their columns, and the rules below them."""
    cells, rules, at = [], [], 1
    for group, width in groups:
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{_escape(group)}}}" if group else " & ".join([""] * width))
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if group else []
        at += width
    return [_latex_row(cells), " ".join(rules)]
