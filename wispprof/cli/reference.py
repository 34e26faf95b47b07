"""``wispprof reference-pair``: train the bundled draft and target again, and measure a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wispprof.cli import common

BUNDLED = "models/reference-pair"

app = typer.Typer(
    no_args_is_help=True, help="Train the small bundled draft and target, or evaluate a pair."
)


def register(parent: typer.Typer) -> None:
    """Add the group to the tool."""
    parent.add_typer(app, name="reference-pair", rich_help_panel="Project")


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder that gets target/ and draft/.")],
    work: Annotated[Path, typer.Option(help="Folder of checkpoints; training resumes from it.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore checkpoints, start over.")] = False,
) -> None:
    """Train target and draft from the standard library's own sources (hours on two CPU cores).

    Tokenizer, checkpoints and the target's own text are kept in --work, so an interrupted training
    goes on where it stopped.
    """
    from wispprof.lm.reference.build import build_pair

    with common.progress() as bars:
        tasks: dict[str, Any] = {}

        def report(part: str) -> Any:
            tasks[part] = bars.add_task(part, total=None, status="")

            def step(done: int, steps: int, loss: float, tokens_per_s: float) -> None:
                known = loss == loss
                status = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s" if known else ""
                bars.update(tasks[part], completed=done, total=steps, status=status)

            return step

        build_pair(out, work, report, resume=not fresh)
    common.note(f"Wrote {out / 'target'} and {out / 'draft'}.")


@app.command("evaluate")
def evaluate(
    pair: Annotated[
        Path | None,
        typer.Option(help="Folder with target/ and draft/ (default: the bundled pair)."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 512 tokens.")] = 200,
    as_json: common.JsonFlag = False,
) -> None:
    """Held-out loss, repetition and cost of a token, for both models of a pair."""
    from wispprof.artifacts import bundled
    from wispprof.lm.loading import load_model
    from wispprof.lm.reference import evaluate as measure
    from wispprof.reporting.tables import Column, Table, to_rich

    folder = pair or bundled.path(BUNDLED)
    texts = measure.held_out_texts()
    found: dict[str, dict[str, float | int | str]] = {}
    with common.progress() as bars:
        task = bars.add_task("evaluate", total=6, status="")
        for side in ("target", "draft"):
            bars.update(task, status=f"{side}: loss")
            loaded = load_model(folder / side, device="cpu")
            loss = measure.held_out_loss(loaded.model, loaded.tokenizer, texts, max_windows=windows)
            bars.update(task, advance=1, status=f"{side}: repetition")
            repeated = measure.repetition(loaded.model, loaded.tokenizer, texts)
            bars.update(task, advance=1, status=f"{side}: step")
            found[side] = {
                "parameters": loaded.info.parameters,
                "loss_per_token": loss.per_token,
                "loss_per_byte": loss.per_byte,
                "held_out_tokens": loss.tokens,
                "repetition": repeated,
                "step_ms": measure.step_ms(loaded.model),
            }
            bars.update(task, advance=1)
    ratio = float(found["draft"]["step_ms"]) / float(found["target"]["step_ms"])
    table = Table(
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
                side,
                int(row["parameters"]),
                row["loss_per_token"],
                row["loss_per_byte"],
                row["repetition"],
                row["step_ms"],
            )
            for side, row in found.items()
        ),
        note=f"A draft step costs {ratio:.2f} of a target step (plain transformers, this machine).",
    )
    common.result({"pair": str(folder), **found, "step_ratio": ratio}, to_rich(table), as_json)
