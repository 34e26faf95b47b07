"""The environment in which vLLM computes on a CPU, without vLLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from wispprof.cli import app
from wispprof.engines.vllm import cpu_process
from wispprof.engines.vllm.cpu_process import missing_settings

OPENMP = Path("/env/lib/libiomp5.so")


def test_a_core_for_each_rank_is_left_to_everything_else() -> None:
    def threads(cores: int, ranks: int = 1) -> str:
        return missing_settings({}, cores, ranks)["OMP_NUM_THREADS"]

    assert [threads(cores) for cores in (1, 2, 8)] == ["1", "1", "7"]
    assert threads(8, 2) == "3"


def test_what_the_user_set_stays() -> None:
    given = {"OMP_NUM_THREADS": "6", "KMP_BLOCKTIME": "0", "LD_PRELOAD": "/usr/lib/libgomp.so.1"}
    assert missing_settings(given, 8, library=OPENMP) == {}


def test_openmp_is_preloaded_before_what_is_preloaded_already() -> None:
    assert missing_settings({}, 2, library=OPENMP)["LD_PRELOAD"] == str(OPENMP)
    found = missing_settings({"LD_PRELOAD": "libtcmalloc.so"}, 2, library=OPENMP)
    assert found["LD_PRELOAD"] == f"{OPENMP}:libtcmalloc.so"
    assert "LD_PRELOAD" not in missing_settings({}, 2)


class Restarted(Exception):
    pass


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
@pytest.mark.parametrize(
    "command",
    [
        "serve --engine vllm --estimator missing",
        "profile-server --engine vllm",
        "trace --engine vllm",
        "doctor --engine vllm",
        "generate text --engine vllm",
        "chat --engine vllm",
        "edge --engine vllm",
    ],
)
def test_commands_start_again_once(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Before they load anything; with what was missing set, they go on."""
    started: list[dict[str, str]] = []

    def execve(program: str, arguments: list[str], environ: dict[str, str]) -> None:
        assert (program, arguments[0]) == (sys.executable, sys.executable)
        started.append(environ)
        raise Restarted

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_process, "on_cpu_build", lambda: True)
    assert isinstance(CliRunner().invoke(app, command.split()).exception, Restarted)
    monkeypatch.setattr(os, "environ", started[0])
    cpu_process.restart_for_cpu()
    assert len(started) == 1


def test_a_gpu_build_and_another_engine_start_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
    monkeypatch.setattr(cpu_process, "on_cpu_build", lambda: False)
    cpu_process.restart_for_cpu()
    monkeypatch.setattr(cpu_process, "on_cpu_build", lambda: True)
    done = CliRunner().invoke(app, ["serve", "--estimator", "missing"])
    assert "There is no file missing" in done.output
