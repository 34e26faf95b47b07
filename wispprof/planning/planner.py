"""Make a plan: read its inputs, refuse what does not belong together, compute all tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from wispprof.artifacts import EdgeProfile, load_edge, load_link, load_trace, read_document, trace_hash
from wispprof.artifacts.median_interval import ROUGH, known_to, noisy_count
from wispprof.artifacts.plan import (
    MODES,
    BatchRow,
    BreakEvenRow,
    CapacityRow,
    DraftRow,
    MixRow,
    Plan,
    machine_of,
)
from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import PlanError
from wispprof.planning.batch_table import batch_row, break_even_row, capacity_row, mix_row, sessions_of_levels
from wispprof.planning.draft_table import EdgeCosts, draft_row, speed_curve
from wispprof.planning.objective import choice_rows
from wispprof.planning.replayed_gains import Gain, SampledAnswers, replayed_gains, sampled_answers
from wispprof.planning.session_speed import LoadedStepTimes, Runs, runs_of_trace
from wispprof.planning.tree_choice import with_tree
from wispprof.policies.cost_model import LOAD_BOUNDS, LOAD_LEVELS
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.candidate_ranks import trace_rates
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import Progress, StepTimeEstimator


def make_plan(
    estimator: StepTimeEstimator,
    devices: Iterable[DeviceProfile],
    acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs,
    settings: PlanSettings | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
    progress: Progress | None = None,
) -> Plan:
    """Compute every table.

    ``acceptance``: one trace (or :class:`Runs`) for all devices, or one trace per device name if
    devices run different draft models. ``inputs``: name → content hash of the plan's inputs.
    ``progress`` is called with (done, total, device).

    Raises :class:`PlanError` if there is no device, two have one name, a draft step takes no time, a device
    has no trace, or traces have different tokenizers.
    """
    settings = settings or PlanSettings()
    fleet = _checked(devices, settings)
    runs = {d.name: _runs(d.name, acceptance, settings) for d in fleet}
    samples = {d.name: _sample(d.name, acceptance) for d in fleet}
    ranks = {d.name: _ranks(d.name, acceptance) for d in fleet}
    contexts = sorted(set(settings.contexts))
    total = len(contexts) * len(fleet) * len(settings.rtts_ms) * len(MODES)
    tables = _Tables()
    for context in contexts:
        _plan_context(
            LoadedStepTimes(estimator, context),
            fleet,
            runs,
            samples,
            ranks,
            replace(settings, contexts=(context,)),
            tables,
            lambda name: progress(tables.done, total, name) if progress is not None else None,
        )
    return Plan(
        draft=tuple(tables.draft),
        batch=tuple(tables.batch),
        capacity=tuple(tables.capacity),
        mixes=tuple(tables.mixes),
        choices=tuple(choice_rows(tables.draft, settings)),
        break_even=tuple(tables.break_even),
        load_bounds=LOAD_BOUNDS,
        context=settings.context,
        objective=settings.objective,
        cum_acceptance=runs[fleet[0].name][0].cumulative[:16],
        settings={**asdict(settings), "coverage": estimator.coverage},
        inputs=dict(inputs or {}),
        notes=(*notes, *tables.notes),
    )


@dataclass
class _Tables:
    """Rows of all contexts so far; ``done``: how many (context, device, round trip, mode) they cover."""

    draft: list[DraftRow] = field(default_factory=list)
    batch: list[BatchRow] = field(default_factory=list)
    capacity: list[CapacityRow] = field(default_factory=list)
    mixes: list[MixRow] = field(default_factory=list)
    break_even: list[BreakEvenRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: int = 0


def _plan_context(
    times: LoadedStepTimes,
    fleet: list[DeviceProfile],
    runs: Mapping[str, tuple[Runs, Runs]],
    samples: Mapping[str, SampledAnswers | None],
    ranks: Mapping[str, tuple[float, ...]],
    settings: PlanSettings,
    tables: _Tables,
    progress: Callable[[str], None],
) -> None:
    """Add the rows of one context to ``tables``."""
    if times.uniform(1, 1)[0] <= 0:
        raise PlanError("The estimator predicts 0 ms for a step.", "Fit it again.")
    levels = sessions_of_levels(times, settings.kv_sessions)
    for device in fleet:
        sample, rates = samples[device.name], ranks[device.name]
        for rtt_ms in settings.rtts_ms:
            for mode in MODES:
                gains: tuple[Gain, ...] = ()
                if sample is not None:
                    gains = replayed_gains(sample, times, device, rtt_ms, mode, settings.k_max)
                edge = EdgeCosts(device, rtt_ms, mode, *runs[device.name], gains)
                for level, sessions in levels.items():
                    cell = speed_curve(times, sessions, edge, settings.k_max)
                    rows = [draft_row(cell, device, level, s, settings) for s in settings.slos]
                    tables.draft += [with_tree(row, rates, device, cell, times) for row in rows]
                    tables.break_even.append(break_even_row(times, edge, level, sessions, settings))
                tables.capacity += [capacity_row(times, edge, s, settings) for s in settings.slos]
                tables.mixes += [mix_row(times, edge, mix, settings) for mix in settings.mixes_or_equal]
                tables.done += 1
                progress(device.name)
    best_runs = max((mean for mean, _ in runs.values()), key=lambda mean: mean.acceptance)
    tables.batch += [
        batch_row(times, level, sessions, slo, best_runs, settings)
        for level, sessions in levels.items()
        for slo in settings.slos
    ]
    if max(levels) < LOAD_LEVELS - 1:
        tables.notes.append(
            f"At {settings.context:,} cached tokens, {settings.kv_sessions} sessions reach load level "
            f"{max(levels)} at most; higher levels use its rows."
        )


def _checked(devices: Iterable[DeviceProfile], settings: PlanSettings) -> list[DeviceProfile]:
    fleet = list(devices)
    if not fleet:
        raise PlanError("A plan needs at least one edge device.", "Give --edge or --device.")
    names = [d.name for d in fleet]
    duplicates = {n for n in names if names.count(n) > 1}
    if duplicates:
        raise PlanError(
            f"Two devices are called {', '.join(sorted(duplicates))}.",
            "Give them different names: NAME=PROFILE.",
        )
    for device in fleet:
        if "/" in device.name:
            raise PlanError(f"The device name {device.name!r} contains a slash.", "Rename it.")
        if not device.step_ms(min(settings.contexts)) > 0:
            raise PlanError(f"A draft step on {device.name} takes 0 ms.", "Profile it again.")
        if "energy" in settings.weights and not device.draft_w > 0:
            raise PlanError(
                f"The drafting power of {device.name} is unknown, so energy cannot be an objective.",
                "Profile it with a power sensor, or give --device NAME=TOKENS_PER_S@WATTS.",
            )
    for name in (name for name, _ in settings.edge_prices if name):
        if not any(name in (device, machine_of(device)) for device in names):
            raise PlanError(
                f"A price is given for {name!r}, which is no device of this plan.",
                f"Its devices: {', '.join(names)}.",
            )
    return fleet


def _runs(
    name: str, acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs, settings: PlanSettings
) -> tuple[Runs, Runs]:
    if isinstance(acceptance, Runs):
        return acceptance, acceptance
    if isinstance(acceptance, AcceptanceTrace):
        return runs_of_trace(acceptance, settings.violations)
    hashes = {t.tokenizer_hash for t in acceptance.values()}
    if len(hashes) > 1:
        raise PlanError(
            f"The traces use {len(hashes)} different tokenizers.", "Use traces of one target model."
        )
    if name not in acceptance:
        raise PlanError(f"There is no acceptance trace for {name!r}.", "Give --trace for it.")
    return runs_of_trace(acceptance[name], settings.violations)


def _sample(
    name: str, acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs
) -> SampledAnswers | None:
    """Answers of a device's trace to serve again; ``None`` for :class:`Runs`."""
    if isinstance(acceptance, Runs):
        return None
    return sampled_answers(acceptance if isinstance(acceptance, AcceptanceTrace) else acceptance[name])


def _ranks(
    name: str, acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs
) -> tuple[float, ...]:
    """How often the target takes each of the draft's candidates; none for :class:`Runs`."""
    if isinstance(acceptance, Runs):
        return ()
    return trace_rates(acceptance if isinstance(acceptance, AcceptanceTrace) else acceptance[name])


def plan_files(
    estimator: Path,
    edges: Sequence[str] = (),
    speeds: Sequence[str] = (),
    traces: Sequence[str] = (),
    settings: PlanSettings | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Read and check everything, and make the plan.

    ``edges``: ``[NAME=]PROFILE``; ``speeds``: ``NAME=TOKENS_PER_S[@WATTS]``; ``traces``: ``TRACE`` for all
    devices or ``NAME=TRACE`` for one. Raises :class:`PlanError` if they do not belong together.
    """
    from wispprof.fitting.estimator import load_estimator

    fitted = load_estimator(Path(estimator))
    document = read_document(Path(estimator), "estimator")
    inputs = {"estimator": document.hash}
    notes: list[str] = []
    if machine := document.inputs.get("machine"):
        inputs["machine"] = machine
        sources = fitted.report.get("sources", ["measured"])
        notes.append(f"Server times are of {machine}: {' and '.join(sources)}.")
    shared, named = _traces(traces, inputs)
    devices: list[DeviceProfile] = []
    for entry in edges:
        name, path = _split(entry)
        profile = load_edge(path)
        name = name or path.name.removesuffix(".jsonl")
        inputs[f"edge:{name}"] = profile.hash
        trace = named.get(name, shared)
        if trace is not None:
            notes += _check_pair(name, profile.manifest.model.tokenizer_hash, trace)
        notes += _noise(name, profile)
        devices.append(DeviceProfile.from_rows(name, profile.rows))
    for entry in speeds:
        name, speed, watts = _speed(entry)
        devices.append(DeviceProfile.from_speed(name, speed, draft_w=watts))
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


def _noise(name: str, profile: EdgeProfile) -> list[str]:
    """A note if the draft step is known too roughly to choose draft lengths by it."""
    width = known_to(profile.of_kind("draft_step"))
    if width <= ROUGH:
        return []
    return [
        f"The draft step of {name} is known to ± {width:.0%} only ({noisy_count(profile.rows)}), so its "
        "draft lengths are a guess. Run `wispprof profile-edge` again on an idle machine."
    ]


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
