"""The command ``wispprof plan`` without printing: reads files, refuses mismatches, returns a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wispprof.artifacts import load_edge, load_link, load_trace, read_document, trace_hash
from wispprof.artifacts.plan import Plan
from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import PlanError
from wispprof.planning.draft_table import PlannedDevice
from wispprof.planning.planner import make_plan
from wispprof.settings.planner_settings import PlanSettings

Report = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class SpeedDevice:
    """A device known by drafting speed (tokens/s) and power alone, as publications state them."""

    name: str
    tokens_per_s: float
    draft_w: float = 0.0
    resume_ms: float = 0.0

    def step_ms(self, context: int) -> float:
        return 1000.0 / self.tokens_per_s


def plan_files(
    estimator: Path,
    edges: Sequence[str] = (),
    speeds: Sequence[str] = (),
    traces: Sequence[str] = (),
    settings: PlanSettings | None = None,
    progress: Report | None = None,
) -> Plan:
    """Read and check everything, and make the plan.

    ``edges``: ``[NAME=]PROFILE``; ``speeds``: ``NAME=TOKENS_PER_S[@WATTS]``; ``traces``: ``TRACE`` for all
    devices or ``NAME=TRACE`` for one. Raises :class:`PlanError` if they do not belong together.
    """
    from wispprof.fitting.estimator import load_estimator
    from wispprof.simulation.devices import DeviceProfile

    fitted = load_estimator(Path(estimator))
    document = read_document(Path(estimator), "estimator")
    inputs = {"estimator": document.hash}
    notes: list[str] = []
    if machine := document.inputs.get("machine"):
        inputs["machine"] = machine
        notes.append(f"Server times were measured on {machine}.")
    shared, named = _traces(traces, inputs)
    devices: list[PlannedDevice] = []
    for entry in edges:
        name, path = _split(entry)
        profile = load_edge(path)
        name = name or path.name.removesuffix(".jsonl")
        inputs[f"edge:{name}"] = profile.hash
        trace = named.get(name, shared)
        if trace is not None:
            notes += _check_pair(name, profile.manifest.model.tokenizer_hash, trace)
        devices.append(DeviceProfile.from_rows(name, profile.rows))
    for entry in speeds:
        name, speed, watts = _speed(entry)
        devices.append(SpeedDevice(name, speed, watts))
        notes.append(f"{name} is described by its drafting speed alone: {speed:g} tokens/s.")
    if shared is None and not named:
        raise PlanError("A plan needs an acceptance trace.", "Give --trace.")
    for name, trace in named.items():
        if shared is not None and trace.tokenizer_hash != shared.tokenizer_hash:
            raise PlanError(
                f"The trace of {name} uses another tokenizer than the shared trace.",
                "Use traces of one target.",
            )
    acceptance: AcceptanceTrace | dict[str, AcceptanceTrace]
    if named:
        acceptance = {d.name: t for d in devices if (t := named.get(d.name, shared)) is not None}
    else:
        assert shared is not None
        acceptance = shared
    return make_plan(fitted, devices, acceptance, settings, inputs=inputs, notes=notes, progress=progress)


def link_rtt_ms(path: Path) -> float:
    """Round-trip time of a measured link: the median of its ``rtt`` rows."""
    rows = [row for row in load_link(path).rows if row.kind == "rtt"]
    if not rows:
        raise PlanError(f"The link profile {path} has no round trips.", "Measure the link again.")
    return sorted(row.median_ms for row in rows)[len(rows) // 2]


def _traces(
    entries: Sequence[str], inputs: dict[str, str]
) -> tuple[AcceptanceTrace | None, dict[str, AcceptanceTrace]]:
    shared: AcceptanceTrace | None = None
    named: dict[str, AcceptanceTrace] = {}
    for entry in entries:
        name, path = _split(entry)
        trace = load_trace(path)
        if name:
            named[name] = trace
        elif shared is not None:
            raise PlanError("Two traces were given for all devices.", "Name them: --trace DEVICE=TRACE.")
        else:
            shared = trace
        inputs[f"trace:{name}" if name else "trace"] = trace_hash(trace)
    return shared, named


def _check_pair(name: str, tokenizer: str, trace: AcceptanceTrace) -> list[str]:
    """Notes on a device and its trace; raises :class:`PlanError` if their tokenizers differ."""
    if not tokenizer or not trace.tokenizer_hash:
        return [f"The tokenizers of {name} and its trace could not be compared."]
    if tokenizer != trace.tokenizer_hash:
        raise PlanError(
            f"The profile of {name} uses another tokenizer than its acceptance trace.",
            "Profile the draft model of the trace, or record a trace with this draft model.",
        )
    return []


def _split(entry: str) -> tuple[str, Path]:
    name, found, path = entry.rpartition("=")
    return (name, Path(path)) if found else ("", Path(entry))


def _speed(entry: str) -> tuple[str, float, float]:
    name, found, value = entry.partition("=")
    value, measured, power = value.partition("@")
    try:
        speed, watts = float(value), float(power) if measured else 0.0
    except ValueError:
        speed = watts = 0.0
    if not found or not name or speed <= 0 or watts < 0 or (measured and not watts):
        raise PlanError(
            f"{entry!r} is not NAME=TOKENS_PER_S or NAME=TOKENS_PER_S@WATTS.",
            "For example: --device rpi5=14.4@8.3.",
        )
    return name, speed, watts
