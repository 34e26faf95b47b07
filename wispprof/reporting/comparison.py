"""Two runs side by side, as one HTML file. Each figure stands over its data as a table.

A difference is B against A. Both runs were measured once each; the page says nothing about noise beyond what
the artifacts hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wispprof import __version__
from wispprof.artifacts import files
from wispprof.artifacts.manifest import utc_now
from wispprof.reporting import comparison_figures, theme
from wispprof.reporting.report import environment, machine_name
from wispprof.reporting.run_folder import Bench, Run
from wispprof.reporting.tables import Cell, Column, Table

_FIGURES = (
    ("goodput_tokens_per_s", "goodput, tokens/s"),
    ("attainment", "SLO attainment"),
    ("tokens_per_s", "all tokens/s"),
    ("ttft_p50_ms", "TTFT p50, ms"),
    ("ttft_p95_ms", "TTFT p95, ms"),
    ("tpot_p50_ms", "TPOT p50, ms"),
    ("tpot_p95_ms", "TPOT p95, ms"),
    ("accepted_per_round", "accepted per round"),
    ("step_p50_ms", "step p50, ms"),
)
_ERRORS = ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
_DRAFT_CONTEXTS = (64, 256, 1024, 4096)


@dataclass(frozen=True)
class Section:
    """One subject: words, a figure (or ""), and the data of the figure."""

    title: str
    text: str
    svg: str
    table: Table


def write_comparison(a: Run, b: Run, out: Path) -> Path:
    """Write the page atomically and return its file."""
    files.write_atomic(out, render_comparison(a, b).encode())
    return out


def render_comparison(a: Run, b: Run) -> str:
    """The page as HTML: one file without scripts, fonts or images from elsewhere."""
    benches = [[Bench.of(document) for document in run.benches] for run in (a, b)]
    made = (
        _benches(benches[0], benches[1]),
        _steps(a, b),
        _acceptance(a, b),
        _estimators(a, b),
        _drafting(a, b),
        _plans(a, b),
    )
    sections = [section for section in made if section is not None]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            css_variables=theme.CSS_VARIABLES,
            headline=_headline(benches[0], benches[1], sections),
            facts=_facts(a, b),
            sections=sections,
            names=(str(a.folder), str(b.folder)),
            version=__version__,
            date=utc_now()[:10],
        )
    )


def _change(before: float | None, after: float | None) -> float | None:
    """B over A, less one; ``None`` if either is missing or A is 0."""
    return None if before is None or after is None or before == 0 else after / before - 1.0


def _pair_columns(first: str, *, digits: int = 2, unit: str = "") -> tuple[Column, ...]:
    return (
        Column(first),
        Column("A", unit, digits),
        Column("B", unit, digits),
        Column("B against A", spec="+.1%"),
    )


def _headline(a: Sequence[Bench], b: Sequence[Bench], sections: Sequence[Section]) -> str:
    best = [max(benches, key=lambda bench: bench.goodput, default=None) for benches in (a, b)]
    first, second = best
    if first is None or second is None:
        return f"{len(sections)} things can be compared" if sections else "These runs have nothing in common"
    change = _change(first.goodput, second.goodput)
    words = f"{first.policy} in A, {second.policy} in B"
    if first.policy == second.policy:
        words = first.policy
    if change is None:
        return f"Best goodput ({words}): {first.goodput:,.0f} and {second.goodput:,.0f} tokens/s"
    return f"Best goodput ({words}): B {abs(change):.0%} {'above' if change >= 0 else 'below'} A"


# --- sections ---


def _benches(a: Sequence[Bench], b: Sequence[Bench]) -> Section | None:
    if not a or not b:
        return None
    pairs = [(one, other) for one in a for other in b if one.policy == other.policy]
    alone = sorted({x.policy for x in a} ^ {x.policy for x in b})
    rows: list[tuple[Cell, ...]] = []
    for one, other in pairs:
        for name, label in _FIGURES:
            before, after = one.figure(name), other.figure(name)
            if before is not None or after is not None:
                rows.append((f"{one.policy}: {label}", before, after, _change(before, after)))
    text = f"A: {a[0].load_text()}. B: {b[0].load_text()}."
    if dict(a[0].load) != dict(b[0].load):
        text += " The loads differ, so the figures do not compare the systems alone."
    if alone:
        text += f" Only in one of the runs: {', '.join(alone)}."
    if not pairs:
        return None
    return Section(
        "One load, every policy",
        text,
        comparison_figures.policy_pairs(pairs),
        Table("", _pair_columns("policy and figure"), tuple(rows)),
    )


def _steps(a: Run, b: Run) -> Section | None:
    if a.server is None or b.server is None:
        return None
    other = {row.key: row.median_ms for row in b.server.rows}
    both = [(row, other[row.key]) for row in a.server.rows if row.key in other]
    if not both:
        return None
    points = [(row.key, row.median_ms, after) for row, after in both]
    ratio = float(np.median([after / before for _, before, after in points if before > 0]))
    rows = tuple((key, before, after, _change(before, after)) for key, before, after in points)
    return Section(
        "What a step costs",
        f"{len(points)} batch shapes were measured in both. The median of B over A is {ratio:.3f}.",
        comparison_figures.step_ratios(points),
        Table("", _pair_columns("shape", unit="median ms"), rows),
    )


def _acceptance(a: Run, b: Run) -> Section | None:
    if a.trace is None or b.trace is None:
        return None
    curves = [trace.cum_acceptance_by_position() for trace in (a.trace, b.trace)]
    depth = max(map(len, curves))
    padded = [[float(c[i]) if i < len(c) else None for i in range(depth)] for c in curves]
    rows = tuple((str(i + 1), x, y, _change(x, y)) for i, (x, y) in enumerate(zip(*padded, strict=True)))
    pairs = [f"{trace.target} drafted by {trace.draft}" for trace in (a.trace, b.trace)]
    return Section(
        "How many drafts are accepted",
        f"A draft and all before it, by position. A: {pairs[0]}. B: {pairs[1]}.",
        comparison_figures.acceptance_curves(curves),
        Table("", _pair_columns("position", digits=3), rows),
    )


def _estimators(a: Run, b: Run) -> Section | None:
    if a.estimator is None or b.estimator is None:
        return None
    found = [run.report.get("held_out", {}).get(run.kind, {}) for run in (a.estimator, b.estimator)]
    rows = [
        (name.replace("_", " "), *(errors.get(name) for errors in found))
        for name in _ERRORS
        if any(name in errors for errors in found)
    ]
    if not rows:
        return None
    kinds = a.estimator.kind, b.estimator.kind
    columns = (Column("error on held-out shapes"), Column("A", "%", 2), Column("B", "%", 2))
    text = f"A fits {kinds[0]}, B fits {kinds[1]}."
    svg = comparison_figures.bars([row[0] for row in rows], [row[1:] for row in rows], "error, %")
    return Section("How well step times are predicted", text, svg, Table("", columns, tuple(rows)))


def _drafting(a: Run, b: Run) -> Section | None:
    if a.edge is None or b.edge is None:
        return None
    if not (a.edge.of_kind("draft_step") and b.edge.of_kind("draft_step")):
        return None
    rows = []
    for context in _DRAFT_CONTEXTS:
        before, after = a.edge.draft_ms(context), b.edge.draft_ms(context)
        rows.append((f"{context:,} tokens", before, after, _change(before, after)))
    svg = comparison_figures.bars([row[0] for row in rows], [row[1:3] for row in rows], "draft step, ms")
    text = "Between the measured contexts it is interpolated; beyond them the nearest is taken."
    return Section(
        "What a draft step costs", text, svg, Table("", _pair_columns("context", unit="ms"), tuple(rows))
    )


def _plans(a: Run, b: Run) -> Section | None:
    if a.plan is None or b.plan is None:
        return None
    other = {row.cell: row for row in b.plan.draft}
    both = [(row, other[row.cell]) for row in a.plan.draft if row.cell in other]
    if not both:
        return None
    changed = [(x, y) for x, y in both if x.k != y.k]
    columns = (
        *(Column("cell"), Column("k in A"), Column("k in B")),
        *(Column("A", "tokens/s"), Column("B", "tokens/s"), Column("B against A", spec="+.1%")),
    )
    rows = tuple(
        (
            x.cell,
            *(x.k, y.k, x.expected_tokens_per_s, y.expected_tokens_per_s),
            _change(x.expected_tokens_per_s, y.expected_tokens_per_s),
        )
        for x, y in both
    )
    speeds = [(x.cell, x.expected_tokens_per_s, y.expected_tokens_per_s) for x, y in both]
    return Section(
        "How far to draft",
        f"{len(both)} cells stand in both plans; the draft length differs in {len(changed)}. Predicted.",
        comparison_figures.step_ratios(speeds, "predicted tokens/s"),
        Table("", columns, rows),
    )


def _facts(a: Run, b: Run) -> Table:
    """What the runs were made of, with a mark where they differ."""
    found: list[dict[str, str]] = []
    for run in (a, b):
        mine: dict[str, str] = {}
        for side, profile in (("server", run.server), ("edge", run.edge)):
            if profile is not None:
                manifest = profile.manifest
                mine[f"{side}: machine"] = machine_name(manifest.hardware)
                mine[f"{side}: model"] = f"{manifest.model.id} {manifest.model.dtype}"
                mine[f"{side}: command"] = manifest.command
                mine |= {f"{side}: {name}": str(version) for name, version in manifest.versions.items()}
        if run.trace is not None:
            mine["trace"] = f"{len(run.trace.paths)} prompts, temperature {run.trace.sampling.temperature:g}"
        mine["artifacts"] = ", ".join(run.names())
        found.append(mine)
    names = list(dict.fromkeys((*found[0], *found[1])))
    rows: list[tuple[Any, ...]] = []
    for name in names:
        values = [mine.get(name) or None for mine in found]
        if any(values):
            rows.append((name, *values, "" if values[0] == values[1] else "differs"))
    return Table("", tuple(map(Column, ("", "A", "B", " "))), tuple(rows))
