"""The command line: each command parses, calls and prints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from wispprof import __version__
from wispprof.cli.commands import LazyCommands, show_overview
from wispprof.cli.console import GuardedGroup, known_options
from wispprof.settings.sources import ENV_PREFIX, read_config


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
        typer.Option(help="Settings file for all commands; default: wispprof.toml if it exists."),
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
    if found.sections:
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
