"""A plan's tables for a reader: draft lengths as a heat map, capacity as a table."""

from __future__ import annotations

import html

from wispprof.artifacts.plan import DraftRow, Plan
from wispprof.reporting.tables import Column, Table

__all__ = ["capacity_table", "draft_length_map"]


def draft_length_map(plan: Plan, device: str, mode: str, tokens_per_s: float) -> str:
    """Draft length by round trip (rows) and load level (columns), as HTML.

    The darker, the longer the draft; under it the expected tokens/s of a session. A hatched cell
    cannot keep the promise with any draft length and names the nearest one that it could.
    """
    row = plan.draft_row(device, 0.0, 0, tokens_per_s, mode)
    rows = [
        r
        for r in plan.draft
        if (r.device, r.mode, r.tokens_per_s) == (row.device, mode, row.tokens_per_s)
    ]
    rtts = sorted({r.rtt_ms for r in rows})
    levels = sorted({r.load_level for r in rows})
    sessions = {b.load_level: b.sessions for b in plan.batch}
    longest = max((r.k for r in rows), default=0) or 1
    cells = {(r.rtt_ms, r.load_level): r for r in rows}
    head = "".join(
        f'<th scope="col" class="n">load {level}<small>{_sessions(sessions.get(level))}</small></th>'
        for level in levels
    )
    body = "".join(
        f'<tr><th scope="row">{rtt:g} ms</th>'
        + "".join(_cell(cells.get((rtt, level)), longest) for level in levels)
        + "</tr>"
        for rtt in rtts
    )
    title = html.escape(f"{row.device}, {mode} mode, promise of {row.tokens_per_s:g} tokens/s")
    return (
        f'<div class="scroll"><table class="map"><caption>{title}</caption>'
        f'<thead><tr><th scope="col">round trip</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _sessions(count: int | None) -> str:
    return "" if count is None else f"{count} session{'s' if count != 1 else ''}"


def _cell(row: DraftRow | None, longest: int) -> str:
    if row is None:
        return '<td class="k">–</td>'
    if not row.feasible:
        nearest = f"{row.nearest_tokens_per_s:.1f} tokens/s at most"
        return f'<td class="k no">{row.k}<small>{nearest}</small></td>'
    heat = 8 + 52 * row.k / longest
    speed = f"{row.expected_tokens_per_s:.1f} tokens/s"
    return f'<td class="k" style="--heat:{heat:.0f}">{row.k}<small>{speed}</small></td>'


def capacity_table(plan: Plan, device: str) -> Table:
    """Sessions that keep their promise, undrafted and split, at the shortest and longest round trip."""
    rows = [r for r in plan.capacity if r.device == device]
    ends = {min(r.rtt_ms for r in rows), max(r.rtt_ms for r in rows)} if rows else set()
    return Table(
        "",
        (
            Column("mode"),
            Column("round trip", "ms", 0),
            Column("promise", "tokens/s", 0),
            Column("centralized", "sessions", 0),
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
                r.centralized,
                r.split,
                r.split / r.centralized if r.centralized else None,
                r.k,
                r.bound_by,
            )
            for r in sorted(rows, key=lambda r: (r.mode, r.rtt_ms, r.tokens_per_s))
            if r.rtt_ms in ends
        ),
        note="Predicted by the plan from the estimator and the acceptance trace; not measured.",
    )
