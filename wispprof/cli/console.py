"""What every command prints with: results on stdout, everything else on stderr, and how an error ends.

Results are a table or, with ``--json``, one JSON document. An error is one line with its hint and exit
code 1, a wrong option 2, Ctrl-C 130. Commands need no ``try``: :class:`GuardedGroup` runs them under
:func:`guard`. rich is imported when something is printed, so ``--help`` stays fast.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from wispprof.errors import SettingsError, WispprofError
from wispprof.settings.sources import KnownNames

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table

FAULT, USAGE, INTERRUPTED = 1, 2, 130
PLAIN_PROGRESS_S = 10.0
"""Interval of progress lines without a terminal."""
UNLIMITED_WIDTH = 160
"""Characters of a line without a terminal and without ``COLUMNS``."""


@cache
def console() -> Console:
    """The stderr console: progress, notes and errors."""
    return _console(stderr=True)


@cache
def output() -> Console:
    """The stdout console: results as tables and text. In a pipe or a file nothing needs to fit a screen."""
    return _console(stderr=False)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = UNLIMITED_WIDTH
    return made


def result(document: Any, shown: RenderableType, as_json: bool) -> None:
    """Print a command's result: ``document`` as JSON, or ``shown``."""
    if as_json:
        emit_json(document)
    else:
        output().print(shown)


def emit_json(document: Any, indent: int | None = 2) -> None:
    """Print ``document`` on stdout as one JSON document; ``indent=None`` prints a single line.

    Dataclasses become objects, numpy arrays lists, paths strings, NaN and infinities null.
    """
    sys.stdout.write(json.dumps(_plain(document), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def table(title: str, columns: str, rows: Iterable[Iterable[Any]] = (), caption: str = "") -> Table:
    """A table of raw values. ``columns``: names separated by ``|``, with formats: ``RTT ms:g|load``."""
    from wispprof.reporting import tables

    named = [column.partition(":") for column in columns.split("|")]
    made = tuple(tables.Column(name, spec=spec) for name, _, spec in named)
    return tables.to_rich(tables.Table(title, made, tuple(map(tuple, rows)), caption))


def note(message: str) -> None:
    """Print one line on stderr."""
    console().print(message, style="dim", markup=False)


def warn(message: str) -> None:
    """Print one line on stderr about something the user should know or mend."""
    console().print(f"[yellow]warning:[/yellow] {_escape(message)}")


def progress(eta: bool = True) -> Progress:
    """A progress display on stderr; use as context manager.

    ``with progress() as bar: task = bar.add_task("evaluate", total=40, status=""); bar.advance(task)``.
    A task's ``status`` is shown at its end.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *((TextColumn("ETA"), TimeRemainingColumn()) if eta else ()),
        TextColumn("{task.fields[status]}", style="dim", markup=False),
        console=console(),
        disable=not console().is_terminal,
    )


class tracker:
    """A progress bar for work that reports by callback: call it with ``(done, total, status)``.

    ``with tracker("profile-server") as report: profile(..., progress=report)``. Without a terminal it prints
    a line every :data:`PLAIN_PROGRESS_S`. ``bar``: a display that several trackers share.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        eta: bool = True,
        bar: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bar = bar or progress(eta)
        self._task = self._bar.add_task(description, total=total, status="")
        self._description, self._clock, self._printed_s = description, clock, clock()

    def __enter__(self) -> tracker:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int | None = None, status: str = "") -> None:
        self._bar.update(self._task, completed=done, status=status)
        if total is not None:
            self._bar.update(self._task, total=total)
        now_s = self._clock()
        if not console().is_terminal and now_s - self._printed_s >= PLAIN_PROGRESS_S:
            self._printed_s = now_s
            of = self._bar.tasks[self._task].total
            count = f"{done}" if of is None else f"{done}/{of:g}"
            note(f"{self._description}  {count}  {status}".rstrip())


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def fail(message: str, hint: str = "", code: int = FAULT) -> typer.Exit:
    """Print an error on one line and return the exit to raise: ``raise fail("…", "…")``."""
    line = f"[bold red]error:[/bold red] {_escape(message)}"
    console().print(f"{line} [green]{_escape(hint)}[/green]" if hint else line, soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def guard() -> Iterator[None]:
    """Print what this package raises on purpose as one line, and exit with its code.

    Anything else is a defect and keeps its traceback. ``WISPPROF_DEBUG=1`` keeps all tracebacks.
    """
    debug = bool(os.environ.get("WISPPROF_DEBUG"))
    try:
        yield
    except WispprofError as err:
        if debug:
            raise
        message = str(err).removesuffix(err.hint).rstrip() if err.hint else str(err)
        code = USAGE if isinstance(err, SettingsError) else FAULT
        raise fail(message, err.hint, code) from err
    except KeyboardInterrupt as stop:
        console().print("Interrupted.", style="yellow")
        raise typer.Exit(INTERRUPTED) from stop
    except BrokenPipeError:  # whoever reads the output has left, such as `head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for what is flushed at exit
        raise typer.Exit(FAULT) from None
    except OSError as err:
        hint = _OS_HINTS.get(err.errno or 0, "Check that path." if err.filename else "")
        if debug or not hint:
            raise
        file = f": {err.filename}" if err.filename else ""
        raise fail(f"{err.strerror}{file}.", hint) from err


_OS_HINTS = {
    errno.ENOENT: "Check the path; its folder may not take files.",
    errno.EACCES: "Choose a place you may write to and read from.",
    errno.EADDRINUSE: "Another program listens there: stop it or choose another --port.",
    errno.EADDRNOTAVAIL: "This machine has no such address: check --host.",
    errno.ENOSPC: "Free some disk space and run the command again.",
    errno.EROFS: "Choose a place you may write to.",
    errno.EISDIR: "Give a file, not a folder.",
    errno.ENOTDIR: "Give a folder, not a file.",
}


class GuardedGroup(TyperGroup):
    """The group of all commands: each of them runs under :func:`guard`."""

    def invoke(self, ctx: Any) -> Any:
        with guard():
            return super().invoke(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Every option has an environment variable of its own name: naming them all hides the help.
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _hide_environment(command)
        return command


def _hide_environment(command: Any) -> None:
    for parameter in command.params:
        if hasattr(parameter, "show_envvar") and not parameter.envvar:
            parameter.show_envvar = False
    for inner in getattr(command, "commands", {}).values():
        _hide_environment(inner)


def known_options(group: Any) -> KnownNames:
    """Names of all commands and their options, as a settings file may use them."""
    return {name.replace("-", "_"): _names_of(command) for name, command in group.commands.items()}


def _names_of(command: Any) -> KnownNames:
    own: KnownNames = {p.name: None for p in command.params if p.name not in ("help", "config")}
    return {**own, **known_options(command)} if hasattr(command, "commands") else own
