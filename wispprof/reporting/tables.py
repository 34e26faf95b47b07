"""One table, two printers: rich for the terminal, HTML for the report.

A table holds raw values and says how they are to be shown, so that whoever prints does not compute and
whoever computes does not format.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | float | int | bool | None
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    ``unit`` stands under the name. ``digits`` decimals of numbers; ``percent`` shows shares times 100.
    ``best`` marks the largest or the smallest value of the column.
    """

    name: str
    unit: str = ""
    digits: int = 1
    percent: bool = False
    best: Literal["max", "min"] | None = None

    def text(self, value: Cell) -> str:
        """``value`` as shown; ``None`` and NaN are a dash."""
        if value is None:
            return NOTHING
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value
        if not math.isfinite(value):
            return NOTHING if math.isnan(value) else "∞"
        if self.percent:
            return f"{100 * value:.{self.digits}f} %"
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """Rows of raw values under their columns. The first column names the row."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...] = field(default=())
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells, {len(self.columns)} columns")

    def is_number(self, index: int) -> bool:
        """Whether the column holds numbers (and is therefore set flush right)."""
        return any(_number(row[index]) is not None for row in self.rows)

    def is_best(self, row: int, index: int) -> bool:
        """Whether this cell holds the best value of its column; never where all are equal."""
        wanted = self.columns[index].best
        value = _number(self.rows[row][index])
        values = [v for r in self.rows if (v := _number(r[index])) is not None]
        if wanted is None or value is None or len(set(values)) < 2:
            return False
        return value == (max(values) if wanted == "max" else min(values))


def _number(value: Cell) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def to_rich(table: Table) -> RichTable:
    """The table for a terminal; the best of a column is bold green."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        title=table.title or None,
        caption=table.note or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        header_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    for index, column in enumerate(table.columns):
        header = Text(column.name)
        if column.unit:
            header.append(f"\n{column.unit}", style="dim")
        made.add_column(
            header, justify="right" if table.is_number(index) else "left", no_wrap=index == 0
        )
    for number, row in enumerate(table.rows):
        made.add_row(
            *(
                Text(column.text(value), style="bold green" if table.is_best(number, i) else "")
                for i, (column, value) in enumerate(zip(table.columns, row, strict=True))
            )
        )
    return made


def to_html(table: Table) -> str:
    """The table as HTML; the best of a column carries the class ``best``."""
    heads = "".join(_head(table, index) for index in range(len(table.columns)))
    body = "".join(
        "<tr>" + "".join(_cell(table, r, c) for c in range(len(table.columns))) + "</tr>"
        for r in range(len(table.rows))
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _head(table: Table, index: int) -> str:
    column = table.columns[index]
    unit = f"<small>{html.escape(column.unit)}</small>" if column.unit else ""
    kind = ' class="n"' if table.is_number(index) else ""
    return f'<th scope="col"{kind}>{html.escape(column.name)}{unit}</th>'


def _cell(table: Table, row: int, index: int) -> str:
    text = html.escape(table.columns[index].text(table.rows[row][index]))
    if index == 0:
        return f'<th scope="row">{text}</th>'
    classes = " ".join(_classes(table, row, index))
    return f'<td class="{classes}">{text}</td>' if classes else f"<td>{text}</td>"


def _classes(table: Table, row: int, index: int) -> Sequence[str]:
    found = ["n"] if table.is_number(index) else []
    return [*found, "best"] if table.is_best(row, index) else found
