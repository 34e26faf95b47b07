"""A table for a terminal that never cuts a value."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 10_000


class TerminalTable(Table):
    """Where space is short, columns of text wrap first, then headers of numbers; the numbers stay whole.

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
        yield from super().__rich_console__(console, options)
