"""One pair of endpoints for a module's tests, and the counts of a long run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzzing import MINUTES, ServedPair, counts, served_pair


@pytest.fixture(scope="module")
def pair() -> Iterator[ServedPair]:
    with served_pair() as one:
        yield one


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MINUTES:
        names = ("requests", "2xx", "4xx", "5xx", "frames", "files", "tracebacks", "hangs", "rounds")
        terminalreporter.write_line("fuzz: " + ", ".join(f"{counts[name]:,} {name}" for name in names))
