"""``wispprof plan``: make a plan, show it, explain a cell, compare two, export one."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli.console import emit_json, note, output, result, table, tracker
from wispprof.cli.options import JsonFlag, OutputFile, with_settings
from wispprof.settings.planner_settings import PlanSettings

if TYPE_CHECKING:
    from wispprof.artifacts.plan import Plan

PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]


group = typer.Typer(
    invoke_without_command=True, help="Make a plan, or show, explain, compare and export one."
)


@group.callback()
@with_settings
def make(
    ctx: typer.Context,
    settings: PlanSettings,
    estimator: Annotated[Path | None, typer.Option(help="Fitted step-time estimator.")] = None,
    edge: Annotated[
        list[str] | None,
        typer.Option(
            help="Edge profile, as PROFILE or NAME=PROFILE; repeatable. Names MACHINE:DRAFT compare several "
            "drafts of one machine."
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Device without a profile: NAME=TOKENS_PER_S, or NAME=TOKENS_PER_S@WATTS; repeatable."
        ),
    ] = None,
    trace: Annotated[
        list[str] | None, typer.Option(help="Acceptance trace, as TRACE or DEVICE=TRACE; repeatable.")
    ] = None,
    link: Annotated[
        list[Path] | None,
        typer.Option(help="Link profile whose round trip is added to those of --rtt; repeatable."),
    ] = None,
    workload: Annotated[
        Path | None,
        typer.Option(help="Workload file: plan for its contexts, SLOs and round trips (`wispprof traffic`)."),
    ] = None,
    out: OutputFile = Path("plan.json"),
    as_json: JsonFlag = False,
) -> None:
    """Make a plan from an estimator, edge profiles and an acceptance trace."""
    if ctx.invoked_subcommand is not None:
        return
    if estimator is None:
        raise typer.BadParameter("--estimator is needed to make a plan (see `wispprof fit`).")
    from wispprof.artifacts.plan import load_plan, save_plan
    from wispprof.planning.planner import link_rtt_ms, plan_files

    rtts_ms = settings.rtts_ms
    if link:
        measured = tuple(map(link_rtt_ms, link))
        rtts_ms = measured if rtts_ms == PlanSettings().rtts_ms else (*rtts_ms, *measured)
    if workload is not None:
        from wispprof.artifacts.workload import load_workload

        seen, default = load_workload(workload), PlanSettings()
        given = () if settings.contexts == default.contexts else settings.contexts
        settings = replace(settings, contexts=(*given, *seen.contexts()))
        if seen.slos and settings.slos == default.slos:
            settings = replace(settings, slos=tuple(map(float, seen.slos)))
        if seen.rtts_ms and rtts_ms == default.rtts_ms:
            rtts_ms = tuple(round(ms, 1) for ms in seen.rtts_ms)
    settings = replace(
        settings,
        rtts_ms=tuple(sorted(set(rtts_ms))),
        slos=tuple(sorted(set(settings.slos))),
        contexts=tuple(sorted(set(settings.contexts))),
    )
    with tracker("plan") as report:
        plan = plan_files(estimator, edge or (), device or (), trace or (), settings, report)
    save_plan(plan, out)
    note(f"wrote {out}")
    plan = load_plan(out)
    if as_json:
        emit_json(plan)
    else:
        _show_plan(plan, None, "stream", None)


@group.command("show")
def show(
    plan: PlanFile,
    device: Annotated[str | None, typer.Option("--device", help="Only this device.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="stream or round.")] = "stream",
    context: Annotated[int | None, typer.Option("--context", help="Cached tokens; default: all.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print a plan's tables."""
    from wispprof.artifacts.plan import load_plan

    loaded = load_plan(plan)
    if as_json:
        emit_json(loaded)
    else:
        _show_plan(loaded, device, mode, context)


@group.command("explain")
def explain_cell(
    cell: Annotated[
        str, typer.Argument(help="DEVICE/RTT/LOAD/SLO, optionally with /stream or /round, and /CONTEXT.")
    ],
    plan: Annotated[Path, typer.Option("--plan", help="The plan file.")] = Path("plan.json"),
    as_json: JsonFlag = False,
) -> None:
    """Explain in words and numbers why a cell is as it is."""
    from wispprof.artifacts.plan import load_plan
    from wispprof.planning.explain import explain

    loaded = load_plan(plan)
    lines = explain(loaded, cell)
    result({"row": loaded.find(cell), "words": lines}, "\n".join(lines), as_json)


@group.command("diff")
def diff(
    before: PlanFile,
    after: PlanFile,
    all_fields: Annotated[bool, typer.Option("--all", help="Every field, not only the decisions.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare the draft-length tables of two plans."""
    from wispprof.artifacts.plan import load_plan
    from wispprof.planning.explain import compare

    changes = compare(load_plan(before), load_plan(after))
    if not all_fields:
        changes = [c for c in changes if c.field in ("cell", "k", "draft_ahead", "feasible", "stop")]
    shown = table(
        f"{len(changes)} differences",
        "cell|field|before:g|after:g",
        ((c.cell, c.field, _text(c.before), _text(c.after)) for c in changes),
    )
    result({"changes": changes}, shown, as_json)


@group.command("export")
def export_plan(
    plan: PlanFile,
    form: Annotated[str, typer.Option("--format", help="csv, vllm, vllm-context or sglang.")] = "csv",
    device: Annotated[str | None, typer.Option("--device", help="Whose rows.")] = None,
    rtt: Annotated[float, typer.Option("--rtt", help="Round trip (ms).")] = 0.0,
    slo: Annotated[float | None, typer.Option("--slo", help="SLO (tokens/s).")] = None,
    mode: Annotated[str, typer.Option("--mode", help="stream or round.")] = "round",
    context: Annotated[
        int | None, typer.Option("--context", help="Cached tokens; default: the plan's middle context.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A file instead of stdout.")] = None,
) -> None:
    """Write a plan for other tools."""
    from wispprof.artifacts import files
    from wispprof.artifacts.plan import load_plan
    from wispprof.planning.plan_export import export

    text = export(load_plan(plan), form, device, rtt, slo, mode, context)
    if out is None:
        typer.echo(text, nl=False)
    else:
        files.write_atomic(out, text.encode())
        note(f"wrote {out}")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _show_plan(plan: Plan, device: str | None, mode: str, context: int | None) -> None:
    """Print every table of one mode, of one ``device`` or all, of one ``context`` or all."""
    from wispprof.artifacts.plan import machine_of
    from wispprof.errors import PlanError

    names = [d for d in plan.devices if device in (None, d, machine_of(d))]
    if not names:
        raise PlanError(f"The plan has no device {device!r}.", f"It has {', '.join(plan.devices)}.")
    contexts = plan.contexts if context is None else (plan.nearest_context(context),)
    for cached in contexts:
        one = plan.at_context(cached)
        where = f" at {cached:,} cached tokens" if len(plan.contexts) > 1 else ""
        for name in names:
            _show_drafts(one, name, mode, where)
            _show_capacity(one, name, mode, where)
        for machine in dict.fromkeys(map(machine_of, names)):
            _show_choices(one, machine, mode, where)
        _show_batches(one, where)
    for line in plan.notes:
        output().print(line, markup=False)


def _show_drafts(plan: Plan, device: str, mode: str, where: str) -> None:
    rows = [row for row in plan.draft if (row.device, row.mode) == (device, mode)]
    priced = any(row.dollars_per_mtoken for row in rows)
    powered = any(row.energy_j_per_token for row in rows)
    by_decision = groupby(
        rows,
        lambda row: (
            row.rtt_ms,
            row.load_level,
            row.k,
            row.stop if row.k else "",
            row.draft_ahead if row.k else "",
            row.expected_tokens_per_s,
            row.by_k[0] if row.by_k else "",
            *([row.dollars_per_mtoken] if priced else []),
            *([row.energy_j_per_token] if powered else []),
            "yes" if row.feasible else f"*{row.nearest_tokens_per_s:.1f}",
        ),
    )
    cells = (
        (*decision[:2], _span([row.tokens_per_s for row in same]), *decision[2:])
        for decision, same in by_decision
    )
    columns = "RTT ms:g|load|SLO tok/s|k|stop:.2f|ahead|tok/s:.2f|tok/s, k = 0:.2f"
    columns += ("|$/M:.3g" if priced else "") + ("|J/tok:.2g" if powered else "") + "|met"
    caption = (
        "tok/s: of a session; k = 0: without drafts; stop: cumulative acceptance probability at which "
        "drafting stops; ahead: maximum draft tokens ahead. "
        + ("$/M: dollars for a million tokens. " if priced else "")
        + ("J/tok: joules of drafting per token. " if powered else "")
        + "met: whether the SLO is; if not, * and the nearest that can be."
    )
    output().print(table(f"{device}: draft length ({mode}){where}", columns, cells, caption))


def _span(slos: list[float]) -> str:
    """The SLOs of consecutive rows that say the same."""
    return f"{slos[0]:g}" if len(slos) == 1 else f"{min(slos):g} … {max(slos):g}"


def _show_choices(plan: Plan, machine: str, mode: str, where: str) -> None:
    rows = [
        (
            row.rtt_ms,
            row.load_level,
            row.tokens_per_s,
            (row.device.partition(":")[2] or row.device) if row.k else "none",
            row.k,
            row.expected_tokens_per_s,
            row.dollars_per_mtoken or None,
            row.energy_j_per_token or None,
            row.feasible,
        )
        for row in plan.choices
        if (row.machine, row.mode) == (machine, mode)
    ]
    if rows:
        shown = table(
            f"{machine}: which draft, by {plan.objective} ({mode}){where}",
            "RTT ms:g|load|SLO tok/s:g|draft|k|tok/s:.2f|$/M:.3g|J/tok:.2g|met",
            rows,
            f"`plan explain {machine}/RTT/LOAD/SLO` lists all choices on the Pareto front.",
        )
        output().print(shown)


def _show_capacity(plan: Plan, device: str, mode: str, where: str) -> None:
    rows = (
        (row.rtt_ms, row.tokens_per_s, row.server_only, row.split, row.k, row.bound_by)
        for row in plan.capacity
        if (row.device, row.mode) == (device, mode)
    )
    columns = "RTT ms:g|SLO tok/s:g|server-only|split|k|bound by"
    caption = "Devices without drafts and with k. Bound by step time, KV memory, or the planned limit."
    output().print(table(f"{device}: capacity ({mode}){where}", columns, rows, caption))
    mixes = [
        (row.rtt_ms, row.mix, row.server_only, row.split, " ".join(f"{k:g}" for k in row.ks), row.bound_by)
        for row in plan.mixes
        if (row.device, row.mode) == (device, mode)
    ]
    if mixes:
        columns = "RTT ms:g|mix|server-only|split|k of each|bound by"
        title = f"{device}: capacity of class mixes ({mode}){where}"
        output().print(table(title, columns, mixes))


def _show_batches(plan: Plan, where: str) -> None:
    columns = "SLO tok/s:g|load|sessions|token budget|max items|prefill|p50 ms:.2f|bound ms:.2f"
    rows = (astuple(row)[:-1] for row in plan.batch)  # without the context
    output().print(table(f"Batching{where}", columns, rows))
