"""Figures of measured records. Each function returns one inline SVG."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace, StepRow
from wispprof.reporting import theme
from wispprof.reporting.run_folder import Bench, StepPoint
from wispprof.types import BatchShape, StepTimeEstimator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS, MAX_LINES = 3, 6
PROFILE = "profile"
"""Group of the steps that the estimator was fitted on; every other group is a policy."""


def latency_surface(rows: Sequence[StepRow], estimator: StepTimeEstimator) -> str:
    """Step time (ms) over cached tokens: a line per number of sessions, a panel per number of new tokens.

    Points: medians of measured uniform verify shapes, with bars from the 10th to the 90th percentile.
    Lines: the estimator's median; shaded: up to its bound. Other shapes are left out. Empty if the
    profile holds no uniform verify shapes.
    """
    uniform = [row for row in rows if row.kind == "verify" and len(set(row.shape.items)) == 1]
    counts = Counter(row.shape.items[0].new for row in uniform)
    panels = sorted(new for new, _ in counts.most_common(MAX_PANELS))
    if not panels:
        return ""
    sizes = _spread(sorted({len(row.shape.items) for row in uniform}), MAX_LINES)
    colors = dict(zip(sizes, theme.ramp(len(sizes)), strict=True))
    with theme.canvas(9.4, 3.6, len(panels), sharey=True) as (figure, axes):
        for panel, new in zip(axes, panels, strict=True):
            for size in sizes:
                own = [
                    row for row in uniform if row.shape.items[0].new == new and len(row.shape.items) == size
                ]
                if own:
                    _surface_line(panel, own, estimator, size, new, colors[size])
            panel.set_xscale("symlog", base=2, linthresh=32, linscale=0.6)
            panel.set_yscale("log")
            ticks = sorted({row.shape.items[0].cached for row in uniform})
            panel.set_xticks(_spread(ticks, 6), [f"{t:,}" for t in _spread(ticks, 6)])
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            low, high = panel.get_ylim()
            panel.set_yticks(_log_ticks(low, high))
            theme.finish(
                panel,
                "cached tokens per session",
                "step time, ms" if panel is axes[0] else "",
                f"{new} new token{'s' if new > 1 else ''} per session",
            )
        handles, labels = _legend_of(axes)
        figure.legend(handles, labels, loc="outside right upper", title="sessions", alignment="left")
        return theme.svg(
            figure,
            "surface",
            "Step time in milliseconds by cached tokens, sessions and new tokens, measured and fitted",
        )


def _surface_line(
    panel: Axes, rows: Sequence[StepRow], estimator: StepTimeEstimator, size: int, new: int, color: str
) -> None:
    rows = sorted(rows, key=lambda row: row.shape.items[0].cached)
    x = np.array([row.shape.items[0].cached for row in rows], dtype=float)
    y = np.array([row.median_ms for row in rows])
    low = np.array([np.percentile(row.samples_ms, 10) for row in rows])
    high = np.array([np.percentile(row.samples_ms, 90) for row in rows])
    line = np.unique(np.linspace(x[0], x[-1], 48).astype(int))
    fit = np.array([estimator.predict(BatchShape.uniform(size, new, int(c))) for c in line])
    panel.fill_between(line, fit[:, 0], fit[:, 1], color=color, alpha=0.13, linewidth=0)
    panel.plot(line, fit[:, 0], color=color, linewidth=1.3)
    panel.errorbar(
        x,
        y,
        yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)],
        fmt="o",
        color=color,
        elinewidth=0.9,
        markersize=4.5,
        label=str(size),
    )


def predicted_against_measured(points: Sequence[StepPoint], coverage: float) -> str:
    """Left: measured over predicted step time (ms, log axes). Right: the distribution of measured ÷ bound.

    The bound holds if the curve on the right crosses 1 at or above ``coverage``.
    """
    groups: dict[str, list[StepPoint]] = defaultdict(list)
    for point in points:
        groups[point.group].append(point)
    with theme.canvas(9.4, 3.9, 2) as (figure, (left, right)):
        everything = [v for p in points for v in (p.predicted_ms, p.measured_ms) if v > 0]
        edge = (min(everything) * 0.8, max(everything) * 1.25)
        left.plot(edge, edge, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for index, (name, own) in enumerate(groups.items()):
            color = theme.MUTED if name == PROFILE else theme.policy_color(name)
            left.scatter(
                [p.predicted_ms for p in own],
                [p.measured_ms for p in own],
                s=14,
                marker=theme.MARKERS[index % len(theme.MARKERS)],
                color=color,
                alpha=0.55,
                linewidths=0,
                label=f"{name} ({len(own):,})",
            )
            ratios = np.sort([p.measured_ms / p.bound_ms for p in own if p.bound_ms > 0])
            if len(ratios):
                share = np.arange(1, len(ratios) + 1) / len(ratios)
                right.plot(ratios, share, color=color, drawstyle="steps-post", label=name)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlim(*edge)
        left.set_ylim(*edge)
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        left.set_xticks(_log_ticks(*edge))
        left.set_yticks(_log_ticks(*edge))
        left.minorticks_off()
        left.legend(loc="upper left", handletextpad=0.2)
        theme.finish(left, "predicted step time, ms", "measured step time, ms", "Every step")
        right.axvline(1.0, color=theme.MUTED, linewidth=1)
        right.axhline(coverage, color=theme.MUTED, linewidth=1, linestyle=(0, (4, 3)))
        right.set_xlim(0.3, 1.8)
        right.set_ylim(0, 1.01)
        right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        right.annotate(
            f"target {100 * coverage:.0f} %",
            (0.31, coverage),
            xytext=(2, -11),
            textcoords="offset points",
            color=theme.MUTED,
            fontsize=8,
        )
        theme.finish(right, "measured ÷ upper bound", "share of steps", "The bound")
        return theme.svg(figure, "steps", "Predicted against measured step times")


def acceptance_by_position(trace: AcceptanceTrace) -> str:
    """Acceptance by position: cumulative, and given that all drafts before it were accepted.

    The 95 % intervals are a seeded percentile bootstrap over whole prompts, because positions of one
    prompt are not independent.
    """
    cum_acceptance = trace.cum_acceptance_by_position()
    low, high = bootstrap(trace)
    position = np.arange(1, len(cum_acceptance) + 1)
    before = np.concatenate([[1.0], cum_acceptance[:-1]])
    given = np.divide(cum_acceptance, before, out=np.full_like(cum_acceptance, np.nan), where=before > 0)
    with theme.canvas(6.6, 3.5) as (figure, (axes,)):
        axes.bar(
            position,
            cum_acceptance,
            width=0.68,
            color=theme.ACCENT,
            alpha=0.85,
            label="this draft and all before it",
        )
        axes.errorbar(
            position,
            cum_acceptance,
            yerr=[np.maximum(cum_acceptance - low, 0), np.maximum(high - cum_acceptance, 0)],
            fmt="none",
            ecolor=theme.INK,
            elinewidth=1,
            capsize=3,
        )
        axes.plot(
            position,
            given,
            color=theme.SERIES[1],
            marker=theme.MARKERS[1],
            label="this draft, given all before it",
        )
        for x, value, top in zip(position, cum_acceptance, high, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (x, min(value, top)),
                xytext=(0, -13),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=theme.PAPER,
            )
        axes.set_ylim(0, 1.02)
        axes.set_xticks(position)
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.13))
        theme.finish(axes, "position of the draft token in its round", "share accepted")
        return theme.svg(figure, "acceptance", "Share of draft tokens accepted by position")


def bootstrap(trace: AcceptanceTrace, draws: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """(2.5th, 97.5th percentile) of the cumulative acceptance, each (depth,)."""
    per_path = [p.accepted[: p.scored_rows()] for p in trace.paths if p.scored_rows()]
    hits = np.array([[(a > j).sum() for j in range(trace.depth)] for a in per_path], dtype=float)
    rows = np.array([len(a) for a in per_path], dtype=float)
    picks = np.random.default_rng(0).integers(len(per_path), size=(draws, len(per_path)))
    shares = hits[picks].sum(1) / rows[picks].sum(1)[:, None]
    return np.percentile(shares, 2.5, axis=0), np.percentile(shares, 97.5, axis=0)


def policy_bars(benches: Sequence[Bench]) -> str:
    """Goodput (solid) within all committed tokens/s (pale), and SLO attainment, per policy."""
    position = np.arange(len(benches))
    with theme.canvas(9.4, 0.62 * len(benches) + 1.25, 2, sharey=True) as (figure, (left, right)):
        for index, bench in enumerate(benches):
            color = theme.policy_color(bench.policy)
            left.barh(index, bench.throughput, height=0.62, color=color, alpha=0.25)
            left.barh(index, bench.goodput, height=0.62, color=color)
            right.barh(index, bench.attainment, height=0.62, color=color)
            _bar_label(left, max(bench.throughput, bench.goodput), index, f"{bench.goodput:,.0f}")
            _bar_label(right, bench.attainment, index, f"{100 * bench.attainment:.0f} %")
        left.set_yticks(position, [bench.policy for bench in benches])
        left.tick_params(axis="y", labelcolor=theme.INK, length=0, labelsize=9.5)
        right.tick_params(axis="y", length=0)
        left.invert_yaxis()
        left.set_xlim(0, max(max(b.throughput, b.goodput) for b in benches) * 1.14 or 1)
        right.set_xlim(0, 1.14)
        right.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
        theme.finish(left, "tokens/s (pale: all, solid: goodput)", "", "Goodput")
        theme.finish(right, f"sessions that met {benches[0].slo_text()}", "", "SLO attainment")
        return theme.svg(figure, "policies", "Goodput and SLO attainment by policy")


def _bar_label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``values``, ends included, evenly over their order."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1-2-5 ticks between two positive values."""
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return ticks or [statistics.geometric_mean((low, high))]


def _legend_of(panels: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """One legend entry per label over all panels, in rising order of its number."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found.update(zip(labels, handles, strict=True))
    order = sorted(found, key=int)
    return [found[label] for label in order], order
