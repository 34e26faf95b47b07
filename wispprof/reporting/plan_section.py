"""The report's section on a plan, and the figure of simulated capacities."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wispprof.artifacts import Document, files
from wispprof.artifacts.plan import BreakEvenRow, DraftRow, Plan, machine_of
from wispprof.planning.objective import Option, draft_front
from wispprof.reporting import theme
from wispprof.reporting.run_folder import Bench
from wispprof.reporting.tables import Column, Table

MAX_PANELS = 3
MODES = ("stream", "round")


@dataclass(frozen=True)
class HeatCell:
    """A value with a note. ``heat``: shade in percent, ``None``: hatched. ``short``: misses the SLO."""

    text: str
    note: str
    heat: int | None = None
    short: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Cells by row and load level. ``corner``: what rows are, by label; ``loads``: number of sessions by
    level."""

    title: str
    corner: str
    rows: dict[float, str]
    loads: dict[int, str]
    cells: dict[tuple[float, int], HeatCell]


def plan_section(plan: Plan | None, benches: Sequence[Bench]) -> dict[str, Any] | None:
    """What the template shows of a plan: draft lengths, break-even, price of speed, capacity."""
    if plan is None or not plan.draft:
        return None
    whole, plan = plan, plan.at_context(plan.nearest_context())
    classes = plan.slo_classes or tuple(sorted({r.tokens_per_s for r in plan.draft}))
    slos = [speed for b in benches for speed in b.slos]
    slo = statistics.median_low(slos) if slos else classes[len(classes) // 2]
    slo = plan.draft_row(plan.devices[0], 0.0, 0, slo, plan.draft[0].mode).tokens_per_s
    return {
        "context": f"{plan.context:,}",
        "notes": plan.notes,
        "objective": plan.objective,
        "tokens_per_s": slo,
        "draft_lengths": _by_device(
            plan, lambda device: [draft_length_map(plan, device, mode, slo) for mode in MODES]
        ),
        "break_even": _by_device(plan, lambda device: [break_even_map(plan, device, mode) for mode in MODES]),
        "by_context": _by_device(whole, lambda device: [context_map(whole, device, mode) for mode in MODES]),
        "front": drafts_front(plan, slo) if plan.draft[0].by_k else "",
        "capacity": _by_device(plan, lambda device: [capacity_table(plan, device)]),
    }


def _by_device(plan: Plan, parts: Callable[[str], Sequence[Any]]) -> dict[str, list[Any]]:
    """The parts that exist of each device, without devices that have none."""
    shown = {device: [p for p in parts(device) if p is not None] for device in plan.devices}
    return {device: found for device, found in shown.items() if found}


def draft_length_map(plan: Plan, device: str, mode: str, tokens_per_s: float) -> HeatMap | None:
    """Draft length and expected tokens/s of a session; ``None`` if the plan lacks device or mode.

    Hatched as in :func:`break_even_map`: drafting does not pay. Short: no draft length meets the SLO; the
    note states the slow session's speed with the draft length that comes nearest.
    """
    if not any((r.device, r.mode) == (device, mode) for r in plan.draft):
        return None
    nearest = plan.draft_row(device, 0.0, 0, tokens_per_s, mode)
    slo = nearest.tokens_per_s
    rows = [r for r in plan.draft if (r.device, r.mode, r.tokens_per_s) == (device, mode, slo)]
    longest = max(r.k for r in rows) or 1
    pays = {
        (r.rtt_ms, r.load_level)
        for r in plan.break_even
        if (r.device, r.mode, r.verdict) == (device, mode, "split")
    }

    def cell(row: DraftRow) -> HeatCell:
        note = f"{row.expected_tokens_per_s:.1f} tokens/s"
        if not row.feasible:
            note = f"{row.slow_tokens_per_s:.1f} of {row.tokens_per_s:g} tokens/s"
        drafts = row.k or (row.rtt_ms, row.load_level) in pays
        heat = round(8 + 52 * row.k / longest) if drafts else None
        return HeatCell(str(row.k), note, heat, short=not row.feasible)

    title = f"{device}, {mode} mode, SLO of {slo:g} tokens/s"
    return _heat_map(plan, title, rows, map(cell, rows))


def break_even_map(plan: Plan, device: str, mode: str) -> HeatMap | None:
    """Speedup of a session with the best draft length over no drafts; ``None`` without rows.

    The note states the least mean acceptance at which drafting pays. Hatched: the server alone is as fast,
    or nearly.
    """
    rows = [r for r in plan.break_even if (r.device, r.mode) == (device, mode)]
    if not rows:
        return None
    title = f"{device}, {mode} mode, measured acceptance {rows[0].acceptance:.2f}"
    return _heat_map(plan, title, rows, _gain_cells(rows))


def context_map(plan: Plan, device: str, mode: str) -> HeatMap | None:
    """:func:`break_even_map` by context at the shortest round trip; ``None`` for plans of one context."""
    near = min(r.rtt_ms for r in plan.draft)
    rows = [r for r in plan.break_even if (r.device, r.mode, r.rtt_ms) == (device, mode, near)]
    if len({r.context for r in rows}) < 2:
        return None
    return HeatMap(
        f"{device}, {mode} mode, {near:g} ms round trip",
        "cached tokens",
        {r.context: f"{r.context:,}" for r in sorted(rows, key=lambda r: r.context)},
        dict.fromkeys(sorted({r.load_level for r in rows}), ""),
        dict(zip(((r.context, r.load_level) for r in rows), _gain_cells(rows), strict=True)),
    )


def _gain_cells(rows: Sequence[BreakEvenRow]) -> list[HeatCell]:
    max_gain = max(1.01, *(r.gain for r in rows))

    def cell(row: BreakEvenRow) -> HeatCell:
        note = "never pays" if row.needed is None else f"pays from {row.needed:.2f}"
        heat = round(8 + 52 * max(0.0, row.gain - 1.0) / (max_gain - 1.0))
        return HeatCell(f"× {row.gain:.2f}", note, heat if row.verdict == "split" else None)

    return list(map(cell, rows))


def _heat_map(
    plan: Plan, title: str, rows: Sequence[DraftRow | BreakEvenRow], cells: Iterable[HeatCell]
) -> HeatMap:
    sessions = _sessions(plan)
    return HeatMap(
        title,
        "round trip",
        {rtt_ms: f"{rtt_ms:g} ms" for rtt_ms in sorted({r.rtt_ms for r in rows})},
        {level: sessions.get(level, "") for level in sorted({r.load_level for r in rows})},
        dict(zip(((r.rtt_ms, r.load_level) for r in rows), cells, strict=True)),
    )


def _sessions(plan: Plan) -> dict[int, str]:
    """Number of sessions by load level, with its noun."""
    return {b.load_level: f"{b.sessions} session{'s'[: b.sessions != 1]}" for b in plan.batch}


def capacity_table(plan: Plan, device: str) -> Table | None:
    """Sessions that meet their SLO at the shortest and the longest round trip."""
    rows = [r for r in plan.capacity if r.device == device]
    if not rows:
        return None
    ends = {min(r.rtt_ms for r in rows), max(r.rtt_ms for r in rows)}
    return Table(
        "",
        (
            Column("mode"),
            Column("round trip", "ms", 0),
            Column("SLO", "tokens/s", 0),
            Column("server-only", "sessions", 0),
            Column("split", "sessions", 0),
            Column("gain", "", 2),
            Column("draft length", "", 0),
            Column("bound by"),
        ),
        tuple(
            (
                r.mode,
                r.rtt_ms,
                r.tokens_per_s,
                r.server_only,
                r.split,
                r.split / r.server_only if r.server_only else None,
                r.k,
                r.bound_by,
            )
            for r in sorted(rows, key=lambda r: (r.mode, r.rtt_ms, r.tokens_per_s))
            if r.rtt_ms in ends
        ),
        note="Predicted by the plan from the estimator and the acceptance trace; not measured.",
    )


@dataclass(frozen=True)
class _SystemCapacity:
    """``probes``: fleet size and share of sessions that met their SLO."""

    system: str
    devices: int
    probes: list[tuple[int, float | None]]


@dataclass(frozen=True)
class _Capacities:
    violations: float
    systems: list[_SystemCapacity]


def capacity_points(document: Document) -> Table:
    """What :func:`capacity_curves` draws."""
    found = _capacities(document)
    rows = tuple(
        (system.system, devices, share, devices == system.devices)
        for system in found.systems
        for devices, share in sorted(system.probes)
    )
    columns = Column("system"), Column("devices"), Column("met their SLO", percent=True), Column("capacity")
    return Table("", columns, rows)


def _capacities(document: Document) -> _Capacities:
    found: _Capacities = files.convert(
        document.payload, _Capacities, "capacities", "Run `wispprof simulate --capacity --out` again."
    )
    return found


def capacity_curves(document: Document) -> str:
    """Share of sessions that met their SLO over the number of devices, one line per system.

    ``document`` comes from ``simulate --capacity --out``. Points are the simulated fleet sizes; a system's
    capacity is its last point above the line. Raises :class:`ArtifactDamaged` for another document.
    """
    found = _capacities(document)
    limit = 1.0 - found.violations
    curves = [
        (s.system, s.devices, [(n, share) for n, share in s.probes if share is not None])
        for s in found.systems
    ]
    with theme.canvas(9.4, 4.0) as (figure, (axes,)):
        axes.axhline(limit, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for index, (system, devices, probes) in enumerate(curves):
            if not probes:
                continue
            color, marker = theme.policy_color(system), theme.MARKERS[index % len(theme.MARKERS)]
            axes.plot(
                [n for n, _ in probes],
                [share for _, share in probes],
                color=color,
                marker=marker,
                label=f"{system}: {devices}",
            )
        axes.set_xscale("log", base=2)
        sizes = sorted({n for _, _, probes in curves for n, _ in probes})
        if sizes:
            ticks = [2**e for e in range(20) if sizes[0] <= 2**e <= sizes[-1]] or sizes
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.annotate(
            f"target {100 * limit:.0f} %",
            (0.0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(4, -11),
            textcoords="offset points",
            color=theme.MUTED,
            fontsize=8,
        )
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside right upper",
            title="system: devices",
            alignment="left",
        )
        theme.finish(axes, "devices on one server", "sessions that met their SLO")
        return theme.svg(figure, "capacity", "Share of sessions that met their SLO by number of devices")


def drafts_front(plan: Plan, tokens_per_s: float) -> str:
    """Speed of a session against its price or energy, one panel per load level.

    Points: every draft length of every draft model on the machine with the most drafts, at the shortest
    round trip. Hollow: misses the SLO; ringed: planned; line: Pareto front. The plan's objective decides
    between price and energy. Empty if the plan has neither prices nor power.
    """
    machines: dict[str, list[str]] = {}
    for device in plan.devices:
        machines.setdefault(machine_of(device), []).append(device)
    machine = max(machines, key=lambda name: len(machines[name]))
    rows = [r for r in plan.draft if machine_of(r.device) == machine]
    mode = rows[0].mode
    rtt_ms = min(r.rtt_ms for r in rows)
    levels = sorted({r.load_level for r in rows})
    levels = levels if len(levels) <= MAX_PANELS else [levels[0], levels[len(levels) // 2], levels[-1]]
    cells = [draft_front(plan, machine, rtt_ms, level, tokens_per_s, mode)[0] for level in levels]
    priced = any(o.figures.dollars_per_mtoken for options in cells for o in options)
    powered = any(o.figures.energy_j_per_token for options in cells for o in options)
    if not priced and not powered:
        return ""
    priced = priced and ("cost" in plan.objective or not powered)
    unit = "dollars per million tokens" if priced else "joules of drafting per token"
    sessions = _sessions(plan)
    with theme.canvas(9.4, 3.8, len(levels)) as (figure, axes):
        for panel, level, options in zip(axes, levels, cells, strict=True):
            _front_panel(panel, options, machines[machine], priced)
            title = ", ".join(filter(None, (f"load {level}", sessions.get(level))))
            theme.finish(panel, unit, "tokens/s of a session" if panel is axes[0] else "", title)
            panel.set_ylim(0, 1.12 * max(o.figures.tokens_per_s for o in options))
            panel.set_xlim(0, 1.12 * max((_paid(o, priced) for o in options), default=1.0) or 1.0)
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(machines[machine]) + 2
        )
        return theme.svg(
            figure, "draft_front", f"Tokens per second of a session against {unit}, by draft and length"
        )


def _paid(option: Option, priced: bool) -> float:
    figures = option.figures
    return figures.dollars_per_mtoken if priced else figures.energy_j_per_token


def _front_panel(panel: Any, options: Sequence[Option], devices: Sequence[str], priced: bool) -> None:
    def paid(option: Option) -> float:
        return _paid(option, priced)

    for index, device in enumerate(devices):
        own = [o for o in options if o.device == device]
        color = theme.SERIES[index % len(theme.SERIES)]
        marker = theme.MARKERS[index % len(theme.MARKERS)]
        # The line joins the draft lengths in order, from k = 0 on.
        panel.plot(
            [paid(o) for o in own],
            [o.figures.tokens_per_s for o in own],
            color=color,
            linewidth=0.9,
            alpha=0.45,
        )
        for meets_slo in (True, False):
            shown = [o for o in own if o.meets_slo == meets_slo]
            panel.scatter(
                [paid(o) for o in shown],
                [o.figures.tokens_per_s for o in shown],
                s=30,
                facecolors=color if meets_slo else theme.PAPER,
                edgecolors=color,
                marker=marker,
                linewidths=0.9,
                label=device.partition(":")[2] or device if meets_slo else None,
                zorder=3,
            )
        for option in (o for o in own if o.planned):
            place = paid(option), option.figures.tokens_per_s
            panel.scatter(
                *([value] for value in place),
                s=105,
                facecolors="none",
                edgecolors=theme.INK,
                linewidths=1.1,
                label="planned for its draft" if index == len(devices) - 1 else None,
                zorder=4,
            )
            panel.annotate(
                f"k = {option.k}",
                place,
                xytext=(-8, 6 if index % 2 == 0 else -13),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=color,
            )
    line = _front_line([(paid(o), o.figures.tokens_per_s) for o in options])
    panel.plot(
        [x for x, _ in line],
        [y for _, y in line],
        color=theme.MUTED,
        linewidth=1.2,
        linestyle=(0, (4, 3)),
        drawstyle="steps-post",
        label="Pareto front",
        zorder=0,
    )


def _front_line(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of (price, speed) points, by rising price."""
    line: list[tuple[float, float]] = []
    for price, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not line or speed > line[-1][1]:
            line.append((price, speed))
    return line
