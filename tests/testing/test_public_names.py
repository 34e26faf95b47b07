"""The public names of ``wispprof.testing`` and the examples in their docstrings."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module

import pytest

from wispprof import testing

NAMES = {
    "CpuBurner",
    "FakeDrafter",
    "FakeEngine",
    "FakeTarget",
    "InProcessServer",
    "LinkProxy",
    "VirtualTimeLoop",
    "emulate_link",
    "run_virtual",
}


def test_public_names_are_pinned_and_documented() -> None:
    assert set(testing.__all__) == NAMES == set(testing._MODULE_OF)
    for name in NAMES:
        assert getattr(testing, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'FakeServer'"):
        testing.FakeServer  # noqa: B018


@pytest.mark.parametrize("module", sorted(set(testing._MODULE_OF.values())))
def test_examples_give_what_they_print(module: str) -> None:
    found = doctest.testmod(import_module(f"wispprof.testing.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_using_every_public_name_imports_no_torch() -> None:
    code = "import sys; from wispprof.testing import *; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
