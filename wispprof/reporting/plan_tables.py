"""A plan's tables for a reader: draft lengths as a heat map, capacity as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from wispprof.artifacts.plan import BreakEvenRow, DraftRow, Plan
from wispprof.reporting.tables import Column, Table

__all__ = ["break_even_map", "capacity_table", "draft_length_map"]


def draft_length_map(plan: Plan, device: str, mode: str, tokens_per_s: float) -> str:
    """Draft length by round trip (rows) and load level (columns), as HTML.

    The darker, the longer the draft; under it the expected tokens/s of a session. Hatched as in
    :func:`break_even_map`: no drafts, for they do not pay. A dashed frame: no draft length keeps the promise,
    and the speed is that of the slow session where it comes nearest.
    """
    row = plan.draft_row(device, 0.0, 0, tokens_per_s, mode)
    rows = [
        r
        for r in plan.draft
        if (r.device, r.mode, r.tokens_per_s) == (row.device, mode, row.tokens_per_s)
    ]
    rtts = sorted({r.rtt_ms for r in rows})
    levels = sorted({r.load_level for r in rows})
    longest = max((r.k for r in rows), default=0) or 1
    pays = {
        _place(r)
        for r in plan.break_even
        if (r.device, r.mode, r.verdict) == (row.device, mode, "split")
    }
    cells = {_place(r): _cell(r, longest, _place(r) in pays) for r in rows}
    title = f"{row.device}, {mode} mode, promise of {row.tokens_per_s:g} tokens/s"
    return _map(plan, title, rtts, levels, cells)


def break_even_map(plan: Plan, device: str, mode: str) -> str:
    """Where speculation pays, by round trip (rows) and load level (columns), as HTML.

    Each cell: a session's tokens/s with the best draft length over those without drafts, and from which
    mean acceptance on drafting would pay there. The darker, the larger the gain; hatched where the server
    alone is as fast, or nearly.
    """
    rows = [r for r in plan.break_even if (r.device, r.mode) == (device, mode)]
    if not rows:
        return ""
    most = max(1.01, *(r.gain for r in rows))
    cells = {_place(r): _break_even(r, most) for r in rows}
    title = f"{device}, {mode} mode, measured acceptance {rows[0].acceptance:.2f}"
    rtts, levels = sorted({r.rtt_ms for r in rows}), sorted({r.load_level for r in rows})
    return _map(plan, title, rtts, levels, cells)


def _break_even(row: BreakEvenRow, most: float) -> str:
    needed = "never pays" if row.needed is None else f"pays from {row.needed:.2f}"
    if row.verdict != "split":
        return f'<td class="k no">× {row.gain:.2f}<small>{needed}</small></td>'
    heat = 8 + 52 * max(0.0, row.gain - 1.0) / (most - 1.0)
    return f'<td class="k" style="--heat:{heat:.0f}">× {row.gain:.2f}<small>{needed}</small></td>'


def _map(
    plan: Plan,
    title: str,
    rtts: Sequence[float],
    levels: Sequence[int],
    cells: Mapping[tuple[float, int], str],
) -> str:
    """Cells by round trip and load level as one table."""
    sessions = {b.load_level: b.sessions for b in plan.batch}
    head = "".join(
        f'<th scope="col" class="n">load {level}<small>{_sessions(sessions.get(level))}</small></th>'
        for level in levels
    )
    body = "".join(
        f'<tr><th scope="row">{rtt:g} ms</th>'
        + "".join(cells.get((rtt, level), '<td class="k">–</td>') for level in levels)
        + "</tr>"
        for rtt in rtts
    )
    return (
        f'<div class="scroll"><table class="map"><caption>{html.escape(title)}</caption>'
        f'<thead><tr><th scope="col">round trip</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _sessions(count: int | None) -> str:
    return "" if count is None else f"{count} session{'s' if count != 1 else ''}"


def _place(row: DraftRow | BreakEvenRow) -> tuple[float, int]:
    return row.rtt_ms, row.load_level


def _cell(row: DraftRow, longest: int, pays: bool) -> str:
    kind = "k" if row.feasible else "k short"
    speed = f"{row.expected_tokens_per_s:.1f} tokens/s"
    if not row.feasible:
        speed = f"{row.slow_tokens_per_s:.1f} of {row.tokens_per_s:g} tokens/s"
    if not row.k and not pays:
        return f'<td class="{kind} no">{row.k}<small>{speed}</small></td>'
    heat = 8 + 52 * row.k / longest
    return f'<td class="{kind}" style="--heat:{heat:.0f}">{row.k}<small>{speed}</small></td>'


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
