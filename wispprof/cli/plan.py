"""``wispprof plan``: make a plan, show it, explain a cell, compare two, export one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli.console import emit_json, note, result, table, tracker
from wispprof.cli.options import JsonFlag
from wispprof.cli.plan_tables import show_plan

__all__ = ["register"]

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


def make(
    context: typer.Context,
    estimator: Annotated[
        Path | None, typer.Option("--estimator", help="Fitted verification-time estimator.")
    ] = None,
    edge: Annotated[
        list[str] | None,
        typer.Option(
            "--edge",
            help="Edge profile, as PROFILE or NAME=PROFILE. Repeatable. Several drafts of one machine are "
            "held against each other where they are called MACHINE:DRAFT.",
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            help="A device by speed alone: NAME=TOKENS_PER_S, or with its power drafting: @WATTS. "
            "Repeatable.",
        ),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option("--trace", help="Acceptance trace, as TRACE or DEVICE=TRACE. Repeatable."),
    ] = None,
    rtt: Annotated[
        list[float] | None, typer.Option("--rtt", help="Round trip in ms. Repeatable.")
    ] = None,
    link: Annotated[
        list[Path] | None,
        typer.Option("--link", help="Link profile whose round trip is planned for. Repeatable."),
    ] = None,
    slo: Annotated[
        list[float] | None, typer.Option("--slo", help="Promise in tokens/s. Repeatable.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            "--mix",
            help="Class mix for capacity: SLO=SHARE,SLO=SHARE (default: equal). Repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--context", min=0, help="Cached tokens per session to plan for.")
    ] = 512,
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, help="Most concurrent sessions.")
    ] = 256,
    kv_tokens: Annotated[
        int, typer.Option("--kv-tokens", min=0, help="Tokens the KV cache holds, 0 for no limit.")
    ] = 0,
    k_max: Annotated[int, typer.Option("--k-max", min=1, max=32, help="Longest draft.")] = 12,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="goodput, cost, energy (least within 5 % of the best speed), or a mix: "
            "goodput=0.7,cost=0.3.",
        ),
    ] = "goodput",
    server_price: Annotated[
        float, typer.Option("--server-price", min=0.0, help="Dollars an hour of the server.")
    ] = 0.0,
    edge_price: Annotated[
        list[str] | None,
        typer.Option(
            "--edge-price",
            help="Dollars an hour of drafting: DOLLARS, or NAME=DOLLARS for one device. Repeatable.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the plan is written.")] = Path(
        "plan.json"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Make a plan from an estimator, edge profiles and an acceptance trace."""
    if context.invoked_subcommand is not None:
        return
    if estimator is None:
        raise typer.BadParameter("--estimator is needed to make a plan (see `wispprof fit`).")
    from wispprof.artifacts.plan import load_plan, save_plan
    from wispprof.planning.pipeline import class_mix, link_rtt_ms, plan_files
    from wispprof.planning.pipeline import edge_price as price
    from wispprof.settings.planner_settings import PlanSettings

    default = PlanSettings()
    rtts = tuple(rtt or ()) + tuple(link_rtt_ms(p) for p in link or ())
    settings = PlanSettings(
        rtts_ms=tuple(sorted(set(rtts))) or default.rtts_ms,
        slos=tuple(sorted(set(slo or default.slos))),
        k_max=k_max,
        context=tokens,
        max_sessions=sessions,
        kv_tokens=kv_tokens,
        objective=objective,
        server_price=server_price,
        edge_prices=tuple(map(price, edge_price or ())),
        mixes=tuple(map(class_mix, mix or ())),
    )
    with tracker("plan") as report:
        plan = plan_files(estimator, edge or (), device or (), trace or (), settings, report)
    save_plan(plan, out)
    note(f"wrote {out}")
    plan = load_plan(out)
    if as_json:
        emit_json(plan)
    else:
        show_plan(plan, None, "stream")


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
        show_plan(loaded, device, mode)


def explain_cell(
    cell: Annotated[str, typer.Argument(help="DEVICE/RTT/LOAD/SLO, or with /stream or /round.")],
    plan: Annotated[Path, typer.Option("--plan", help="The plan file.")] = Path("plan.json"),
    as_json: JsonFlag = False,
) -> None:
    """Say in words and numbers why a cell is as it is."""
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
    rtt: Annotated[float, typer.Option("--rtt", help="Round trip in ms.")] = 0.0,
    slo: Annotated[float | None, typer.Option("--slo", help="Promise in tokens/s.")] = None,
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
