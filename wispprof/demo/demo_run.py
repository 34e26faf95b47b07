"""The demo: measure, answer a prompt through a server, run every system under the same load, report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.artifacts import write_document
from wispprof.demo.core_sets import running_on, two_sets_of_cores
from wispprof.demo.measure_machine import (
    DemoSettings,
    Measured,
    Stage,
    first_token_ms,
    measure,
    plan_load,
    slo_classes,
)
from wispprof.demo.turns import benches_of, ranking, turn_order
from wispprof.errors import EngineError
from wispprof.reporting import (
    ANSWER_KIND,
    BENCH_KIND,
    SERVER_ONLY,
    Answer,
    Bench,
    TextSpan,
    load_run,
    verdict,
    write_report,
)
from wispprof.simulation.scenario import system

if TYPE_CHECKING:
    from wispprof.bench import BenchResult, FleetProcess
    from wispprof.engines import LoadedEngine
    from wispprof.server.process import RunningServer
    from wispprof.settings.fleet_settings import BenchSettings
    from wispprof.settings.server_settings import ServerSettings


_NO_SLO = 0.01
"""Tokens/s of an SLO that every session meets."""


def server_settings(settings: DemoSettings) -> ServerSettings:
    """Of every server: all sessions are admitted and fit into memory."""
    from wispprof.settings.server_settings import ServerSettings

    longest = settings.prompt_tokens + max(settings.max_new, settings.path_tokens) + 64
    return ServerSettings(
        target=str(settings.target),
        kv_tokens=2 * settings.devices * longest + 2048,
        max_sessions=4 * settings.devices,
        admit="all",
        prefix_cache_sessions=0,
    )


def load_engines(
    settings: DemoSettings, cores: list[int], stack: ExitStack, stage: Stage
) -> dict[str, LoadedEngine]:
    """An engine for each system's server, loaded as ``wispprof serve`` does; ``stack`` shuts them down."""
    from wispprof.server.startup import load_engine

    report = stage("load the servers")
    engines: dict[str, LoadedEngine] = {}
    for name in settings.systems:
        report(len(engines), len(settings.systems), name)
        engines[name] = load_engine(server_settings(settings), cores)
        stack.callback(engines[name].engine.shutdown)
        engines[name].engine.warm_up(every_size=True)
    report(len(engines), len(engines), "")
    return engines


@asynccontextmanager
async def serving(
    name: str, settings: DemoSettings, loaded: LoadedEngine, measured: Measured
) -> AsyncIterator[RunningServer]:
    """A server on a loopback port with the batching policy of system ``name``.

    All systems get the same estimator and step limits, so that the comparison is fair.
    """
    from wispprof.server.garbage_collector import calm_garbage_collector
    from wispprof.server.process import running_server

    async with running_server(
        server_settings(settings),
        engine=loaded.engine,
        model=loaded.model,
        policy=system(name).make_batching(),
        estimator=measured.estimator,
        front_process=True,
    ) as running:
        with calm_garbage_collector():
            yield running
    if loaded.engine.sessions:
        raise EngineError(
            f"{name} left {len(loaded.engine.sessions)} sessions open in the engine.",
            "This is a defect: please report it.",
        )


async def answer(settings: DemoSettings, measured: Measured, loaded: LoadedEngine, stage: Stage) -> Answer:
    """Generate an answer with a real draft model and server; writes ``answer.json``."""
    from wispprof.edge.edge_runtime import Prompt, open_edge
    from wispprof.settings.edge_settings import EdgeSettings

    report = stage("answer a prompt")
    async with serving("wispprof", settings, loaded, measured) as running:
        edge = EdgeSettings(
            server=running.split_url,
            draft=str(settings.draft),
            predictor=measured.predictor,
            plan=settings.out / "plan.json",
            plan_device=measured.device.name,
        )
        async with open_edge(edge) as runtime:
            prompt = Prompt(
                runtime.tokenizer.encode(settings.prompt), settings.answer_tokens, settings.answer
            )
            reply = runtime.reply(prompt)
            commits: list[list[int]] = []
            done = 0
            async for _ in reply.text():
                commits.append(reply.tokens[done:])
                done = len(reply.tokens)
                report(done, settings.answer_tokens, "")
            commits.append(reply.tokens[done:])
            report(settings.answer_tokens, settings.answer_tokens, f"{reply.stats.tokens_per_s:.0f} tokens/s")
            text = runtime.tokenizer.detokenizer(prompt.tokens)
            spans = []
            for commit in commits:
                # The last token of a commit is the target's own; those before it were drafted.
                spans += [TextSpan(text.push([token]), "draft") for token in commit[:-1]]
                spans += [TextSpan(text.push([token]), "target") for token in commit[-1:]]
    result = Answer(settings.prompt, _merge_spans(spans), reply.stats.summary())
    write_document(settings.out / "answer.json", ANSWER_KIND, asdict(result))
    return result


def _merge_spans(spans: list[TextSpan]) -> tuple[TextSpan, ...]:
    """Join adjacent spans of the same origin; empty ones go."""
    groups = groupby((span for span in spans if span.text), key=lambda span: span.origin)
    return tuple(TextSpan("".join(span.text for span in group), origin) for origin, group in groups)


def load_of(
    settings: DemoSettings, measured: Measured, name: str, slo_classes: tuple[float, ...], number: int = 0
) -> BenchSettings:
    """The load of a system's turn: the same requests in every round ``number``, started at other times."""
    from wispprof.settings.fleet_settings import BenchSettings
    from wispprof.settings.shared_settings import LinkModel

    return BenchSettings(
        system=name,
        devices=settings.devices,
        device=(replace(measured.device, draft_ms=round(measured.device.draft_ms, 2)),),
        tokens_per_s=slo_classes,
        ttft_ms=first_token_ms(settings, measured.estimator),
        requests=settings.requests,
        hold=True,
        max_new=settings.max_new,
        link=LinkModel(rtt_ms=settings.rtt_ms),
        predictor=measured.predictor,
        ramp_ms=settings.ramp_ms,
        seed=settings.seed + number,
    )


async def server_only_speed(
    settings: DemoSettings, measured: Measured, loaded: LoadedEngine, fleet: FleetProcess, stage: Stage
) -> float:
    """Tokens/s of a session under server-only serving of the demo's load: the median of a whole turn.

    A turn before it warms up. No SLO binds in either.
    """
    report = stage("measure the server alone")
    load = load_of(settings, measured, SERVER_ONLY, (_NO_SLO,))
    async with serving(SERVER_ONLY, settings, loaded, measured) as running:
        for _ in range(2):
            turn = await fleet.bench(load, running.split_url, settings.out / "trace.jsonl", report)
    return 1000.0 / turn.figures["tpot_p50_ms"]


async def compare(
    settings: DemoSettings,
    measured: Measured,
    engines: dict[str, LoadedEngine],
    slo_classes: tuple[float, ...],
    fleet: FleetProcess,
    stage: Stage,
) -> tuple[list[Bench], str]:
    """Run the same load under every system in turns; writes ``bench-SYSTEM.json``. Returns the benches and
    the systems' order.

    All servers run throughout, each on an engine of its own. One is asked at a time.
    """
    rounds: dict[str, list[BenchResult]] = {name: [] for name in settings.systems}
    report = stage("compare in turns")
    total = len(settings.systems) * settings.rounds
    async with AsyncExitStack() as stack:
        urls = {
            name: (
                await stack.enter_async_context(serving(name, settings, engines[name], measured))
            ).split_url
            for name in settings.systems
        }
        for done, (number, name) in enumerate(turn_order(settings.systems, settings.rounds)):
            report(done, total, name)
            load = load_of(settings, measured, name, slo_classes, number)
            rounds[name].append(await fleet.bench(load, urls[name], settings.out / "trace.jsonl"))
        report(total, total, ranking(rounds))
    benches = benches_of(rounds, SERVER_ONLY)
    for bench in benches:
        write_document(
            settings.out / f"bench-{bench.policy}.json",
            BENCH_KIND,
            asdict(bench),
            {"trace": measured.inputs["trace"]},
        )
    return benches, ranking(rounds)


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo; ``order``: the systems by goodput, see :func:`~wispprof.demo.turns.ranking`.
    ``report``: path of the HTML page. ``flagged``: share of the server profile's rows that were measured
    under drift, noise or throttling."""

    answer: Answer
    benches: tuple[Bench, ...]
    order: str
    report: Path
    seconds: float
    estimator_mape: float
    cum_acceptance: tuple[float, ...]
    flagged: float

    @property
    def verdict(self) -> str:
        return verdict(self.benches)

    @property
    def lossless(self) -> bool:
        """Whether every output of every system equals the target's own."""
        return all(bench.figure("mismatches") == 0 for bench in self.benches)

    def record(self) -> dict[str, Any]:
        """Scalar results, the last line of the demo's output."""
        names = (
            "goodput_tokens_per_s",
            "goodput_ratio",
            "goodput_ratio_low",
            "goodput_ratio_high",
            "attainment",
            "tokens_per_s",
            "accepted_per_round",
        )
        return {
            "verdict": self.verdict,
            "order": self.order,
            "lossless": self.lossless,
            "systems": {b.policy: {name: b.figure(name) for name in names} for b in self.benches},
            "answer_tokens_per_s": self.answer.stats.get("tokens_per_s"),
            "acceptance_by_position": [round(float(s), 3) for s in self.cum_acceptance],
            "estimator_mape_percent": round(self.estimator_mape, 2),
            "flagged_rows_share": round(self.flagged, 3),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
        }


def run_demo(settings: DemoSettings, stage: Stage) -> DemoResult:
    """Run every stage and write the report. Artifacts of an earlier demo in ``out`` are replaced."""
    from wispprof.bench import FleetProcess
    from wispprof.engines.engine_process import EngineProcess
    from wispprof.testing import CpuBurner

    began = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    for old in settings.out.glob("bench-*.json"):
        old.unlink()  # of systems that this run may not include
    with ExitStack() as stack:
        engine_cores, fleet_cores = stack.enter_context(two_sets_of_cores())
        fleet = stack.enter_context(FleetProcess(fleet_cores))
        # Each system is to find the same machine, however much its edges draft.
        stack.enter_context(CpuBurner(fleet_cores))
        with running_on(engine_cores):
            measured = measure(settings, stage)
        engines = load_engines(settings, engine_cores, stack, stage)
        # An engine on a GPU is not in a process of its own, and its kernels need a free core to start from.
        separate = all(isinstance(loaded.engine, EngineProcess) for loaded in engines.values())
        with running_on(fleet_cores if separate else engine_cores):
            alone = asyncio.run(server_only_speed(settings, measured, engines[SERVER_ONLY], fleet, stage))
            classes = slo_classes(settings, alone)
            plan_load(settings, measured, classes, stage)
            shown = asyncio.run(answer(settings, measured, engines["wispprof"], stage))
            benches, order = asyncio.run(compare(settings, measured, engines, classes, fleet, stage))
    page = write_report(load_run(settings.out), settings.out / "report.html")
    kind = measured.estimator.kind
    return DemoResult(
        answer=shown,
        benches=tuple(benches),
        order=order,
        report=page,
        seconds=time.monotonic() - began,
        estimator_mape=float(measured.estimator.report["held_out"][kind]["mape"]),
        cum_acceptance=tuple(float(s) for s in measured.trace.cum_acceptance_by_position()),
        flagged=sum(bool(row.flags) for row in measured.server.rows) / len(measured.server.rows),
    )
