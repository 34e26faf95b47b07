"""What the README shows of a run is what its record says, and the picture beside it too."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "docs" / "generate_readme.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    return copy.deepcopy(found)


def labels(svg: str) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_the_readme_says_what_its_record_says(record: dict[str, Any]) -> None:
    assert MADE["render"](README, record) == README, "run docs/generate_readme.py"
    for figures in record["systems"].values():
        assert figures["attainment"] <= 1
        assert figures["goodput_tokens_per_s"] <= figures["tokens_per_s"]


def test_the_picture_shows_what_its_record_says(record: dict[str, Any]) -> None:
    shown = labels((ROOT / "docs" / "demo.svg").read_text(encoding="utf-8"))
    assert shown == labels(MADE["picture"](record)), "run docs/generate_readme.py"
    for policy, figures in record["systems"].items():
        assert policy in shown
        assert f"{figures['goodput_tokens_per_s']:,.0f}" in shown
        assert f"{100 * figures['attainment']:.0f} %" in shown


def test_negative_control_another_record_changes_both(record: dict[str, Any]) -> None:
    record["systems"]["wispprof"]["goodput_tokens_per_s"] /= 2
    assert MADE["render"](README, record) != README
    assert labels(MADE["picture"](record)) != labels((ROOT / "docs" / "demo.svg").read_text(encoding="utf-8"))


def test_a_readme_without_the_marks_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="has no part"):
        MADE["render"]("# wispprof\n", record)
