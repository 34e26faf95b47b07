"""``wispprof plan``: make a plan, show it, explain a cell, compare two, export one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli.console import emit_json, note, output, result, table, tracker
from wispprof.cli.options import JsonFlag, OutputFile, with_settings
from wispprof.settings.planner_settings import PlanSettings

if TYPE_CHECKING:
    from wispprof.artifacts.plan import DraftRow, Plan

PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]


def register(app: typer.Typer) -> None:
    """Add the ``plan`` group."""
    group = typer.Typer(
        invoke_without_command=True, help="Make a plan, or show, explain, compare and export one."
    )
    group.callback()(make)
    group.command("show")(show)
    group.command("explain")(explain_cell)
    group.command("diff")(diff)
    group.command("export")(export_plan)
    app.add_typer(group, name="plan")


@with_settings
def make(
    ctx: typer.Context,
    settings: PlanSettings,
    estimator: Annotated[Path | None, typer.Option(help="Fitted step-time estimator.")] = None,
    edge: Annotated[
        list[str] | None,
        typer.Option(
            help="Edge profile, as PROFILE or NAME=PROFILE; repeatable. Names MACHINE:DRAFT compare several "
            "drafts of one machine.",
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Device without a profile: NAME=TOKENS_PER_S, or NAME=TOKENS_PER_S@WATTS; repeatable."
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="Acceptance trace, as TRACE or DEVICE=TRACE; repeatable."),
    ] = None,
    link: Annotated[
        list[Path] | None,
        typer.Option(help="Link profile whose round trip is added to those of --rtt; repeatable."),
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
    from wispprof.planning.pipeline import link_rtt_ms, plan_files

    rtts_ms = settings.rtts_ms
    if link:
        measured = tuple(map(link_rtt_ms, link))
        rtts_ms = measured if rtts_ms == PlanSettings().rtts_ms else (*rtts_ms, *measured)
    settings = replace(
        settings, rtts_ms=tuple(sorted(set(rtts_ms))), slos=tuple(sorted(set(settings.slos)))
    )
    with tracker("plan") as report:
        plan = plan_files(estimator, edge or (), device or (), trace or (), settings, report)
    save_plan(plan, out)
    note(f"wrote {out}")
    plan = load_plan(out)
    if as_json:
        emit_json(plan)
    else:
        _show_plan(plan, None, "stream")


def show(
    plan: PlanFile,
    device: Annotated[str | None, typer.Option("--device", help="Only this device.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="stream or round.")] = "stream",
    as_json: JsonFlag = False,
) -> None:
    """Print a plan's tables."""
    from wispprof.artifacts.plan import load_plan

    loaded = load_plan(plan)
    if as_json:
        emit_json(loaded)
    else:
        _show_plan(loaded, device, mode)


def explain_cell(
    cell: Annotated[
        str, typer.Argument(help="DEVICE/RTT/LOAD/SLO, optionally with /stream or /round.")
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


def diff(
    before: PlanFile,
    after: PlanFile,
    all_fields: Annotated[
        bool, typer.Option("--all", help="Every field, not only the decisions.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare the draft-length tables of two plans."""
    from wispprof.artifacts.plan import load_plan
    from wispprof.planning.explain import compare

    changes = compare(load_plan(before), load_plan(after))
    if not all_fields:
        changes = [
            c for c in changes if c.field in ("cell", "k", "draft_ahead", "feasible", "stop")
        ]
    shown = table(f"{len(changes)} differences", "cell", "field", ">before", ">after")
    for change in changes:
        shown.add_row(change.cell, change.field, _text(change.before), _text(change.after))
    result({"changes": changes}, shown, as_json)


def export_plan(
    plan: PlanFile,
    form: Annotated[str, typer.Option("--format", help="csv, vllm or sglang.")] = "csv",
    device: Annotated[str | None, typer.Option("--device", help="Whose rows.")] = None,
    rtt: Annotated[float, typer.Option("--rtt", help="Round trip (ms).")] = 0.0,
    slo: Annotated[float | None, typer.Option("--slo", help="SLO (tokens/s).")] = None,
    mode: Annotated[str, typer.Option("--mode", help="stream or round.")] = "round",
    out: Annotated[Path | None, typer.Option("--out", help="A file instead of stdout.")] = None,
) -> None:
    """Write a plan for other tools."""
    from wispprof.artifacts import files
    from wispprof.artifacts.plan import load_plan
    from wispprof.planning.plan_export import export

    text = export(load_plan(plan), form, device, rtt, slo, mode)
    if out is None:
        typer.echo(text, nl=False)
    else:
        files.write_atomic(out, text.encode())
        note(f"wrote {out}")


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _show_plan(plan: Plan, device: str | None, mode: str) -> None:
    """Print every table of one mode, of one ``device`` or all."""
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
        ">RTT|>load|>SLO|>k|>stop|>ahead|>speed|>k = 0",
        *([">$/M"] if priced else []),
        *([">J/tok"] if powered else []),
        "met",
        caption="RTT in ms; SLO and speed in tokens/s of a session; k = 0: speed without drafts; ahead: "
        "maximum draft tokens ahead. "
        + ("$/M: dollars for a million tokens. " if priced else "")
        + ("J/tok: joules of drafting per token. " if powered else "")
        + "met: whether the SLO is; if not, * and the nearest that can be.",
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
        ">RTT|>load|>SLO|draft|>k|>speed|>$/M|>J/tok|met",
        caption=f"`plan explain {machine}/RTT/LOAD/SLO` lists all choices on the Pareto front.",
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
        ">RTT ms|>SLO|>server-only|>split|>k|bound by",
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
        ">RTT ms|mix|>server-only|>split|k of each|bound by",
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
        ">SLO|>load|>sessions|>token budget|>max items|>prefill|>p50 ms|>bound ms",
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
