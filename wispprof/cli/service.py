"""``wispprof service``: systemd units with the paths of this installation."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from wispprof.cli.console import USAGE, fail, note

_CONFIG = "/srv/wispprof/wispprof.toml"
_EDGE_CONFIG = "%h/.config/wispprof.toml"
_NEXT = {
    "server": "save it as /etc/systemd/system/wispprof.service, then: "
    "sudo systemctl daemon-reload && sudo systemctl enable --now wispprof",
    "edge": "save it as ~/.config/systemd/user/wispprof-edge.service, then: "
    "systemctl --user daemon-reload && systemctl --user enable --now wispprof-edge",
}


class Role(StrEnum):
    server = "server"
    edge = "edge"


def service(
    role: Annotated[Role, typer.Argument(help="What the unit runs.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help=f"Settings file of the service. [default: {_CONFIG}; edge: ~/.config/wispprof.toml]"
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="User that the server runs as. [default: wispprof]")
    ] = None,
) -> None:
    """Print a systemd unit that runs this installation."""
    if user and role is Role.edge:
        raise fail("--user is for the server only.", "An edge runs as the user who enables it.", USAGE)
    path = config.absolute() if config is not None else Path(_CONFIG)
    unit = Template(files("wispprof.cli").joinpath("units", f"{role}.service").read_text(encoding="utf-8"))
    text = unit.substitute(
        program=" ".join(map(_quoted, program())),
        config=_EDGE_CONFIG if config is None and role is Role.edge else _quoted(str(path)),
        folder=_escaped(str(path.parent)),
        user=user or "wispprof",
    )
    sys.stdout.write(text)
    note(_NEXT[role])


def program() -> list[str]:
    """The words that start ``wispprof`` of this installation."""
    typed, beside = Path(sys.argv[0]).absolute(), Path(sys.executable).with_name("wispprof")
    for script in (typed, beside):
        if script.name == "wispprof" and script.is_file():
            return [str(script)]
    return [sys.executable, "-m", "wispprof"]


def _escaped(text: str) -> str:
    """Without specifiers of systemd."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a command line in a unit."""
    text = _escaped(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"' if any(c.isspace() or c in "'\"" for c in text) else text
