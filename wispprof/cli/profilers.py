"""``wispprof profile-server``, ``profile-edge``, ``profile-link`` and ``trace``: measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import INTERRUPTED, console, note, result, table, tracker, warn
from wispprof.cli.options import JsonFlag, OutputFile, with_settings
from wispprof.cli.profile import Out, Overwrite, finished
from wispprof.settings.profiler_settings import (
    EdgeProfilerSettings,
    LinkProfilerSettings,
    Output,
    ServerProfilerSettings,
    TraceEngineSettings,
    TraceSettings,
)
from wispprof.settings.shared_settings import SamplingSettings, ServerAccess

if TYPE_CHECKING:
    from wispprof.artifacts.rows import AcceptanceTrace
    from wispprof.profiling.profile_run import SweepPlan

Resume = Annotated[bool, typer.Option("--resume", help="Continue at the next missing row.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the workloads and the expected time.")]
TraceServer = Annotated[
    str, typer.Option(help="Running server that generates the trace's paths instead of --model.")
]


@with_settings
def profile_server(
    settings: ServerProfilerSettings,
    items: Annotated[str, typer.Option(help="Sessions in a step, such as 1-32*2.")] = "",
    new: Annotated[str, typer.Option(help="New tokens per session, such as 1,2,5,9.")] = "",
    cached: Annotated[str, typer.Option(help="Cached tokens per session, such as 64-4096*2.")] = "",
    out: Out = Path("server"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Time ragged batch shapes on the engine."""
    from wispprof.profiling import server_profiler
    from wispprof.profiling.shape_grid import load_axes, override_axes

    axes = {"items": items, "new": new, "cached": cached}
    given = {name: text for name, text in axes.items() if text}
    settings = replace(
        settings,
        axes=override_axes(load_axes(settings.grid), given, "options") if given else None,
        output=Output(out, resume, overwrite),
    )
    if dry_run:
        _announce(server_profiler.plan_server(settings), as_json)
        return
    profile = _keep_rows(
        out, "profile-server", lambda report: server_profiler.profile_server(settings, report, warn=warn)
    )
    finished(profile, out, as_json)


@with_settings
def profile_edge(
    settings: EdgeProfilerSettings,
    sampling: SamplingSettings,
    access: ServerAccess,
    contexts: Annotated[str, typer.Option(help="Cached tokens under a draft step, such as 64-4096*2.")] = "",
    chunks: Annotated[str, typer.Option(help="Tokens prefilled at once, such as 64,256.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Also take an acceptance trace into this file.")] = None,
    model: Annotated[str, typer.Option(help="Target model of the trace; default: the bundled one.")] = "",
    server: TraceServer = "",
    out: Out = Path("edge"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Time drafting: in bursts and sustained."""
    from wispprof.profiling import edge_profiler
    from wispprof.profiling.drafter_runner import load_edge_axes
    from wispprof.profiling.shape_grid import override_axes

    given = {name: text for name, text in (("contexts", contexts), ("chunks", chunks)) if text}
    if contexts:  # rounds of the grid's own contexts would take long prompts all the same
        given["rounds"] = contexts
    settings = replace(
        settings,
        axes=override_axes(load_edge_axes(settings.grid), given, "options") if given else None,
        sampling=sampling.sampling(),
        output=Output(out, resume, overwrite),
    )
    if dry_run:
        _announce(edge_profiler.plan_edge(settings), as_json)
        return
    profile = _keep_rows(out, "profile-edge", lambda report: edge_profiler.profile_edge(settings, report))
    if trace is not None:
        wanted = TraceSettings(
            target=model,
            draft=settings.draft,
            dtype=settings.dtype,
            device=settings.device,
            sampling=settings.sampling,
            seed=sampling.seed,
        )
        _take(wanted, server, access, trace)
    finished(profile, out, as_json)


@with_settings
def profile_link(
    server: Annotated[str, typer.Argument(help="Address of a running server, such as HOST:8200.")],
    settings: LinkProfilerSettings,
    out: Out = Path("link"),
    overwrite: Overwrite = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure round trip, jitter and bandwidth."""
    from wispprof.profiling import link_profiler

    settings = replace(settings, server=server, output=Output(out, overwrite=overwrite))
    with tracker("profile-link") as report:
        profile = link_profiler.profile_link(settings, report)
    finished(profile, out, as_json)


@with_settings
def trace(
    settings: TraceSettings,
    sampling: SamplingSettings,
    access: ServerAccess,
    engine: TraceEngineSettings,
    server: TraceServer = "",
    out: OutputFile = Path("trace.jsonl"),
    as_json: JsonFlag = False,
) -> None:
    """Take an acceptance trace of a draft and a target."""
    settings = replace(settings, sampling=sampling.sampling())
    taken, digest = _take(settings, server, access, out, engine)
    cum_acceptance = taken.cum_acceptance_by_position().tolist()
    shown = table(
        f"Drafts of {taken.draft} accepted by {taken.target}",
        "position|cumulative acceptance:.3f",
        enumerate(cum_acceptance, start=1),
    )
    document = {
        "file": str(out),
        "hash": digest,
        "paths": len(taken.paths),
        "tokens": sum(len(path.path) for path in taken.paths),
        "cum_acceptance": cum_acceptance,
    }
    result(document, shown, as_json)


@with_settings
def check_pair(
    sampling: SamplingSettings,
    access: ServerAccess,
    settings: TraceSettings = TraceSettings(count=8, path_tokens=64, depth=6),
    server: TraceServer = "",
    rtt_ms: Annotated[float, typer.Option("--rtt", min=0, help="Round trip to the server (ms).")] = 30.0,
    as_json: JsonFlag = False,
) -> None:
    """Say in minutes whether a draft is worth serving with a target."""
    from dataclasses import asdict

    from wispprof.profiling.acceptance_trace import RemoteTarget
    from wispprof.profiling.pair_check import run_check

    settings = replace(settings, sampling=sampling.sampling())
    with tracker("check-pair") as report:
        found = run_check(settings, RemoteTarget(server, access) if server else None, rtt_ms, report)
    shown = table(
        f"Rounds with these drafts, over {found.prompts} prompts (95 %)",
        "k|accepted per round:.2f|from:.2f|to:.2f|verify ms:.1f|tokens/s:.1f|from:.1f|to:.1f|later:.1f",
        (
            (
                one.name,
                one.accepted,
                one.low,
                one.high,
                found.verify_ms[one.k] if one.k else None,
                one.tokens_per_s,
                one.slow,
                one.fast,
                one.later_tokens_per_s,
            )
            for one in (*found.lengths, found.ahead)
        ),
        f"Draft step {found.draft_ms:.1f} ms, the first of a round {found.resume_ms:.1f} ms more; "
        f"target step {found.target_ms:.1f} ms, round trip {found.rtt_ms:g} ms. The target alone: "
        f"{found.undrafted_tokens_per_s:.1f} tokens/s, later {found.undrafted_later_tokens_per_s:.1f}. k = "
        "ahead: asynchronous drafting. later: tokens/s after the first token, as a plan counts them.",
    )
    document = {
        **asdict(found),
        "best_k": found.best.k,
        "worthwhile": found.worthwhile,
        "verdict": found.verdict,
    }
    result(document, shown, as_json)
    if found.prompt_warning:
        warn(found.prompt_warning)
    note(found.verdict)


def _take(
    settings: TraceSettings,
    server: str,
    access: ServerAccess,
    out: Path,
    engine: TraceEngineSettings = TraceEngineSettings(),
) -> tuple[AcceptanceTrace, str]:
    """Take a trace and write it; the trace and its content hash."""
    from wispprof.artifacts import save_trace
    from wispprof.artifacts.files import check_writable
    from wispprof.profiling.acceptance_trace import RemoteTarget, trace_pair, trace_remote
    from wispprof.profiling.prompts import prompt_warning

    check_writable(out)
    with tracker("trace") as report:
        if server:
            taken = trace_remote(RemoteTarget(server, access), settings, report)
        else:
            taken = trace_pair(settings, report, engine)
    digest = save_trace(taken, out)
    note(f"wrote {out}")
    if said := prompt_warning(taken.meta, settings.prompt_tokens):
        warn(said)
    if taken.meta["chat_model"] and settings.prompts is None:
        warn(
            "this is a chat model, and it was traced on source code without its template: acceptance in "
            "chats differs. Give --prompts chats.jsonl with lines of messages."
        )
    return taken, digest


def _keep_rows(out: Path, name: str, run: Callable[[Any], Any]) -> Any:
    """Run with a progress bar; on Ctrl-C say where the finished rows are and how to resume."""
    from wispprof.profiling.profile_run import journal_path

    try:
        # A sweep reports its own ETA: workloads differ too much to extrapolate from their number.
        with tracker(name, eta=False) as report:
            return run(report)
    except KeyboardInterrupt:
        journal = journal_path(out)
        if journal.exists():
            rows = max(0, journal.read_bytes().count(b"\n") - 1)
            message = f"Interrupted. {rows} finished blocks are in {journal}; continue with --resume."
        else:
            message = "Interrupted before the first row; nothing was written."
        console().print(message, style="yellow", markup=False)
        raise typer.Exit(INTERRUPTED) from None


def _announce(plan: SweepPlan, as_json: bool) -> None:
    from wispprof.profiling.workload import format_duration

    shown = table(
        f"{len(plan.workloads)} workloads, about {format_duration(plan.expected_s)} (by {plan.basis})",
        "kind|workload",
        ((workload.kind, workload.key) for workload in plan.workloads),
    )
    document = {
        "workloads": [{"kind": workload.kind, "key": workload.key} for workload in plan.workloads],
        "expected_s": plan.expected_s,
        "basis": plan.basis,
    }
    result(document, shown, as_json)
