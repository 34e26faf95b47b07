"""Which vLLM is accepted, in an environment without one."""

from __future__ import annotations

import pytest

from wispprof.engines import EngineOptions, load_engine
from wispprof.engines.vllm import versions
from wispprof.engines.vllm.build import engine_arguments
from wispprof.errors import EngineError, SettingsError

CHANGED = versions.changed_functions


def installed(monkeypatch: pytest.MonkeyPatch, version: str, functions: dict[str, tuple[str, ...]]) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: version)
    monkeypatch.setattr(versions, "changed_functions", lambda: CHANGED(functions))


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: None)
    with pytest.raises(EngineError, match=r"vLLM is not installed. Run `pip install vllm=="):
        load_engine("vllm", EngineOptions("target"))


@pytest.mark.parametrize(
    ("version", "untested", "message"),
    [
        ("0.32.0", False, ""),
        ("0.32.0+cpu", False, ""),
        ("0.33.1", False, "vLLM 0.33.1 was not tested"),
        ("0.33.1", True, ""),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, untested: bool, message: str) -> None:
    installed(monkeypatch, version, {"operator:index": ("a", "/")[:1]})
    if message:
        with pytest.raises(EngineError, match=message):
            versions.check_vllm(untested)
    else:
        assert versions.check_vllm(untested) == version


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("json:loads", "loads(text)"),
        ("json:no_such_function", "no_such_function(text)"),
        ("no_such_module:f", "f(text)"),
    ],
)
def test_a_changed_function_is_named(monkeypatch: pytest.MonkeyPatch, path: str, shown: str) -> None:
    installed(monkeypatch, "0.32.0", {path: ("text",)})
    with pytest.raises(EngineError) as refused:
        versions.check_vllm(untested=True)
    assert f"lacks what this engine needs: {shown}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_own_arguments_cannot_be_set() -> None:
    options = EngineOptions("target", arguments={"scheduler-cls": "mine", "model": "other"})
    with pytest.raises(SettingsError, match="--vllm-arg cannot set model, scheduler_cls"):
        engine_arguments(options)
