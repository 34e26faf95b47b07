"""A plan's tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wispprof.cli.console import output, table

if TYPE_CHECKING:
    from wispprof.artifacts.plan import DraftRow, Plan

__all__ = ["show_plan"]


def show_plan(plan: Plan, device: str | None, mode: str) -> None:
    """Print every table of one mode; ``device``: only what concerns this one."""
    from wispprof.artifacts.plan import machine_of
    from wispprof.errors import PlanError

    names = [d for d in plan.devices if device in (None, d, machine_of(d))]
    if not names:
        raise PlanError(f"The plan has no device {device!r}.", f"It has {', '.join(plan.devices)}.")
    for name in names:
        _show_drafts(plan, name, mode)
        _show_capacity(plan, name, mode)
    for machine in dict.fromkeys(map(machine_of, names)):
        _show_choices(plan, machine, mode)
    _show_batches(plan)
    for line in plan.notes:
        output().print(line, markup=False)


def _show_drafts(plan: Plan, device: str, mode: str) -> None:
    rows = [row for row in plan.draft if (row.device, row.mode) == (device, mode)]
    priced = any(row.dollars_per_mtoken for row in rows)
    powered = any(row.energy_j_per_token for row in rows)
    shown = table(
        f"{device}: draft length ({mode})",
        ">RTT",
        ">load",
        ">SLO",
        ">k",
        ">stop",
        ">lead",
        ">speed",
        ">k = 0",
        *([">$/M"] if priced else []),
        *([">J/tok"] if powered else []),
        "kept",
        caption="RTT in ms; SLO and speed in tokens/s of a session, k = 0: undrafted. "
        + ("$/M: dollars for a million tokens. " if priced else "")
        + ("J/tok: joules of drafting per token. " if powered else "")
        + "kept: the promise is; else * and the nearest that can be.",
    )
    for row in rows:
        shown.add_row(
            f"{row.rtt_ms:g}",
            str(row.load_level),
            f"{row.tokens_per_s:g}",
            str(row.k),
            f"{row.stop:.2f}" if row.k else "",
            str(row.draft_ahead) if row.k else "",
            f"{row.expected_tokens_per_s:.2f}",
            f"{row.by_k[0]:.2f}" if row.by_k else "",
            *([f"{row.dollars_per_mtoken:.3g}"] if priced else []),
            *([f"{row.energy_j_per_token:.2g}"] if powered else []),
            _feasible(row),
        )
    output().print(shown)


def _feasible(row: DraftRow) -> str:
    return "yes" if row.feasible else f"*{row.nearest_tokens_per_s:.1f}"


def _show_choices(plan: Plan, machine: str, mode: str) -> None:
    rows = [row for row in plan.choices if (row.machine, row.mode) == (machine, mode)]
    if not rows:
        return
    shown = table(
        f"{machine}: which draft, by {plan.objective} ({mode})",
        ">RTT",
        ">load",
        ">SLO",
        "draft",
        ">k",
        ">speed",
        ">$/M",
        ">J/tok",
        "kept",
        caption=f"plan explain {machine}/RTT/LOAD/SLO names every choice that no other one beats.",
    )
    for row in rows:
        shown.add_row(
            f"{row.rtt_ms:g}",
            str(row.load_level),
            f"{row.tokens_per_s:g}",
            (row.device.partition(":")[2] or row.device) if row.k else "none",
            str(row.k),
            f"{row.expected_tokens_per_s:.2f}",
            f"{row.dollars_per_mtoken:.3g}" if row.dollars_per_mtoken else "-",
            f"{row.energy_j_per_token:.2g}" if row.energy_j_per_token else "-",
            "yes" if row.feasible else "no",
        )
    output().print(shown)


def _show_capacity(plan: Plan, device: str, mode: str) -> None:
    shown = table(
        f"{device}: capacity ({mode})",
        ">RTT ms",
        ">SLO",
        ">server-only",
        ">split",
        ">k",
        "bound by",
    )
    for row in plan.capacity:
        if row.device == device and row.mode == mode:
            shown.add_row(
                f"{row.rtt_ms:g}",
                f"{row.tokens_per_s:g}",
                str(row.server_only),
                str(row.split),
                str(row.k),
                row.bound_by,
            )
    output().print(shown)
    mixes = [r for r in plan.mixes if r.device == device and r.mode == mode]
    if not mixes:
        return
    shown = table(
        f"{device}: capacity of class mixes ({mode})",
        ">RTT ms",
        "mix",
        ">server-only",
        ">split",
        "k of each",
        "bound by",
    )
    for many in mixes:
        shown.add_row(
            f"{many.rtt_ms:g}",
            many.mix,
            str(many.server_only),
            str(many.split),
            " ".join(f"{k:g}" for k in many.ks),
            many.bound_by,
        )
    output().print(shown)


def _show_batches(plan: Plan) -> None:
    shown = table(
        "Batching",
        ">SLO",
        ">load",
        ">sessions",
        ">token budget",
        ">max items",
        ">prefill",
        ">p50 ms",
        ">bound ms",
    )
    for row in plan.batch:
        shown.add_row(
            f"{row.tokens_per_s:g}",
            str(row.load_level),
            str(row.sessions),
            str(row.token_budget),
            str(row.max_items),
            str(row.prefill_chunk),
            f"{row.p50_ms:.2f}",
            f"{row.bound_ms:.2f}",
        )
    output().print(shown)
