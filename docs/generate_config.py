"""Write the tables of docs/config.md from the settings: ``python docs/generate_config.py``.

A test compares the page with what this makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from wispprof.cli import app
from wispprof.settings.fields import Declared
from wispprof.settings.sources import ENV_PREFIX

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Settings

Made by `python docs/generate_config.py` from the settings themselves.

Every option of every command can be set in three places. A typed option wins over the environment, the
environment over the settings file, the file over the default.

    wispprof serve --port 9000
    WISPPROF_SERVE_PORT=9000 wispprof serve

The settings file is `wispprof.toml` in the working folder, or the file that `--config` or `WISPPROF_CONFIG`
names. It has one section per command and one entry per option:

```toml
[serve]
port = 9000
policy = "wispprof"
estimator = "mine/estimator.json"

[edge]
server = "gpu-box:9000"
```

An unknown section or entry ends every command with one line that names it and the nearest known one. A
repeatable option is a list in the file and a list separated by spaces in the environment. The option is the
entry's name with two dashes; options that a command shows in `--help` but not here are listed in
[cli.md](cli.md).
"""


def render() -> str:
    """The page as Markdown."""
    root: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in root.commands.items():
        known: dict[str, Declared] = getattr(command.callback, "declared_options", {})
        parameters = [p for p in command.params if p.name in known]
        if parameters:
            parts += [
                f"## [{name}]\n",
                "| entry | environment | default | unit | allowed | meaning |",
                "|---|---|---|---|---|---|",
                *(_row(name, p, known[p.name]) for p in parameters),
                "",
            ]
    return "\n".join(parts)


def _row(command: str, parameter: Any, field: Declared) -> str:
    of = field.setting
    entry = field.key.replace("_", "-")
    variable = "_".join((ENV_PREFIX, *command.split("-"), field.key)).upper()
    default = parameter.default
    if isinstance(default, list):
        default = " ".join(map(str, default))
    shown = "" if default in (None, "") or default is False else f"`{default}`"
    allowed = ", ".join(filter(None, of.choices)) or of.bounds
    variables = " or ".join(f"`{name}`" for name in (variable, of.variable) if name)
    return f"| `{entry}` | {variables} | {shown} | {of.unit} | {allowed} | {of.help} |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
