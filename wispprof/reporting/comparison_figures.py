"""Figures of two runs, A and B, in the style of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wispprof.reporting import theme
from wispprof.reporting.run_folder import Bench

A, B = theme.SERIES[0], theme.SERIES[3]
_HEIGHT = 0.36


def policy_pairs(pairs: Sequence[tuple[Bench, Bench]]) -> str:
    """Goodput (solid) within all committed tokens/s (pale), and SLO attainment: A above B for each policy."""
    position = np.arange(len(pairs))
    with theme.canvas(9.4, 0.85 * len(pairs) + 1.25, 2, sharey=True) as (figure, (left, right)):
        for side, color, offset in ((0, A, -_HEIGHT / 2), (1, B, _HEIGHT / 2)):
            benches = [pair[side] for pair in pairs]
            at = position + offset
            left.barh(at, [b.throughput for b in benches], height=_HEIGHT, color=color, alpha=0.25)
            left.barh(at, [b.goodput for b in benches], height=_HEIGHT, color=color, label="AB"[side])
            right.barh(at, [b.attainment for b in benches], height=_HEIGHT, color=color)
        left.set_yticks(position, [pair[0].policy for pair in pairs])
        left.tick_params(axis="y", labelcolor=theme.INK, length=0, labelsize=9.5)
        right.tick_params(axis="y", length=0)
        left.invert_yaxis()
        right.set_xlim(0, 1.02)
        right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
        figure.legend(loc="outside right upper")
        theme.finish(left, "tokens/s (pale: all, solid: goodput)", "", "Goodput")
        theme.finish(right, "sessions that met their SLO", "", "SLO attainment")
        return theme.svg(figure, "compare-policies", "Goodput and SLO attainment of both runs by policy")


def step_ratios(points: Sequence[tuple[str, float, float]], unit: str = "median step time, ms") -> str:
    """Left: B over A, a point for each (name, A, B), on log axes. Right: the distribution of B ÷ A."""
    usable = [(before, after) for _, before, after in points if before > 0 and after > 0]
    if not usable:
        return ""
    a, b = np.array(usable).T
    edge = (0.85 * min(a.min(), b.min()), 1.18 * max(a.max(), b.max()))
    with theme.canvas(9.4, 3.7, 2) as (figure, (left, right)):
        left.plot(edge, edge, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        left.scatter(a, b, s=18, color=B, alpha=0.6, linewidths=0)
        left.set_xscale("log")
        left.set_yscale("log")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        theme.finish(left, f"A: {unit}", f"B: {unit}", "Each of both")
        ratios = np.sort(b / a)
        share = np.arange(1, len(ratios) + 1) / len(ratios)
        right.plot(ratios, share, color=B, drawstyle="steps-post")
        right.axvline(1.0, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        right.set_ylim(0, 1.02)
        theme.finish(right, "B ÷ A", "share of them", "Distribution")
        return theme.svg(figure, f"compare-{unit.split(',')[0]}", f"{unit} of B against A")


def acceptance_curves(curves: Sequence[np.ndarray]) -> str:
    """Share of drafts accepted with all before them, by position."""
    with theme.canvas(6.6, 3.4) as (figure, (axes,)):
        for name, curve, color, marker in zip("AB", curves, (A, B), theme.MARKERS, strict=False):
            axes.plot(np.arange(1, len(curve) + 1), curve, color=color, marker=marker, label=name)
        axes.set_ylim(0, 1.02)
        axes.set_xticks(np.arange(1, max(map(len, curves)) + 1))
        axes.legend(loc="upper right")
        theme.finish(axes, "position of the draft token in its round", "share accepted")
        return theme.svg(
            figure, "compare-acceptance", "Share of draft tokens accepted by position, both runs"
        )


def bars(names: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> str:
    """A pair of bars, A above B, for each name; ``None`` has no bar."""
    position = np.arange(len(names))
    with theme.canvas(7.4, 0.62 * len(names) + 1.2) as (figure, (axes,)):
        for side, color, offset in ((0, A, -_HEIGHT / 2), (1, B, _HEIGHT / 2)):
            widths = [np.nan if pair[side] is None else pair[side] for pair in values]
            axes.barh(position + offset, widths, height=_HEIGHT, color=color, label="AB"[side])
        axes.set_yticks(position, list(names))
        axes.tick_params(axis="y", labelcolor=theme.INK, length=0)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside right upper")
        theme.finish(axes, label, "")
        return theme.svg(figure, f"compare-{label.split(',')[0]}", f"{label} of both runs")
