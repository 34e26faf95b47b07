"""The public API: its names are pinned, each resolves, and importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import wispprof

NAMES = """
    BatchShape EdgeProfilerSettings EdgeSettings PlanSettings Prompt Sampling Scenario ServerModel
    ServerProfilerSettings ServerSettings Slo TraceSettings WispprofError __version__ fit generate
    load_estimator load_model load_plan load_predictor load_profile load_trace open_edge plan profile_edge
    profile_server running_server save_plan serve simulate system trace
"""


def test_names_are_pinned() -> None:
    """A name that goes is a breaking change: it needs an entry in CHANGELOG.md."""
    assert wispprof.__all__ == sorted(NAMES.split())


@pytest.mark.parametrize("name", wispprof.__all__)
def test_a_name_resolves_and_says_what_it_is(name: str) -> None:
    found = getattr(wispprof, name)
    assert name == "__version__" or found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wispprof.nothing


def test_import_is_light() -> None:
    code = "import sys, wispprof; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
