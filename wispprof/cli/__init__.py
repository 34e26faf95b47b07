"""The command line: each command parses, calls and prints.

A module is imported when one of its commands is needed. The overview that ``wispprof --help`` prints needs
none of them; a test compares its lines with the commands' own help.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof import __version__
from wispprof.cli.console import USAGE, GuardedGroup, known_options, note
from wispprof.settings.sources import ENV_PREFIX, read_config

if TYPE_CHECKING:
    from rich.panel import Panel
    from rich.text import Text

_NAME, _ASIDE = "bold cyan", "dim"


@dataclass(frozen=True, slots=True)
class Entry:
    """One command, or a group: its panel in the overview, its name and first line, its module if named
    otherwise."""

    panel: str
    name: str
    line: str
    module: str = ""
    is_group: bool = False


COMMANDS = (
    Entry("Start here", "demo", "Profile, fit, plan, serve, generate and compare on this machine.", "start"),
    Entry("Start here", "doctor", "Check installation, models, ports, keys and files.", "start"),
    Entry("Measure", "profile-server", "Time ragged batch shapes on the engine.", "profilers"),
    Entry("Measure", "profile-edge", "Time drafting: in bursts and sustained.", "profilers"),
    Entry("Measure", "profile-link", "Measure round trip, jitter and bandwidth.", "profilers"),
    Entry("Measure", "trace", "Take an acceptance trace of a draft and a target.", "profilers"),
    Entry(
        "Measure", "check-pair", "Say in minutes whether a draft is worth serving with a target.", "profilers"
    ),
    Entry("Measure", "profile", "Show, validate, merge, compare, export and import profiles.", is_group=True),
    Entry("Decide", "fit", "Fit a step-time estimator and a rejection predictor, and score them."),
    Entry("Decide", "plan", "Make a plan, or show, explain, compare and export one.", is_group=True),
    Entry(
        "Decide", "fleet", "Rank servers and systems for a fleet by price, and verify the best by simulation."
    ),
    Entry(
        "Decide", "traffic", "Turn recorded requests into an anonymous workload file for `plan` and `fleet`."
    ),
    Entry("Decide", "simulate", "Simulate a fleet of edges on one server under several policies."),
    Entry("Decide", "reproduce", "Compare published results with the simulator's.", "simulate"),
    Entry(
        "Decide",
        "report",
        "Write an HTML report of a folder of artifacts, or of two side by side.",
        "start",
    ),
    Entry("Run", "serve", "Verify the drafts of many edges with one target model."),
    Entry("Run", "edge", "Serve an OpenAI-compatible API on this device, and a page to chat on."),
    Entry("Run", "generate", "Generate text: this device drafts, the server verifies.", "edge"),
    Entry("Run", "chat", "Chat with the target; an empty line or Ctrl-D ends.", "edge"),
    Entry("Run", "bench", "Load a running server with replayed edges; print their metrics.", "serve"),
    Entry("Run", "link", "Emulate a link: a proxy with delay, jitter, loss and stalls.", "edge"),
    Entry("Run", "service", "Print a systemd unit that runs this installation."),
)


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name, in the order of :data:`COMMANDS`; each is made when it is first taken out."""

    def __init__(self) -> None:
        self._by_name = {entry.name: entry for entry in COMMANDS}
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(self._by_name[name])
        return self._made[name]

    def _make(self, entry: Entry) -> Any:
        """The module's ``group``, or its function of the command's name."""
        module: Any = import_module(f"wispprof.cli.{entry.module or entry.name}")
        part = typer.Typer()
        part.callback()(lambda: None)  # with a callback, Typer makes a group even of one command
        if entry.is_group:
            part.add_typer(module.group, name=entry.name)
        else:
            part.command(entry.name)(getattr(module, entry.name.replace("-", "_")))
        tool: Any = typer.main.get_command(part)
        command = tool.commands[entry.name]
        command.rich_help_panel = entry.panel
        return command

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


def show_overview(group: Any, context: Any) -> None:
    """Print usage, purpose, the tool's own options and all commands by panel.

    Typer's own overview imports every command, a Markdown parser and a syntax highlighter, which doubles
    the time of ``wispprof --help``.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    head, _, rest = group.get_usage(context).partition(": ")
    usage = Text.assemble((f"{head}: ", "bold yellow"), (rest, "bold"))
    console.print(Padding(usage, 1))
    console.print(Padding(Text(group.help or ""), (0, 1, 1, 1)))
    parameters = group.get_params(context)
    for parameter in parameters:
        if "completion" in (parameter.name or ""):
            parameter.show_envvar = False
    records = [p.get_help_record(context) for p in parameters]
    options = [(Text(names, _NAME), Text(text)) for names, text in filter(None, records)]
    console.print(_panel("Options", options, max(len(names) for names, _ in options)))
    width = max(len(entry.name) for entry in COMMANDS)
    for panel in dict.fromkeys(entry.panel for entry in COMMANDS):
        rows = [(Text(e.name, _NAME), Text(e.line)) for e in COMMANDS if e.panel == panel]
        console.print(_panel(panel, rows, width))


def _panel(title: str, rows: list[tuple[Text, Text]], width: int) -> Panel:
    from rich.panel import Panel
    from rich.table import Table

    table = Table(show_header=False, expand=True, box=None, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True, width=width)
    table.add_column(ratio=10)
    for row in rows:
        table.add_row(*row)
    return Panel(table, title=title, title_align="left", border_style=_ASIDE)


class Tool(GuardedGroup):
    """The group of all commands. It loads those that are called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show_overview(self, ctx)


app = typer.Typer(
    name="wispprof",
    cls=Tool,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": ENV_PREFIX, "help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wispprof {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Settings file for all commands; default: wispprof.toml if it exists.")
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Measure, fit, plan and run split speculative LLM serving."""
    logging.basicConfig(format="%(message)s")
    found = read_config(config)
    if found.sections:
        found.check(known_options(context.command))
    if config is None and (context.invoked_subcommand or "").replace("-", "_") in found.sections:
        note(f"settings of [{context.invoked_subcommand}] from {found.path}")
    context.default_map = _by_command(found.sections)
    if context.invoked_subcommand is None:
        _first_run(context)


def on_terminal() -> bool:
    """Whether someone can answer questions."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _first_run(context: typer.Context) -> None:
    """Without a command: a menu on a terminal, the overview elsewhere."""
    if not on_terminal():
        context.command.format_help(context, context.make_formatter())
        raise typer.Exit(USAGE)
    from wispprof.cli.first_run import choose

    for arguments in choose(
        lambda question, default: typer.prompt(question, default, show_default=bool(default))
    ):
        typer.echo(f"\n$ wispprof {shlex.join(arguments)}")
        code = context.command.main(arguments, prog_name="wispprof", standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)


def _by_command(sections: Any) -> dict[str, Any]:
    """Sections under the names that commands are called by."""
    return {
        name.replace("_", "-") if isinstance(value, dict) else name: (
            _by_command(value) if isinstance(value, dict) else value
        )
        for name, value in sections.items()
    }
