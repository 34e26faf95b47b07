"""``wispprof simulate``: simulated fleets, compared or searched for their capacity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wispprof.cli.console import note, result, table, tracker
from wispprof.cli.options import Jobs, JsonFlag, with_settings
from wispprof.settings.planner_settings import PlanSettings
from wispprof.settings.shared_settings import LinkModel

if TYPE_CHECKING:
    from rich.table import Table

    from wispprof.simulation.metrics import Report


def register(app: typer.Typer) -> None:
    """Add ``simulate`` to the commands."""
    app.command("simulate")(simulate)


@with_settings
def simulate(
    link: LinkModel,
    devices: Annotated[int, typer.Option(min=1, help="Devices of a closed fleet.")] = 40,
    policy: Annotated[list[str], typer.Option(help="System to simulate; repeatable.")] = [
        "wispprof"
    ],
    compare: Annotated[bool, typer.Option("--compare", help="Simulate all systems.")] = False,
    capacity: Annotated[
        bool,
        typer.Option("--capacity", help="Search the most devices within --violations instead."),
    ] = False,
    violations: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of sessions that may miss their SLO.")
    ] = PlanSettings().violations,
    slo: Annotated[
        list[float],
        typer.Option(help="SLO: token speed (tokens/s); repeatable, for equal shares."),
    ] = [4.0],
    ttft: Annotated[float | None, typer.Option(help="SLO: time to the first token (ms).")] = None,
    server: Annotated[
        str | None, typer.Option(help="Estimator file, or the preset a100-32b or h200-32b.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Size of the server's KV cache (tokens).")
    ] = None,
    edge: Annotated[Path | None, typer.Option(help="Edge profile.")] = None,
    draft_speed: Annotated[
        float, typer.Option(min=0.01, help="Drafting speed without a profile (tokens/s).")
    ] = 60.0,
    trace: Annotated[Path | None, typer.Option(help="Acceptance trace.")] = None,
    predictor: Annotated[
        Path | None, typer.Option(help="Rejection predictor for the trace.")
    ] = None,
    acceptance: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Mean acceptance without a trace.")
    ] = 0.75,
    plan: Annotated[Path | None, typer.Option(help="Plan that the edges of wispprof obey.")] = None,
    arrivals: Annotated[
        str,
        typer.Option(
            help="closed, poisson, bursts, or a request trace (Azure CSV, Mooncake JSONL)."
        ),
    ] = "closed",
    per_s: Annotated[
        float, typer.Option(min=0.0, help="Request rate of poisson and bursts (requests/s).")
    ] = 1.0,
    speed: Annotated[
        float, typer.Option(min=0.001, help="Factor by which a request trace plays faster.")
    ] = 1.0,
    think: Annotated[
        float, typer.Option(min=0.0, help="Mean pause between a device's requests (ms).")
    ] = 0.0,
    prompt: Annotated[int, typer.Option(min=1, help="Median prompt length (tokens).")] = 512,
    output: Annotated[int, typer.Option(min=2, help="Median output length (tokens).")] = 128,
    spread: Annotated[float, typer.Option(min=0.0, help="Log-normal sigma of both lengths.")] = 0.3,
    seconds: Annotated[float, typer.Option(min=1.0, help="Simulated time (s).")] = 120.0,
    warmup: Annotated[
        float, typer.Option(min=0.0, help="Time at the beginning that is not counted (s).")
    ] = 20.0,
    seed: Annotated[int, typer.Option(help="Seed; equal seeds give equal runs.")] = 0,
    jobs: Jobs = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --capacity: file for the curves, which `wispprof report` draws."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Simulate a fleet of edges on one server under several policies."""
    from wispprof.errors import PlanError
    from wispprof.simulation.arrivals import Lengths
    from wispprof.simulation.scenario import SYSTEMS, Scenario, system
    from wispprof.simulation.scenario_inputs import load_of, read_inputs, slo_mix, with_plan

    if warmup >= seconds:
        raise typer.BadParameter("--warmup must be shorter than --seconds.")
    if capacity and arrivals != "closed":
        raise PlanError("--capacity needs a closed fleet.", "Omit --arrivals.")
    if out is not None and not capacity:
        raise PlanError("--out writes the curves of --capacity.", "Add --capacity, or use --json.")
    inputs = read_inputs(
        server=server,
        edge=edge,
        trace=trace,
        predictor=predictor,
        draft_tokens_per_s=draft_speed,
        acceptance=acceptance,
    )
    for line in inputs.notes:
        note(line)
    from dataclasses import replace

    model = replace(inputs.server, kv_tokens=kv_tokens) if kv_tokens else inputs.server
    load = load_of(
        arrivals,
        devices=devices,
        lengths=Lengths(prompt, output, spread, spread),
        think_ms=think,
        per_s=per_s,
        speed=speed,
    )
    names = list(SYSTEMS) if compare else policy
    scenarios = [
        Scenario(
            with_plan(system(name), plan, inputs.device.name),
            model,
            load,
            inputs.acceptance,
            devices=((inputs.device, 1.0),),
            links=((link, 1.0),),
            slos=slo_mix(slo, ttft),
            seconds=seconds,
            warmup_s=warmup,
            seed=seed,
        )
        for name in names
    ]
    run = _capacities if capacity else _runs
    document, shown = run(scenarios, violations, jobs)
    if out is not None:
        speeds = ", ".join(f"{speed:g}" for speed in slo)
        description = (
            f"SLO of {speeds} tokens/s, round trip {link.rtt_ms:g} ms, prompts of {prompt} and outputs of "
            f"{output} tokens (medians), {seconds:g} s each; {'; '.join(inputs.notes) or 'no files'}."
        )
        _write_curves(out, document, violations, description)
    document["inputs"] = list(inputs.notes)
    result(document, shown, as_json)


def _runs(
    scenarios: list[Any], violations: float, jobs: int | None
) -> tuple[dict[str, Any], Table]:
    from wispprof.simulation.capacity_search import run_all, workers

    with (
        workers(jobs if len(scenarios) > 1 else 1) as executor,
        tracker("simulate", len(scenarios)) as report,
    ):
        reports = run_all(scenarios, executor, lambda done, word: report(done, status=word))
    return {"runs": [_summary(r) for r in reports]}, _report_table(reports)


def _capacities(
    scenarios: list[Any], violations: float, jobs: int | None
) -> tuple[dict[str, Any], Table]:
    import os

    from wispprof.simulation.capacity_search import capacity, workers

    wide = jobs or os.cpu_count() or 1
    shown = table(
        f"Capacity within {violations:.0%} violations",
        "system|>devices|>SLO met|>goodput|>step ms|>runs",
    )
    found = []
    with workers(wide) as executor, tracker("capacity") as report:
        for scenario in scenarios:
            answer = capacity(
                scenario,
                violations=violations,
                wide=wide,
                executor=executor,
                progress=lambda done, word, s=scenario: report(  # type: ignore[misc]
                    done, status=f"{s.system.label}, {word}"
                ),
            )
            best = answer.report
            shown.add_row(
                scenario.system.label,
                f"{'' if answer.bounded else '>= '}{answer.devices}",
                _percent(best.attainment) if best else "-",
                _number(best.goodput) if best else "-",
                _number(best.mean_step_ms) if best else "-",
                str(len(answer.probes)),
            )
            found.append(
                {
                    "system": scenario.system.label,
                    "devices": answer.devices,
                    "bounded": answer.bounded,
                    "violations": answer.violations,
                    "probes": [list(p) for p in answer.probes],
                    "report": _summary(best) if best else None,
                }
            )
    return {"capacities": found}, shown


def _write_curves(out: Path, document: Mapping[str, Any], violations: float, load: str) -> None:
    """Write the curves of a capacity search as an artifact that ``wispprof report`` draws."""
    from wispprof.artifacts import write_document
    from wispprof.reporting import CAPACITY_KIND

    systems = [
        {
            "system": c["system"],
            "devices": c["devices"],
            "bounded": c["bounded"],
            # A fleet in which no session was counted has no share.
            "probes": [[n, None if math.isnan(share) else share] for n, share in c["probes"]],
        }
        for c in document["capacities"]
    ]
    write_document(out, CAPACITY_KIND, {"violations": violations, "load": load, "systems": systems})
    note(f"wrote {out}")


def _summary(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _report_table(reports: list[Report]) -> Table:
    shown = table(
        "Simulated fleet",
        "system|>SLO\nmet|>good-\nput|>TTFT\np50|>\np95|>TPOT\np50|>\np95|>\nstep|>ac-\ncepted|>\nwasted",
        caption="goodput: tokens/s of sessions that met their SLO; TTFT, TPOT (at the device) and mean step "
        "in ms; accepted: drafts per round; wasted: share of drafting time.",
    )
    # Ten columns within 80 characters.
    shown.padding = 0
    shown.columns[0].no_wrap = True
    for r in reports:
        shown.add_row(
            r.system,
            _percent(r.attainment),
            _number(r.goodput),
            *map(_number, (*r.ttft_ms[:2], *r.tpot_ms[:2])),
            _number(r.mean_step_ms),
            _number(r.accepted_per_round),
            _percent(r.wasted_share),
        )
    return shown


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else "100%" if value == 1 else f"{value:.1%}"
