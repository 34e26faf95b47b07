"""A table for a terminal that never cuts a value."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 10_000
_TEXT = 10


class TerminalTable(Table):
    """Where space is short, text and headers wrap and numbers stay whole.

    So do the names in the first column, if the other columns of text keep :data:`_TEXT` characters each.

    ``floors``: by column the characters that its numbers need; 0 for text.
    """

    def __init__(self, title: str, note: str, floors: Sequence[int]) -> None:
        super().__init__(
            title=title or None,
            caption=note or None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            caption_justify="left",
            header_style="bold",
            pad_edge=False,
            collapse_padding=True,
        )
        self._floors = floors

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        natural = Measurement.get(console, options.update_width(_UNBOUNDED), self).maximum
        narrow = natural > options.max_width
        for column, floor in zip(self.columns, self._floors, strict=True):
            column.width = floor if narrow and floor else None
        if narrow and not self._floors[0]:
            first, *others = self.columns
            names = max((Measurement.get(console, options, cell).maximum for cell in first.cells), default=0)
            needed = names + sum((floor or _TEXT) + 3 for floor in self._floors[1:]) + 3
            first.width = names if others and needed <= options.max_width else None
        yield from super().__rich_console__(console, options)
