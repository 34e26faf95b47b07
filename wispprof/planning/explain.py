"""Explain a plan: why a cell is as it is, and what two plans do differently."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from wispprof.artifacts.plan import DraftRow, Plan, machine_of
from wispprof.planning.objective import draft_front


class PlanChange(NamedTuple):
    """A field of a cell that differs. ``before`` or ``after`` is ``None`` if the cell does not exist."""

    cell: str
    field: str
    before: object
    after: object


def explain(plan: Plan, cell: str) -> list[str]:
    """Sentences with the numbers that decided a cell."""
    row = plan.find(cell)
    load = next((b for b in plan.batch if (b.load_level, b.context) == (row.load_level, row.context)), None)
    sessions = "its sessions"
    if load is not None:
        sessions = f"{load.sessions} session{'s' if load.sessions != 1 else ''}"
    undrafted = row.by_k[0] if row.by_k else 0.0
    lines = [
        f"{row.device}, {row.rtt_ms:g} ms round trip, load level {row.load_level} ({sessions} of "
        f"{row.context or plan.context} cached tokens), SLO {row.tokens_per_s:g} tokens/s, {row.mode} mode.",
        f"One draft token takes {row.draft_ms:.3g} ms; a server step takes {row.step_ms:.3g} ms.",
    ]
    lines += _choice(row, undrafted, plan.objective)
    lines += _link(plan, row)
    lines += _context(plan, row)
    lines.append(_slo(row))
    if row.k:
        lines.append(_stop(row))
    lines += _capacity(plan, row)
    if row.energy_j_per_token:
        lines.append(f"Drafting takes {row.energy_j_per_token:.3g} J per committed token.")
    if row.dollars_per_mtoken:
        lines.append(
            f"A million tokens cost {_money(row.dollars_per_mtoken)} of server and edge time"
            + (f", undrafted {_money(row.dollars_by_k[0])}." if row.k else ".")
        )
    lines += [note for note in plan.notes if row.device in note.split()]
    return lines + _drafts(plan, row)


def _money(dollars: float) -> str:
    return f"${dollars:.3g}"


def _drafts(plan: Plan, row: DraftRow) -> list[str]:
    """Which draft model the machine should run, and the Pareto front."""
    choice = next(
        (c for c in plan.choices if c.cell == row.cell.replace(row.device, machine_of(row.device), 1)),
        None,
    )
    if choice is None:
        return []
    options, best = draft_front(
        plan, choice.machine, row.rtt_ms, row.load_level, row.tokens_per_s, row.mode, row.context or None
    )
    lines = [f"Best draft model of {choice.machine} by {plan.objective}: {choice.device}."]
    if choice.feasible and not choice.k:
        lines[0] = f"No draft model of {choice.machine} pays here."
    elif not choice.feasible:
        lines[0] = f"No draft model of {choice.machine} meets the SLO; {choice.device} comes nearest."
    lines.append("Pareto front (no other choice is better in every figure):")
    for idx in best:
        option = options[idx]
        figures = option.figures
        line = f"  {option.device}, k = {option.k}: {figures.tokens_per_s:.3g} tokens/s"
        if figures.dollars_per_mtoken:
            line += f", {_money(figures.dollars_per_mtoken)} per million tokens"
        if any(o.figures.energy_j_per_token for o in options):
            line += f", {figures.energy_j_per_token:.3g} J per token"
        lines.append(line + ("" if option.meets_slo else " (misses the SLO)"))
    return lines


def _choice(row: DraftRow, undrafted: float, objective: str) -> list[str]:
    drafted = max(range(1, len(row.by_k)), key=lambda k: row.by_k[k], default=0)
    best = row.by_k[drafted] if drafted else 0.0
    if row.k == 0:
        line = f"Do not draft: without drafts a session gets {undrafted:.3g} tokens/s"
        if drafted:
            line += f", with the best draft length, {drafted}, it would get {best:.3g}"
        return [line + "."]
    gain = row.expected_tokens_per_s / undrafted if undrafted else 0.0
    lines = [
        f"k = {row.k}: {row.expected_tokens_per_s:.3g} tokens/s, {gain:.2f} times the "
        f"{undrafted:.3g} without drafts; {row.commits:.2f} tokens per commit, one every "
        f"{row.round_ms:.3g} ms."
    ]
    if row.nodes:
        lines.append(
            f"A tree is faster than this chain: {row.beams} nodes a forward, {row.depth} deep. "
            "The edge drafts it if the server verifies trees."
        )
    if drafted != row.k:
        why = "but it misses the SLO" if objective == "goodput" else f"but the objective is {objective}"
        lines.append(f"k = {drafted} would be faster on average ({best:.3g}), {why}.")
    return lines


def _link(plan: Plan, row: DraftRow) -> list[str]:
    """Why a longer round trip made the draft shorter, if it did."""
    key = (row.device, row.load_level, row.tokens_per_s, row.mode, row.context)
    nearer = [
        r
        for r in plan.draft
        if (r.device, r.load_level, r.tokens_per_s, r.mode, r.context) == key and r.rtt_ms < row.rtt_ms
    ]
    if not nearer:
        return []
    near = max(nearer, key=lambda r: r.rtt_ms)
    if row.k >= near.k or near.k >= len(row.by_k):
        return []
    there, here = row.by_k[near.k], row.by_k[row.k]
    slow = row.slow_by_k[near.k]
    if row.feasible and slow < row.tokens_per_s:
        why = f"here the slow session would get {slow:.3g} tokens/s with it, below the SLO"
    elif there < here:
        why = f"here it would give {there:.3g} tokens/s, less than the {here:.3g} of k = {row.k}"
    elif not row.feasible:
        why = f"here no draft length meets the SLO, and k = {row.k} comes nearest"
    elif row.k == 0:
        why = f"here it would give {there:.3g} tokens/s, too little above {here:.3g} to draft for"
    else:
        why = f"here k = {row.k} is the better one by {plan.objective}"
    return [f"At {near.rtt_ms:g} ms round trip k is {near.k}; {why}."]


def _context(plan: Plan, row: DraftRow) -> list[str]:
    """The draft lengths of other contexts, if they differ."""
    where = (row.device, row.rtt_ms, row.load_level, row.tokens_per_s, row.mode)
    lengths = {context: plan.draft_row(*where, context).k for context in plan.contexts}
    if len(set(lengths.values())) < 2:
        return []
    shown = ", ".join(f"{k} at {context:,}" for context, k in sorted(lengths.items()))
    return [f"k by cached tokens at this load: {shown}."]


def _slo(row: DraftRow) -> str:
    slow = f"the slow session (the one that decides attainment) gets {row.slow_tokens_per_s:.3g}"
    if row.feasible:
        return f"The SLO of {row.tokens_per_s:g} tokens/s is met: {slow}."
    return (
        f"The SLO of {row.tokens_per_s:g} tokens/s cannot be met: {slow}. "
        f"The nearest SLO that can: {row.nearest_tokens_per_s:.3g}."
    )


def _stop(row: DraftRow) -> str:
    return (
        f"Drafting stops when the cumulative acceptance probability of the next draft falls below "
        f"{row.stop:.2f}: the server commits {row.server_tokens_per_ms:.3g} tokens per ms of step at this "
        f"load. The edge may run {row.draft_ahead} tokens ahead."
    )


_LIMITS = {
    "time": "more would miss the SLO",
    "kv": "more would not fit into the KV cache",
    "limit": "the largest number that was planned for",
}
"""What limits a capacity, by :attr:`~wispprof.artifacts.plan.CapacityRow.bound_by`."""


def _capacity(plan: Plan, row: DraftRow) -> list[str]:
    """How many such devices fit: all of this class, and in the mixes that contain it."""
    where = (row.device, row.rtt_ms, row.mode, row.context)
    lines = [
        f"Capacity if all have an SLO of {row.tokens_per_s:g} tokens/s: "
        + (f"{alone.split} devices with k = {alone.k}, " if alone.k else "")
        + f"{alone.server_only} {'' if alone.k else 'devices '}without drafts ({_LIMITS[alone.bound_by]})."
        for alone in plan.capacity
        if (alone.device, alone.rtt_ms, alone.mode, alone.context) == where
        and alone.tokens_per_s == row.tokens_per_s
    ]
    for mix in plan.mixes:
        if (mix.device, mix.rtt_ms, mix.mode, mix.context) == where and row.tokens_per_s in mix.slos:
            lengths = ", ".join(f"{k:g}" for k in mix.ks)
            lines.append(
                f"Capacity of the mix {mix.mix}: {mix.split} devices with k = {lengths}, "
                f"{mix.server_only} without drafts."
            )
    return lines


def compare(before: Plan, after: Plan, tolerance: float = 0.01) -> list[PlanChange]:
    """What differs between two plans' draft-length tables; numbers within ``tolerance`` are equal."""
    old, new = {r.cell: r for r in before.draft}, {r.cell: r for r in after.draft}
    changes = [PlanChange(c, "cell", None, "new") for c in new if c not in old]
    changes += [PlanChange(c, "cell", "gone", None) for c in old if c not in new]
    names = [f.name for f in fields(DraftRow) if not f.name.endswith("by_k")]
    for cell, row in new.items():
        if cell not in old:
            continue
        for name in names:
            a, b = getattr(old[cell], name), getattr(row, name)
            if isinstance(a, float) and isinstance(b, float):
                if abs(a - b) <= tolerance * max(abs(a), abs(b)):
                    continue
            elif a == b:
                continue
            changes.append(PlanChange(cell, name, a, b))
    return changes
