"""``wispprof demo``, ``doctor`` and ``report``: try this installation, check it, show a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wispprof.cli import console
from wispprof.cli.options import JsonFlag, with_settings
from wispprof.doctor.findings import DoctorContext
from wispprof.settings.shared_settings import DEMO_FOLDER

if TYPE_CHECKING:
    from wispprof.demo import DemoResult

BUSY = 0.5
"""Share of flagged rows above which the demo warns that its figures are rough."""

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer measurements and requests: a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of artifacts and report.")] = DEMO_FOLDER,
    pair: Annotated[
        Path | None, typer.Option(help="Folder with target/ and draft/; default: the bundled pair.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text that the edge continues.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Profile, fit, plan, serve, generate and compare on this machine.

    Prints one table and, as its last line, one JSON object; writes an HTML report.
    """
    from wispprof.demo import DemoSettings, run_demo

    settings = DemoSettings.quick(out, pair) if quick else DemoSettings(out=out, pair=pair)
    if prompt:
        settings = replace(settings, prompt=prompt)
    with console.progress() as bars:
        result = run_demo(settings, lambda name: console.tracker(name, bar=bars))
    if not as_json:
        _show_demo(result)
    if result.flagged > BUSY:
        console.warn(
            f"{result.flagged:.0%} of the profile's rows drifted or were noisy: this machine was busy, "
            "and the figures are rough. Run the demo again when it is idle."
        )
    console.emit_json(result.record(), indent=None)
    if not result.lossless:
        raise console.fail(
            "A text differs from the target's own output.", "This is a defect: please report it."
        )


def _show_demo(result: DemoResult) -> None:
    from rich.text import Text

    from wispprof.reporting import bench_table, to_rich

    out = console.output()
    text = Text(result.answer.prompt, style="dim")
    for piece in result.answer.pieces:
        text.append(piece.text, style="green" if piece.origin == "draft" else "yellow")
    out.print(Text("Answer of an edge (green: accepted drafts, yellow: the target's own tokens)"))
    out.print(text)
    out.print()
    out.print(to_rich(bench_table(result.benches, brief=True)))
    out.print(Text(f"By goodput: {result.order} (≈: not decided)."))
    out.print(Text(f"{result.verdict}.", style="bold"))
    out.print(f"Report: {result.report}", markup=False, highlight=False)


@with_settings
def doctor(context: DoctorContext, as_json: JsonFlag = False) -> None:
    """Check installation, models, ports, keys and files.

    Each finding says what to do. Exit code 1 if a check fails.
    """
    from rich.text import Text

    from wispprof.doctor import CHECKS, Finding, examine

    findings: list[Finding] = []
    with console.tracker("doctor", total=len(CHECKS)) as report:
        for finding in examine(context, CHECKS):
            findings.append(finding)
            report(len(findings), status=finding.check)
    table = console.table("", "|check|finding")
    for finding in findings:
        text = Text(finding.message)
        if finding.hint:
            text.append(f"\n{finding.hint}", style="green")
        style = _STYLES[finding.status]
        table.add_row(Text(finding.status, style=style), finding.check, text)
    failed = [f.check for f in findings if f.status == "fail"]
    console.result({"ok": not failed, "findings": findings}, table, as_json)
    if failed:
        raise typer.Exit(console.FAULT)


def report(
    run: Annotated[Path, typer.Argument(help="Folder with the artifacts of a run.")] = DEMO_FOLDER,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: report.html in the folder.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two folders A and B: write them side by side.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an HTML report of a folder of artifacts, or of two side by side.

    The report is one file, which loads nothing.
    """
    from wispprof.reporting import load_run, write_comparison, write_report

    if compare is not None:
        a, b = map(load_run, compare)
        file = write_comparison(a, b, out or compare[1] / "comparison.html")
        size = f"{file} ({file.stat().st_size / 1024:.0f} KiB)"
        console.result({"report": file, "a": a.names(), "b": b.names()}, size, as_json)
        return
    loaded = load_run(run)
    stale = loaded.stale()
    if stale:
        console.warn(f"{', '.join(stale)}: not made from the files in this folder. Fit and plan again.")
    file = write_report(loaded, out or run / "report.html")
    console.result(
        {"report": file, "artifacts": loaded.names(), "stale": stale},
        f"{file} ({file.stat().st_size / 1024:.0f} KiB, from {len(loaded.names())} artifacts)",
        as_json,
    )
