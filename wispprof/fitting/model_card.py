"""Model cards of estimators and predictors (data, held-out errors, reason of the choice), and plots."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wispprof.artifacts import files
from wispprof.fitting.conformal import REGIMES
from wispprof.fitting.estimator import FittedEstimator
from wispprof.fitting.evaluation import Evaluation
from wispprof.fitting.rejection_predictor import FittedPredictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explain_estimator(estimator: FittedEstimator) -> str:
    """One paragraph on why this estimator was chosen and how accurate it is."""
    report = estimator.report
    errors = report["held_out"]
    chosen = report["chosen"]
    own = errors[chosen]
    noise = report["repeat_noise_percent"]
    sources = report.get("sources", ["measured"])
    measured = sources == ["measured"]
    held_out = "whole shapes were held out in turn, so every error is on shapes outside the training data"
    if measured:
        text = [f"{report['shapes']} batch shapes ({report['samples']} timed steps) were fitted; {held_out}."]
    else:
        text = [
            f"Not all of these steps were timed: {report['shapes']} batch shapes are "
            f"{' and '.join(sources)}. "
            "Errors say how well the form fits these times, not how near they are to real hardware; "
            f"{held_out}. Source: {'; '.join(report.get('citations', ['unknown']))}."
        ]
    flagged = report["flagged_rows"]
    if flagged["left_out"]:
        text.append(f"{flagged['left_out']} drifted or throttled rows were left out.")
    if flagged["kept"]:
        text.append(
            f"{flagged['kept']} drifted or throttled rows were kept, because too few would remain "
            "without them: measure again on a quiet machine for a better fit."
        )
    if report["drift_percent"] > 0.5:
        text.append(
            "According to the reference workload, the machine was up to "
            f"{report['drift_percent']:.0f} % slower at some times than at others. Medians and their "
            "errors are at its typical speed; the bound covers times as measured."
        )
    if report["requested"] == "auto":
        text.append(
            f"`{chosen}` was chosen because its mean error of {own['mape']:.1f} % is the smallest of "
            "those whose predictions never fall if work is added."
        )
        others = sorted((n for n in errors if n != chosen), key=lambda n: errors[n]["mape"])
        if others:
            listed = ", ".join(f"`{n}` {errors[n]['mape']:.1f} %" for n in others)
            text.append(f"The others: {listed}.")
        better = [n for n in others if errors[n]["mape"] < own["mape"]]
        if better:
            named = ", ".join(f"`{n}`" for n in better)
            text.append(
                f"{named} has a smaller error but can predict less time for more work, which would "
                "mislead a scheduler that adds one item at a time."
            )
    else:
        text.append(f"`{chosen}` was requested; its mean held-out error is {own['mape']:.1f} %.")
    text.append(
        f"Half of the shapes are predicted within {own['median_ape']:.1f} % and nine of ten within "
        f"{own['p90_ape']:.1f} %, {_on_average(own['bias'])}."
    )
    if measured:
        text.append(
            f"Repeating a measurement moves its median by about {noise:.1f} %, and no estimator can be more "
            "accurate than that."
        )
    factors = estimator.ratio.at(estimator.coverage)
    what, adjective = ("steps", "measured") if measured else ("the fitted times, not of real steps", "fitted")
    text.append(
        f"The bound lies {100 * (min(factors) - 1):.1f} to {100 * (max(factors) - 1):.1f} % above the "
        f"median, by regime, and covers {100 * estimator.coverage:g} % of {what}. Outside the "
        f"{adjective} box of shapes, the excess over the box is multiplied by {estimator.inflation:g} in "
        "the bound, and the prediction is flagged."
    )
    update = report.get("update")
    if update:
        text.append(
            f"It was recalibrated on {update['steps']} steps of a running server: the median is scaled "
            f"by {update['scale']:.3f}, which changed its mean error on them from "
            f"{update['before']['mape']:.1f} to {update['after']['mape']:.1f} %."
        )
    return " ".join(text)


def _on_average(bias: float) -> str:
    if abs(bias) < 0.05:
        return "on average neither too high nor too low"
    return f"on average {abs(bias):.1f} % too {'high' if bias > 0 else 'low'}"


def explain_predictor(predictor: FittedPredictor) -> str:
    """One paragraph on why this predictor was chosen and how accurate it is."""
    report = predictor.report
    chosen = report["chosen"]
    own = report["held_out"][chosen]
    counts = report["tokens"]
    text = [
        f"`{chosen}` {_why_predictor(report)}. It was trained on {counts['learn']} draft tokens, "
        f"calibrated on {counts['tune']} and tested on {counts['test']}, all of different prompts "
        f"({report['prompts']} in all). The target accepted {100 * own['accepted_share']:.0f} % of them."
    ]
    if own["auc"] is not None:
        text.append(
            f"It ranks an accepted token above a rejected one {100 * own['auc']:.0f} % of the time. At a "
            f"recall of {100 * own['recall']:.0f} % of the accepted tokens, "
            f"{100 * own['false_acceptance']:.0f} % of the rejected ones pass too."
        )
    text.append(
        f"Its probabilities are off by {100 * own['ece']:.1f} points on average (expected calibration error)."
    )
    if known := report.get("candidates"):
        text.append(
            f"For draft trees it rates {known['width']} candidates of a position: log loss "
            f"{known['log_loss']:.3f}, {100 * known['ece']:.1f} points off; the draft's own probabilities "
            f"have {known['plain_log_loss']:.3f}, and are {100 * known['plain_ece']:.1f} off."
        )
    return " ".join(text)


def _why_predictor(report: Mapping[str, Any]) -> str:
    """The reason of the choice: validation prompts, which may disagree with the test prompts."""
    chosen, tried = report["chosen"], report.get("validation_log_loss", {})
    if report["requested"] != "auto":
        return "was requested"
    if not tried:
        return "was the only candidate"
    figures = ", ".join(f"`{n}` {loss:.3f}" for n, loss in sorted(tried.items(), key=itemgetter(1)))
    why = (
        "was chosen because it had the least log loss in cross-validation on the training and "
        f"calibration prompts: {figures}"
    )
    test_loss = {name: row["log_loss"] for name, row in report["held_out"].items()}
    best = min(test_loss, key=lambda name: test_loss[name])
    if test_loss[best] < test_loss[chosen]:
        why += (
            f". On the test prompts, which the choice does not use, `{best}` did better: "
            f"{test_loss[best]:.3f} against {test_loss[chosen]:.3f}; a longer trace would tell which is "
            "better"
        )
    return why


Card = tuple[str, dict[str, Any]]
"""(Markdown, JSON)."""


def estimator_card(estimator: FittedEstimator, inputs: dict[str, str]) -> Card:
    report, ratio, domain = estimator.report, estimator.ratio, estimator.domain
    errors = ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
    held_out = sorted(report["held_out"].items(), key=lambda item: item[1]["mape"])
    factors = [f"{factor:.3f}" for factor in ratio.at(estimator.coverage)]
    sections = [
        *_table(
            "Held-out error by estimator (whole shapes held out, percent)",
            "estimator, MAPE, median, p90, p99, bias, never falls",
            [
                (n, *(f"{row[e]:.2f}" for e in errors), "yes" if report["monotone"][n] else "no")
                for n, row in held_out
            ],
        ),
        *_table(
            f"Bound at {100 * estimator.coverage:g} %",
            "regime, bound ÷ median, calibration shapes",
            zip(REGIMES, factors, ratio.shapes, strict=True),
        ),
        f"A step is large from {ratio.split_ms:.3g} ms on. Regimes with few shapes share the scale of a "
        "wider one; all regimes share the quantiles in units of it.",
        "",
        *_table(
            "Fitted domain" if "sources" in report else "Measured domain",
            "total, from, to",
            zip(domain.low._fields, domain.low, domain.high, strict=True),
        ),
    ]
    return _card(
        "Verification-time estimator",
        estimator,
        explain_estimator(estimator),
        inputs,
        sections,
        bound=ratio.payload(),
        domain={"low": domain.low._asdict(), "high": domain.high._asdict()},
        inflation=estimator.inflation,
    )


def predictor_card(predictor: FittedPredictor, inputs: dict[str, str]) -> Card:
    report = predictor.report
    scores = ("auc", "false_acceptance", "ece", "log_loss")
    curve = report["held_out"][report["chosen"]]["reliability"]
    sections = [
        *_table(
            "On held-out prompts",
            "predictor, AUC, false acceptance at 80 % recall, ECE, log loss",
            (
                (name, *("–" if row[s] is None else f"{row[s]:.3f}" for s in scores))
                for name, row in report["held_out"].items()
            ),
        ),
        *_table(
            f"Reliability of `{report['chosen']}`",
            "predicted, accepted, tokens",
            ((f"{p:.3f}", f"{a:.3f}", n) for p, a, n in curve),
        ),
    ]
    explanation = explain_predictor(predictor)
    return _card("Rejection predictor", predictor, explanation, inputs, sections)


def _card(
    title: str,
    fitted: FittedEstimator | FittedPredictor,
    explanation: str,
    inputs: dict[str, str],
    sections: Iterable[str],
    **more: object,
) -> Card:
    listed = [f"- {name}: `{digest}`" for name, digest in inputs.items()]
    for name in ("sources", "citations"):
        listed += [f"- {name.removesuffix('s')}: {value}" for value in fitted.report.get(name, ())]
    made_from = ["## Made from", "", *listed, ""] if listed else []
    text = "\n".join([f"# {title}", "", explanation, "", *sections, *made_from])
    document = {"kind": fitted.kind, "explanation": explanation, "report": fitted.report}
    return text, document | more | {"inputs": inputs}


def _table(title: str, columns: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """A section with one Markdown table; ``columns`` are separated by commas."""
    names = columns.split(", ")
    head = [f"## {title}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return [*head, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def write_card(artifact: Path, card: Card) -> tuple[Path, Path]:
    """Write ``NAME.card.md`` and ``NAME.card.json`` beside an artifact ``NAME.json``."""
    markdown, document = card
    text = artifact.with_name(f"{artifact.stem}.card.md")
    data = artifact.with_name(f"{artifact.stem}.card.json")
    files.write_atomic(text, markdown.encode())
    body = json.dumps(document, indent=1, ensure_ascii=False, default=files.plain)
    files.write_atomic(data, (body + "\n").encode())
    return text, data


COLORS = {"wisp-linear": "#d1495b", "staircase": "#edae49", "forest": "#66a182", "wispprof": "#00509d"}


def plot_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``predicted.svg``, ``groups.svg`` and ``learning.svg``; returns their paths."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(r["estimator"] for r in found.groups))
    paths = []
    for name, size, draw in (
        ("predicted.svg", (3.2 * len(kinds), 3.2), _predicted),
        ("groups.svg", (7.5, 3.4), _held_out_groups),
        ("learning.svg", (5.0, 3.4), _learning),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, found, kinds)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        files.write_atomic(folder / name, buffer.getvalue())
        paths.append(folder / name)
    return paths


def _predicted(figure: Figure, found: Evaluation, kinds: list[str]) -> None:
    """Actual ÷ predicted over predicted, one panel per estimator, shapes outside the domain hollow."""
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for inside in (True, False):
            chosen = [p for p in found.points if (p["estimator"], p["in_domain"]) == (kind, inside)]
            x = np.array([p["p50_ms"] for p in chosen])
            y = np.array([p["actual_ms"] for p in chosen]) / np.maximum(x, 1e-9)
            face = COLORS.get(kind, "#444444") if inside else "none"
            axis.scatter(x, y, s=8, linewidths=0.6, facecolors=face, edgecolors=COLORS.get(kind))
        axis.axhline(1.0, color="#222222", linewidth=0.8)
        axis.set(xscale="log", title=kind, xlabel="predicted ms", ylim=(0.5, 1.6))
    axes[0].set_ylabel("actual ÷ predicted (held out)")


def _held_out_groups(figure: Figure, found: Evaluation, kinds: list[str]) -> None:
    """Median and p90 absolute error by what was held out, in domain."""
    axis = figure.subplots()
    schemes = list(dict.fromkeys(r["scheme"] for r in found.groups))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        rows = [r for r in found.groups if r["estimator"] == kind and r["in_domain"]]
        offset = (number - len(kinds) / 2 + 0.5) * width
        x = np.array([schemes.index(r["scheme"]) for r in rows]) + offset
        median, p90 = (np.array([r[key] for r in rows]) for key in ("median_ape", "p90_ape"))
        axis.bar(x, median, width, color=COLORS.get(kind), label=kind)
        axis.vlines(x, median, p90, color=COLORS.get(kind), linewidth=2)
    axis.set_xticks(range(len(schemes)), schemes)
    axis.set(ylabel="absolute error, %: median (bar) to p90 (line)", yscale="log")
    axis.legend(frameon=False, ncols=2)


def _learning(figure: Figure, found: Evaluation, kinds: list[str]) -> None:
    """Error over the number of training shapes: how small a profile is enough."""
    axis = figure.subplots()
    for kind in kinds:
        rows = [r for r in found.learning if r["estimator"] == kind]
        x, y = ([r[key] for r in rows] for key in ("shapes", "mape"))
        axis.plot(x, y, marker="o", color=COLORS.get(kind), label=kind)
    axis.axhline(found.noise["median"], color="#222222", linestyle=":", linewidth=1)
    axis.set(xlabel="training shapes", ylabel="held-out MAPE, %", xscale="log", yscale="log")
    axis.legend(frameon=False)
