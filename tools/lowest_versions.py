"""Print the lowest versions that pyproject.toml allows, one requirement a line, for ``make test-lowest``.

python tools/lowest_versions.py [NAME=VERSION ...]     # NAME=VERSION takes the place of a lower bound
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(requirement: str) -> tuple[str, str]:
    """``("uvicorn", "uvicorn==0.35")`` for ``uvicorn>=0.35``; the name alone where there is no bound."""
    spec = requirement.split(";")[0].strip()
    name = re.match(r"[\w.-]+", spec)
    bound = re.search(r">=\s*([\w.]+)", spec)
    assert name is not None, requirement
    return name.group(0), f"{name.group(0)}=={bound.group(1)}" if bound else name.group(0)


def main(replaced: list[str]) -> None:
    versions = dict(entry.split("=", 1) for entry in replaced)
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    for requirement in project["dependencies"]:
        name, pinned = lowest(requirement)
        print(f"{name}=={versions[name]}" if name in versions else pinned)


if __name__ == "__main__":
    main(sys.argv[1:])
