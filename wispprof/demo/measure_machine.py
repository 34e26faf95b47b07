"""Settings of the demo, and its first half: profile, trace, fit and plan. Each stage writes an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wispprof.artifacts import AcceptanceTrace, EdgeProfile, ServerProfile, bundled_path, save_trace
from wispprof.artifacts.plan import save_plan
from wispprof.errors import FitError
from wispprof.fitting import FittedEstimator
from wispprof.fitting.pipeline import fit_files
from wispprof.planning import PlanSettings, make_plan
from wispprof.profiling.shape_grid import Axes
from wispprof.settings.profiler_settings import (
    EdgeProfilerSettings,
    Output,
    ServerProfilerSettings,
    SweepSettings,
    TraceSettings,
)
from wispprof.settings.shared_settings import DEMO_FOLDER
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import BatchShape, Progress, Sampling

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel


Stage = Callable[[str], Progress]
"""Given the name of a stage, returns its progress callback (done, total, note)."""

DEVICE = "this-machine"


PROMPT = '''def read_config(path, encoding="utf-8"):
    """'''


@dataclass(frozen=True)
class DemoSettings:
    """``pair``: folder with ``target`` and ``draft``; ``None`` is the bundled pair.

    ``axes`` and ``sweep``: batch shapes and precision of the server profile; its drift limit is higher than
    usual, because a demo runs beside other programs. The trace has ``prompts`` of ``prompt_tokens``, paths
    of ``path_tokens`` and drafts of ``depth`` tokens. ``devices`` replayed edges make ``requests``
    each in a turn, started within ``ramp_ms``. ``systems`` take turns for ``rounds``, over an emulated
    link of ``rtt_ms``. ``shares``: SLO classes as shares of the speed that server-only serving reaches with
    them; none is near 1, where chance decides whether the server alone meets it. ``answer``: sampling of the
    shown answer, because small models repeat themselves under greedy decoding; everything else is greedy.
    """

    out: Path = DEMO_FOLDER
    pair: Path | None = None
    prompt: str = PROMPT
    answer_tokens: int = 96
    answer: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_p=0.9))
    axes: Axes = field(
        default_factory=lambda: Axes(
            items=(1, 2, 4, 8, 16),
            new=(1, 3, 6),
            cached=(64, 256, 512),
            skew_items=(4, 12),
            chunk=(64, 128),
            chunk_cached=(0, 256),
            mixed_items=(4,),
        )
    )
    sweep: SweepSettings = field(
        default_factory=lambda: SweepSettings(
            target=0.06, min_samples=5, max_samples=12, max_workload_s=0.5, sentinel_every=12, drift=0.6
        )
    )
    prompts: int = 16
    prompt_tokens: int = 96
    path_tokens: int = 96
    depth: int = 8
    systems: tuple[str, ...] = ("server-only", "sled", "wisp", "wispprof")
    devices: int = 8
    rounds: int = 5
    requests: int = 3
    max_new: int = 64
    shares: tuple[float, ...] = (0.3, 0.55, 0.8, 1.2)
    rtt_ms: float = 5.0
    ramp_ms: float = 200.0
    seed: int = 0

    @classmethod
    def quick(cls, out: Path = DEMO_FOLDER, pair: Path | None = None) -> DemoSettings:
        """Fewer measurements and requests; takes about one minute instead of three."""
        full = cls(out=out, pair=pair)
        return replace(
            full,
            axes=replace(full.axes, items=(1, 4, 8), new=(1, 5), cached=(64, 256), skew_items=(4,)),
            sweep=replace(full.sweep, min_samples=4, max_samples=6, max_workload_s=0.25),
            prompts=8,
            prompt_tokens=64,
            path_tokens=64,
            answer_tokens=64,
            requests=2,
            max_new=48,
        )

    @property
    def target(self) -> Path:
        return (self.pair or bundled_path("models/reference-pair")) / "target"

    @property
    def draft(self) -> Path:
        return (self.pair or bundled_path("models/reference-pair")) / "draft"


@dataclass(frozen=True)
class Measured:
    """Models, artifacts and fits that the serving half uses. ``inputs``: hashes of profiles and trace."""

    target: LoadedModel
    server: ServerProfile
    edge: EdgeProfile
    device: DeviceProfile
    trace: AcceptanceTrace
    estimator: FittedEstimator
    predictor: Path
    inputs: dict[str, str]


def measure(settings: DemoSettings, stage: Stage) -> Measured:
    """Profile both sides, record an acceptance trace and fit. Writes every artifact to ``out``."""
    from wispprof.engines.loading import load_model
    from wispprof.profiling.acceptance_trace import collect_trace
    from wispprof.profiling.edge_profiler import profile_edge
    from wispprof.profiling.server_profiler import profile_server

    out = settings.out
    report = stage("load the pair")
    report(0, 2, "target")
    target = load_model(settings.target)
    report(1, 2, "draft")
    draft = load_model(settings.draft)
    report(2, 2, "")

    server = profile_server(
        ServerProfilerSettings(
            axes=settings.axes, sweep=settings.sweep, output=Output(out / "server", overwrite=True)
        ),
        stage("profile the server"),
        loaded=target,
    )
    edge = profile_edge(
        EdgeProfilerSettings(sweep=settings.sweep, output=Output(out / "edge", overwrite=True)),
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
        raise FitError("No estimator or predictor was fitted.", "Profile and trace again.")

    return Measured(
        target,
        server,
        edge,
        DeviceProfile.from_rows(DEVICE, edge.rows),
        trace,
        fitted.estimator,
        out / "predictor.json",
        {"profile": server.hash, "edge": edge.hash, "trace": trace_hash},
    )


def plan_load(
    settings: DemoSettings, measured: Measured, slo_classes: tuple[float, ...], stage: Stage
) -> None:
    """Plan for this device and these SLO classes; writes ``plan.json``."""
    plan = make_plan(
        measured.estimator,
        [measured.device],
        measured.trace,
        PlanSettings(
            rtts_ms=(1.0, 5.0, 20.0, 50.0, 100.0),
            slos=slo_classes,
            k_max=settings.depth,
            contexts=(settings.prompt_tokens + settings.path_tokens // 2,),
            max_sessions=64,
        ),
        inputs=measured.inputs,
        progress=stage("plan"),
    )
    save_plan(plan, settings.out / "plan.json")


def slo_classes(settings: DemoSettings, alone: float) -> tuple[float, ...]:
    """SLO classes of the load in tokens/s, ascending, rounded to two digits. ``alone``: tokens/s of a session
    in server-only serving."""
    return tuple(float(f"{share * alone:.2g}") for share in settings.shares)


def first_token_ms(settings: DemoSettings, estimator: FittedEstimator) -> float:
    """TTFT SLO in ms: three times the prefill of all devices' prompts, at least 500.

    Without a TTFT SLO, a policy may delay new prompts without limit.
    """
    prompt = BatchShape.of([(settings.prompt_tokens, 0, True)])
    return max(500.0, 3.0 * settings.devices * estimator.predict(prompt)[0])
