"""The figures of a plan and of simulated capacities, each to one inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wispprof.artifacts import Document
from wispprof.artifacts.plan import Plan, machine_of
from wispprof.errors import ArtifactDamaged
from wispprof.planning.objective import Option, draft_front
from wispprof.reporting import theme

MOST_PANELS = 3


def capacity_curves(document: Document) -> str:
    """Share of sessions that met their SLO over the number of devices, one line per system, of a
    document that ``simulate --capacity --out`` wrote.

    Points are the fleet sizes that the search simulated; the last one above the line is the capacity.
    Raises :class:`ArtifactDamaged` where the document is none of that kind.
    """
    try:
        systems: Sequence[Mapping[str, Any]] = document.payload["systems"]
        limit = 1.0 - float(document.payload["violations"])
        curves = [
            (
                str(found["system"]),
                int(found["devices"]),
                [(int(n), float(share)) for n, share in found["probes"] if share is not None],
            )
            for found in systems
        ]
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactDamaged(
            f"The capacities lack {err}.", "Run `wispprof simulate --capacity --out` again."
        ) from err
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
        return theme.svg(
            figure, "capacity", "Share of sessions that met their SLO by number of devices"
        )


def drafts_front(plan: Plan, tokens_per_s: float) -> str:
    """Speed of a session against what it is paid with, one panel per load level; empty where the plan knows
    neither prices nor power. Where it knows both, the objective says which; energy where it does not.

    Points: every draft length of every draft of the machine that has most of them, at the shortest round
    trip; hollow if the SLO is missed, ringed where the plan chose it. Line: the choices that no
    other one beats in speed and in the price shown.
    """
    machines: dict[str, list[str]] = {}
    for device in plan.devices:
        machines.setdefault(machine_of(device), []).append(device)
    machine = max(machines, key=lambda name: len(machines[name]))
    rows = [r for r in plan.draft if machine_of(r.device) == machine]
    mode = rows[0].mode
    rtt_ms = min(r.rtt_ms for r in rows)
    levels = sorted({r.load_level for r in rows})
    levels = (
        levels if len(levels) <= MOST_PANELS else [levels[0], levels[len(levels) // 2], levels[-1]]
    )
    cells = [draft_front(plan, machine, rtt_ms, level, tokens_per_s, mode)[0] for level in levels]
    priced = any(o.figures.dollars_per_mtoken for options in cells for o in options)
    powered = any(o.figures.energy_j_per_token for options in cells for o in options)
    if not priced and not powered:
        return ""
    priced = priced and ("cost" in plan.objective or not powered)
    unit = "dollars per million tokens" if priced else "joules of drafting per token"
    sessions = {b.load_level: b.sessions for b in plan.batch}
    with theme.canvas(9.4, 3.8, len(levels)) as (figure, axes):
        for panel, level, options in zip(axes, levels, cells, strict=True):
            _front_panel(panel, options, machines[machine], priced)
            count = sessions.get(level)
            title = f"load {level}" + (f", {count} session{'s'[: count != 1]}" if count else "")
            theme.finish(panel, unit, "tokens/s of a session" if panel is axes[0] else "", title)
            panel.set_ylim(0, 1.12 * max(o.figures.tokens_per_s for o in options))
            panel.set_xlim(0, 1.12 * max((_paid(o, priced) for o in options), default=1.0) or 1.0)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(machines[machine]) + 2,
        )
        return theme.svg(
            figure,
            "draft_front",
            f"Tokens per second of a session against {unit}, by draft and length",
        )


def _paid(option: Option, priced: bool) -> float:
    figures = option.figures
    return figures.dollars_per_mtoken if priced else figures.energy_j_per_token


def _front_panel(
    panel: Any, options: Sequence[Option], devices: Sequence[str], priced: bool
) -> None:
    def paid(option: Option) -> float:
        return _paid(option, priced)

    for index, device in enumerate(devices):
        mine = [o for o in options if o.device == device]
        color = theme.SERIES[index % len(theme.SERIES)]
        marker = theme.MARKERS[index % len(theme.MARKERS)]
        # From k = 0 on, so that the eye finds the order of the lengths.
        panel.plot(
            [paid(o) for o in mine],
            [o.figures.tokens_per_s for o in mine],
            color=color,
            linewidth=0.9,
            alpha=0.45,
        )
        for meets_slo in (True, False):
            shown = [o for o in mine if o.meets_slo == meets_slo]
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
        for option in (o for o in mine if o.planned):
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
    line = _unbeaten([(paid(o), o.figures.tokens_per_s) for o in options])
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


def _unbeaten(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (price, speed) points those that no other one beats, by rising price."""
    line: list[tuple[float, float]] = []
    for price, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not line or speed > line[-1][1]:
            line.append((price, speed))
    return line
