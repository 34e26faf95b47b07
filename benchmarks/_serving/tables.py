"""Real figures beside simulated ones, as tables and as JSON."""

from __future__ import annotations

import math
from typing import Any

from _serving.run import Run
from wispprof.reporting.tables import Column, Table, to_rich


def off(real: float, simulated: float) -> float:
    """Difference in share of the real figure."""
    if math.isnan(real) or math.isnan(simulated):
        return math.nan
    return 0.0 if real == simulated else (simulated - real) / real if real else math.inf


def compared(row: Run) -> dict[str, tuple[float, float]]:
    """Figure by figure: (real, simulated)."""
    figures, sim = row.figures, row.simulated
    return {
        "attainment": (figures["attainment"], sim.attainment),
        "goodput": (figures["goodput_tokens_per_s"], sim.goodput_tokens_per_s),
        "accepted_per_round": (figures["accepted_per_round"], sim.accepted_per_round),
        "step_mean_ms": (row.step_mean_ms, sim.step_mean_ms),
    }


def show(table: Table) -> None:
    from rich.console import Console

    Console(width=max(140, Console().width)).print(to_rich(table))


def comparison(title: str, rows: list[Run]) -> Table:
    return Table(
        title,
        (
            Column("system"),
            Column("SLO met", percent=True, digits=0, best="max"),
            Column("(sim)", percent=True, digits=0),
            Column("±", "%", digits=0),
            Column("goodput", "tok/s", best="max"),
            Column("(sim)", "tok/s"),
            Column("±", "%", digits=0),
            Column("acc.", "/round", digits=2),
            Column("(sim)", digits=2),
            Column("±", "%", digits=0),
            Column("step", "ms"),
            Column("(sim)", "ms"),
            Column("±", "%", digits=0),
            Column("loop", "ms"),
            Column("pace", digits=2),
            Column("machine", digits=2),
            Column("SLO met", "even", percent=True, digits=0, best="max"),
            Column("goodput", "even", best="max"),
        ),
        tuple(
            (
                row.name,
                *(
                    cell
                    for real, sim in compared(row).values()
                    for cell in (real, sim, 100.0 * off(real, sim))
                ),
                row.overhead_ms,
                row.pace,
                row.slowdown,
                row.even.attainment,
                row.even.goodput_tokens_per_s,
            )
            for row in rows
        ),
    )


def record(row: Run) -> dict[str, Any]:
    found = {
        name: {"real": round(real, 4), "simulated": round(sim, 4), "off": round(off(real, sim), 4)}
        for name, (real, sim) in compared(row).items()
    }
    return {
        "system": row.name,
        "devices": row.devices,
        "requests": int(row.figures["requests"]),
        "seconds": round(row.figures["seconds"], 1),
        "ttft_p95_ms": round(row.figures["ttft_p95_ms"], 1),
        "overhead_ms": round(row.overhead_ms, 2),
        "pace": round(row.pace, 3),
        "slowdown": round(row.slowdown, 3),
        "rtt_ms": round(row.rtt_ms, 2),
        "even_attainment": round(row.even.attainment, 4),
        "even_goodput": round(row.even.goodput_tokens_per_s, 2),
        **found,
    }
