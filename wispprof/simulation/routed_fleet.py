"""A whole fleet behind a router: requests of many device classes, dealt to servers, each simulated by itself.

The router sends a request to the server with the fewest requests in progress. It estimates when each ends, so
the servers share nothing and are simulated in processes of their own. A router that sees the true ends would
balance a little better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random
from typing import Protocol

from wispprof.simulation.arrivals import Replay, Request
from wispprof.simulation.event_loop import simulate
from wispprof.simulation.metrics import Report
from wispprof.simulation.scenario import Client, Scenario, ServerModel, System
from wispprof.simulation.simulated_output import mix

_NO_LIMIT = 1 << 30


class RequestLengths(Protocol):
    """Draws requests: :class:`~wispprof.simulation.arrivals.Lengths`, or those of a workload file."""

    def request(self, rng: Random, time_ms: float, client: int = -1) -> Request: ...


@dataclass(frozen=True)
class ClientClass:
    """Clients of one kind: all together they send ``per_s`` requests a second."""

    client: Client
    per_s: float
    lengths: RequestLengths


@dataclass(frozen=True, slots=True)
class Burst:
    """Every ``every_s`` seconds, ``factor`` times the requests for ``length_s`` seconds."""

    factor: float = 1.0
    every_s: float = 60.0
    length_s: float = 20.0

    def rate(self, time_ms: float) -> float:
        """Factor of the usual rate at a time."""
        return self.factor if (time_ms / 1000.0) % self.every_s >= self.every_s - self.length_s else 1.0


def fleet_requests(
    classes: Sequence[ClientClass], seconds: float, seed: int, burst: Burst | None = None
) -> list[Request]:
    """Independent arrivals of every class, in order of time. ``Request.client`` numbers the class."""
    burst = burst or Burst()
    most = max(1.0, burst.factor)
    requests = []
    for number, of in enumerate(classes):
        rng = Random(mix((seed, 7, number)))
        time_ms = 0.0
        while (
            of.per_s > 0 and (time_ms := time_ms + rng.expovariate(of.per_s * most) * 1000.0) < 1e3 * seconds
        ):
            taken, request = rng.random(), of.lengths.request(rng, time_ms, number)
            if taken * most < burst.rate(time_ms):
                requests.append(request)
    requests.sort(key=lambda request: request.time_ms)
    return requests


def route(
    requests: Sequence[Request], servers: int, service_ms: Callable[[Request], float]
) -> list[tuple[Request, ...]]:
    """Deal requests to servers, fewest in progress first; of equals the one that waited longest."""
    dealt: list[list[Request]] = [[] for _ in range(servers)]
    idle = [(0, turn, turn) for turn in range(servers)]
    counts = [0] * servers
    ends: list[tuple[float, int]] = []
    for turn, request in enumerate(requests, start=servers):
        while ends and ends[0][0] <= request.time_ms:
            _, server = heappop(ends)
            counts[server] -= 1
            heappush(idle, (counts[server], turn, server))
        # Entries that no longer state the server's count are out of date.
        while idle[0][0] != counts[idle[0][2]]:
            heappop(idle)
        _, _, server = heappop(idle)
        counts[server] += 1
        heappush(idle, (counts[server], turn, server))
        heappush(ends, (request.time_ms + service_ms(request), server))
        dealt[server].append(request)
    return list(map(tuple, dealt))


@dataclass(frozen=True)
class FleetRun:
    """Simulated servers of a fleet, summed up; ``by_server`` and ``by_class``: (sessions that met their SLO,
    judged). ``attainment`` is NaN if no session was judged."""

    by_server: tuple[tuple[int, int], ...] = ()
    by_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    missed_by: Mapping[str, int] = field(default_factory=dict)
    tokens: float = 0.0
    busy_s: float = 0.0
    server_s: float = 0.0
    drafting_s: float = 0.0

    @property
    def met(self) -> int:
        return sum(met for met, _ in self.by_server)

    @property
    def judged(self) -> int:
        return sum(of for _, of in self.by_server)

    @property
    def attainment(self) -> float:
        return self.met / self.judged if self.judged else math.nan

    @property
    def server_error(self) -> float:
        """Standard error of the attainment from server to server: sessions of one server share its queue. 0
        with fewer than two."""
        count, share = len(self.by_server), self.attainment
        if count < 2 or not self.judged:
            return 0.0
        squares = sum((met - share * of) ** 2 for met, of in self.by_server)
        return math.sqrt(squares * count / (count - 1)) / self.judged

    @property
    def utilisation(self) -> float:
        return self.busy_s / self.server_s if self.server_s else 0.0

    def class_attainment(self, least: int = 1) -> dict[str, float]:
        """By class, of those with at least ``least`` judged sessions."""
        return {name: met / of for name, (met, of) in sorted(self.by_class.items()) if of >= least}


@dataclass(frozen=True)
class RoutedFleet:
    """Everything that a fleet's run depends on, except how many servers there are.

    ``service_ms``: the router's estimate, by class: (first token, each further token).
    """

    classes: tuple[ClientClass, ...]
    server: ServerModel
    system: System
    service_ms: tuple[tuple[float, float], ...]

    def _service_ms(self, request: Request) -> float:
        first_ms, token_ms = self.service_ms[request.client]
        return first_ms + token_ms * request.output_tokens

    def scenarios(
        self, servers: int, seconds: float, warmup_s: float, seed: int, burst: Burst | None = None
    ) -> list[Scenario]:
        """One scenario a server."""
        clients = tuple(of.client for of in self.classes)
        requests = fleet_requests(self.classes, seconds, seed, burst)
        return [
            Scenario(
                self.system,
                self.server,
                Replay(dealt, max_prompt=_NO_LIMIT, max_output=_NO_LIMIT),
                clients[0].acceptance,
                clients=clients,
                seconds=seconds,
                warmup_s=warmup_s,
                seed=mix((seed, number)) & 0xFFFFFFFF,
            )
            for number, dealt in enumerate(route(requests, servers, self._service_ms))
        ]

    def run(
        self,
        servers: int,
        seconds: float,
        warmup_s: float,
        seed: int,
        *,
        sampled: int | None = None,
        burst: Burst | None = None,
        executor: Executor | None = None,
        progress: Callable[[], None] | None = None,
        target: float | None = None,
    ) -> FleetRun:
        """Simulate all servers, or ``sampled`` of them. With ``target``, they end early once their attainment
        cannot reach it any more."""
        scenarios = self.scenarios(servers, seconds, warmup_s, seed, burst)[:sampled]
        if target is not None:
            requests = sum(len(one.load.recorded) for one in scenarios if isinstance(one.load, Replay))
            most_missed = math.ceil((1.0 - target) * requests)
            scenarios = [replace(one, most_missed=most_missed) for one in scenarios]
        found = map(simulate, scenarios) if executor is None else executor.map(simulate, scenarios)
        reports = []
        for report in found:
            reports.append(report)
            if progress is not None:
                progress()
        return sum_up(reports)


def sum_up(reports: Sequence[Report]) -> FleetRun:
    """One run of several servers' reports."""
    by_class: dict[str, tuple[int, int]] = {}
    by_server: list[tuple[int, int]] = []
    missed_by: dict[str, int] = {}
    for report in reports:
        pairs = report.judged_by_client.values()
        by_server.append((sum(met for met, _ in pairs), sum(of for _, of in pairs)))
        for name, (met, of) in report.judged_by_client.items():
            before = by_class.get(name, (0, 0))
            by_class[name] = (before[0] + met, before[1] + of)
        for why, count in report.missed_by.items():
            missed_by[why] = missed_by.get(why, 0) + count
    return FleetRun(
        tuple(by_server),
        by_class,
        missed_by,
        sum(r.throughput * r.seconds for r in reports),
        sum(r.counters.busy_ms for r in reports) / 1000.0,
        sum(r.seconds for r in reports),
        sum(r.counters.drafting_ms for r in reports) / 1000.0,
    )
