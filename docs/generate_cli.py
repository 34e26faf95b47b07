"""Write docs/cli.md from the commands themselves: ``python docs/generate_cli.py``.

A test compares the file with what this makes, so that the page cannot lie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from wispprof.cli import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Commands

Made by `python docs/generate_cli.py` from the commands themselves. Every command prints its result on stdout
(`--json`: one JSON document) and everything else on stderr. An error is one line with its hint and exit code
1, a wrong option 2, Ctrl-C 130. Every option can also be set in a settings file or the environment: see
[config.md](config.md).
"""


def render() -> str:
    """The page as Markdown."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD]
    panel = ""
    order = ["Start here", "Measure", "Decide", "Run"]
    commands = sorted(root.commands.items(), key=lambda item: order.index(item[1].rich_help_panel))
    for name, command in commands:
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            parts.append(f"## {panel}\n")
        parts.append(_command(f"wispprof {name}", command))
    return "\n".join(parts)


def _command(path: str, command: Any) -> str:
    text = " ".join(str(command.help or "").split())
    inner = getattr(command, "commands", {})
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *(str(p.name).upper() for p in arguments), "[OPTIONS]"])
    lines = [f"### {path}", ""]
    if not inner or command.invoke_without_command:
        lines += [f"    {usage}", ""]
    lines += [text, ""]
    rows = [_row(p) for p in (*arguments, *options) if p.name != "help"]
    if rows:
        lines += ["| | | default |", "|---|---|---|", *rows, ""]
    lines += [_command(f"{path} {name}", each) for name, each in inner.items()]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = str(parameter.name).upper() if argument else ", ".join(parameter.opts)
    if parameter.required:
        default = "required"
    elif parameter.default in (None, "", []) or parameter.default is False:
        default = ""
    else:
        given = parameter.default
        default = f"`{' '.join(map(str, given)) if isinstance(given, list) else given}`"
    text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    return f"| `{names}` | {text} | {default} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
