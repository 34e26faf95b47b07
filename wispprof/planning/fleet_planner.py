"""How many of which server, under which system: ranked by price, verified by simulation.

1. The closed model of one server (:mod:`wispprof.planning.replica_model`) estimates how many servers each
   candidate needs under each system.
2. From there a search simulates a few servers behind the router, for every system on the candidate that is
   cheapest by estimate, and for as many more as may be cheaper than the second best.
3. The best and its runner-up are simulated whole, with other random numbers: with the servers that suffice,
   and with the spare ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

from wispprof.artifacts.fleet_answer import FleetAnswer, FleetOption
from wispprof.errors import PlanError
from wispprof.planning.fleet_file import Candidate, FleetSpec
from wispprof.planning.fleet_load import FleetLoad, fleet_load, in_words
from wispprof.planning.replica_model import ClassLoad, ReplicaModel, Steady, classes_of_tightness
from wispprof.settings.planner_settings import FleetSettings
from wispprof.simulation.routed_fleet import Burst, FleetRun, RoutedFleet
from wispprof.simulation.scenario import ServerDraft, ServerModel, system
from wispprof.simulation.server_models import server_of

Progress = Callable[[str], None]

_PROBE_SEED, _CHECK_SEED = 1, 2
_LEAST_JUDGED = 50
_FAR = 0.2
"""Shortfall of attainment from which the search takes longer strides."""
_TOLERANCE = 0.02
"""Of the number of servers."""
_AGREEMENT = 0.01
"""If the attainment of two simulations of a fleet differs by more, chance decides what users get."""
_BURSTS = (3.0, 2.0, 1.5)
_BURSTS_S = 2 * Burst().every_s
_MS_PER_S, _S_PER_H = 1000.0, 3600.0


@dataclass
class _Search:
    """One candidate under one system, and what is known of it."""

    spec: FleetSpec
    candidate: Candidate
    system: str
    load: FleetLoad
    model: ReplicaModel
    settings: FleetSettings
    estimate: int = 0
    servers: int = 0
    too_dear: bool = False
    runs: dict[int, FleetRun] = field(default_factory=dict)
    confirmed: set[int] = field(default_factory=set)

    def price_per_h(self, servers: int) -> float:
        return (servers + self.spec.spare) * self.candidate.gpus * self.candidate.price_per_h

    @property
    def known_price(self) -> float:
        """By simulation if there was one, else by estimate."""
        count = self.servers or self.estimate
        return self.price_per_h(count) if count else math.inf

    def fleet(self, servers: int) -> RoutedFleet:
        state = self.model.best(servers)
        pairs = zip(state.first_ms, state.speeds, strict=True)
        service = tuple((first, _MS_PER_S / max(speed, 1e-6)) for first, speed in pairs)
        if not service:  # no steady state: any estimate will do
            service = tuple((_MS_PER_S, _MS_PER_S / of.slo.tokens_per_s) for of in self.load.model)
        return RoutedFleet(self.load.simulated, self.model.server, system(self.system), service)

    def run(
        self, servers: int, executor: Executor | None, progress: Progress, confirm: bool = False
    ) -> FleetRun:
        """Some of so many servers; simulated once. ``confirm`` what a probe says: more servers, as long as
        the check of the whole fleet, because queues for KV memory build up over minutes."""
        settings, per_s = self.settings, self.load.per_s
        if servers not in self.runs or (confirm and servers not in self.confirmed):
            sampled = min(servers, settings.confirming if confirm else settings.sampled)
            seconds = settings.seconds_for(sampled / servers * per_s, settings.probe_sessions)
            if confirm:
                seconds = max(seconds, settings.seconds_for(per_s, settings.check_sessions))
                self.confirmed.add(servers)
            self.runs[servers] = self.fleet(servers).run(
                servers,
                seconds,
                settings.warmup_s,
                _PROBE_SEED,
                sampled=sampled,
                executor=executor,
                target=self.spec.target,
            )
            progress(f"{self.candidate.name}, {self.system}, {servers} servers")
        return self.runs[servers]

    def holds(self, run: FleetRun) -> bool:
        """Whether all sessions, and those of each class, meet the target with a standard error to spare: the
        fewest servers that seem to hold are else those that were lucky."""
        parts = [(run.met, run.judged), *(p for p in run.by_class.values() if p[1] >= _LEAST_JUDGED)]
        steady = run.attainment - run.server_error >= self.spec.target
        return steady and all(_surely(met, of) >= self.spec.target for met, of in parts)

    def search(self, executor: Executor | None, progress: Progress, dearest: float = math.inf) -> None:
        """Find the fewest servers that hold the SLO; 0 if none does. Give up (``too_dear``) if it needs
        so many that they cost more than ``dearest`` dollars an hour."""
        low, high = 0, 0
        count, self.too_dear = self.estimate, False
        while not high or high - low > max(1, round(_TOLERANCE * high)):
            if not high and self.price_per_h(count) > dearest:
                self.too_dear, self.estimate = True, count
                return
            run = self.run(count, executor, progress)
            if self.holds(run):
                run = self.run(count, executor, progress, confirm=True)
            if self.holds(run):
                high = count
                count = (low + high) // 2 if low else max(1, math.floor(0.8 * count))
                if high == 1:
                    break
            else:
                low = count
                self.estimate = max(self.estimate, low + 1)
                if low >= self.candidate.max_servers:
                    break
                growth = 1.25 if run.attainment > self.spec.target - _FAR else 1.6
                count = (low + high) // 2 if high else math.ceil(growth * count) + 1
                count = min(count, self.candidate.max_servers)
        self.servers = high
        if not high:
            self.estimate = 0

    def option(self) -> FleetOption:
        """What is known of it, as a row of the answer."""
        candidate, count = self.candidate, self.servers or self.estimate
        run = self.runs.get(self.servers)
        less = self.runs.get(count - 1) or next((r for n, r in sorted(self.runs.items()) if n < count), None)
        state = self.model.best(max(1, count))
        utilisation = run.utilisation if run else 0.0
        bound_by = "never"
        if self.too_dear:
            bound_by, run = "dear", None
        elif count:
            bound_by = "one" if count == 1 else self._bound_by(less)
        return FleetOption(
            self.system,
            candidate.name,
            candidate.gpu,
            candidate.gpus,
            count,
            count + self.spec.spare if count else 0,
            self.price_per_h(count) if count else 0.0,
            self._dollars_per_mtoken(count),
            self._joules_per_token(count, run),
            run.attainment if run else None,
            run.class_attainment() if run else {},
            bound_by,
            _tightest(run, self.load.model, state),
            utilisation,
            run is not None,
        )

    def _bound_by(self, run: FleetRun | None) -> str:
        if run is not None and run.missed_by:
            return max(run.missed_by, key=lambda why: run.missed_by[why])
        state = self.model.best(max(1, self.estimate - 1))
        kv_tokens = self.model.server.kv_tokens
        return "kv" if kv_tokens and state.kv_tokens > 0.8 * kv_tokens else "speed"

    def _dollars_per_mtoken(self, count: int) -> float:
        tokens_per_h = self.load.tokens_per_s * self.load.day_share * _S_PER_H
        return self.price_per_h(count) / tokens_per_h * 1e6 if count else 0.0

    def _joules_per_token(self, count: int, run: FleetRun | None) -> float:
        """At the busiest hour: busy and idle watts of the servers bought, and drafting."""
        if run is None or not run.tokens:
            return 0.0
        candidate = self.candidate
        busy = run.busy_s / run.server_s * count
        idle = count + self.spec.spare - busy
        server_w = candidate.gpus * (busy * candidate.watts + idle * candidate.idle_watts)
        drafting_w = sum(of.device.draft_w * of.per_s for of in self.load.model) / self.load.per_s
        return server_w / self.load.tokens_per_s + drafting_w * run.drafting_s / run.tokens


def _surely(met: int, judged: int) -> float:
    """The share less its standard error; one more miss is counted, so that none is no proof."""
    share = met / (judged + 1)
    return share - math.sqrt(share * (1.0 - share) / (judged + 1))


def _tightest(run: FleetRun | None, classes: tuple[ClassLoad, ...], state: Steady) -> str:
    if run is not None and (shares := run.class_attainment(_LEAST_JUDGED)):
        return min(shares, key=lambda name: shares[name])
    return classes_of_tightness(classes, state)


def plan_fleet(
    spec: FleetSpec,
    settings: FleetSettings,
    executor: Executor | None = None,
    progress: Progress = lambda doing: None,
) -> FleetAnswer:
    """Rank all candidates under all systems. ``progress`` is called after every part, with its name. After
    Ctrl-C the answer has what is known by then."""
    load = fleet_load(spec)
    notes: list[str] = []
    searches = []
    for candidate in spec.servers:
        server = _server(candidate, load.acceptance, notes)
        for name in spec.systems:
            model = ReplicaModel(server, name, load.model)
            one = _Search(spec, candidate, name, load, model, settings)
            one.estimate = model.servers_needed(candidate.max_servers)
            searches.append(one)
            progress(f"{candidate.name}, {name}: estimated")
    verified: dict[int, FleetOption] = {}
    complete = True
    try:
        if not settings.estimate:
            _search(searches, settings, executor, progress)
            _verify(searches, settings, executor, progress, verified)
    except KeyboardInterrupt:
        complete = False
        notes.insert(0, "Interrupted: what was not simulated by then is an estimate.")
    return FleetAnswer(
        spec.title,
        spec.model,
        tuple(verified.get(id(one)) or one.option() for one in _ranked(searches)),
        tuple(map(in_words, spec.devices)),
        sum(of.count for of in spec.devices),
        load.per_s,
        spec.target,
        spec.spare,
        spec.prices_as_of,
        notes=tuple(dict.fromkeys(notes)),
        complete=complete,
    )


def _ranked(searches: list[_Search]) -> list[_Search]:
    return sorted(searches, key=lambda s: (s.known_price, not s.runs))


def _search(
    searches: list[_Search], settings: FleetSettings, executor: Executor | None, progress: Progress
) -> None:
    """Simulate each system on its cheapest candidate, and whatever may be cheaper than the second best."""
    first = [
        _cheapest([one for one in searches if one.system == name])
        for name in dict.fromkeys(s.system for s in searches)
    ]
    for one in sorted((one for one in first if one is not None), key=lambda one: one.known_price):
        best = min((s.price_per_h(s.servers) for s in searches if s.servers), default=math.inf)
        one.search(executor, progress, settings.dearest * best)
    while True:
        done = sorted(s.known_price for s in searches if s.servers)
        limit = done[1] if len(done) > 1 else math.inf  # the answer has a runner-up, if there is one
        left = [
            s for s in searches if s.estimate and not s.runs and s.known_price < limit * settings.optimism
        ]
        if not left:
            break
        min(left, key=lambda s: s.known_price).search(executor, progress, settings.dearest * limit)


def _verify(
    searches: list[_Search],
    settings: FleetSettings,
    executor: Executor | None,
    progress: Progress,
    verified: dict[int, FleetOption],
) -> None:
    """Simulate the whole fleet of the best and its runner-up. One may turn out to need more servers, and
    another be cheaper then."""
    while True:
        best = _ranked(searches)[: settings.verified]
        unverified = [s for s in best if s.servers and id(s) not in verified]
        if not unverified:
            break
        verified[id(unverified[0])] = _verified(unverified[0], executor, progress)


def _cheapest(searches: list[_Search]) -> _Search | None:
    estimated = [one for one in searches if one.estimate]
    return min(estimated, key=lambda one: one.known_price) if estimated else None


def _verified(one: _Search, executor: Executor | None, progress: Progress) -> FleetOption:
    """Simulate the whole fleet, without and with the spare servers, and under bursts. A fleet that misses the
    target, or whose attainment depends on chance (``_AGREEMENT``), gets more servers."""
    settings, spare = one.settings, one.spec.spare
    name = f"{one.candidate.name}, {one.system}"

    def run(servers: int, seconds: float, doing: str, burst: float = 0.0) -> FleetRun:
        return one.fleet(servers).run(
            servers,
            seconds,
            settings.warmup_s,
            _CHECK_SEED,
            sampled=settings.sampled if burst else None,
            burst=Burst(burst) if burst else None,
            executor=executor,
            progress=lambda: progress(f"{name}: {doing}"),
            target=one.spec.target if burst else None,
        )

    def whole(servers: int, sessions: int) -> float:
        seconds = settings.seconds_for(one.load.per_s, sessions)
        return run(servers, seconds, "a server of the whole fleet").attainment

    def settled(exact: float) -> bool:
        planned = one.run(one.servers, executor, progress, confirm=True).attainment
        return exact >= one.spec.target and abs(exact - planned) <= _AGREEMENT

    while not settled(exact := whole(one.servers, settings.check_sessions)):
        if one.servers >= one.candidate.max_servers:
            break
        one.servers += max(1, round(_TOLERANCE * one.servers))
    with_spare = whole(one.servers + spare, settings.probe_sessions) if spare else exact
    burst = 1.0
    for factor in _BURSTS:
        if one.holds(run(one.servers + spare, settings.warmup_s + _BURSTS_S, f"bursts × {factor:g}", factor)):
            burst = factor
            break
    return replace(one.option(), fleet_attainment=exact, spare_attainment=with_spare, burst=burst)


def _server(candidate: Candidate, acceptance: float, notes: list[str]) -> ServerModel:
    made, note = server_of(candidate.server)
    notes.append(f"{candidate.name}: {note}")
    kv_tokens = candidate.kv_tokens or made.kv_tokens
    if not kv_tokens:
        raise PlanError(
            f"The KV memory of {candidate.name} is unknown.", "Give kv_tokens with it in the fleet's file."
        )
    chances = tuple(acceptance**depth for depth in range(1, 6))
    draft = ServerDraft(candidate.draft_ms or made.draft.draft_ms, made.draft.row_ms, cum_acceptance=chances)
    return replace(made, kv_tokens=kv_tokens, draft=draft)
