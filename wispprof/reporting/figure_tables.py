"""The data of the report's figures as tables, which stand beneath them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace, StepRow
from wispprof.reporting.figures import bootstrap
from wispprof.reporting.run_folder import StepPoint
from wispprof.reporting.tables import Column, Table
from wispprof.types import StepTimeEstimator


def surface_table(rows: Sequence[StepRow], estimator: StepTimeEstimator) -> Table:
    """Each uniform verify shape: its samples and the fit, ms."""
    made = []
    for row in rows:
        if row.kind != "verify" or len(set(row.shape.items)) != 1:
            continue
        item = row.shape.items[0]
        low, high = (float(np.percentile(row.samples_ms, share)) for share in (10, 90))
        fitted = map(float, estimator.predict(row.shape))
        made.append((len(row.shape.items), item.new, item.cached, row.median_ms, low, high, *fitted))
    columns = (
        *map(Column, ("sessions", "new tokens", "cached tokens")),
        *(Column(name, "ms", 2) for name in ("median", "p10", "p90", "fitted median", "fitted bound")),
    )
    return Table("", columns, tuple(sorted(made)))


def step_table(points: Sequence[StepPoint]) -> Table:
    """The steps of each group: how many, measured over predicted, and the share over their bound."""
    groups: dict[str, list[StepPoint]] = defaultdict(list)
    for point in points:
        groups[point.group].append(point)
    rows = []
    for name, own in groups.items():
        ratios = [one.measured_ms / one.predicted_ms for one in own if one.predicted_ms > 0]
        bounded = [one.measured_ms > one.bound_ms for one in own if one.bound_ms > 0]
        quantiles = [float(np.percentile(ratios, q)) if ratios else None for q in (10, 50, 90, 99)]
        over = float(np.mean(bounded)) if bounded else None
        rows.append((name, len(own), *quantiles, over))
    columns = (
        *(Column("steps of"), Column("steps")),
        *(Column(f"p{q}", "measured ÷ predicted", 3) for q in (10, 50, 90, 99)),
        Column("over the bound", percent=True),
    )
    return Table("", columns, tuple(rows))


def acceptance_table(trace: AcceptanceTrace) -> Table:
    """Acceptance by position, with the 95 % interval over prompts."""
    cumulative = trace.cum_acceptance_by_position()
    low, high = bootstrap(trace)
    before = [1.0, *cumulative[:-1]]
    rows = tuple(
        (place + 1, value, float(low[place]), float(high[place]), value / held if held else None)
        for place, (value, held) in enumerate(zip(map(float, cumulative), map(float, before), strict=True))
    )
    columns = (
        Column("position"),
        *(Column(name, digits=3) for name in ("with all before it", "from", "to", "given all before it")),
    )
    return Table("", columns, rows)
