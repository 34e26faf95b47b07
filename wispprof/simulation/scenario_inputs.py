"""Parts of a scenario from the names and files of a command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from wispprof.artifacts.files import bundle_roots
from wispprof.artifacts.plan import load_plan
from wispprof.artifacts.profile import load_edge, profile_files
from wispprof.artifacts.trace import load_trace
from wispprof.errors import PlanError
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.settings.fleet_settings import InputSettings, LoadSettings, SimulationSettings
from wispprof.simulation.arrivals import (
    Bursts,
    ClosedFleet,
    Lengths,
    OpenLoad,
    Poisson,
    Replay,
)
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.request_traces import read_requests
from wispprof.simulation.scenario import SYSTEMS, Scenario, ServerModel, System, system
from wispprof.simulation.server_models import DEFAULT_SERVER, server_of
from wispprof.simulation.simulated_output import AcceptanceSource
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.trace_replay import TraceAcceptance
from wispprof.types import RejectionPredictor, Slo


@dataclass(frozen=True)
class Inputs:
    """Server, device and acceptance of a scenario. ``notes`` say where each came from."""

    server: ServerModel
    device: DeviceProfile
    acceptance: AcceptanceSource
    notes: tuple[str, ...]


def read_inputs(settings: InputSettings) -> Inputs:
    """Read what is given; what is not comes from shipped files.

    Raises the artifact errors, or :class:`PlanError` for an unknown server.
    """
    notes: list[str] = []
    model = _server(settings.server, notes)
    if settings.kv_tokens is not None:
        model = replace(model, kv_tokens=settings.kv_tokens)
    edge, trace = settings.edge, settings.trace
    tokenizer = ""
    if edge is not None:
        profile = load_edge(edge)
        tokenizer = profile.manifest.model.tokenizer_hash
        device = DeviceProfile.from_rows(profile_files(edge)[0].stem, profile.rows)
        manifest = profile.manifest
        notes.append(f"edge: profile {edge}, {manifest.source} ({manifest.citation or 'profile'})")
    else:
        device = DeviceProfile.from_speed("edge", settings.draft_tokens_per_s)
        notes.append(f"edge: {settings.draft_tokens_per_s:g} draft tokens/s (no profile given)")
    source: AcceptanceSource
    if trace is not None:
        recorded = load_trace(trace)
        if tokenizer and recorded.tokenizer_hash and tokenizer != recorded.tokenizer_hash:
            raise PlanError(
                f"{edge} was profiled with another tokenizer than {trace} was taken with.",
                "Profile the draft model that the trace is of, or take the trace with this one.",
            )
        source = TraceAcceptance(recorded, _predictor(settings.predictor))
        notes.append(f"acceptance: trace {trace}")
    else:
        source = SyntheticAcceptance(settings.acceptance)
        notes.append(f"acceptance: drawn, mean {settings.acceptance:g} a position (no trace given)")
    return Inputs(model, device, source, tuple(notes))


def _server(name: str, notes: list[str]) -> ServerModel:
    if not name:
        shipped = _shipped("estimator.json")
        name = str(shipped) if shipped is not None else DEFAULT_SERVER
    model, origin = server_of(name)
    notes.append(origin)
    return model


def _predictor(path: Path | None) -> RejectionPredictor:
    if path is None:
        return ConfidenceAcceptance()
    from wispprof.fitting import load_predictor

    return load_predictor(path)


def _shipped(name: str) -> Path | None:
    """The first shipped artifact of that file name, searched in the shipped models and profiles."""
    for root in bundle_roots():
        for folder in ("models", "profiles"):
            found = sorted((root / folder).rglob(name)) if (root / folder).is_dir() else []
            if found:
                return found[0]
    return None


def load_of(settings: LoadSettings) -> ClosedFleet | OpenLoad:
    """``closed``, ``poisson``, ``bursts`` at four times the rate, or a request trace by its path."""
    lengths = Lengths(settings.prompt, settings.output, settings.spread, settings.spread)
    if settings.arrivals == "closed":
        return ClosedFleet(settings.devices, lengths, settings.think_ms)
    if settings.arrivals == "poisson":
        return Poisson(settings.per_s, lengths)
    if settings.arrivals == "bursts":
        return Bursts(settings.per_s, 4 * settings.per_s, lengths=lengths)
    return Replay(read_requests(settings.arrivals), settings.speed)


def scenarios_of(settings: SimulationSettings) -> tuple[list[Scenario], tuple[str, ...]]:
    """One scenario for each system, and where its inputs came from."""
    inputs = read_inputs(settings.inputs)
    load = load_of(settings.load)
    scenarios = [
        Scenario(
            with_plan(_controlled(system(name), settings.controller), settings.plan, inputs.device.name),
            inputs.server,
            load,
            inputs.acceptance,
            devices=((inputs.device, 1.0),),
            links=((settings.link, 1.0),),
            slos=tuple((Slo(speed, settings.ttft_ms), 1.0) for speed in settings.tokens_per_s),
            seconds=settings.seconds,
            warmup_s=settings.uncounted_s,
            seed=settings.seed,
        )
        for name in (SYSTEMS if settings.compare else settings.systems)
    ]
    notes = (_chains_only(scenario) for scenario in scenarios)
    return scenarios, (*inputs.notes, *filter(None, notes))


def _controlled(chosen: System, controller: str) -> System:
    """The system with edges that draft by another controller, if they draft at all."""
    if not controller or chosen.controller is None:
        return chosen
    label = f"{chosen.label} with {controller}"
    return chosen.replace(label=label, controller=controller, controller_options={})


def _chains_only(scenario: Scenario) -> str:
    """Why a system of trees drafts chains here; empty if it drafts trees, or is none of trees."""
    if not scenario.system.trees:
        return ""
    reasons = []
    if all(device.node_ms is None for device, _ in scenario.devices):
        reasons.append("no edge profile times several nodes a forward")
    if not scenario.acceptance.output((0,), 1, 2).candidates:
        reasons.append("the trace holds no ranks")
    return f"{scenario.system.label} drafts chains: {' and '.join(reasons)}" if reasons else ""


def with_plan(system: System, plan: Path | None, device: str) -> System:
    """The system with its ``wispprof`` controllers bound to a plan's rows for a device."""
    if plan is None or system.controller != "wispprof":
        return system
    from wispprof.policies.stopping import PlannedRows

    options = {**system.controller_options, "rows": PlannedRows(load_plan(plan), device)}
    return replace(system, controller_options=options)
