"""Names and files: the field's words, each class once, no file name that says nothing."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("wispprof", "tests", "benchmarks", "tools", "examples", "docs")
PYTHON = [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*.py")) if p != Path(__file__)]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = sorted((ROOT / "wispprof").rglob("*.py"))

IDENTIFIERS = [
    "Ballast",
    "Boxed",
    "Dial",
    "EdgeHouse",
    "EdgePath",
    "Feed",
    "Fires",
    "FrontLoop",
    "House",
    "KeptCaches",
    "Ladder",
    "Lessons",
    "LiveSession",
    "PocketServer",
    "PolicyBroke",
    "Port",
    "Residency",
    "Shooter",
    "Shot",
    "Situation",
    "StepClock",
    "StepLoop",
    "Surface",
    "Tally",
    "TextSide",
    "Turns",
    "_Astray",
    "_climb",
    "_rungs",
    "agree_least",
    "alive",
    "ballast",
    "boxed",
    "chore",
    "edgelink",
    "frontier",
    "frontloop",
    "gather_ms",
    "hangup",
    "heard_ms",
    "hopeless",
    "house",
    "hurry",
    "lain_ms",
    "lead_limit",
    "lives",
    "lone",
    "made_elsewhere",
    "openai_shapes",
    "packs",
    "pocket",
    "rescue",
    "ring",
    "rungs",
    "seated",
    "seats",
    "settle",
    "settle_in",
    "shooter",
    "shot",
    "shots",
    "steploop",
    "surfaces",
    "survival",
    "survival_batch",
    "survival_byte",
    "tail_survival",
    "told_ms",
    "trimmed",
    "twin",
    "visits",
]
"""Names this project does not use: docs/architecture.md lists the field's words."""

WORDS = (
    "ballast|bodies|chore|frontiers?|hopeless|houses?|ladders?|promis\\w*|rooms?|rungs?|survival\\w*|twins?"
)
"""Words that no page, docstring, comment or message uses."""


def test_no_private_identifier() -> None:
    found = defaultdict(set)
    for path in PYTHON:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.NAME and token.string in IDENTIFIERS:
                found[str(path.relative_to(ROOT))].add(token.string)
    assert not found


@pytest.mark.parametrize("path", [*PYTHON, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_word(path: Path) -> None:
    text = path.read_text()
    found = {m.group(0) for m in re.finditer(rf"(?i)(?<![\w/-])(?:{WORDS})(?![\w-])", text)}
    assert not found


def test_the_words_are_seen() -> None:
    """Negative control of the pattern above."""
    for text in ("It kept its promise.", "the Frontier", "survivals", "two rooms"):
        assert re.search(rf"(?i)(?<![\w/-])(?:{WORDS})(?![\w-])", text)


def test_a_class_name_is_defined_once() -> None:
    where = defaultdict(list)
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_a_file_name_says_which_file() -> None:
    names = Counter(path.name for path in PACKAGE if path.name != "__init__.py")
    assert {name: count for name, count in names.items() if count > 2} == {}


def test_no_file_is_long() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PACKAGE}
    assert {path: count for path, count in lines.items() if count > 400} == {}
