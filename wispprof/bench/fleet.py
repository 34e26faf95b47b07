"""A load generator: replayed edges send recorded drafts to a running server with the delays of real devices.

:func:`run_bench` runs the fleet on the current event loop, :class:`FleetProcess` in a process of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import selectors
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Self, TypeVar

from wispprof.artifacts import load_trace
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.bench.bench_result import (
    BenchResult,
    HandleWatch,
    MetricsWatch,
    RequestResult,
    StepWatch,
    summarise,
)
from wispprof.drafters.replay import ReplayDrafter, replay_drafter
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import ConnectionFactory, server_url, ssl_context, websocket_connections
from wispprof.edge.draft_worker import TimedWorker
from wispprof.edge.generation import Generation
from wispprof.errors import HandshakeRefused, ProfileError, WispprofError
from wispprof.policies import make_controller
from wispprof.policies.interface import Controller
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.shared_settings import LinkSettings, ServerAccess
from wispprof.simulation.devices import DEVICES, DeviceProfile
from wispprof.simulation.scenario import system
from wispprof.testing.link_emulator import emulate_link
from wispprof.types import GenerationRequest, RejectionPredictor, Slo

if TYPE_CHECKING:
    from wispprof.server.process import RunningServer

T = TypeVar("T")

Progress = Callable[[int, int, str], None]
"""Called with the number of finished requests, their total, and a short note."""

_ProgressArgs = tuple[int, int, str]
_progress_queue: SimpleQueue[_ProgressArgs | None] | None = None
"""The parent's queue, in the worker process of a :class:`FleetProcess`."""

_MAX_SELECT_CONNECTIONS = 900
"""Leaves descriptors below 1,024, the limit of ``select``, for the other files of the process."""


def run_high_res(main: Coroutine[Any, Any, T], connections: int) -> T:
    """``asyncio.run`` on a loop whose timers have microsecond resolution, for up to 900 connections.

    asyncio's default selector, epoll, rounds timeouts up to whole milliseconds. A replayed device with 2.5 ms
    per draft would then take 3 ms or more. ``select`` takes microseconds, but no descriptor above 1,023.
    """

    def loop() -> asyncio.AbstractEventLoop:
        precise = connections <= _MAX_SELECT_CONNECTIONS
        return asyncio.SelectorEventLoop(selectors.SelectSelector() if precise else None)

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


async def run_bench(
    settings: BenchSettings,
    server: str | RunningServer | ConnectionFactory,
    trace: AcceptanceTrace,
    progress: Progress | None = None,
    *,
    watch: StepWatch | None = None,
) -> BenchResult:
    """Offer the load of ``settings`` to ``server`` and measure what its users see.

    ``server``: an address, a server in this process, or a connection factory. ``trace``: an acceptance trace
    of the server's target. Its prompts are sent, and every output is compared with its path.
    Raises :class:`HandshakeRefused` or :class:`ServerUnreachable` if a device cannot connect. Errors of
    single requests are counted in the result.
    """
    return await _Fleet(settings, server, trace, progress, watch).run()


def bench(
    settings: BenchSettings, server: str, trace: AcceptanceTrace, progress: Progress | None = None
) -> BenchResult:
    """Call :func:`run_bench` from outside an event loop."""
    return run_high_res(run_bench(settings, server, trace, progress), settings.devices)


class _Fleet:
    def __init__(
        self,
        settings: BenchSettings,
        server: str | RunningServer | ConnectionFactory,
        trace: AcceptanceTrace,
        progress: Progress | None,
        watch: StepWatch | None,
    ) -> None:
        if not trace.paths:
            raise ProfileError("The trace has no paths.", "Record one with `wispprof profile-edge`.")
        self.settings = settings
        self.trace = trace
        self.connect, self.watch = _resolve_server(server, watch, settings.access)
        self.system = system(settings.system)
        if self.system.clairvoyant:
            raise WispprofError(
                "The clairvoyant system exists only in the simulator.", "Choose another system."
            )
        self.controller = settings.controller or self.system.controller
        self.drafting = settings.drafting or self.system.drafting
        self.predictor = _predictor(settings)
        self.results: list[RequestResult] = []
        self.finished_devices = 0
        self.progress = progress
        self.total = settings.requests * (1 if settings.rate_per_s else settings.devices)
        self.first_s: float | None = None
        self.last_s = 0.0

    async def run(self) -> BenchResult:
        settings = self.settings
        rng = Random(settings.seed)
        clients = [
            EdgeClient(self._connection_factory(i), self._client_settings(i)) for i in range(settings.devices)
        ]
        entered: list[EdgeClient] = []
        try:
            for client in clients:
                entered.append(await client.__aenter__())
            if self.watch is not None:
                await self.watch.begin()
            arrivals = self._poisson if settings.rate_per_s else self._closed
            await asyncio.gather(*arrivals(clients, rng))
            steps, step_figures = ([], {}) if self.watch is None else await self.watch.end()
        finally:
            for client in entered:
                await client.__aexit__(None, None, None)
        up = sum(client.traffic.up_bytes for client in clients)
        down = sum(client.traffic.down_bytes for client in clients)
        return summarise(
            settings.system,
            offered_load(settings),
            self.results,
            self.last_s - (self.first_s or 0.0),
            steps,
            step_figures,
            (up, down),
        )

    # --- arrivals ---

    def _closed(self, clients: Sequence[EdgeClient], rng: Random) -> list[Awaitable[None]]:
        ramp_s = self.settings.ramp_ms / 1000.0
        return [
            self._device(i, client, rng.random() * ramp_s, Random(rng.random()))
            for i, client in enumerate(clients)
        ]

    async def _device(self, number: int, client: EdgeClient, start_s: float, rng: Random) -> None:
        await asyncio.sleep(start_s)
        for request in range(self.settings.requests):
            if request and self.settings.think_ms:
                await asyncio.sleep(rng.expovariate(1000.0 / self.settings.think_ms))
            await self._request(number, client, number + request * self.settings.devices)
        self.finished_devices += 1
        request = self.settings.requests
        while self.settings.hold and self.finished_devices < self.settings.devices:
            await self._request(number, client, number + request * self.settings.devices)
            request += 1

    def _poisson(self, clients: Sequence[EdgeClient], rng: Random) -> list[Awaitable[None]]:
        at_s = 0.0
        work: list[Awaitable[None]] = []
        for request in range(self.settings.requests):
            at_s += rng.expovariate(self.settings.rate_per_s)
            number = request % len(clients)
            work.append(self._later(at_s, number, clients[number], request))
        return work

    async def _later(self, at_s: float, number: int, client: EdgeClient, request: int) -> None:
        await asyncio.sleep(at_s)
        await self._request(number, client, request)

    # --- one request ---

    async def _request(self, number: int, client: EdgeClient, index: int) -> None:
        settings = self.settings
        path = self.trace.paths[index % len(self.trace.paths)]
        slo = Slo(settings.tokens_per_s[number % len(settings.tokens_per_s)], settings.ttft_ms)
        request = GenerationRequest(
            tokens=path.prompt,
            max_new=min(settings.max_new, len(path.path)),
            sampling=self.trace.sampling,
            slo=slo,
        )
        worker, controller = self._make_drafting(number, path, client)
        generation = Generation(client, request, worker, controller, self.drafting)
        loop = asyncio.get_running_loop()
        self.first_s = loop.time() if self.first_s is None else self.first_s
        err, lossless = "", True
        try:
            await generation.run()
        except HandshakeRefused:
            raise
        except WispprofError as error:
            err = str(error)
            lossless = not isinstance(error, ProfileError)  # the output left the recorded path
        if self.settings.hold and self.finished_devices == self.settings.devices:
            return  # the measured load had already ended
        out = generation.output
        lossless = lossless and out == path.path[: len(out)]
        lossless = lossless and (bool(err) or len(out) == request.max_new)
        self.last_s = loop.time()
        self.results.append(RequestResult(number, slo, generation.stats, lossless, err))
        if self.progress is not None:
            met_slo = sum(r.met_slo for r in self.results)
            done = len(self.results)
            self.progress(done, max(done, self.total), f"{met_slo}/{done} met their SLO")

    def _make_drafting(
        self, number: int, path: TracePath, client: EdgeClient
    ) -> tuple[TimedWorker, Controller] | tuple[None, None]:
        if self.controller is None:
            return None, None
        devices = devices_of(self.settings)
        device = devices[number % len(devices)]
        options = dict(self.settings.options or self.system.controller_options)
        if self.controller == "wispprof":
            stream = self.drafting.stream
            if stream is None:
                stream = bool(client.welcome and client.welcome.stream)
            options.setdefault("stream", stream)
            if self.system.trees:
                options.setdefault("node_ms", device.node_ms)
        controller = make_controller(self.controller, self.predictor, **options)
        trees = self.system.trees and device.node_ms is not None
        worker = TimedWorker(
            replay_drafter([path]) if trees else ReplayDrafter([path]),
            device.step_ms,
            device.prefill_ms_per_token,
            device.resuming_ms,
            device.node_ms or 0.0,
        )
        return worker, controller

    def _connection_factory(self, number: int) -> ConnectionFactory:
        link = self.settings.link
        if link.rtt_ms == 0 and link.jitter_ms == 0 and link.loss == 0:
            return self.connect
        return emulate_link(self.connect, LinkSettings(link, seed=self.settings.seed * 1000 + number))

    def _client_settings(self, number: int) -> ClientSettings:
        return ClientSettings(
            tokenizer=self.trace.tokenizer_hash, access=self.settings.access, name=f"bench-{number}"
        )


def devices_of(settings: BenchSettings) -> tuple[DeviceProfile, ...]:
    """Device profiles of a load; by default the preset ``medium``."""
    return settings.device or (DEVICES["medium"],)


def offered_load(settings: BenchSettings) -> dict[str, Any]:
    """The offered load as a record; equal for all systems that are compared under it."""
    total = settings.requests * (1 if settings.rate_per_s else settings.devices)
    return {
        "devices": settings.devices,
        "device": [f"{d.name} ({d.draft_ms:g} ms)" for d in devices_of(settings)],
        "slo_tokens_per_s": list(settings.tokens_per_s),
        "slo_ttft_ms": settings.ttft_ms,
        "arrivals": f"poisson {settings.rate_per_s:g}/s" if settings.rate_per_s else "closed",
        "requests": total,
        "max_new": settings.max_new,
        "rtt_ms": settings.link.rtt_ms,
        "jitter_ms": settings.link.jitter_ms,
        "seed": settings.seed,
    }


def _resolve_server(
    server: str | RunningServer | ConnectionFactory, watch: StepWatch | None, access: ServerAccess
) -> tuple[ConnectionFactory, StepWatch | None]:
    if isinstance(server, str):
        url = server_url(server)
        tls = ssl_context(access.ca_file)
        return websocket_connections(url, ssl=tls), watch or MetricsWatch(url, tls, access.key)
    if callable(server):
        return server, watch
    return websocket_connections(server.split_url), watch or HandleWatch(server)


def _predictor(settings: BenchSettings) -> RejectionPredictor | None:
    if settings.predictor is None:
        return None
    from wispprof.fitting import load_predictor

    return load_predictor(settings.predictor)


class FleetProcess:
    """A fleet in a process of its own, so that drafting and link emulation take no time from the server.

    Use as ``with``; one bench at a time. ``cores``: the CPU cores it may run on (none: all), if the system
    supports pinning. Keep the measured server on the others.
    """

    def __init__(self, cores: Collection[int] = ()) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._progress: SimpleQueue[_ProgressArgs | None] = spawn.SimpleQueue()
        self._pool = ProcessPoolExecutor(
            1, spawn, initializer=_init_worker, initargs=(self._progress, tuple(cores))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a module-level function in the process; arguments and result are pickled."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def bench(
        self, settings: BenchSettings, url: str, trace: Path, progress: Progress | None = None
    ) -> BenchResult:
        """:func:`run_bench` in the process, against the server at ``url``, with the trace file ``trace``."""
        if progress is None:
            return await self.call(_bench_in_worker, settings, url, trace, False)
        loop = asyncio.get_running_loop()

        def forward() -> None:
            while (args := self._progress.get()) is not None:
                loop.call_soon_threadsafe(progress, *args)

        forwarding = loop.run_in_executor(None, forward)
        try:
            return await self.call(_bench_in_worker, settings, url, trace, True)
        finally:
            self._progress.put(None)
            await forwarding


def _init_worker(queue: SimpleQueue[_ProgressArgs | None], cores: tuple[int, ...]) -> None:
    global _progress_queue
    _progress_queue = queue
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _bench_in_worker(settings: BenchSettings, url: str, trace: Path, report: bool) -> BenchResult:
    queue = _progress_queue
    assert queue is not None

    def put(done: int, total: int, note: str) -> None:
        queue.put((done, total, note))

    # If nobody reads the queue, its pipe fills up and put() blocks.
    main = run_bench(settings, url, load_trace(trace), put if report else None)
    return run_high_res(main, settings.devices)
