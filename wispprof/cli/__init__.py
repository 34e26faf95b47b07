"""The command line: parse, call, print. Every command imports its room when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wispprof import __version__
from wispprof.cli import (
    bench,
    demo,
    doctor,
    edge,
    fit,
    plan,
    profile,
    profile_edge,
    profile_link,
    profile_server,
    reference,
    report,
    serve,
    simulate,
)
from wispprof.cli.common import GuardedGroup, known_options
from wispprof.config import ENV_PREFIX, read_config

app = typer.Typer(
    name="wispprof",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
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
        Path | None,
        typer.Option(
            help="Settings for all commands (default: wispprof.toml, where there is one)."
        ),
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
    found = read_config(config)
    found.check(known_options(context.command))
    context.default_map = _by_command(found.sections)


def _by_command(sections: Any) -> dict[str, Any]:
    """Sections under the names that commands are called by."""
    return {
        name.replace("_", "-") if isinstance(value, dict) else name: (
            _by_command(value) if isinstance(value, dict) else value
        )
        for name, value in sections.items()
    }


for _command in (
    demo,
    profile_server,
    profile_edge,
    profile_link,
    profile,
    fit,
    plan,
    simulate,
    serve,
    edge,
    bench,
    report,
    doctor,
    reference,
):
    _command.register(app)

_PANELS = {
    "Start here": ("demo", "doctor"),
    "Measure": ("profile-server", "profile-edge", "profile-link", "trace", "profile"),
    "Decide": ("fit", "plan", "simulate", "reproduce", "report"),
    "Run": ("serve", "edge", "generate", "chat", "bench", "link"),
    "Project": ("reference-pair",),
}


def _arrange() -> None:
    """Commands in the order in which they are used, whoever registered them first."""
    place = {name: panel for panel, names in _PANELS.items() for name in names}
    order = {name: number for number, name in enumerate(place)}
    entries: list[Any] = [*app.registered_commands, *app.registered_groups]
    for entry in entries:
        entry.rich_help_panel = place.get(_name(entry), "Project")
    app.registered_commands.sort(key=lambda entry: order.get(_name(entry), len(order)))
    app.registered_groups.sort(key=lambda entry: order.get(_name(entry), len(order)))


def _name(entry: Any) -> str:
    return str(entry.name or entry.callback.__name__.replace("_", "-"))


_arrange()
