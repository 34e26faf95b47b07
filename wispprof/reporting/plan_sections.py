"""A plan's tables for a reader: draft lengths as a heat map, capacity as a table.

The report's sections on what was planned and simulated rather than measured.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Mapping, Sequence

from wispprof.artifacts.plan import BreakEvenRow, DraftRow, Plan
from wispprof.reporting.bench_records import Bench
from wispprof.reporting.page import Section, figure
from wispprof.reporting.plan_figures import capacity_curves, drafts_front
from wispprof.reporting.run_folder import Run
from wispprof.reporting.tables import Column, Table, to_html


def draft_length_map(plan: Plan, device: str, mode: str, tokens_per_s: float) -> str:
    """Draft length by round trip (rows) and load level (columns), as HTML.

    The darker, the longer the draft; under it the expected tokens/s of a session. Hatched as in
    :func:`break_even_map`: no drafts, for they do not pay. A dashed frame: no draft length meets the SLO,
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
    title = f"{row.device}, {mode} mode, SLO of {row.tokens_per_s:g} tokens/s"
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
    """Sessions that meet their SLO, undrafted and split, at the shortest and longest round trip."""
    rows = [r for r in plan.capacity if r.device == device]
    ends = {min(r.rtt_ms for r in rows), max(r.rtt_ms for r in rows)} if rows else set()
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


def plan_sections(run: Run, benches: Sequence[Bench]) -> list[Section]:
    """The plan: draft lengths, break-even, what speed is paid with, capacity by its own models."""
    plan = run.plan
    if plan is None or not plan.draft:
        return []
    classes = plan.slo_classes or tuple(sorted({r.tokens_per_s for r in plan.draft}))
    asked = [speed for b in benches for speed in b.slos]
    wanted = statistics.median_low(asked) if asked else classes[len(classes) // 2]
    speed = plan.draft_row(plan.devices[0], 0.0, 0, wanted, plan.draft[0].mode).tokens_per_s
    maps = _by_device(plan, lambda device: _draft_lengths(plan, device, speed))
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in plan.notes)
    even = _by_device(
        plan,
        lambda device: "".join(break_even_map(plan, device, mode) for mode in ("stream", "round")),
    )
    if even:
        even = (
            "<h3>Where speculation pays</h3><p>A session’s tokens/s with the best draft length over those "
            "without drafts, and the least mean acceptance at which any draft length would pay. Hatched: "
            f"let the server work alone, unless an SLO depends on the small gain.</p>{even}"
        )
    drawn = drafts_front(plan, speed) if plan.draft[0].by_k else ""
    if drawn:
        drawn = "<h3>What speed is paid with</h3>" + figure(
            drawn,
            note="Every draft length at the shortest round trip, joined from k = 0 on; up and to the left is "
            "better. On the front nothing else is both faster and cheaper. Hollow where "
            f"{speed:g} tokens/s is not met. Objective of the plan: {plan.objective}. "
            "Predicted, not measured.",
        )
    capacity = _by_device(plan, lambda device: _capacity(plan, device))
    return [
        Section(
            "plan",
            "How far to draft",
            f"The plan’s draft length for each round trip and load, with {plan.context:,} cached tokens "
            "per session. 0 means: do not speculate here, hatched where it would not pay. In a dashed frame: "
            "no draft length meets the SLO, and this one comes nearest to it. Server and edge look their "
            "row up while they run.",
            maps
            + notes
            + even
            + drawn
            + (f"<h3>How many devices</h3>{capacity}" if capacity else ""),
        )
    ]


def _by_device(plan: Plan, show: Callable[[str], str]) -> str:
    """What is shown of each device: of several, each in a fold of its own, the first one open.

    Those that are folded take a line each.
    """
    shown = {device: show(device) for device in plan.devices}
    shown = {device: body for device, body in shown.items() if body}
    if len(shown) < 2:
        return "".join(shown.values())
    return "".join(
        f"<details{'' if number else ' open'}><summary>{html.escape(device)}</summary>{body}</details>"
        for number, (device, body) in enumerate(shown.items())
    )


def _draft_lengths(plan: Plan, device: str, speed: float) -> str:
    return "".join(
        draft_length_map(plan, device, mode, speed)
        for mode in ("stream", "round")
        if any((r.device, r.mode) == (device, mode) for r in plan.draft)
    )


def _capacity(plan: Plan, device: str) -> str:
    table = capacity_table(plan, device)
    return to_html(table) if table.rows else ""


def capacity_sections(run: Run) -> list[Section]:
    """Simulated capacities, if a search was saved."""
    if run.capacity is None:
        return []
    return [
        Section(
            "capacity",
            "How many devices one server carries",
            "Simulated: the runtime’s own policies over the estimator’s step times. "
            + str(run.capacity.payload.get("load", "")),
            figure(
                capacity_curves(run.capacity),
                note="Points are the fleets that the search tried; equal seeds, so that fleets differ by "
                "their added devices alone.",
            ),
        )
    ]
