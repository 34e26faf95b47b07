"""The report's sections on what was planned and simulated rather than measured."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Sequence

from wispprof.artifacts.plan import Plan
from wispprof.reporting.page import Section, figure
from wispprof.reporting.plan_figures import capacity_curves, drafts_front
from wispprof.reporting.plan_tables import break_even_map, capacity_table, draft_length_map
from wispprof.reporting.results import Bench
from wispprof.reporting.run import Run
from wispprof.reporting.tables import to_html

__all__ = ["capacity_sections", "plan_sections"]


def plan_sections(run: Run, benches: Sequence[Bench]) -> list[Section]:
    """The plan: draft lengths, break-even, what speed is paid with, capacity by its own models."""
    plan = run.plan
    if plan is None or not plan.draft:
        return []
    classes = plan.slo_classes or tuple(sorted({r.tokens_per_s for r in plan.draft}))
    asked = [speed for b in benches for speed in b.promises]
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
            f"let the server work alone, unless a promise hangs on what little there is to gain.</p>{even}"
        )
    drawn = drafts_front(plan, speed) if plan.draft[0].by_k else ""
    if drawn:
        drawn = "<h3>What speed is paid with</h3>" + figure(
            drawn,
            note="Every draft length at the shortest round trip, joined from k = 0 on; up and to the left is "
            "better. On the front nothing else is both faster and cheaper. Hollow where "
            f"{speed:g} tokens/s could not be promised. Objective of the plan: {plan.objective}. "
            "Predicted, not measured.",
        )
    capacity = _by_device(plan, lambda device: _capacity(plan, device))
    return [
        Section(
            "plan",
            "How far to draft",
            f"The plan’s draft length for each round trip and load, with {plan.context:,} cached tokens "
            "per session. 0 means: do not speculate here, hatched where it would not pay. In a dashed frame: "
            "no draft length keeps the promise, and this one comes nearest to it. Server and edge look their "
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
    """Simulated capacities, where a search was kept."""
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
