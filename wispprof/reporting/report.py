"""The HTML report of a run: a section for each kind of artifact, drawn by Jinja2 templates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from wispprof import __version__
from wispprof.artifacts import ServerProfile, files
from wispprof.artifacts.manifest import utc_now
from wispprof.hardware.machine_info import cores_text
from wispprof.reporting import figures, theme
from wispprof.reporting.figure_tables import acceptance_table, step_table, surface_table
from wispprof.reporting.fleet_section import fleet_section
from wispprof.reporting.plan_section import capacity_curves, capacity_points, plan_section
from wispprof.reporting.run_folder import Answer, Bench, Run, StepPoint, bench_table
from wispprof.reporting.tables import Column, Table
from wispprof.types import StepTimeEstimator

SERVER_ONLY = "server-only"
EQUAL_GOODPUT_MARGIN = 0.03


@cache
def environment() -> Environment:
    """The templates of the pages."""
    return Environment(
        loader=PackageLoader("wispprof.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_macros() -> Any:
    """The macros of ``templates/macros.html`` as functions that return HTML."""
    return environment().get_template("macros.html").module


def to_html(table: Table) -> str:
    """The table as HTML; the best cells of a column have the class ``best``."""
    return str(page_macros().table(table))


def write_report(run: Run, out: Path) -> Path:
    """Write the page of ``run`` atomically and return its file."""
    files.write_atomic(out, render_report(run).encode())
    return out


def render_report(run: Run) -> str:
    """The page as HTML: one file without scripts, fonts or images from elsewhere."""
    benches = [Bench.of(document) for document in run.benches]
    answer = Answer.of(run.answer) if run.answer else None
    fleet = fleet_section(run.fleet)
    return (
        environment()
        .get_template("report.html")
        .render(
            css_variables=theme.CSS_VARIABLES,
            headline=verdict(benches) or (fleet["headline"] if fleet else "What was measured"),
            summary=_summary(run, benches) or (fleet["lead"] if fleet else ""),
            fleet=fleet,
            tiles=_tiles(run, benches, answer),
            policies=_policies(benches),
            answer=answer,
            surface=_surface(run),
            accuracy=_accuracy(run, benches),
            acceptance=_acceptance(run),
            plan=plan_section(run.plan, benches),
            capacity=_capacity(run),
            provenance=_provenance(run),
            version=__version__,
            date=utc_now()[:10],
            folder=run.folder.name,
        )
    )


def verdict(benches: Sequence[Bench]) -> str:
    """One sentence on whether split serving pays under this load; empty without a comparison."""
    server_only = next((b for b in benches if b.policy == SERVER_ONLY), None)
    split = [b for b in benches if b.policy != SERVER_ONLY]
    if server_only is None or not split:
        return ""
    best = max(split, key=lambda b: b.goodput)
    if best.goodput <= 0 and server_only.goodput <= 0:
        return "Under this load no policy met any SLO"
    if server_only.goodput <= 0:
        return f"Under this load only split serving met an SLO, with {best.policy}"
    if best.goodput <= 0:
        return "Split serving does not pay here: only the server alone met an SLO"
    ratio = best.figure("goodput_ratio") or best.goodput / server_only.goodput
    low, high = best.figure("goodput_ratio_low"), best.figure("goodput_ratio_high")
    if low is None or high is None:
        decided, sure = abs(ratio - 1.0) > EQUAL_GOODPUT_MARGIN, ""
    else:
        decided, sure = not low <= 1.0 <= high, f" (95 % interval of the ratio: {low:.2f} to {high:.2f})"
    if not decided and sure:
        return f"Undecided: {best.policy} delivers {ratio:.2f} × the goodput of the server alone{sure}"
    if not decided:
        return f"Here {best.policy} and the server alone deliver the same goodput"
    if ratio > 1.0:
        return (
            f"Split serving pays here: {best.policy} delivers {ratio:.2f} × the goodput of the server "
            f"alone{sure}"
        )
    return (
        f"Split serving does not pay here: the server alone delivers {1 / ratio:.2f} × the goodput of "
        f"{best.policy}{sure}"
    )


def _summary(run: Run, benches: Sequence[Bench]) -> str:
    parts = []
    if benches:
        parts.append(f"{benches[0].load_text()}; the same engine and load under every policy.")
    profile = run.server or run.edge
    if profile is not None:
        machine = machine_name(profile.manifest.hardware)
        parts.append(f"Measured on {machine} with {profile.manifest.model.id}.")
    return " ".join(parts)


def machine_name(hardware: dict[str, Any]) -> str:
    """Board or CPU, cores and GPUs."""
    name = hardware.get("board") or hardware.get("cpu") or hardware.get("arch") or "this machine"
    gpus = [str(gpu.get("name")) for gpu in hardware.get("gpus") or ()]
    return ", ".join([str(name), cores_text(hardware.get("cores", "?")), *gpus])


def _tiles(run: Run, benches: Sequence[Bench], answer: Answer | None) -> list[tuple[str, str, str]]:
    """The key figures: name, value and unit."""
    tiles = []
    if benches:
        best = max(benches, key=lambda b: b.goodput)
        tiles += [
            (f"goodput, {best.policy}", f"{best.goodput:,.0f}", "tokens/s"),
            (f"SLO attainment, {best.policy}", f"{100 * best.attainment:.0f}", "%"),
        ]
    if run.trace is not None:
        first = run.trace.cum_acceptance_by_position()[0]
        tiles.append(("first draft accepted", f"{100 * first:.0f}", "%"))
    if run.edge is not None and run.edge.of_kind("draft_step"):
        tiles.append(("draft step, edge", f"{run.edge.draft_ms(256):.2f}", "ms"))
    if run.estimator is not None:
        errors = run.estimator.report.get("held_out", {}).get(run.estimator.kind, {})
        if "mape" in errors:
            tiles.append(("step time error, held out", f"{errors['mape']:.1f}", "% MAPE"))
    if run.fleet is not None and (option := run.fleet.best) is not None:
        tiles += [
            (f"servers, {option.server}", str(option.bought), f"{run.fleet.spare} spare"),
            ("price", f"{option.dollars_per_h:,.2f}", "$/h"),
            ("a million tokens", f"{option.dollars_per_mtoken:,.2f}", "$"),
        ]
        met = option.fleet_attainment or option.attainment
        if met is not None:
            tiles.append(("SLO attainment, whole fleet", f"{100 * met:.1f}", "%"))
    if answer is not None and isinstance(speed := answer.stats.get("tokens_per_s"), int | float):
        tiles.append(("real edge, alone", f"{speed:,.0f}", "tokens/s"))
    return tiles


def _policies(benches: Sequence[Bench]) -> dict[str, Any] | None:
    if not benches:
        return None
    return {"svg": figures.policy_bars(benches), "table": bench_table(benches)}


def _surface(run: Run) -> dict[str, Any] | None:
    if run.server is None or run.estimator is None:
        return None
    rows = [row for row in run.server.rows if row.kind != "sentinel"]
    svg = figures.latency_surface(rows, run.estimator)
    flagged = sum(bool(row.flags) for row in rows)
    if not svg:
        return None
    data = surface_table(rows, run.estimator)
    return {"svg": svg, "rows": len(rows), "flagged": flagged, "data": data}


def _accuracy(run: Run, benches: Sequence[Bench]) -> dict[str, Any] | None:
    estimator = run.estimator
    if estimator is None:
        return None
    points = _profile_points(run.server, estimator) + [p for b in benches for p in b.points()]
    svg = figures.predicted_against_measured(points, estimator.coverage) if points else ""
    errors = ("mape", "median_ape", "p90_ape", "p99_ape", "bias")
    monotone = estimator.report.get("monotone", {})
    held_out = Table(
        "",
        (
            Column("estimator"),
            *(Column(name.replace("_", " "), "%", 2) for name in errors),
            Column("never falls"),
            Column("chosen"),
        ),
        tuple(
            (
                kind,
                *(found.get(name) for name in errors),
                bool(monotone.get(kind, False)),
                kind == estimator.kind,
            )
            for kind, found in estimator.report.get("held_out", {}).items()
        ),
        note="Errors on shapes that were held out whole. "
        + (
            f"The times are {' and '.join(estimator.report['sources'])}."
            if "sources" in estimator.report
            else f"Median repeat noise of a row: {estimator.report.get('repeat_noise_percent', 0):.2f} %."
        ),
    )
    data = step_table(points) if points else None
    return {"svg": svg, "data": data, "held_out": held_out if held_out.rows else None}


def _profile_points(profile: ServerProfile | None, estimator: StepTimeEstimator) -> list[StepPoint]:
    if profile is None:
        return []
    return [StepPoint(*estimator.predict(row.shape), row.median_ms, figures.PROFILE) for row in profile.rows]


def _acceptance(run: Run) -> dict[str, Any] | None:
    trace = run.trace
    if trace is None or not (positions := sum(p.scored_rows() for p in trace.paths)):
        return None
    committed = 1 + float(trace.cum_acceptance_by_position().sum())
    temperature = trace.sampling.temperature
    sampling = "greedy" if temperature == 0 else f"T = {temperature:g}"
    note = (
        f"{positions:,} positions of {len(trace.paths)} held-out prompts, {sampling}, censored rows "
        f"left out. A round of {trace.depth} drafts commits {committed:.2f} tokens on average. "
        "Bars: 95 % interval over prompts."
    )
    return {"svg": figures.acceptance_by_position(trace), "note": note, "data": acceptance_table(trace)}


def _capacity(run: Run) -> dict[str, Any] | None:
    if run.capacity is None:
        return None
    load = str(run.capacity.payload.get("load", ""))
    svg = capacity_curves(run.capacity)
    return {"svg": svg, "load": load, "data": capacity_points(run.capacity)}


def _input(name: str, value: str) -> str:
    """A hash says nothing to a reader; other values do."""
    return name if value.startswith("blake2b:") else f"{name} {value}"


def _provenance(run: Run) -> dict[str, Any]:
    sources = Table(
        "",
        tuple(map(Column, ("file", "kind", "content hash", "made", "made from"))),
        tuple(
            (
                source.file,
                source.kind,
                source.hash.removeprefix("blake2b:")[:16],
                source.created[:19].replace("T", " "),
                ", ".join(_input(name, source.inputs[name]) for name in sorted(source.inputs)),
            )
            for source in sorted(run.sources, key=lambda s: (s.created, s.file))
        ),
    )
    facts: list[tuple[str, str]] = []
    for side, profile in (("server", run.server), ("edge", run.edge)):
        if profile is None:
            continue
        manifest, model = profile.manifest, profile.manifest.model
        settings = (f"{k} {v}" for k, v in manifest.engine.items() if not isinstance(v, dict))
        facts += [
            (f"{side}: machine", machine_name(manifest.hardware)),
            (f"{side}: model", f"{model.id} {model.dtype}, {model.parameters / 1e6:.1f} M parameters"),
            (f"{side}: engine", ", ".join(settings)),
            (f"{side}: command", manifest.command),
            (f"{side}: versions", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
        ]
    return {"sources": sources, "stale": run.stale(), "facts": facts}
