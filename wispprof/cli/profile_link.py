"""``wispprof profile-link``: the way to a server, in its own frames."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli.console import tracker
from wispprof.cli.options import CaFile, JsonFlag
from wispprof.cli.profiling import Out, Overwrite, finished, output_of

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the tool."""
    app.command("profile-link")(profile_link)


def profile_link(
    server: Annotated[str, typer.Argument(help="URL of a running server, e.g. HOST:8200.")],
    key: Annotated[str, typer.Option(help="API key of the server.")] = "",
    ca_file: CaFile = None,
    count: Annotated[int, typer.Option(min=3, help="Exchanges of each kind.")] = 40,
    out: Out = Path("link"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure round trip, jitter and bandwidth to a server."""
    from wispprof.profiling import link_profiler

    settings = link_profiler.LinkProfilerSettings(
        server, key, count=count, output=output_of(out, False, overwrite), ca_file=ca_file
    )
    with tracker("profile-link") as report:
        profile = link_profiler.profile_link(settings, report)
    finished(profile, out, as_json)
