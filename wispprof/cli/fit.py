"""``wispprof fit``: estimator and predictor from a server profile and an acceptance trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.common import JsonFlag, note, output, result, table

if TYPE_CHECKING:
    from wispprof.fitting import FittedEstimator, FittedPredictor

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``fit`` to the commands."""
    app.command("fit")(fit)


def fit(
    server: Annotated[
        list[Path] | None,
        typer.Option("--server", help="Server profile (.jsonl). May be given more than once."),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option("--trace", help="Acceptance trace. May be given more than once."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for artifacts and cards.")] = Path(
        "fit"
    ),
    estimator: Annotated[
        str,
        typer.Option(
            "--estimator",
            help="wisp-linear, staircase, forest, wispprof, or auto: by held-out error.",
        ),
    ] = "auto",
    predictor: Annotated[
        str,
        typer.Option(
            "--predictor",
            help="threshold, margin-logistic, wisp-mlp, lightgbm, or auto: by log loss.",
        ),
    ] = "auto",
    coverage: Annotated[
        float, typer.Option("--coverage", min=0.5, max=0.999, help="Coverage of the upper bound.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the split by prompt.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Fit a verification-time estimator and a rejection predictor, and say how good they are."""
    from wispprof.fitting.card import explain_estimator, explain_predictor
    from wispprof.fitting.run import fit_files

    fitted = fit_files(out, server or (), trace or (), estimator, predictor, coverage, seed)
    document: dict[str, Any] = {"files": [str(f) for f in fitted.files]}
    if fitted.estimator is not None:
        document["estimator"] = fitted.estimator.report
        document["estimator"]["explanation"] = explain_estimator(fitted.estimator)
    if fitted.predictor is not None:
        document["predictor"] = fitted.predictor.report
        document["predictor"]["explanation"] = explain_predictor(fitted.predictor)
    if as_json:
        result(document, "", True)
        return
    if fitted.estimator is not None:
        _show_estimator(fitted.estimator)
        output().print(document["estimator"]["explanation"], markup=False)
    if fitted.predictor is not None:
        _show_predictor(fitted.predictor)
        output().print(document["predictor"]["explanation"], markup=False)
    for file in fitted.files:
        note(f"wrote {file}")


def _show_estimator(estimator: FittedEstimator) -> None:
    shown = table(
        "Verification-time estimators, whole shapes held out (percent)",
        "estimator",
        ">MAPE",
        ">median",
        ">p90",
        ">p99",
        ">bias",
        "never falls",
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
        "Rejection predictors, on held-out prompts",
        "predictor",
        ">AUC",
        ">false acceptance at 80 % recall",
        ">ECE",
        ">log loss",
    )
    report = predictor.report
    for name, row in report["held_out"].items():
        mark = " ←" if name == report["chosen"] else ""
        keys = ("auc", "false_acceptance", "ece", "log_loss")
        figures = ["–" if row[k] is None else f"{row[k]:.3f}" for k in keys]
        shown.add_row(name + mark, *figures)
    output().print(shown)
