"""Which system serves a load best, and what each piece of ``wispprof`` is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from _serving.bed import LOADS, Bed, load_of, server_model
from _serving.run import Run, ceiling, run
from _serving.tables import comparison, record, show
from wispprof.bench import simulate_bench
from wispprof.fitting import load_predictor
from wispprof.policies.wispprof_settings import WispprofSettings
from wispprof.reporting.tables import Column, Table
from wispprof.simulation import System, system

SYSTEMS = {
    "server-only": "server-only",
    "sled": "sled-threshold",
    "fcfs": "fcfs",
    "specedge": "specedge",
    "wisp": "wisp",
    "wispprof": "wispprof",
}


def compare(bed: Bed) -> dict[str, Any]:
    rows: dict[str, list[Run]] = {}
    for load, share in LOADS.items():
        devices = max(1, round(share * bed.near))
        rows[load] = run(bed, {name: system(label) for name, label in SYSTEMS.items()}, devices)
        show(comparison(f"{load} capacity: {devices} devices", rows[load]))
    overhead = {row.name: row.overhead_ms for row in rows["near"]}
    capacity = {
        name: simulated_capacity(bed, system(label), overhead[name]) for name, label in SYSTEMS.items()
    }
    ceilings = {load: ceiling(bed, _of(rows[load], "wispprof")) for load in LOADS}
    lines: list[tuple[Any, ...]] = [
        (
            name,
            capacity[name],
            *(_goodput(_of(rows[load], name)) for load in LOADS),
            *(_even(_of(rows[load], name)) for load in LOADS),
        )
        for name in SYSTEMS
    ]
    lines.append(("drafts known beforehand", math.nan, *[math.nan] * len(LOADS), *ceilings.values()))
    columns = (
        Column("system"),
        Column("capacity (sim)", "devices", best="max"),
        *(Column(f"goodput {load}", "tok/s", best="max") for load in LOADS),
        *(Column(f"even {load}", "tok/s", best="max") for load in LOADS),
    )
    show(Table("Capacity and goodput", columns, tuple(lines)))
    return {
        "loads": {load: [record(r) for r in found] for load, found in rows.items()},
        "capacity_simulated": capacity,
        "wispprof_over_wisp_capacity": round(capacity["wispprof"] / max(1, capacity["wisp"]), 3),
        "wispprof_over_best_other_goodput": _over_best(rows, _goodput),
        "wispprof_over_best_other_goodput_even": _over_best(rows, _even),
        "ceiling_even": {load: round(goodput, 2) for load, goodput in ceilings.items()},
    }


def _over_best(rows: dict[str, list[Run]], figure: Callable[[Run], float]) -> dict[str, float]:
    """``wispprof``'s figure over the best of the others', by load."""
    return {
        load: round(
            figure(_of(found, "wispprof")) / max(1e-9, max(figure(r) for r in found if r.name != "wispprof")),
            3,
        )
        for load, found in rows.items()
    }


def _of(rows: list[Run], name: str) -> Run:
    return next(row for row in rows if row.name == name)


def _goodput(row: Run) -> float:
    return row.figures["goodput_tokens_per_s"]


def _even(row: Run) -> float:
    return row.even.goodput_tokens_per_s


def simulated_capacity(bed: Bed, what: System, overhead_ms: float) -> int:
    """Most devices at 95 % attainment: doubling, then halving the interval."""
    predictor = load_predictor(bed.predictor)
    model = server_model(bed, overhead_ms)

    def holds(devices: int) -> bool:
        load = load_of(bed, what.label, devices)
        found = simulate_bench(load, bed.mix, what, model, bed.trace, predictor, seeds=(0, 1))
        return found.attainment >= 0.95

    low, high = 0, max(2, bed.near // 2)
    while high < 8 * bed.near and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def ablation(bed: Bed) -> dict[str, Any]:
    """Each switch of the policy, the other way round from its default."""
    variants: dict[str, dict[str, Any]] = {"wispprof": {}}
    for one in fields(WispprofSettings):
        if isinstance(one.default, bool):
            sign = "without" if one.default else "with"
            variants[f"{sign} {one.name}"] = {one.name: not one.default}
    found: dict[str, Any] = {}
    for load in ("near", "above"):
        devices = max(1, round(LOADS[load] * bed.near))
        systems = {
            name: system("wispprof").replace(batching_options=options) for name, options in variants.items()
        }
        rows = run(bed, systems, devices)
        show(comparison(f"wispprof's pieces, {load} capacity: {devices} devices", rows))
        found[load] = [record(row) for row in rows]
    return {"ablation": found}
