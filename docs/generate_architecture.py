"""Write the table of packages into docs/architecture.md from the import contracts of pyproject.toml.

    python docs/generate_architecture.py

Layers come from ``[tool.importlinter]``, descriptions from the first line of each package's docstring.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- packages: generate_architecture.py -->", "<!-- /packages -->"


def layers() -> list[list[str]]:
    """Names of packages by layer, the topmost first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in config["contracts"] if c["type"] == "layers")
    return [
        [name.strip().removeprefix("wispprof.") for name in layer.split("|")] for layer in contract["layers"]
    ]


def torch_free() -> set[str]:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in config["contracts"] if c["type"] == "forbidden")
    return {name.removeprefix("wispprof.") for name in contract["source_modules"]}


def description(name: str) -> str:
    """First paragraph of the package's docstring on one line, without its final full stop."""
    folder = ROOT / "wispprof" / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("``", "`")


def table() -> str:
    pure = torch_free()
    rows = [
        f"| {number} | `{name}` | {description(name)} | {'no' if name in pure else 'may'} |"
        for number, layer in enumerate(layers(), start=1)
        for name in layer
    ]
    return "\n".join(["| layer | package | what it holds | torch, network |", "|---|---|---|---|", *rows])


def render() -> str:
    """The page with its table as the contracts say."""
    text = PAGE.read_text("utf-8")
    made, found = re.subn(
        re.escape(BEGIN) + ".*?" + re.escape(END),
        lambda _: f"{BEGIN}\n{table()}\n{END}",
        text,
        flags=re.S,
    )
    if found != 1:
        raise SystemExit(f"error: {PAGE} has no part for the packages.")
    return made


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
