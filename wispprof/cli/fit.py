"""``wispprof fit``: estimator and predictor from a server profile and an acceptance trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import emit_json, note, output, table, tracker
from wispprof.cli.options import JsonFlag

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.fitting import FittedEstimator, FittedPredictor
    from wispprof.fitting.evaluation import Evaluation


def register(app: typer.Typer) -> None:
    """Add ``fit`` to the commands."""
    app.command("fit")(fit)


def fit(
    server: Annotated[
        list[Path] | None, typer.Option(help="Server profile (.jsonl); repeatable.")
    ] = None,
    trace: Annotated[list[Path] | None, typer.Option(help="Acceptance trace; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for artifacts and model cards.")] = Path("fit"),
    estimator: Annotated[
        str,
        typer.Option(help="wisp-linear, staircase, forest, wispprof, or auto: by held-out error."),
    ] = "auto",
    predictor: Annotated[
        str,
        typer.Option(help="threshold, margin-logistic, wisp-mlp, lightgbm, or auto: by log loss."),
    ] = "auto",
    coverage: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="Coverage of the upper bound.")
    ] = 0.95,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Also score all estimators on held-out blocks of shapes, with plots, and replay rounds "
            "under every predictor (minutes).",
        ),
    ] = False,
    splits: Annotated[
        int, typer.Option(min=1, help="Random splits that test the bound's coverage.")
    ] = 20,
    update: Annotated[
        Path | None,
        typer.Option(help="Step log of a server; recalibrates the estimator in --out on it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every split.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Fit a step-time estimator and a rejection predictor, and score them."""
    from wispprof.fitting.model_card import explain_estimator, explain_predictor
    from wispprof.fitting.pipeline import evaluate_files, fit_files, replay_files, update_files

    if update is not None:
        if server or trace or evaluate:
            raise typer.BadParameter("--update goes with --out alone.")
        fitted = update_files(out, update)
    else:
        fitted = fit_files(out, server or (), trace or (), estimator, predictor, coverage, seed)
    document: dict[str, Any] = {}
    found = None
    if evaluate:
        if server:
            with tracker("evaluate") as report:
                found, files = evaluate_files(out, server, splits, seed, report)
            fitted.files += files
            document["evaluation"] = {
                "noise": found.noise,
                "repeat_error": found.repeat_error,
                "noise_floor": {f"{level:g}": ratio for level, ratio in found.noise_floor.items()},
                "speed_corrected_floor": {
                    f"{k:g}": ratio for k, ratio in found.speed_corrected_floor.items()
                },
                "groups": found.groups,
                "regimes": found.regimes,
                "splits": found.splits,
                "learning": found.learning,
            }
        if trace:
            document["replay"], files = replay_files(out, trace, seed)
            fitted.files += files
    if fitted.estimator is not None:
        explained = explain_estimator(fitted.estimator)
        document["estimator"] = {**fitted.estimator.report, "explanation": explained}
    if fitted.predictor is not None:
        explained = explain_predictor(fitted.predictor)
        document["predictor"] = {**fitted.predictor.report, "explanation": explained}
    document["files"] = [str(f) for f in fitted.files]
    if as_json:
        emit_json(document)
        return
    if fitted.estimator is not None:
        _show_estimator(fitted.estimator)
        output().print(document["estimator"]["explanation"], markup=False)
    if found is not None:
        _show_evaluation(found)
    if fitted.predictor is not None:
        _show_predictor(fitted.predictor)
        output().print(document["predictor"]["explanation"], markup=False)
    if "replay" in document:
        _show_replay(document["replay"])
    for file in fitted.files:
        note(f"wrote {file}")


_SCORES = ">n|>MAPE|>median|>p90|>p99|>bias|>cover|>bound"


def _wide(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table of many narrow columns that fits 80 characters."""
    shown = table(title, *columns, caption=caption)
    shown.padding = (0, 1, 0, 0)
    shown.pad_edge = False
    for column in shown.columns[:2]:
        column.no_wrap = True
    return shown


def _show_evaluation(found: Evaluation) -> None:
    noise = found.noise["median"]
    for inside, what in ((True, "inside"), (False, "outside")):
        errors = _wide(
            f"Blocks of shapes held out, {what} the range of the others (percent; noise {noise:.2f})",
            "held out by|estimator",
            _SCORES,
            caption="cover: samples below the 95 % bound. bound: bound ÷ median.\n"
            "oracle: predicts each shape by "
            "another measurement of it, and bounds it by the quantile of its samples.",
        )
        for row in (r for r in found.groups if r["in_domain"] == inside):
            errors.add_row(row["scheme"], row["estimator"], *_figures(row))
        if inside and found.repeat_error is not None:
            ideal = found.noise_floor[0.95]
            oracle = {**found.repeat_error, "shapes": "", "coverage": 0.95, "sharpness": ideal}
            errors.add_row("", "oracle", *_figures(oracle))
        output().print(errors)
    regimes = _wide("By regime, inside the range (percent)", "regime", "estimator", _SCORES)
    for row in sorted(found.regimes, key=lambda r: r["regime"]):
        regimes.add_row(row["regime"], row["estimator"], *_figures(row))
    output().print(regimes)
    bounds = table(
        "Coverage of the bound over random splits of shapes",
        "estimator|>wanted|>found|>worst split|>bound ÷ median",
        caption="oracle: the quantile of each shape's own steps.\n"
        "speed-corrected: with the machine's speed at every step known.",
    )
    for row in found.splits:
        figures = [f"{100 * row[k]:.1f} %" for k in ("level", "coverage", "worst_split")]
        bounds.add_row(row["estimator"], *figures, f"{row['sharpness']:.3f}")
    for name, floor in (
        ("oracle", found.noise_floor),
        ("speed-corrected", found.speed_corrected_floor),
    ):
        for level, ratio in floor.items():
            percent = f"{100 * level:.1f} %"
            bounds.add_row(name, percent, percent, "", f"{ratio:.3f}")
    output().print(bounds)
    sizes = sorted({row["shapes"] for row in found.learning})
    learning = table(
        "Held-out MAPE by number of training shapes (percent)",
        "estimator",
        *(f">{s}" for s in sizes),
    )
    for kind in dict.fromkeys(row["estimator"] for row in found.learning):
        points = {r["shapes"]: r["mape"] for r in found.learning if r["estimator"] == kind}
        learning.add_row(kind, *(f"{points[s]:.2f}" for s in sizes))
    output().print(learning)


def _show_replay(summary: list[dict[str, Any]]) -> None:
    shown = _wide(
        "Rounds replayed on held-out prompts (wasted: drafting ms per token)",
        "device|>RTT|rule|>value|>tokens/s|>wasted|>drafted|>accepted",
        caption="↑ tuned for most tokens/s, ↓ for least waste at the speed of the best fixed k, both on "
        "other prompts.\nDevice: ms per draft token.",
    )
    for cell in summary:
        for name in ("fixed", "fastest", "frugal", "clairvoyant"):
            row = cell[name]
            if row is None:
                continue
            sign = {"fastest": "↑ ", "frugal": "↓ "}.get(name, "")
            rule = sign + row["controller"]
            figures = [f"{row[k]:.2f}" for k in ("wasted_ms", "drafted", "accepted")]
            first = name == "fixed"
            shown.add_row(
                f"{cell['device']} {row['draft_ms']:g}" if first else "",
                f"{cell['rtt_ms']:g}" if first else "",
                rule,
                f"{row['value']:g}",
                f"{row['tokens_per_s']:.2f}",
                *figures,
            )
    output().print(shown)


def _figures(row: dict[str, Any]) -> list[str]:
    errors = [f"{row[k]:.1f}" for k in ("mape", "median_ape", "p90_ape", "p99_ape")]
    covered = f"{100 * row['coverage']:.1f}"
    return [str(row["shapes"]), *errors, f"{row['bias']:+.1f}", covered, f"{row['sharpness']:.2f}"]


def _show_estimator(estimator: FittedEstimator) -> None:
    shown = table(
        "Step-time estimators, scored on held-out shapes (percent)",
        "estimator|>MAPE|>median|>p90|>p99|>bias|monotone",
    )
    report = estimator.report
    for name, row in sorted(report["held_out"].items(), key=lambda item: item[1]["mape"]):
        mark = " ←" if name == report["chosen"] else ""
        figures = [f"{row[k]:.2f}" for k in ("mape", "median_ape", "p90_ape", "p99_ape")]
        falls = "yes" if report["monotone"][name] else "no"
        shown.add_row(name + mark, *figures, f"{row['bias']:+.2f}", falls)
    output().print(shown)


def _show_predictor(predictor: FittedPredictor) -> None:
    shown = table(
        "Rejection predictors, scored on held-out prompts",
        "predictor|>AUC|>false acceptance at 80 % recall|>ECE|>log loss",
    )
    report = predictor.report
    for name, row in report["held_out"].items():
        mark = " ←" if name == report["chosen"] else ""
        keys = ("auc", "false_acceptance", "ece", "log_loss")
        figures = ["–" if row[k] is None else f"{row[k]:.3f}" for k in keys]
        shown.add_row(name + mark, *figures)
    output().print(shown)
