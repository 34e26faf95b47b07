"""Tables of raw values and how each column is shown, in the terminal and in the HTML report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from wispprof.reporting.terminal_table import TerminalTable

Cell = str | float | int | bool | None
MISSING = "–"


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    ``unit`` is printed under the name. Floats get ``digits`` decimals; ``percent`` shows shares times
    100. ``spec`` formats numbers in place of both. ``best`` highlights the largest or the smallest value.
    """

    name: str
    unit: str = ""
    digits: int = 1
    percent: bool = False
    best: Literal["max", "min"] | None = None
    spec: str = ""

    def text(self, value: Cell) -> str:
        """``value`` as shown; ``None`` and NaN are a dash."""
        if value is None:
            return MISSING
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value
        if not math.isfinite(value):
            return MISSING if math.isnan(value) else "∞"
        if self.spec:
            return format(value, self.spec)
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
        """Whether the column holds numbers and is aligned to the right."""
        numbers = any(_number(row[index]) is not None for row in self.rows)
        return numbers or bool(self.columns[index].spec)

    def is_best(self, row: int, index: int) -> bool:
        """Whether this cell holds the best value of its column. False if all values are equal."""
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


def to_rich(table: Table) -> TerminalTable:
    """The table for a terminal; the best of a column is bold green."""
    from rich.text import Text

    from wispprof.reporting.terminal_table import TerminalTable

    shown = TerminalTable(table.title, table.note, [_floor(table, i) for i in range(len(table.columns))])
    for index, column in enumerate(table.columns):
        header = Text(column.name)
        if column.unit:
            header.append(f"\n{column.unit}", style="dim")
        shown.add_column(header, justify="right" if table.is_number(index) else "left", overflow="fold")
    for number, row in enumerate(table.rows):
        shown.add_row(
            *(
                Text(column.text(value), style="bold green" if table.is_best(number, i) else "")
                for i, (column, value) in enumerate(zip(table.columns, row, strict=True))
            )
        )
    return shown


def _floor(table: Table, index: int) -> int:
    """Characters that a column of numbers needs: its longest number, or word; 0 for a column of text."""
    if not table.is_number(index):
        return 0
    column = table.columns[index]
    cells = [row[index] for row in table.rows]
    numbers = [column.text(value) for value in cells if not isinstance(value, str)]
    words = " ".join((column.name, column.unit, *(value for value in cells if isinstance(value, str))))
    return max(map(len, (*numbers, *words.split())))
