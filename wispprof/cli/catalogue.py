"""What commands there are: module, name and one line of each. A module is imported when it is needed.

The line is the first of the command's own help, and a test compares the two, so that the overview
(``wispprof --help``) needs no command and yet cannot say what the command does not.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer

__all__ = ["CATALOGUE", "Catalogue", "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One command: its ``name``, where it stands in the overview, and the ``module`` that registers it."""

    panel: str
    module: str
    name: str
    line: str


def _panel(title: str, *commands: tuple[str, str, str]) -> tuple[Entry, ...]:
    return tuple(Entry(title, *command) for command in commands)


CATALOGUE = (
    *_panel(
        "Start here",
        (
            "demo",
            "demo",
            "Everything in a row on this machine: profile both sides, fit, plan, serve, answer, compare.",
        ),
        (
            "doctor",
            "doctor",
            "Check installation, machine, models, ports, keys and files; say what to do about each fault.",
        ),
    ),
    *_panel(
        "Measure",
        ("profile_server", "profile-server", "Time ragged batch shapes on the verifier engine."),
        (
            "profile_edge",
            "profile-edge",
            "Time drafting on this device: by context, in a burst, sustained, with energy.",
        ),
        (
            "profile_link",
            "profile-link",
            "Measure round trip, jitter and bandwidth to a server, in its own frames.",
        ),
        (
            "profile_edge",
            "trace",
            "Take an acceptance trace: the target's path and what the draft would propose along it.",
        ),
        ("profile", "profile", "Look at, check, join and compare profiles."),
    ),
    *_panel(
        "Decide",
        (
            "fit",
            "fit",
            "Fit a verification-time estimator and a rejection predictor, and say how good they are.",
        ),
        ("plan", "plan", "Make a plan, or look at one."),
        (
            "simulate",
            "simulate",
            "Simulate a fleet of edges on one server, under one policy or several.",
        ),
        (
            "reproduce",
            "reproduce",
            "Print a paper's headline table beside what the simulator (or its formulas) gives.",
        ),
        (
            "report",
            "report",
            "Write one self-contained HTML page from whatever artifacts a folder holds.",
        ),
    ),
    *_panel(
        "Run",
        ("serve", "serve", "Verify the drafts of many edges with one target model."),
        ("edge", "edge", "Serve an OpenAI-compatible API on this device."),
        (
            "edge",
            "generate",
            "Generate text: this device drafts, the server verifies.",
        ),
        (
            "edge",
            "chat",
            "Talk to the target. Type a message and Enter; an empty line or Ctrl-D ends.",
        ),
        (
            "bench",
            "bench",
            "Load a running server with replay edges and print what their users saw.",
        ),
        (
            "edge",
            "link",
            "Emulate a link: a proxy with delay, jitter, bandwidth, loss, stalls and cuts before a server.",
        ),
    ),
)


class Catalogue(MutableMapping[str, Any]):
    """Commands by name, in the order of the catalogue; each is made when it is first taken out."""

    def __init__(self, entries: tuple[Entry, ...] = CATALOGUE) -> None:
        self.entries = entries
        self._by_name = {entry.name: entry for entry in entries}
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._make(self._by_name[name])
        return self._made[name]

    def _make(self, entry: Entry) -> None:
        part = typer.Typer()
        part.callback()(
            _nothing
        )  # with a callback Typer makes a group, however few commands it has
        import_module(f"wispprof.cli.{entry.module}").register(part)
        group: Any = typer.main.get_command(part)
        for name, command in group.commands.items():
            command.rich_help_panel = self._by_name[name].panel
            self._made.setdefault(name, command)

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name


def _nothing() -> None:
    """A group's own action: none."""
