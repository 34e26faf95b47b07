"""Model cards: what was fitted, on what, how good it is where it did not learn, and why it was chosen.

Pictures of a held-out evaluation, as SVG files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
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

__all__ = [
    "estimator_card",
    "explain_estimator",
    "explain_predictor",
    "plot_evaluation",
    "predictor_card",
    "write_card",
]


def explain_estimator(estimator: FittedEstimator) -> str:
    """One paragraph on why this estimator was chosen and how far it can be trusted."""
    report = estimator.report
    errors = report["held_out"]
    chosen = report["chosen"]
    own = errors[chosen]
    noise = report["repeat_noise_percent"]
    text = [
        f"{report['shapes']} batch shapes ({report['samples']} timed steps) were fitted; whole shapes "
        "were held out in turn, so every error here is on shapes the estimator had not seen."
    ]
    flagged = report["flagged_rows"]
    if flagged["left_out"]:
        text.append(f"{flagged['left_out']} drifted or throttled rows were left out.")
    if flagged["kept"]:
        text.append(
            f"{flagged['kept']} rows had drifted or were throttled and were kept, because too few would "
            "have remained: measure again on a quiet machine for a better fit."
        )
    if report["drift_percent"] > 0.5:
        text.append(
            f"By its sentinel the machine was up to {report['drift_percent']:.0f} % slower at times than "
            "at others; medians and their errors are at its typical speed, the bound covers times as "
            "they were measured."
        )
    if report["requested"] == "auto":
        text.append(
            f"`{chosen}` was chosen because its mean error of {own['mape']:.1f} % is the smallest of "
            "those whose predictions never fall when work is added."
        )
        others = sorted((n for n in errors if n != chosen), key=lambda n: errors[n]["mape"])
        if others:
            listed = ", ".join(f"`{n}` {errors[n]['mape']:.1f} %" for n in others)
            text.append(f"The others: {listed}.")
        better = [n for n in others if errors[n]["mape"] < own["mape"]]
        if better:
            named = ", ".join(f"`{n}`" for n in better)
            text.append(
                f"{named} erred less but can predict that more work takes less time, which would "
                "mislead a scheduler that adds one item at a time."
            )
    else:
        text.append(f"`{chosen}` was asked for; its mean held-out error is {own['mape']:.1f} %.")
    text.append(
        f"Half of the shapes are predicted within {own['median_ape']:.1f} % and nine of ten within "
        f"{own['p90_ape']:.1f} %, on average {abs(own['bias']):.1f} % too "
        f"{'high' if own['bias'] >= 0 else 'low'}; repeating a measurement moves its median by about "
        f"{noise:.1f} %, and no estimator can do better than that."
    )
    factors = estimator.ratio.at(estimator.coverage)
    text.append(
        f"The bound lies {100 * (min(factors) - 1):.1f} to {100 * (max(factors) - 1):.1f} % above the "
        f"median, by regime, and is meant to hold for {100 * estimator.coverage:g} % of steps. Outside "
        "the measured box of shapes, what the physical terms add is multiplied by "
        f"{estimator.inflation:g} in the bound, and the prediction is flagged."
    )
    update = report.get("update")
    if update:
        text.append(
            f"It was since recalibrated on {update['steps']} steps of a running server: the median is "
            f"scaled by {update['scale']:.3f}, which took its mean error on them from "
            f"{update['before']['mape']:.1f} to {update['after']['mape']:.1f} %."
        )
    return " ".join(text)


def explain_predictor(predictor: FittedPredictor) -> str:
    """One paragraph on why this predictor was chosen and what it is worth."""
    report = predictor.report
    chosen = report["chosen"]
    own = report["held_out"][chosen]
    counts = report["tokens"]
    text = [
        f"`{chosen}` {_why_predictor(report)}. It learnt from {counts['learn']} draft tokens, was calibrated "
        f"on {counts['tune']} and judged on {counts['test']}, all of different prompts "
        f"({report['prompts']} in all); the target kept {100 * own['accepted_share']:.0f} % of them."
    ]
    if own["auc"] is not None:
        text.append(
            f"It ranks a kept token above a rejected one {100 * own['auc']:.0f} % of the time. A "
            f"threshold that lets {100 * own['recall']:.0f} % of the kept tokens pass lets "
            f"{100 * own['false_acceptance']:.0f} % of the rejected ones pass too."
        )
    text.append(
        f"Its probabilities are off by {100 * own['ece']:.1f} points on average (expected calibration "
        "error)."
    )
    return " ".join(text)


def _why_predictor(report: Mapping[str, Any]) -> str:
    """What the choice rests on: other prompts than those that judge, which may see it otherwise."""
    chosen, tried = report["chosen"], report.get("validation_log_loss", {})
    if report["requested"] != "auto":
        return "was asked for"
    if not tried:
        return "was the only one to choose from"
    figures = ", ".join(f"`{n}` {loss:.3f}" for n, loss in sorted(tried.items(), key=itemgetter(1)))
    why = (
        "was chosen because it had the least log loss where the prompts that teach and calibrate were "
        f"cross-validated: {figures}"
    )
    judged = {name: row["log_loss"] for name, row in report["held_out"].items()}
    best = min(judged, key=lambda name: judged[name])
    if judged[best] < judged[chosen]:
        why += (
            f". On the prompts held out to judge by, which had no say in it, `{best}` did better: "
            f"{judged[best]:.3f} against {judged[chosen]:.3f}; a longer trace would tell them apart"
        )
    return why


def estimator_card(
    estimator: FittedEstimator, inputs: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """(Markdown, JSON) of an estimator's card."""
    report = estimator.report
    low, high = estimator.domain.low, estimator.domain.high
    lines = [
        "# Verification-time estimator",
        "",
        explain_estimator(estimator),
        "",
        "## Held-out error by estimator (whole shapes held out, percent)",
        "",
        "| estimator | MAPE | median | p90 | p99 | bias | never falls |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(report["held_out"].items(), key=lambda item: item[1]["mape"]):
        figures = " | ".join(
            f"{row[k]:.2f}" for k in ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
        )
        lines.append(f"| {name} | {figures} | {'yes' if report['monotone'][name] else 'no'} |")
    lines += [
        "",
        f"## Bound at {100 * estimator.coverage:g} %",
        "",
        "| regime | bound ÷ median | calibration shapes |",
        "|---|---|---|",
    ]
    factors = estimator.ratio.at(estimator.coverage)
    for name, factor, count in zip(REGIMES, factors, estimator.ratio.shapes, strict=True):
        lines.append(f"| {name} | {factor:.3f} | {count} |")
    lines += [
        "",
        f"A step is large from {estimator.ratio.split_ms:.3g} ms on. Regimes with few shapes share the "
        "scale of a wider one; how far the tail reaches in units of it is common to all.",
        "",
        "## Measured domain",
        "",
        "| total | from | to |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {a} | {b} |" for n, a, b in zip(low._fields, low, high, strict=True)]
    lines += ["", *_inputs(inputs)]
    document = {
        "kind": estimator.kind,
        "explanation": explain_estimator(estimator),
        "report": report,
        "bound": estimator.ratio.payload(),
        "domain": {"low": low._asdict(), "high": high._asdict()},
        "inflation": estimator.inflation,
        "inputs": inputs,
    }
    return "\n".join(lines), document


def predictor_card(
    predictor: FittedPredictor, inputs: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """(Markdown, JSON) of a predictor's card."""
    report = predictor.report
    lines = [
        "# Rejection predictor",
        "",
        explain_predictor(predictor),
        "",
        "## On held-out prompts",
        "",
        "| predictor | AUC | false acceptance at 80 % recall | ECE | log loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in report["held_out"].items():
        figures = [row[k] for k in ("auc", "false_acceptance", "ece", "log_loss")]
        shown = " | ".join("–" if v is None else f"{v:.3f}" for v in figures)
        lines.append(f"| {name} | {shown} |")
    lines += [
        "",
        f"## Reliability of `{report['chosen']}`",
        "",
        "| predicted | kept | tokens |",
        "|---|---|---|",
    ]
    curve = report["held_out"][report["chosen"]]["reliability"]
    lines += [f"| {p:.3f} | {a:.3f} | {n} |" for p, a, n in curve]
    lines += ["", *_inputs(inputs)]
    document = {
        "kind": predictor.kind,
        "explanation": explain_predictor(predictor),
        "report": report,
        "inputs": inputs,
    }
    return "\n".join(lines), document


def _inputs(inputs: dict[str, str]) -> list[str]:
    listed = [f"- {name}: `{digest}`" for name, digest in inputs.items()]
    return ["## Made from", "", *listed, ""] if listed else []


def write_card(artifact: Path, card: tuple[str, dict[str, Any]]) -> tuple[Path, Path]:
    """Write ``NAME.card.md`` and ``NAME.card.json`` beside an artifact ``NAME.json``."""
    markdown, document = card
    text = artifact.with_name(f"{artifact.stem}.card.md")
    data = artifact.with_name(f"{artifact.stem}.card.json")
    files.write_atomic(text, markdown.encode())
    body = json.dumps(document, indent=1, ensure_ascii=False, default=files.plain)
    files.write_atomic(data, (body + "\n").encode())
    return text, data


COLORS = {
    "wisp-linear": "#d1495b",
    "staircase": "#edae49",
    "forest": "#66a182",
    "wispprof": "#00509d",
}


def plot_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``predicted.svg``, ``groups.svg`` and ``learning.svg``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(dict.fromkeys(r["estimator"] for r in found.groups))
    made = {
        "predicted.svg": _predicted(found, kinds),
        "groups.svg": _held_out_groups(found, kinds),
        "learning.svg": _learning(found, kinds),
    }
    paths = []
    for name, figure in made.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        files.write_atomic(folder / name, buffer.getvalue())
        paths.append(folder / name)
    return paths


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _predicted(found: Evaluation, kinds: list[str]) -> Figure:
    """Actual ÷ predicted over predicted, one panel per estimator, shapes outside the domain hollow."""
    figure = _figure(3.2 * len(kinds), 3.2)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        points = [p for p in found.points if p["estimator"] == kind]
        for inside in (True, False):
            chosen = [p for p in points if p["in_domain"] == inside]
            x = np.array([p["p50_ms"] for p in chosen])
            y = np.array([p["actual_ms"] for p in chosen]) / np.maximum(x, 1e-9)
            face = COLORS.get(kind, "#444444") if inside else "none"
            axis.scatter(x, y, s=8, linewidths=0.6, facecolors=face, edgecolors=COLORS.get(kind))
        axis.axhline(1.0, color="#222222", linewidth=0.8)
        axis.set(xscale="log", title=kind, xlabel="predicted ms", ylim=(0.5, 1.6))
    axes[0].set_ylabel("actual ÷ predicted (held out)")
    return figure


def _held_out_groups(found: Evaluation, kinds: list[str]) -> Figure:
    """Median and p90 absolute error by what was held out, in domain."""
    figure = _figure(7.5, 3.4)
    axis = figure.subplots()
    schemes = list(dict.fromkeys(r["scheme"] for r in found.groups))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        rows: dict[str, dict[str, Any]] = {
            r["scheme"]: r for r in found.groups if r["estimator"] == kind and r["in_domain"]
        }
        known = [s for s in schemes if s in rows]
        x = np.array([schemes.index(s) for s in known]) + (number - len(kinds) / 2 + 0.5) * width
        median = np.array([rows[s]["median_ape"] for s in known])
        p90 = np.array([rows[s]["p90_ape"] for s in known])
        axis.bar(x, median, width, color=COLORS.get(kind), label=kind)
        axis.vlines(x, median, p90, color=COLORS.get(kind), linewidth=2)
    axis.set_xticks(range(len(schemes)), schemes)
    axis.set(ylabel="absolute error, %: median (bar) to p90 (line)", yscale="log")
    axis.legend(frameon=False, ncols=2)
    return figure


def _learning(found: Evaluation, kinds: list[str]) -> Figure:
    """Error over the number of shapes learnt from: how small a profile is enough."""
    figure = _figure(5.0, 3.4)
    axis = figure.subplots()
    for kind in kinds:
        rows = [r for r in found.learning if r["estimator"] == kind]
        axis.plot(
            [r["shapes"] for r in rows],
            [r["mape"] for r in rows],
            marker="o",
            color=COLORS.get(kind),
            label=kind,
        )
    axis.axhline(found.noise["median"], color="#222222", linestyle=":", linewidth=1)
    axis.set(xlabel="shapes learnt from", ylabel="held-out MAPE, %", xscale="log", yscale="log")
    axis.legend(frameon=False)
    return figure
