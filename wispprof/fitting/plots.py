"""Pictures of a held-out evaluation, as SVG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wispprof.artifacts import files
from wispprof.fitting.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_evaluation"]

COLORS = {
    "wisp-linear": "#d1495b",
    "staircase": "#edae49",
    "forest": "#66a182",
    "wispprof": "#00509d",
}


def plot_evaluation(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``predicted.svg``, ``blocks.svg`` and ``learning.svg``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = list(dict.fromkeys(r["estimator"] for r in found.blocks))
    made = {
        "predicted.svg": _predicted(found, kinds),
        "blocks.svg": _blocks(found, kinds),
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


def _blocks(found: Evaluation, kinds: list[str]) -> Figure:
    """Median and p90 absolute error by what was held out, in domain."""
    figure = _figure(7.5, 3.4)
    axis = figure.subplots()
    schemes = list(dict.fromkeys(r["scheme"] for r in found.blocks))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        rows: dict[str, dict[str, Any]] = {
            r["scheme"]: r for r in found.blocks if r["estimator"] == kind and r["in_domain"]
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
