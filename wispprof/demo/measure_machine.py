"""The measuring half of the demo: from two models to a plan, each step an artifact in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wispprof.artifacts import AcceptanceTrace, EdgeProfile, ServerProfile, save_trace
from wispprof.artifacts.plan import Plan, load_plan, save_plan
from wispprof.demo.demo_settings import DemoSettings
from wispprof.errors import FitError
from wispprof.fitting import FittedEstimator
from wispprof.fitting.pipeline import fit_files
from wispprof.planning import PlanSettings, make_plan
from wispprof.simulation.devices import DeviceProfile

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel

__all__ = [
    "DEVICE",
    "Measured",
    "Progress",
    "Stage",
    "expected_speed",
    "first_token_ms",
    "measure",
    "slo_classes",
]

Progress = Callable[[int, int, str], None]
Stage = Callable[[str], Progress]
"""Given the name of a stage, returns its progress callback (done, total, a few words)."""

DEVICE = "this-machine"
MODEL_LOADS = 2


@dataclass(frozen=True)
class Measured:
    """Everything the serving half needs."""

    target: LoadedModel
    draft: LoadedModel
    server: ServerProfile
    edge: EdgeProfile
    device: DeviceProfile
    trace: AcceptanceTrace
    estimator: FittedEstimator
    predictor: Path
    plan: Plan


def measure(settings: DemoSettings, stage: Stage) -> Measured:
    """Profile both sides, take an acceptance trace, fit, plan. Writes every artifact to ``out``."""
    from wispprof.engines.loading import load_model
    from wispprof.profiling.acceptance_trace import collect_trace
    from wispprof.profiling.edge_profiler import profile_edge
    from wispprof.profiling.server_profiler import profile_server
    from wispprof.settings.profiler_settings import (
        EdgeProfilerSettings,
        Output,
        ServerProfilerSettings,
        TraceSettings,
    )

    out = settings.out
    report = stage("load the pair")
    report(0, MODEL_LOADS, "target")
    target = load_model(settings.target)
    report(1, MODEL_LOADS, "draft")
    draft = load_model(settings.draft)
    report(2, MODEL_LOADS, "")

    server = profile_server(
        ServerProfilerSettings(
            axes=settings.axes,
            sweep=settings.sweep,
            output=Output(out / "server", overwrite=True),
        ),
        stage("profile the server"),
        loaded=target,
    )
    edge = profile_edge(
        EdgeProfilerSettings(
            sweep=settings.sweep,
            output=Output(out / "edge", overwrite=True),
        ),
        stage("profile the edge"),
        loaded=draft,
    )
    trace = collect_trace(
        target,
        draft,
        TraceSettings(
            count=settings.prompts,
            prompt_tokens=settings.prompt_tokens,
            path_tokens=settings.path_tokens,
            depth=settings.depth,
            seed=settings.seed,
        ),
        stage("trace acceptance"),
    )
    trace_hash = save_trace(trace, out / "trace.jsonl")

    report = stage("fit")
    report(0, 1, "estimator and predictor")
    fitted = fit_files(out, [out / "server"], [out / "trace.jsonl"])
    report(1, 1, fitted.estimator.kind if fitted.estimator else "")
    if fitted.estimator is None or fitted.predictor is None:
        raise FitError("Nothing was fitted.", "Profile and trace again.")

    device = DeviceProfile.from_rows(DEVICE, edge.rows)
    plan_file = out / "plan.json"
    plan = make_plan(
        fitted.estimator,
        [device],
        trace,
        PlanSettings(
            rtts_ms=(1.0, 5.0, 20.0, 50.0, 100.0),
            slos=slo_classes(settings, fitted.estimator),
            k_max=settings.depth,
            context=settings.prompt_tokens + settings.path_tokens // 2,
            max_sessions=64,
        ),
        inputs={"profile": server.hash, "edge": edge.hash, "trace": trace_hash},
        progress=stage("plan"),
    )
    save_plan(plan, plan_file)
    return Measured(
        target,
        draft,
        server,
        edge,
        device,
        trace,
        fitted.estimator,
        out / "predictor.json",
        load_plan(plan_file),
    )


def expected_speed(estimator: FittedEstimator, sessions: int, cached: int) -> float:
    """Tokens/s that each of ``sessions`` gets from the server alone, by the estimator's median."""
    from wispprof.types import BatchShape

    return 1000.0 / estimator.predict(BatchShape.uniform(sessions, 1, cached))[0]


def slo_classes(settings: DemoSettings, estimator: FittedEstimator) -> tuple[float, ...]:
    """The SLO classes of the load in tokens/s, rising, to two digits."""
    cached = settings.prompt_tokens + settings.max_new // 2
    alone = expected_speed(estimator, settings.devices, cached)
    return tuple(float(f"{share * alone:.2g}") for share in settings.shares)


def first_token_ms(settings: DemoSettings, estimator: FittedEstimator) -> float:
    """TTFT SLO: three times the prefill of all devices' prompts, and at least 500 ms. Without a TTFT SLO a
    policy may let new prompts wait without limit."""
    from wispprof.types import BatchShape

    prompt = BatchShape.of([(settings.prompt_tokens, 0, True)])
    return max(500.0, 3.0 * settings.devices * estimator.predict(prompt)[0])
