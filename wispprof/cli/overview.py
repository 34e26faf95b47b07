"""What ``wispprof --help`` shows, drawn from the catalogue in the look of the commands' own help.

Typer's drawing of a group asks every command for its help, and its module imports a Markdown parser and a
syntax highlighter that nothing here uses: together they took half of the time in which the overview answers.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from wispprof.cli.catalogue import Entry

__all__ = ["show_overview"]

_NAME, _ASIDE = "bold cyan", "dim"


def show_overview(group: Any, context: Any, entries: tuple[Entry, ...]) -> None:
    """Print usage, what the tool is for, its own options and ``entries`` by panel, on stdout."""
    console = Console(highlight=False)
    console.print(Padding(_usage(group, context), 1))
    console.print(Padding(Text(group.help or ""), (0, 1, 1, 1)))
    records = [p.get_help_record(context) for p in group.get_params(context)]
    options = [(Text(names, _NAME), Text(text)) for names, text in filter(None, records)]
    console.print(_panel("Options", options, max(len(names) for names, _ in options)))
    width = max(len(entry.name) for entry in entries)
    for panel in dict.fromkeys(entry.panel for entry in entries):
        inside = [(Text(e.name, _NAME), Text(e.line)) for e in entries if e.panel == panel]
        console.print(_panel(panel, inside, width))


def _usage(group: Any, context: Any) -> Text:
    head, _, rest = group.get_usage(context).partition(": ")
    return Text.assemble((f"{head}: ", "bold yellow"), (rest, "bold"))


def _panel(title: str, rows: list[tuple[Text, Text]], width: int) -> Panel:
    table = Table(show_header=False, expand=True, box=None, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True, width=width)
    table.add_column(ratio=10)
    for row in rows:
        table.add_row(*row)
    return Panel(table, title=title, title_align="left", border_style=_ASIDE)
