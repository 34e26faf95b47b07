"""``serve --live``: sessions, steps and SLO attainment in the terminal, twice a second."""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING

from wispprof.server.verification_server import VerificationServer

if TYPE_CHECKING:
    from rich.table import Table

_WINDOW_MS = 5_000.0


def dashboard_table(server: VerificationServer) -> Table:
    """The state of a server as a two-column table; ``–`` for values that are not known yet."""
    from rich import box
    from rich.table import Table

    manager, metrics = server.manager, server.metrics
    now = server.now_ms()
    states = [session.state for session in manager.sessions]
    prefilling = sum(1 for state in states if state.prompt_left)
    unreachable = sum(1 for state in states if state.view(now).slo_unreachable)
    ended = metrics.sessions_ended
    met_slo = f"{metrics.sessions_met_slo / ended:.1%} of {ended} sessions" if ended else "–"
    if unreachable:
        met_slo += f", {unreachable} cannot meet it any more"
    kv_used = 1 - server.kv_free / max(1, manager.kv_total)
    waiting = f"{prefilling} prefilling, {manager.waiting} waiting for memory"
    rows = [
        ("sessions", f"{len(states)} ({waiting})"),
        ("load level", str(manager.load_level)),
        ("KV cache", f"{kv_used:.0%} of {manager.kv_total} tokens"),
        *_step_rows(server, now),
        ("SLO met", met_slo),
    ]
    table = Table(title=f"{server.model.id} · {server.policy.name}", box=box.SIMPLE, show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _step_rows(server: VerificationServer, now_ms: float) -> list[tuple[str, str]]:
    throughput = step_count = step_time = "–"
    steps = [step for step in server.metrics.steps if now_ms - step.at_ms <= _WINDOW_MS]
    if steps:
        span_ms = max(1.0, now_ms - steps[0].at_ms + steps[0].actual_ms)
        items = statistics.mean(step.items for step in steps)
        busy = sum(step.actual_ms for step in steps) / span_ms
        actual = statistics.median(step.actual_ms for step in steps)
        predicted = statistics.median(step.predicted_ms for step in steps)
        over = sum(step.actual_ms > step.bound_ms for step in steps) / len(steps)
        throughput = f"{1000 * sum(step.committed for step in steps) / span_ms:.1f} tokens/s"
        step_count = f"{1000 * len(steps) / span_ms:.1f}/s, {items:.1f} items, engine {busy:.0%}"
        step_time = f"{actual:.1f} ms measured, {predicted:.1f} predicted, {over:.0%} over bound"
    rows = [("throughput", throughput), ("steps", step_count), ("step time", step_time)]
    drift = server.step_times.drift
    if drift is not None and drift.re_profile:
        rows.append(("drift", drift.reason))
    return rows


async def run_dashboard(server: VerificationServer) -> None:
    """Draw the table on stderr until cancelled."""
    from rich.console import Console
    from rich.live import Live

    with Live(dashboard_table(server), console=Console(stderr=True), auto_refresh=False) as view:
        while True:
            await asyncio.sleep(0.5)
            view.update(dashboard_table(server), refresh=True)
