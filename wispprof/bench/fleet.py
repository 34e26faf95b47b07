"""A fleet of replay edges against a running server: right tokens, right delays, no models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.bench.bench_result import BenchResult, RequestResult, summarise
from wispprof.bench.step_watch import HandleWatch, MetricsWatch, StepWatch
from wispprof.drafters.replay import ReplayDrafter
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import (
    ConnectionFactory,
    server_url,
    ssl_context,
    websocket_connections,
)
from wispprof.edge.draft_worker import TimedWorker
from wispprof.edge.generation import Generation, GenerationRequest
from wispprof.errors import HandshakeRefused, ProfileError, WispprofError
from wispprof.policies import make_controller
from wispprof.policies.interface import Controller
from wispprof.settings.bench_settings import BenchSettings
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.shared_settings import LinkSettings
from wispprof.simulation.devices import DEVICES, DeviceProfile
from wispprof.simulation.scenario import system
from wispprof.testing.high_res_loop import run_high_res
from wispprof.testing.link_emulator import emulate_link
from wispprof.types import RejectionPredictor, Slo

if TYPE_CHECKING:
    from wispprof.server.process import RunningServer

__all__ = ["Progress", "bench", "run_bench"]

Progress = Callable[[int, int, str], None]
"""Called with (requests done, requests in all, a few words)."""


async def run_bench(
    settings: BenchSettings,
    server: str | RunningServer | ConnectionFactory,
    trace: AcceptanceTrace,
    progress: Progress | None = None,
    *,
    watch: StepWatch | None = None,
) -> BenchResult:
    """Offer the load of ``settings`` to ``server`` and measure what its users would have seen.

    ``server``: an address, a server that runs in this process, or a connect. ``trace``: taken with the
    target that the server runs; its paths are the prompts, and what every text must equal.
    Raises :class:`HandshakeRefused` or :class:`ServerUnreachable` where the first device cannot
    connect; what befalls single requests is counted in the result.
    """
    return await _Fleet(settings, server, trace, progress, watch).run()


def bench(
    settings: BenchSettings,
    server: str,
    trace: AcceptanceTrace,
    progress: Progress | None = None,
) -> BenchResult:
    """:func:`run_bench` for callers without an event loop."""
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
            raise ProfileError(
                "The trace holds no paths.", "Take one with `wispprof profile-edge`."
            )
        self.settings = settings
        self.trace = trace
        self.connect, self.watch = _reach(server, watch, settings.access.ca_file)
        self.system = system(settings.system)
        if self.system.clairvoyant:
            raise WispprofError(
                "The clairvoyant system exists in the simulator only.", "Choose another one."
            )
        self.controller = settings.controller or self.system.controller
        self.drafting = settings.drafting or self.system.drafting
        self.predictor = _predictor(settings)
        self.outcomes: list[RequestResult] = []
        self.through = 0
        self.progress = progress
        self.total = settings.requests * (1 if settings.rate_per_s else settings.devices)
        self.first_s: float | None = None
        self.last_s = 0.0

    async def run(self) -> BenchResult:
        settings = self.settings
        rng = Random(settings.seed)
        clients = [
            EdgeClient(self._dial_of(i), self._client_of(i)) for i in range(settings.devices)
        ]
        entered: list[EdgeClient] = []
        try:
            for client in clients:
                entered.append(await client.__aenter__())
            if self.watch is not None:
                await self.watch.begin()
            offered = self._poisson if settings.rate_per_s else self._closed
            await asyncio.gather(*offered(clients, rng))
            steps, said = ([], {}) if self.watch is None else await self.watch.end()
        finally:
            for client in entered:
                await client.__aexit__(None, None, None)
        loop_seconds = self.last_s - (self.first_s or 0.0)
        up = sum(client.traffic.up_bytes for client in clients)
        down = sum(client.traffic.down_bytes for client in clients)
        return summarise(
            settings.system,
            offered_load(settings),
            self.outcomes,
            loop_seconds,
            steps,
            said,
            (up, down),
        )

    # --- when requests come ---

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
        self.through += 1
        request = self.settings.requests
        while self.settings.hold and self.through < self.settings.devices:
            await self._request(number, client, number + request * self.settings.devices)
            request += 1

    def _poisson(self, clients: Sequence[EdgeClient], rng: Random) -> list[Awaitable[None]]:
        at = 0.0
        work: list[Awaitable[None]] = []
        for request in range(self.settings.requests):
            at += rng.expovariate(self.settings.rate_per_s)
            number = request % len(clients)
            work.append(self._later(at, number, clients[number], request))
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
        worker, controller = self._drafting_of(number, path, client)
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
            lossless = not isinstance(error, ProfileError)  # the target left the recorded path
        if self.settings.hold and self.through == self.settings.devices:
            return  # it ended after the load that is measured
        out = generation.output
        lossless = lossless and out == path.path[: len(out)]
        lossless = lossless and (bool(err) or len(out) == request.max_new)
        self.last_s = loop.time()
        self.outcomes.append(RequestResult(number, slo, generation.stats, lossless, err))
        if self.progress is not None:
            met_slo = sum(o.met_slo for o in self.outcomes)
            done = len(self.outcomes)
            self.progress(done, max(done, self.total), f"{met_slo}/{done} met their SLO")

    def _drafting_of(
        self, number: int, path: TracePath, client: EdgeClient
    ) -> tuple[TimedWorker, Controller] | tuple[None, None]:
        if self.controller is None:
            return None, None
        devices = devices_of(self.settings)
        device = devices[number % len(devices)]
        options = dict(self.settings.options or self.system.controller_options)
        if self.controller == "wispprof":
            stream = self.drafting.stream
            running = (
                stream if stream is not None else bool(client.welcome and client.welcome.stream)
            )
            options.setdefault("stream", running)
        controller = make_controller(self.controller, self.predictor, **options)
        drafter = ReplayDrafter([path])
        worker = TimedWorker(
            drafter, device.step_ms, device.prefill_ms_per_token, device.resuming_ms
        )
        return worker, controller

    def _dial_of(self, number: int) -> ConnectionFactory:
        profile = self.settings.link
        if profile.rtt_ms == 0 and profile.jitter_ms == 0 and profile.loss == 0:
            return self.connect
        return emulate_link(
            self.connect, LinkSettings(profile, seed=self.settings.seed * 1000 + number)
        )

    def _client_of(self, number: int) -> ClientSettings:
        return ClientSettings(
            tokenizer=self.trace.tokenizer_hash,
            access=self.settings.access,
            name=f"bench-{number}",
        )


def devices_of(settings: BenchSettings) -> tuple[DeviceProfile, ...]:
    """The kinds of device of a load, the preset ``medium`` if it names none."""
    return settings.device or (DEVICES["medium"],)


def offered_load(settings: BenchSettings) -> dict[str, Any]:
    """The offered load as a record: the same for every system compared under it."""
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


def _reach(
    server: str | RunningServer | ConnectionFactory, watch: StepWatch | None, ca_file: Path | None
) -> tuple[ConnectionFactory, StepWatch | None]:
    if isinstance(server, str):
        url = server_url(server)
        trusted = ssl_context(ca_file)
        return websocket_connections(url, ssl=trusted), watch or MetricsWatch(url, trusted)
    if callable(server):
        return server, watch
    return websocket_connections(server.split_url), watch or HandleWatch(server)


def _predictor(settings: BenchSettings) -> RejectionPredictor | None:
    if settings.predictor is None:
        return None
    from wispprof.fitting import load_predictor

    return load_predictor(settings.predictor)
