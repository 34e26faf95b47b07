"""Names resolve to built-ins, entry points and ``module:attribute``, in that order."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from wispprof import plugins
from wispprof.errors import PlanError, PluginError
from wispprof.simulation.scenario import system

BUILTIN = {"wisp": dict}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One package that offers a policy, and one that shadows a built-in."""
    points = EntryPoints(
        [
            EntryPoint("mine", "collections:Counter", "wispprof.policies"),
            EntryPoint("wisp", "collections:OrderedDict", "wispprof.policies"),
            EntryPoint("gone", "no_such_module:Policy", "wispprof.policies"),
        ]
    )
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: points.select(**wanted))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "found"),
    [("wisp", "dict"), ("mine", "Counter"), ("collections:ChainMap", "ChainMap")],
)
def test_a_name_resolves(name: str, found: str) -> None:
    assert plugins.load("policies", name, BUILTIN).__name__ == found  # type: ignore[attr-defined]


def test_a_file_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_policy_of_mine.py").write_text("class Least: ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    assert plugins.load("policies", "a_policy_of_mine:Least", BUILTIN).__name__ == "Least"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("other", "Unknown name 'other' in policies. Use one of wisp, gone, mine, or MODULE:NAME."),
        ("gone", "Cannot load 'gone' for policies: No module named 'no_such_module'"),
        ("collections:nothing", "has no attribute 'nothing'"),
        ("math:pi", "'math:pi' is not a class or function."),
    ],
)
def test_an_error_names_what_is_wrong(name: str, says: str) -> None:
    with pytest.raises(PluginError, match=r".") as caught:
        plugins.load("policies", name, BUILTIN)
    assert says in str(caught.value)


def test_another_group_does_not_see_it(installed: None) -> None:
    assert plugins.names("engines", {}) == ()


@pytest.mark.usefixtures("installed")
def test_a_mistyped_system_gets_the_installed_names_too() -> None:
    with pytest.raises(PlanError) as caught:
        system("mina")
    assert "Did you mean 'mine'?" in caught.value.hint
    assert " mine, " in caught.value.hint
    assert " sled, " in caught.value.hint
