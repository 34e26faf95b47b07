"""The environment in which vLLM's workers compute on a CPU, without vLLM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from wispprof.engines.vllm import cpu_workers
from wispprof.engines.vllm.cpu_workers import missing_settings, numa_nodes, prepare_workers

OPENMP = Path("/env/lib/libiomp5.so")


def test_vllm_binds_a_worker_for_each_numa_node() -> None:
    for ranks, nodes in ((1, 1), (2, 2), (1, 4)):
        assert missing_settings({}, 8, ranks, nodes) == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def test_ranks_that_share_a_node_leave_a_core_each_to_everything_else() -> None:
    found = missing_settings({}, 8, ranks=2)
    assert (found["VLLM_CPU_OMP_THREADS_BIND"], found["OMP_NUM_THREADS"]) == ("nobind", "3")
    assert missing_settings({}, 2, ranks=2)["OMP_NUM_THREADS"] == "1"


def test_what_the_user_set_stays() -> None:
    given = {
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "VLLM_CPU_OMP_THREADS_BIND": "0-3|4-7",
        "OMP_NUM_THREADS": "6",
        "KMP_BLOCKTIME": "0",
        "LD_PRELOAD": "/usr/lib/libgomp.so.1",
    }
    assert missing_settings(given, 8, ranks=2, library=OPENMP) == {}


def test_openmp_is_preloaded_before_what_is_preloaded_already() -> None:
    assert missing_settings({}, 2, library=OPENMP)["LD_PRELOAD"] == str(OPENMP)
    found = missing_settings({"LD_PRELOAD": "libtcmalloc.so"}, 2, library=OPENMP)
    assert found["LD_PRELOAD"] == f"{OPENMP}:libtcmalloc.so"
    assert "LD_PRELOAD" not in missing_settings({}, 2)


def test_numa_nodes_are_those_of_the_machine(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path / "missing") == 1
    for name in ("node0", "node1", "node12", "online"):
        (tmp_path / name).mkdir()
    assert numa_nodes(tmp_path) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")
def test_only_the_cpu_build_changes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cpu_workers, "openmp_library", lambda: OPENMP)
    monkeypatch.setattr(cpu_workers, "on_cpu_build", lambda: False)
    prepare_workers(1)
    assert os.environ == {}
    monkeypatch.setattr(cpu_workers, "on_cpu_build", lambda: True)
    prepare_workers(1)
    assert os.environ == {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "LD_PRELOAD": str(OPENMP)}
