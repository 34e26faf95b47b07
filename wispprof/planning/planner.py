"""Compute all tables of a plan from measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from wispprof.artifacts.plan import MODES, Plan, machine_of
from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.errors import PlanError
from wispprof.planning.acceptance_runs import Runs, runs_of_trace
from wispprof.planning.batch_table import (
    batch_row,
    break_even_row,
    capacity_row,
    mix_row,
    sessions_of_levels,
)
from wispprof.planning.draft_table import EdgeCosts, PlannedDevice, draft_row, speed_curve
from wispprof.planning.objective import choice_rows
from wispprof.planning.session_speed import LoadedStepTimes
from wispprof.policies.cost_model import LOAD_BOUNDS, LOAD_LEVELS
from wispprof.settings.planner_settings import PlanSettings
from wispprof.types import StepTimeEstimator

Report = Callable[[int, int, str], None]


def make_plan(
    estimator: StepTimeEstimator,
    devices: Iterable[PlannedDevice],
    acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs,
    settings: PlanSettings | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
    progress: Report | None = None,
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
    times = LoadedStepTimes(estimator, settings.context)
    if times.uniform(1, 1)[0] <= 0:
        raise PlanError("The estimator predicts 0 ms for a step.", "Fit it again.")
    levels = sessions_of_levels(times, settings.kv_sessions)
    draft, capacity, mixes, break_even = [], [], [], []
    total = len(fleet) * len(settings.rtts_ms) * len(MODES)
    done = 0
    for device in fleet:
        for rtt_ms in settings.rtts_ms:
            for mode in MODES:
                edge = EdgeCosts(device, rtt_ms, mode, *runs[device.name])
                for level, sessions in levels.items():
                    cell = speed_curve(times, sessions, edge, settings.k_max)
                    draft += [draft_row(cell, device, level, s, settings) for s in settings.slos]
                    break_even.append(break_even_row(times, edge, level, sessions, settings))
                capacity += [capacity_row(times, edge, s, settings) for s in settings.slos]
                mixes += [mix_row(times, edge, mix, settings) for mix in settings.mixes_or_equal]
                done += 1
                if progress is not None:
                    progress(done, total, device.name)
    best_runs = max((mean for mean, _ in runs.values()), key=lambda mean: mean.acceptance)
    batch = [
        batch_row(times, level, sessions, slo, best_runs, settings)
        for level, sessions in levels.items()
        for slo in settings.slos
    ]
    all_notes = list(notes)
    if max(levels) < LOAD_LEVELS - 1:
        all_notes.append(
            f"{settings.kv_sessions} sessions reach load level {max(levels)} at most; "
            "higher levels use its rows."
        )
    return Plan(
        draft=tuple(draft),
        batch=tuple(batch),
        capacity=tuple(capacity),
        mixes=tuple(mixes),
        choices=tuple(choice_rows(draft, settings)),
        break_even=tuple(break_even),
        load_bounds=LOAD_BOUNDS,
        context=settings.context,
        objective=settings.objective,
        cum_acceptance=runs[fleet[0].name][0].cumulative[:16],
        settings={**asdict(settings), "coverage": estimator.coverage},
        inputs=dict(inputs or {}),
        notes=tuple(all_notes),
    )


def _checked(devices: Iterable[PlannedDevice], settings: PlanSettings) -> list[PlannedDevice]:
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
        if not device.step_ms(settings.context) > 0:
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
    name: str,
    acceptance: AcceptanceTrace | Mapping[str, AcceptanceTrace] | Runs,
    settings: PlanSettings,
) -> tuple[Runs, Runs]:
    if isinstance(acceptance, Runs):
        return acceptance, acceptance
    if isinstance(acceptance, AcceptanceTrace):
        return runs_of_trace(acceptance, settings.violations)
    hashes = {t.tokenizer_hash for t in acceptance.values()}
    if len(hashes) > 1:
        raise PlanError(
            f"The traces use {len(hashes)} different tokenizers.",
            "Use traces of one target model.",
        )
    if name not in acceptance:
        raise PlanError(f"There is no acceptance trace for {name!r}.", "Give --trace for it.")
    return runs_of_trace(acceptance[name], settings.violations)
