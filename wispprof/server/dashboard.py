"""``serve --live``: queue, steps and attainment in the terminal, twice a second."""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING

from wispprof.server.verification_server import VerificationServer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["dashboard_table", "run_dashboard"]

_WINDOW_MS = 5_000.0


def dashboard_table(server: VerificationServer) -> Table:
    """The state of a server as a two-column table. ``–`` where there is nothing to say yet."""
    from rich import box
    from rich.table import Table

    manager, metrics = server.manager, server.metrics
    now = server.now_ms()
    recent = [step for step in metrics.steps if now - step.at_ms <= _WINDOW_MS]
    shown = Table(
        title=f"{server.model.id} · {server.policy.name}", box=box.SIMPLE, show_header=False
    )
    sessions = list(manager.sessions)
    prefilling = sum(1 for live in sessions if live.state.prompt_left)
    slo_unreachable = sum(1 for live in sessions if live.state.view(now).slo_unreachable)
    free = server.kv_free
    rows = [
        (
            "sessions",
            f"{len(sessions)} ({prefilling} prefilling, {manager.waiting} waiting for memory)",
        ),
        ("load level", str(server.load_level)),
        ("KV cache", f"{1 - free / max(1, manager.kv_total):.0%} of {manager.kv_total} tokens"),
    ]
    if recent:
        span_ms = max(1.0, now - recent[0].at_ms + recent[0].actual_ms)
        committed = sum(step.committed for step in recent)
        actual = statistics.median(step.actual_ms for step in recent)
        predicted = statistics.median(step.predicted_ms for step in recent)
        items = statistics.mean(step.items for step in recent)
        busy = sum(step.actual_ms for step in recent) / span_ms
        over = sum(step.actual_ms > step.bound_ms for step in recent) / len(recent)
        rows += [
            ("throughput", f"{1000 * committed / span_ms:.1f} tokens/s"),
            (
                "steps",
                f"{1000 * len(recent) / span_ms:.1f}/s, {items:.1f} items, engine {busy:.0%}",
            ),
            (
                "step time",
                f"{actual:.1f} ms measured, {predicted:.1f} predicted, {over:.0%} over bound",
            ),
        ]
    else:
        rows += [("throughput", "–"), ("steps", "–"), ("step time", "–")]
    status = server.clock.drift
    if status is not None and status.re_profile:
        rows.append(("drift", status.reason))
    ended = metrics.sessions_ended
    kept = f"{metrics.sessions_met_slo / ended:.1%} of {ended} sessions" if ended else "–"
    rows += [
        (
            "SLO kept",
            f"{kept}{f', {slo_unreachable} slo_unreachable now' if slo_unreachable else ''}",
        )
    ]
    for name, value in rows:
        shown.add_row(name, value)
    return shown


async def run_dashboard(server: VerificationServer) -> None:
    """Draw the board on stderr until cancelled."""
    from rich.console import Console
    from rich.live import Live

    with Live(dashboard_table(server), console=Console(stderr=True), auto_refresh=False) as live:
        while True:
            await asyncio.sleep(0.5)
            live.update(dashboard_table(server), refresh=True)
