"""profile-server where memory is scarce, and where what only serving and fitting need is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from wispprof.artifacts import load_server
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError, ProfileError
from wispprof.profiling import server_profiler
from wispprof.profiling.shape_grid import GRIDS, Axes
from wispprof.profiling.workload import Workload
from wispprof.settings import profiler_settings
from wispprof.settings.profiler_settings import SweepSettings
from wispprof.types import BatchShape

ROOMY = Axes(
    items=(1, 8),
    new=(1, 5),
    cached=(16, 4096),
    skew_items=(4,),
    chunk=(32,),
    mixed_items=(2,),
    full_share=(0.5, 0.95),
)
SWEEP = SweepSettings(
    warmup=0,
    block=1,
    min_samples=1,
    max_samples=1,
    target=0.9,
    sentinel_every=5,
    reference_samples=1,
)


@pytest.fixture(scope="module")
def tiny():
    return random_model("tiny-llama", seed=1)


@pytest.fixture
def anything_goes(monkeypatch):
    """Times of so small a model are all overhead; what physics says of them has a test of its own."""
    passed = type("Passed", (), {"as_dict": lambda self: {}})()
    monkeypatch.setattr(server_profiler, "check_physics", lambda rows, model: passed)


def profile(tiny, **more):
    return server_profiler.profile_server(
        profiler_settings.ServerProfilerSettings(axes=ROOMY, sweep=SWEEP, **more), loaded=tiny
    )


@pytest.mark.parametrize("backend", ["dense", "paged"])
@pytest.mark.parametrize("kv_tokens", [90, 400, 1500])
def test_a_small_memory_is_filled_and_nothing_refused(tiny, anything_goes, backend, kv_tokens):
    made = profile(tiny, backend=backend, kv_tokens=kv_tokens)
    assert made.manifest.summary["refused"] == {}
    assert made.manifest.engine["kv_tokens"] == kv_tokens
    longest = max(i.cached + i.new for row in made.rows for i in row.shape.items)
    held = [row.shape.cached_tokens + row.shape.new_tokens for row in made.rows]
    # The master session takes half of the memory at most.
    assert max(held) + longest <= kv_tokens
    assert max(held) > 0.9 * (kv_tokens - max(longest, kv_tokens // 2))


def test_contexts_are_measured_to_their_last_token(tiny, anything_goes):
    made = profile(tiny)
    assert made.manifest.summary["refused"] == {}
    context = made.manifest.engine["max_context"]
    ends = {i.new for row in made.rows for i in row.shape.items if i.cached + i.new == context}
    assert ends >= set(ROOMY.new)


def test_too_little_memory_is_an_error(tiny):
    with pytest.raises(ProfileError, match="KV tokens"):
        profile(tiny, kv_tokens=50)


def test_a_workload_beyond_the_memory_is_refused_and_leaves_no_trace(tiny):
    """Negative control: the engine refuses what does not fit."""
    engine = TorchEngine(tiny, kv_tokens=300, max_sessions=8)
    runner = server_profiler.EngineRunner(engine, 100)
    free = engine.kv_free
    with pytest.raises(EngineError, match="do not fit"):
        runner.prepare(Workload("large", "verify", BatchShape.uniform(3, 5, 90)))
    runner.finish()
    assert engine.kv_free == free
    runner.prepare(Workload("long", "verify", BatchShape.uniform(2, 60, 95)))
    with pytest.raises(EngineError, match="do not fit"):
        runner.run_once()
    runner.finish()
    assert engine.kv_free == free
    runner.prepare(Workload("small", "verify", BatchShape.uniform(2, 5, 90)))
    assert runner.run_once() > 0


@pytest.mark.parametrize(
    "err",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=lambda err: type(err).__name__,
)
def test_a_device_out_of_memory_loses_that_workload_alone(tiny, anything_goes, monkeypatch, err):
    real = TorchEngine.step

    def step(engine, feeds, **more):
        if len(feeds) == 8 and sum(len(feed.tokens) for feed in feeds) == 40:
            raise err
        return real(engine, feeds, **more)

    monkeypatch.setattr(TorchEngine, "step", step)
    made = profile(tiny, kv_tokens=3000)
    refused = made.manifest.summary["refused"]
    assert refused
    assert all(key.startswith("8x(5@") for key in refused)
    assert all("ran out of memory" in reason for reason in refused.values())
    assert not any(row.key in refused for row in made.rows)
    assert len(made.rows) > 10


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory(tiny, monkeypatch):
    def step(engine, feeds, **more):
        raise RuntimeError("a kernel is broken")

    engine = TorchEngine(tiny, kv_tokens=300, max_sessions=8)
    runner = server_profiler.EngineRunner(engine, 50)
    monkeypatch.setattr(TorchEngine, "step", step)
    runner.prepare(Workload("s", "verify", BatchShape.uniform(1, 1, 8)))
    with pytest.raises(RuntimeError, match="broken"):
        runner.run_once()


def test_the_standard_grid_reaches_the_end_of_the_bundled_context_and_of_memory():
    """No workload is planned that the master session is too short for."""
    axes, context = GRIDS["standard"], 2048
    most = server_profiler.required_capacity(axes, context)
    for available in (200, 5_000, 40_000, 1 << 30):
        kv_tokens, longest = server_profiler._engine_capacity(axes, available, most, context)
        capacity = server_profiler.DeviceCapacity(kv_tokens - longest, most.sessions, longest)
        shapes = [workload.subject for workload in server_profiler.server_workloads(axes, capacity)]
        assert max(i.cached for s in shapes for i in s.items) <= longest <= context
        assert kv_tokens <= available


WITHOUT = """
import importlib.metadata, sys
missing = {"lightgbm", "msgspec"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
version = importlib.metadata.version
def installed(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
if sys.argv[1] == "fit":
    sys.argv[1:] = sys.argv[2:]
    import lightgbm
import wispprof.profiling.server_profiler as server
server.check_physics = lambda rows, model: type("P", (), {"as_dict": lambda self: {}})()
from wispprof.cli import app
app(sys.argv[1:])
"""


def test_profile_server_needs_neither_lightgbm_nor_msgspec(tmp_path):
    """An image made for a GPU has neither. The negative control imports one and must fail."""
    words = ["profile-server", "--shape", "tiny-llama", "--device", "cpu", "--repeats", "3"]
    words += ["--items", "1,2", "--new", "1,3", "--cached", "8,32", "--kv-tokens", "600"]
    words += ["--out", str(tmp_path / "p")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = load_server(tmp_path / "p")
    assert len(made.rows) >= 8
    assert not {"lightgbm", "msgspec"} & set(made.manifest.versions)
    control = subprocess.run(
        [sys.executable, "-c", WITHOUT, "fit"], capture_output=True, text=True, check=False
    )
    assert "No module named 'lightgbm'" in control.stderr
