"""The command line: parse, call, print. Every command imports its room when it runs."""

from typing import Annotated

import typer

from wispprof import __version__
from wispprof.cli.common import GuardedGroup

app = typer.Typer(
    name="wispprof",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure, fit, plan and run split speculative LLM serving.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wispprof {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Measure, fit, plan and run split speculative LLM serving."""
