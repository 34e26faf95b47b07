"""``wispprof demo``: measure, fit, plan, serve and compare, on the bundled pair and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli import console
from wispprof.cli.options import JsonFlag
from wispprof.settings.shared_settings import DEMO_FOLDER

if TYPE_CHECKING:
    from wispprof.demo import DemoResult

BUSY = 0.5
"""Share of flagged rows above which the demo warns that its figures are rough."""


def register(app: typer.Typer) -> None:
    """Add ``demo`` to the commands."""
    app.command("demo")(demo)


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer measurements and requests: a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of artifacts and report.")] = DEMO_FOLDER,
    pair: Annotated[
        Path | None,
        typer.Option(help="Folder with target/ and draft/; default: the bundled pair."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Text that the edge continues.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Profile, fit, plan, serve, generate and compare on this machine.

    Prints one table and, as its last line, one JSON object; writes an HTML report.
    """
    from dataclasses import replace

    from wispprof.demo import DemoSettings, run_demo

    settings = DemoSettings.quick(out, pair) if quick else DemoSettings(out=out, pair=pair)
    if prompt:
        settings = replace(settings, prompt=prompt)
    with console.progress() as bars:

        def stage(name: str) -> Any:
            task = bars.add_task(name, total=None, status="")

            def report(done: int, total: int, status: str = "") -> None:
                bars.update(task, completed=done, total=total, status=status)

            return report

        result = run_demo(settings, stage)
    if not as_json:
        _show(result)
    if result.flagged > BUSY:
        console.warn(
            f"{result.flagged:.0%} of the profile's rows drifted or were noisy: this machine was busy, "
            "and the figures are rough. Run the demo again when it is idle."
        )
    console.emit_json(result.record(), indent=None)
    if not result.lossless:
        raise console.fail(
            "A text differs from the target's own output.",
            "This is a defect: please report it.",
        )


def _show(result: DemoResult) -> None:
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
    out.print(Text(f"{result.verdict}.", style="bold"))
    out.print(f"Report: {result.report}", markup=False, highlight=False)
