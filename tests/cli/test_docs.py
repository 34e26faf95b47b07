"""The pages say what is: generated help is up to date, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

from wispprof.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUP = typer.main.get_command(app)


def test_the_page_of_commands_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))["render"]()
    assert (ROOT / "docs" / "cli.md").read_text() == made, "run: python docs/generate_cli.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands_in(page: Path) -> list[str]:
    """Lines that call the tool, as printed: indented or in a fence, comments and pipes cut off."""
    lines = re.findall(r"^(?: {4}|)(?:\w+=\S+ )?(wispprof .*)$", page.read_text(), re.MULTILINE)
    return [line.split("  #")[0].split(" | ")[0] for line in lines]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=lambda p: p.name)
def test_commands_in_the_pages_exist_with_their_options(page: Path) -> None:
    for line in commands_in(page):
        words = shlex.split(line.replace("TARGET", "t").replace("DRAFT", "d"))[1:]
        command = GROUP.commands.get(words[0])  # type: ignore[attr-defined]
        assert command is not None, f"{page.name}: {line}"
        for name in list(words[1:]):
            inner = getattr(command, "commands", {}).get(name)
            command = inner or command
        known = {option for p in command.params for option in getattr(p, "opts", ())}
        used = {word for word in words[1:] if word.startswith("--")}
        assert used <= known, f"{page.name}: {line}: {sorted(used - known)}"


def test_negative_control_the_pages_do_hold_commands() -> None:
    found = [line for page in PAGES for line in commands_in(page)]
    assert len(found) > 20
