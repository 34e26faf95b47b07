"""From the artifacts of a run to its page: each section is there where what it shows is there."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from wispprof import __version__
from wispprof.artifacts import files
from wispprof.artifacts.manifest import utc_now
from wispprof.reporting import figures
from wispprof.reporting.bench_records import Answer, Bench, bench_table
from wispprof.reporting.page import Page, Section, Tile, facts, figure
from wispprof.reporting.plan_sections import capacity_sections, plan_sections
from wispprof.reporting.run_folder import Run
from wispprof.reporting.tables import Column, Table, to_html
from wispprof.types import StepTimeEstimator

ALONE = "server-only"
EVEN = 0.03
"""Goodput within this share of each other counts as equal."""


def write_report(run: Run, out: Path) -> Path:
    """Write the page of ``run`` atomically and return its file."""
    files.write_atomic(out, render_report(run).encode())
    return out


def render_report(run: Run) -> str:
    """The page as HTML."""
    benches = [Bench.of(document) for document in run.benches]
    answer = Answer.of(run.answer) if run.answer else None
    sections = [
        *_policies(benches),
        *_answer(answer),
        *_surface(run),
        *_accuracy(run, benches),
        *_acceptance(run),
        *plan_sections(run, benches),
        *capacity_sections(run),
        _provenance(run),
    ]
    return Page(
        title="wispprof report",
        headline=verdict(benches) or "What was measured",
        draft_ahead=_lead(run, benches),
        tiles=_tiles(run, benches, answer),
        sections=sections,
        footer=f"Made by wispprof {__version__} on {utc_now()[:10]} from the artifacts in "
        f"{run.folder.name}. Every figure on this page was measured in this run unless it says "
        "otherwise.",
    ).render()


# --- the head -------------------------------------------------------------------------------------


def verdict(benches: Sequence[Bench]) -> str:
    """One sentence on whether split serving paid under this load; empty without a comparison."""
    alone = next((b for b in benches if b.policy == ALONE), None)
    split = [b for b in benches if b.policy != ALONE]
    if alone is None or not split:
        return ""
    best = max(split, key=lambda b: b.bar().goodput)
    ours, theirs = best.bar().goodput, alone.bar().goodput
    if ours <= 0 and theirs <= 0:
        return "Under this load no policy met any SLO"
    if theirs <= 0:
        return f"Under this load only split serving met an SLO, with {best.policy}"
    ratio = ours / theirs
    if ratio > 1 + EVEN:
        return (
            f"Split serving pays here: {best.policy} delivers {ratio:.2f} × the goodput of the "
            "server alone"
        )
    if ratio < 1 - EVEN:
        return (
            f"Split serving does not pay here: the server alone delivers {1 / ratio:.2f} × the "
            f"goodput of {best.policy}"
            if ratio > 0
            else "Split serving does not pay here: only the server alone met an SLO"
        )
    return f"Here {best.policy} and the server alone deliver the same goodput"


def _lead(run: Run, benches: Sequence[Bench]) -> str:
    parts = []
    if benches:
        parts.append(f"{benches[0].load_words()}; the same engine and load under every policy.")
    profile = run.server or run.edge
    if profile is not None:
        machine = _machine(profile.manifest.hardware)
        parts.append(f"Measured on {machine} with {profile.manifest.model.id}.")
    return " ".join(parts)


def _machine(hardware: dict[str, object]) -> str:
    name = hardware.get("board") or hardware.get("cpu") or hardware.get("arch") or "this machine"
    gpus = hardware.get("gpus")
    found = (
        [str(g.get("name")) for g in gpus if isinstance(g, dict)] if isinstance(gpus, list) else []
    )
    return ", ".join([str(name), f"{hardware.get('cores', '?')} cores", *found])


def _tiles(run: Run, benches: Sequence[Bench], answer: Answer | None) -> list[Tile]:
    tiles = []
    if benches:
        best = max(benches, key=lambda b: b.bar().goodput)
        bar = best.bar()
        tiles += [
            Tile(f"goodput, {best.policy}", f"{bar.goodput:,.0f}", "tokens/s"),
            Tile(f"SLO attainment, {best.policy}", f"{100 * bar.attainment:.0f}", "%"),
        ]
    if run.trace is not None:
        cum_acceptance = run.trace.cum_acceptance_by_position()
        tiles.append(Tile("first draft accepted", f"{100 * cum_acceptance[0]:.0f}", "%"))
    if run.edge is not None and run.edge.of_kind("draft_step"):
        tiles.append(Tile("draft step, edge", f"{run.edge.draft_ms(256):.2f}", "ms"))
    error = _held_out_error(run)
    if error is not None:
        tiles.append(Tile("step time error, held out", f"{error:.1f}", "% MAPE"))
    if answer is not None and isinstance(speed := answer.stats.get("tokens_per_s"), int | float):
        tiles.append(Tile("real edge, alone", f"{speed:,.0f}", "tokens/s"))
    return tiles


def _held_out_error(run: Run) -> float | None:
    if run.estimator is None:
        return None
    errors = run.estimator.report.get("held_out", {}).get(run.estimator.kind, {})
    return float(errors["mape"]) if "mape" in errors else None


# --- sections -------------------------------------------------------------------------------------


def _policies(benches: Sequence[Bench]) -> list[Section]:
    if not benches:
        return []
    slo = benches[0].slo_text()
    body = figure(figures.policy_bars([b.bar() for b in benches], slo))
    body += to_html(bench_table(benches))
    return [
        Section(
            "policies",
            "One load, every policy",
            "Goodput counts the tokens of sessions that met their SLO. The "
            "server-only server sends no drafts and runs on the same kernels as the rest.",
            body,
        )
    ]


def _answer(answer: Answer | None) -> list[Section]:
    if answer is None:
        return []
    text = "".join(
        f'<span class="{piece.origin[0]}">{html.escape(piece.text)}</span>'
        for piece in answer.pieces
    )
    drafted = sum(len(p.text) for p in answer.pieces if p.origin == "draft")
    share = drafted / max(1, len(answer.text))
    legend = (
        '<p class="note"><span class="key d"></span>drafted by the edge and accepted '
        f'({100 * share:.0f} % of the text) &nbsp; <span class="key t"></span>the target’s own tokens'
        "</p>"
    )
    body = f'<pre class="answer"><span class="p">{html.escape(answer.prompt)}</span>{text}</pre>{legend}'
    return [
        Section(
            "answer",
            "What a user of the edge sees",
            "A real draft model on the edge, a real server over a WebSocket. The text is exactly what "
            "the target alone would have written.",
            body,
        )
    ]


def _surface(run: Run) -> list[Section]:
    if run.server is None or run.estimator is None:
        return []
    rows = run.server.rows
    if not any(r.kind == "verify" and len(set(r.shape.items)) == 1 for r in rows):
        return []
    noisy = sum(bool(r.flags) for r in rows)
    note = (
        f"Points: medians of {len(rows)} measured shapes with the 10th to 90th percentile of their "
        "samples. Lines: the fitted median; shaded: up to the bound. "
        f"{noisy} rows carry a flag (drift, noise or throttling)."
    )
    return [
        Section(
            "surface",
            "What a verify step costs",
            "The time of one target forward over a ragged batch, by what the sessions bring and what "
            "they have cached. Speculation is free while the lines are flat.",
            figure(figures.latency_surface(rows, run.estimator), note=note),
        )
    ]


def _accuracy(run: Run, benches: Sequence[Bench]) -> list[Section]:
    estimator = run.estimator
    if estimator is None:
        return []
    points = _profile_points(run, estimator) + [p for b in benches for p in b.points()]
    body = ""
    if points:
        body = figure(
            figures.predicted_against_measured(points, estimator.coverage),
            note="Steps of the profile are those the estimator was fitted on; steps of the policies "
            "came later, under load.",
        )
    held_out = estimator.report.get("held_out", {})
    if held_out:
        names = ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
        table = Table(
            "",
            (
                Column("estimator"),
                *(Column(n.replace("_", " "), "%", 2) for n in names[:-1]),
                Column("bias", "%", 2),
                Column("never falls"),
                Column("chosen"),
            ),
            tuple(
                (
                    name,
                    *(errors.get(n) for n in names),
                    bool(estimator.report.get("monotone", {}).get(name, False)),
                    name == estimator.kind,
                )
                for name, errors in held_out.items()
            ),
            note="Errors on shapes that were held out whole. "
            f"Median repeat noise of a row: {estimator.report.get('repeat_noise_percent', 0):.2f} %.",
        )
        body += to_html(table)
    return [
        Section(
            "accuracy",
            "Predicted and measured",
            "Deadlines are checked against the upper bound, throughput is planned on the median.",
            body,
        )
    ]


def _profile_points(run: Run, estimator: StepTimeEstimator) -> list[figures.StepPoint]:
    if run.server is None:
        return []
    predictions = [(estimator.predict(row.shape), row.median_ms) for row in run.server.rows]
    return [figures.StepPoint(p, b, m, figures.PROFILE) for (p, b), m in predictions]


def _acceptance(run: Run) -> list[Section]:
    trace = run.trace
    if trace is None or not sum(p.scored_rows() for p in trace.paths):
        return []
    cum_acceptance = trace.cum_acceptance_by_position()
    positions = sum(p.scored_rows() for p in trace.paths)
    sampling = trace.sampling
    how = "greedy" if sampling.temperature == 0 else f"T = {sampling.temperature:g}"
    note = (
        f"{positions:,} positions of {len(trace.paths)} held-out prompts, {how}, censored rows left "
        f"out. A round of {trace.depth} drafts commits {1 + float(cum_acceptance.sum()):.2f} tokens on "
        "average. Bars: 95 % interval over prompts."
    )
    return [
        Section(
            "acceptance",
            "How many drafts are accepted",
            "The share of draft tokens that the target accepts, by their place in the round.",
            figure(figures.acceptance_by_position(trace), narrow=True, note=note),
        )
    ]


def _provenance(run: Run) -> Section:
    table = Table(
        "",
        (
            Column("file"),
            Column("kind"),
            Column("content hash"),
            Column("made"),
            Column("made from"),
        ),
        tuple(
            (
                source.file,
                source.kind,
                source.hash.removeprefix("blake2b:")[:16],
                source.created[:19].replace("T", " "),
                ", ".join(sorted(source.inputs)),
            )
            for source in sorted(run.sources, key=lambda s: (s.created, s.file))
        ),
    )
    entries: list[tuple[str, str]] = []
    for side, profile in (("server", run.server), ("edge", run.edge)):
        if profile is None:
            continue
        manifest = profile.manifest
        settings = ", ".join(
            f"{k} {v}" for k, v in manifest.engine.items() if not isinstance(v, dict)
        )
        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        entries += [
            (f"{side}: machine", _machine(manifest.hardware)),
            (
                f"{side}: model",
                f"{manifest.model.id} {manifest.model.dtype}, "
                f"{manifest.model.parameters / 1e6:.1f} M parameters",
            ),
            (f"{side}: engine", settings),
            (f"{side}: command", manifest.command),
            (f"{side}: versions", versions),
        ]
    stale = run.stale()
    warning = (
        f'<p class="note">Made from files that have changed since: {html.escape(", ".join(stale))}.</p>'
        if stale
        else ""
    )
    return Section(
        "provenance",
        "Where the figures come from",
        "Every artifact names what it was made from by the hash of its content.",
        to_html(table) + warning + facts(entries),
    )
