"""Timing vLLM: the same path that serves, with its prefix cache off."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wispprof.artifacts import bundled_model
from wispprof.engines import EngineOptions, load_engine
from wispprof.errors import ProfileError
from wispprof.profiling.shape_grid import Axes, DeviceCapacity, required_capacity, server_workloads
from wispprof.profiling.step_runner import ProfiledEngine, StepRunner
from wispprof.settings.profiler_settings import ServerProfilerSettings, SweepSettings

if TYPE_CHECKING:
    from wispprof.engines.vllm.engine import VllmEngine

_BLOCK = 256
"""Tokens that a session may take beyond those it caches: the rest of its last block, at most."""


class VllmRunner(StepRunner):
    """Runs batch shapes on vLLM. Sessions hold blocks as if they had computed them: times depend on how much
    is cached, not on what."""

    def __init__(self, engine: VllmEngine, *, seed: int, clock: Callable[[], float]) -> None:
        super().__init__(engine, engine.info.vocab_size, seed=seed, clock=clock)
        self._engine = engine

    def open_at(self, name: str, cached: int) -> None:
        self._engine.open_computed(name, self._random_tokens(cached))


def load_profiled_vllm(
    settings: ServerProfilerSettings, axes: Axes, sweep: SweepSettings, clock: Callable[[], float]
) -> ProfiledEngine:
    """vLLM with limits that fit the grid."""
    from wispprof.engines.vllm.engine import VllmEngine
    from wispprof.engines.vllm.target import max_context_of, provenance, write_shape

    if settings.engine != "vllm":
        raise ProfileError(
            f"Engine {settings.engine!r} cannot be profiled.", "Use --engine torch or --engine vllm."
        )
    arguments = dict(settings.vllm_args)
    target = settings.model or bundled_model("target")
    if settings.shape:
        target = str(write_shape(settings.shape))
        arguments = {"load_format": "dummy", **arguments}
    context = int(arguments.get("max_model_len") or max_context_of(target))
    required = required_capacity(axes, context)
    sessions = settings.max_sessions or required.sessions
    longest = min(required.context, context - 1)
    kv_tokens = settings.kv_tokens or required.kv_tokens + sessions * _BLOCK
    workloads = server_workloads(axes, DeviceCapacity(kv_tokens - sessions * _BLOCK, sessions, longest))
    shapes = [workload.subject for workload in workloads]
    if not shapes:
        raise ProfileError(f"No shape of the grid fits into {kv_tokens} KV tokens.", "Give more --kv-tokens.")
    verified = [item.new for shape in shapes for item in shape.items if not item.prefill]
    options = EngineOptions(
        target,
        settings.dtype,
        settings.device,
        kv_tokens,
        sessions,
        max_items=max(len(shape.items) for shape in shapes),
        max_tokens=max(shape.new_tokens for shape in shapes),
        max_drafts=max(verified, default=2) - 1 or 1,
        prefix_cache=False,
        arguments=arguments,
        untested=settings.vllm_untested,
    )
    engine = load_engine("vllm", options).engine
    assert isinstance(engine, VllmEngine)
    record = {
        **provenance(engine.core),
        "graphs": engine.capabilities.graphs,
        "kv_tokens": kv_tokens,
        "max_sessions": sessions,
        "max_context": engine.max_context,
        "device": settings.device,
    }
    return ProfiledEngine(VllmRunner(engine, seed=sweep.seed, clock=clock), engine.info, workloads, record)
