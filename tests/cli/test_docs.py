"""The pages: generated ones are up to date, links resolve, commands parse."""

from __future__ import annotations

import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from wispprof.artifacts.profile import load_manifest
from wispprof.cli import app
from wispprof.errors import WispprofError
from wispprof.simulation.devices import device_of
from wispprof.simulation.reproduce import PAPERS, read_setup
from wispprof.simulation.scenario import names as builtin_systems

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
GROUP = typer.main.get_command(app)
# Typer brings its own click: what its parser raises is known by where BadParameter comes from.
USAGE_ERRORS = (typer.BadParameter.__mro__[1], AssertionError)
BEFORE = r"(?: {4}|)(?:\w+=\S+ |torchrun .* --no-python )?"


@pytest.mark.parametrize("page", ["api", "architecture", "cli", "config", "artifacts", "metrics"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs" / f"generate_{page}.py"))["render"]()
    assert (ROOT / "docs" / f"{page}.md").read_text() == made, f"run docs/generate_{page}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_class_is_in_the_module_that_is_linked(page: Path) -> None:
    for name, module in re.findall(r"`([A-Z]\w+)` in\s\[[^]]*\]\(([^)#]+\.py)\)", page.read_text()):
        assert f"class {name}" in (page.parent / module).read_text(), f"{page.name}: {name} in {module}"


def test_the_page_lists_every_system_that_can_be_simulated() -> None:
    text = (ROOT / "docs" / "simulate.md").read_text().split("## Systems")[1].split("\n## ")[0]
    assert set(re.findall(r"`([a-z-]+)`", text)) - {"compare", "--policy", "--compare"} >= set(
        builtin_systems()
    )


def test_the_papers_page_names_each_paper_by_its_number() -> None:
    text = (ROOT / "docs" / "papers.md").read_text()
    for paper in PAPERS:
        number = re.search(r"arXiv (\d{4}\.\d{5})", read_setup(paper)["citation"])
        assert number is not None, paper
        assert f"arxiv.org/abs/{number[1]}" in text, paper


def test_every_shipped_edge_profile_is_listed() -> None:
    text = (ROOT / "docs" / "simulate.md").read_text()
    for file in (ROOT / "profiles").glob("*.manifest.json"):
        if load_manifest(file).kind == "edge":
            assert f"`{file.name.removesuffix('.manifest.json').removesuffix('-8b')}`" in text, file.name


def commands_in(page: Path) -> list[str]:
    """Lines that call the tool, indented or in a fence, without comments and pipes."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        found = re.match(rf"{BEFORE}(wispprof .*)$", line)
        if found and (fenced or line.startswith("    ")):
            lines.append(found[1])
    return [line.split("  #")[0].split(" | ")[0] for line in lines]


def parse(line: str) -> None:
    """As the command line itself would: names, types and ranges of options, required ones there."""
    words = shlex.split(line)[1:]
    command: Any = GROUP
    while getattr(command, "commands", None) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command is not GROUP, f"there is no command {words[0]}"
    command.make_context("wispprof", words)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=lambda p: p.name)
def test_commands_in_the_pages_parse(page: Path) -> None:
    for line in commands_in(page):
        try:
            parse(line)
        except USAGE_ERRORS as err:
            pytest.fail(f"{page.name}: {line}: {err}")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=lambda p: p.name)
def test_devices_in_the_pages_are_known(page: Path) -> None:
    for line in commands_in(page):
        words = shlex.split(line)
        if words[1] == "bench":
            for option, value in pairwise(words):
                if option == "--device":
                    assert device_of(value).draft_ms > 0


def test_negative_control_an_unknown_device_is_refused() -> None:
    with pytest.raises(WispprofError, match="rpi-5"):
        device_of("rpi5")


@pytest.mark.parametrize(
    "line", ["wispprof serve --replica 2", "wispprof serve --port high", "wispprof nothing"]
)
def test_negative_control_wrong_commands_do_not_parse(line: str) -> None:
    with pytest.raises(USAGE_ERRORS):
        parse(line)


def test_negative_control_the_pages_do_hold_commands() -> None:
    found = [line for page in PAGES for line in commands_in(page)]
    assert len(found) > 30
