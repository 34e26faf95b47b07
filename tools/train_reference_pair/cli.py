"""``python -m tools.train_reference_pair``: train the bundled draft and target again, and measure a pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli import console

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from tools.train_reference_pair.pair_figures import PairFigures

BUNDLED = "models/reference-pair"

app = typer.Typer(no_args_is_help=True, help="Train the small bundled draft and target, or evaluate a pair.")


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder that gets target/ and draft/.")],
    work: Annotated[Path, typer.Option(help="Folder of checkpoints; training resumes from it.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the work folder and start over.")] = False,
    keep_target: Annotated[
        bool,
        typer.Option("--keep-target", help="Distil a new draft for the target that --out holds."),
    ] = False,
) -> None:
    """Train target and draft from the standard library's own sources (hours on two CPU cores).

    --work stores the tokenizer, checkpoints and the target's logits, so an interrupted training
    resumes where it stopped.
    """
    from tools.train_reference_pair.build import build_pair

    with console.progress() as bars:
        tasks: dict[str, Any] = {}

        def report(part: str) -> Any:
            tasks[part] = bars.add_task(part, total=None, status="")

            def step(done: int, steps: int, loss: float, tokens_per_s: float) -> None:
                known = loss == loss
                status = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s" if known else ""
                bars.update(tasks[part], completed=done, total=steps, status=status)

            return step

        build_pair(out, work, report, resume=not fresh, keep_target=keep_target)
    console.note(f"Wrote {out / 'target'} and {out / 'draft'}.")


@app.command("evaluate")
def evaluate(
    pair: Annotated[
        Path | None,
        typer.Option(help="Folder with target/ and draft/ (default: the bundled pair)."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 512 tokens.")] = 100,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts for acceptance.")] = 50,
    card: Annotated[bool, typer.Option("--card", help="Write the pair's model card.")] = False,
    as_json: console.JsonFlag = False,
) -> None:
    """Held-out loss, repetition, cost of a token, acceptance and sampled agreement of a pair."""
    from dataclasses import asdict

    from rich.console import Group

    from tools.train_reference_pair.pair_figures import evaluate_pair, write_card
    from wispprof.artifacts import bundled_path

    folder = pair or bundled_path(BUNDLED)
    with console.progress() as bars:
        task = bars.add_task("evaluate", total=4, status="")

        def step(done: int, total: int, status: str) -> None:
            bars.update(task, completed=done, total=total, status=status)

        found = evaluate_pair(folder, windows, prompts, step)
    if card:
        console.note(f"Wrote {write_card(folder, found)}.")
    tables = Group(*_tables(folder, found))
    console.result({"pair": str(folder), **asdict(found)}, tables, as_json)


def _tables(folder: Path, found: PairFigures) -> list[RichTable]:
    from wispprof.reporting.tables import Column, Table, to_rich

    sides = Table(
        f"Pair {folder}",
        (
            Column("model"),
            Column("parameters"),
            Column("held-out loss", "nats/token", 3),
            Column("held-out loss", "nats/byte", 3),
            Column("repeated 4-grams", "greedy text", percent=True),
            Column("step", "ms, 1 token over 128", 2),
        ),
        tuple(
            (
                name,
                side.parameters,
                side.loss_per_token,
                side.loss_per_byte,
                side.repetition,
                side.step_ms,
            )
            for name, side in (("target", found.target), ("draft", found.draft))
        ),
        note=f"A draft step costs {found.step_ratio:.2f} of a target step "
        "(plain transformers, this machine).",
    )
    cum_acceptance = Table(
        "Greedy acceptance: all of the first j drafts accepted",
        tuple(Column(f"j = {j + 1}", "", 3) for j in range(len(found.cum_acceptance))),
        (found.cum_acceptance,),
    )
    agreement = Table(
        "Sampled agreement on one token",
        (
            Column("sampling"),
            Column("best possible", "Σ min(p, q)", 3),
            Column("same noise", "ours", 3),
            Column("share of best", "", 2),
            Column("independent", "", 3),
        ),
        tuple(
            (
                f"T = {s.temperature:g}, top-p {s.top_p:g}",
                a.best,
                a.same_noise,
                a.same_noise / a.best,
                a.independent,
            )
            for s, a in found.agreement
        ),
    )
    return [to_rich(table) for table in (sides, cum_acceptance, agreement)]
