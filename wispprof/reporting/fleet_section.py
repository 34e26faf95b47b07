"""The report's section on a fleet: ranking, price against attainment, and where drafting pays."""

from __future__ import annotations

from typing import Any

from wispprof.artifacts.fleet_answer import FleetAnswer, FleetOption, PayRow
from wispprof.planning.explain_fleet import LIMITS, headline, in_words
from wispprof.reporting import theme
from wispprof.reporting.plan_section import HeatCell, HeatMap
from wispprof.reporting.tables import Column, Table

PAYS_FROM = 1.02
_LABELLED = 6


def fleet_section(answer: FleetAnswer | None) -> dict[str, Any] | None:
    """What the template shows of a fleet."""
    if answer is None:
        return None
    models = dict.fromkeys(row.model for row in answer.pays)
    return {
        "headline": headline(answer),
        "lead": "".join(in_words(answer)[1:2]),
        "words": in_words(answer)[2:],
        "classes": answer.classes,
        "ranking": ranking_table(answer),
        "front": price_front(answer),
        "pays": [pays_heat_map(answer.pays, model) for model in models],
        "notes": answer.notes,
        "as_of": answer.prices_as_of,
    }


def ranking_table(answer: FleetAnswer) -> Table:
    """Every option that holds the SLO, cheapest first."""
    return Table(
        "",
        (
            Column("system"),
            Column("server"),
            Column("servers"),
            Column("price", "$/h", 2, best="min"),
            Column("tokens", "$/million", 2, best="min"),
            Column("energy", "J/token", 2, best="min"),
            Column("SLO met", "%", 1),
            Column("whole fleet", "%", 1),
            Column("burst", "×", 1),
            Column("limit"),
        ),
        tuple(
            (
                o.system,
                o.server,
                f"{o.servers} + {answer.spare}",
                o.dollars_per_h,
                o.dollars_per_mtoken,
                o.joules_per_token or None,
                None if o.attainment is None else 100 * o.attainment,
                None if o.fleet_attainment is None else 100 * o.fleet_attainment,
                o.burst,
                LIMITS[o.bound_by] + ("" if o.simulated or o.bound_by == "dear" else " (estimate)"),
            )
            for o in answer.options
            if o.servers
        ),
        note="Simulated, not measured; estimates are marked. Servers: those that hold the SLO for "
        f"{answer.target:.0%} of all sessions and of each class, and spare ones. Tokens: over the day. Whole "
        "fleet: all servers simulated behind a router, with other random numbers. Burst: what the bought "
        f"servers bear for 20 s. Prices of {answer.prices_as_of}.",
    )


def price_front(answer: FleetAnswer) -> str:
    """Dollars for a million tokens against attainment. Empty if nothing was simulated."""
    shown = [o for o in answer.options if o.simulated]
    if not shown:
        return ""
    systems = list(dict.fromkeys(o.system for o in shown))
    with theme.canvas(9.4, 4.4) as (figure, (axes,)):
        axes.axhline(answer.target, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for system in systems:
            own = [o for o in shown if o.system == system]
            axes.scatter(
                [o.dollars_per_mtoken for o in own],
                [_attained(o) for o in own],
                s=64,
                color=theme.policy_color(system),
                marker=theme.MARKERS[systems.index(system) % len(theme.MARKERS)],
                label=system,
                zorder=3,
            )
        front = _front(shown)
        axes.plot(
            [o.dollars_per_mtoken for o in front],
            [_attained(o) for o in front],
            color=theme.MUTED,
            linewidth=1.2,
            drawstyle="steps-post",
            label="Pareto front",
            zorder=1,
        )
        for place, option in enumerate(shown[:_LABELLED]):
            axes.annotate(
                f"{option.bought} × {option.server}",
                (option.dollars_per_mtoken, _attained(option)),
                xytext=(7, 5 if place % 2 == 0 else -12),
                textcoords="offset points",
                fontsize=8,
                color=theme.INK,
            )
        axes.margins(x=0.18, y=0.2)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f} %" if value <= 1.0001 else "")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems) + 1)
        theme.finish(
            axes, "dollars for a million tokens, spare servers included", "sessions that met their SLO"
        )
        return theme.svg(figure, "fleet_front", "Price of a million tokens against SLO attainment")


def _attained(option: FleetOption) -> float:
    if option.fleet_attainment is not None:
        return option.fleet_attainment
    return option.attainment or 0.0


def _front(options: list[FleetOption]) -> list[FleetOption]:
    """Options that no other beats in price and attainment, by rising price."""
    front: list[FleetOption] = []
    for option in sorted(options, key=lambda o: (o.dollars_per_mtoken, -_attained(o))):
        if not front or _attained(option) > _attained(front[-1]):
            front.append(option)
    return front


def pays_heat_map(pays: tuple[PayRow, ...], model: str) -> HeatMap:
    """Gain of the best draft length by GPU and load level, for one model."""
    rows = [row for row in pays if row.model == model]
    gpus = list(dict.fromkeys(row.gpu for row in rows))
    most = max(1.01, *(row.gain for row in pays))

    def cell(row: PayRow) -> HeatCell:
        heat = round(8 + 52 * (row.gain - 1.0) / (most - 1.0)) if row.gain >= PAYS_FROM else None
        count = f"{row.sessions} session{'s'[: row.sessions != 1]}"
        return HeatCell(f"× {row.gain:.2f}", f"{count}, k = {row.k}" if heat is not None else count, heat)

    return HeatMap(
        model or "Servers",
        "GPU",
        {float(place): gpu for place, gpu in enumerate(gpus)},
        dict.fromkeys(sorted({row.load_level for row in rows}), ""),
        {(float(gpus.index(row.gpu)), row.load_level): cell(row) for row in rows},
    )
