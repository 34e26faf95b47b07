"""The Triton kernels compiled for GPUs that this machine does not have: registers and spills.

Both bound a kernel's occupancy. A change that makes a kernel heavier than the table fails here; a change that
makes it lighter should lower its row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def _has_triton(series: str) -> bool:
    try:
        return version("triton").startswith(series)
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _has_triton("3.9."), reason="the bounds are those of Triton 3.9")

BOUNDS = {  # kernel, architecture, query tile: registers a thread, spilled bytes stored, loaded
    ("chain", "sm_80", 16): (96, 0, 0),
    ("chain", "sm_89", 16): (96, 0, 0),
    ("chain", "sm_90", 16): (110, 0, 0),
    ("chain", "sm_100", 16): (107, 0, 0),
    ("tree", "sm_80", 16): (112, 0, 0),
    ("tree", "sm_89", 16): (109, 0, 0),
    ("tree", "sm_90", 16): (96, 0, 0),
    ("tree", "sm_100", 16): (107, 0, 0),
    ("chain", "sm_80", 64): (170, 0, 0),
    ("chain", "sm_89", 64): (155, 0, 0),
    ("chain", "sm_90", 64): (144, 0, 0),
    ("chain", "sm_100", 64): (121, 0, 0),
    ("tree", "sm_80", 64): (197, 0, 0),
    ("tree", "sm_89", 64): (169, 0, 0),
    ("tree", "sm_90", 64): (149, 0, 0),
    ("tree", "sm_100", 64): (128, 0, 0),
    ("merge", "sm_80", 0): (32, 0, 0),
    ("merge", "sm_89", 0): (35, 0, 0),
    ("merge", "sm_90", 0): (32, 0, 0),
    ("merge", "sm_100", 0): (32, 0, 0),
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_no_kernel_needs_more_registers_and_spills_than_before(figures: dict[str, dict[str, int]]) -> None:
    compiled = set()
    for name, found in figures.items():
        kernel, arch, tile, _ = name.split()
        registers, stored, loaded = BOUNDS[kernel, arch, int(tile)]
        assert found["registers"] <= registers, name
        assert found["spill_stores"] <= stored, name
        assert found["spill_loads"] <= loaded, name
        compiled.add((kernel, arch, int(tile)))
    assert compiled == set(BOUNDS)


@pytest.mark.parametrize("kernel", ["chain", "tree"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_verification_leaves_room_for_three_blocks_of_threads(
    figures: dict[str, dict[str, int]], kernel: str, dtype: str
) -> None:
    """16 rows of 128 dimensions: 65,536 registers hold three blocks of 128 threads at 168 each."""
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100"):
        found = figures[f"{kernel} {arch} 16 {dtype}"]
        assert found["registers"] <= 168
        assert found["spill_stores"] == found["spill_loads"] == 0
