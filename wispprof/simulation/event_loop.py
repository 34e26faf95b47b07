"""The event loop: a heap of (time, number, callback, argument), the load, and the counters of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

from wispprof.sessions.draft_buffer import CommitEffect, Outgoing
from wispprof.simulation.arrivals import ClosedFleet, Request
from wispprof.simulation.devices import DRAFT_BYTES, OPEN_BYTES, TOKEN_BYTES, Link
from wispprof.simulation.metrics import Counters, Report, SessionRecord, summarise
from wispprof.simulation.scenario import DEVICE_STEP, LINK_STEP, SLO_STEP, Client, Scenario, pick
from wispprof.simulation.simulated_edge import SimulatedEdge
from wispprof.simulation.simulated_output import mix
from wispprof.simulation.simulated_server import SimulatedServer

_RETRY_MS = 1000.0
_JUDGE_EVERY_MS = 2000.0


class Simulation:
    """One run of a scenario. Generators are seeded by the scenario's seed and by purpose: fleets of
    another size or under another policy get the same requests and outputs (common random numbers)."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.system = scenario.system
        self.now_ms = 0.0
        self.end_ms = scenario.seconds * 1000.0
        self.counted_from_ms = 0.0
        self.counters = Counters()
        self.records: list[SessionRecord] = []
        self._live: dict[str, SimulatedEdge] = {}  # generations that are not over yet
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self._number = 0
        self._links: dict[int, Link] = {}
        self._before: dict[tuple[int, int], int] = {}
        policy = self.system.make_batching()
        self._stream = policy.stream
        self.server = SimulatedServer(self, scenario.server, policy, Random(mix((scenario.seed, 1))))

    def schedule(self, when_ms: float, what: Callable[[float, Any], None], argument: Any) -> None:
        """Call ``what(when_ms, argument)`` at ``when_ms``; ties in the order of scheduling."""
        self._number = number = self._number + 1
        heappush(self._heap, (when_ms, number, what, argument))

    def run(self) -> Report:
        """Run to the end."""
        self._load()
        warm_ms = self.scenario.warmup_s * 1000.0
        if warm_ms > 0:
            self.schedule(warm_ms, self._warm, None)
        if self.scenario.most_missed is not None:
            self.schedule(warm_ms + _JUDGE_EVERY_MS, self._judge, self.scenario.most_missed)
        heap, pop, end_ms = self._heap, heappop, self.end_ms
        events = 0
        # Reference counting frees everything here; the cycle collector would only cost time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            while heap:
                when, _, what, argument = pop(heap)
                if when > end_ms:
                    break
                self.now_ms = when
                events += 1
                what(when, argument)
        finally:
            if collecting:
                gc.enable()
        self.events = events
        return self._report()

    # --- requests ---

    def _load(self) -> None:
        scenario = self.scenario
        load = scenario.load
        if isinstance(load, ClosedFleet):
            for device in range(load.devices):
                rng = Random(mix((scenario.seed, 2, device)))
                self.schedule(rng.random() * load.ramp_ms, self._next, (device, 0))
            return
        rng = Random(mix((scenario.seed, 3)))
        for device, request in enumerate(load.requests(rng, self.end_ms)):
            self.schedule(request.time_ms, self._request, (device, 0, request))

    def _next(self, now_ms: float, who: tuple[int, int]) -> None:
        """The next request of a closed fleet's device."""
        device, number = who
        load = self.scenario.load
        assert isinstance(load, ClosedFleet)
        rng = Random(mix((self.scenario.seed, 4, device, number)))
        self._request(now_ms, (device, number, load.lengths.request(rng, now_ms)))

    def _request(self, now_ms: float, arrival: tuple[int, int, Request]) -> None:
        device, number, request = arrival
        scenario = self.scenario
        client = self._client(device, request)
        record = SessionRecord(
            device,
            number,
            client.slo,
            now_ms,
            request.prompt_tokens,
            request.output_tokens,
            client.name,
        )
        self.records.append(record)
        link = self._links.get(device)
        if link is None:
            link = self._links[device] = Link(client.link, Random(mix((scenario.seed, 5, device))))
        source = client.acceptance
        output = source.output((scenario.seed, device, number), request.prompt_tokens, request.output_tokens)
        system, kind = self.system, client.device
        edge = SimulatedEdge(
            self,
            f"{device}.{number}",
            record,
            kind,
            link,
            output,
            system.make_controller(source.predictor, output, kind),
            self._stream,
            system.drafting,
            system.trees and kind.node_ms is not None and bool(output.candidates),
            request,
        )
        size = OPEN_BYTES + TOKEN_BYTES * request.prompt_tokens
        self.counters.up_bytes += size
        self.schedule(link.up(now_ms, size), self.server.open, edge)
        edge.begin(now_ms)
        self._live[edge.key] = edge

    def _client(self, device: int, request: Request) -> Client:
        """Who sends a request: one of the scenario's clients, or what its mixes deal to the device."""
        scenario = self.scenario
        if request.client >= 0:
            return scenario.clients[request.client]
        return Client(
            "",
            pick(scenario.devices, device, DEVICE_STEP),
            pick(scenario.links, device, LINK_STEP),
            pick(scenario.slos, device, SLO_STEP),
            scenario.acceptance,
        )

    def ended(self, now_ms: float, edge: SimulatedEdge) -> None:
        """A generation ended at its device; a device of a closed fleet thinks, then sends the next
        request."""
        del self._live[edge.key]
        load = self.scenario.load
        if not isinstance(load, ClosedFleet):
            return
        record = edge.record
        pause = 0.0
        if load.think_ms > 0:
            rng = Random(mix((self.scenario.seed, 6, record.device, record.number)))
            pause = rng.expovariate(1.0 / load.think_ms)
        if record.refused:
            pause = max(pause, _RETRY_MS)
        self.schedule(now_ms + pause, self._next, (record.device, record.number + 1))

    # --- what edges report ---

    def send_round(self, now_ms: float, edge: SimulatedEdge, frame: Outgoing, slack_ms: float) -> None:
        """A whole round leaves the edge."""
        arrives_ms = self.send(now_ms, edge.link, len(frame.tokens))
        self.schedule(arrives_ms, self.server.draft, (edge, frame, slack_ms))

    def send(self, now_ms: float, link: Link, tokens: int) -> float:
        """A frame of so many drafts leaves an edge; returns when it arrives."""
        size = DRAFT_BYTES + (TOKEN_BYTES + 1) * tokens
        self.counters.up_bytes += size
        return link.up(now_ms, size)

    def count_wasted(self, cost_ms: float, tokens: int) -> None:
        """Drafting that was overtaken or contradicted."""
        self.counters.wasted_ms += cost_ms
        self.counters.wasted_tokens += tokens

    def count_effect(self, effect: CommitEffect) -> None:
        """What a commit did to an edge's drafts."""
        counters = self.counters
        counters.wasted_ms += effect.wasted_ms
        counters.wasted_tokens += effect.wasted_tokens
        counters.proactive += effect.proactive
        counters.proactive_hits += effect.proactive_hit

    # --- summing up ---

    def _warm(self, now_ms: float, _: None) -> None:
        """Counting begins."""
        self._catch_up(now_ms)
        self.counted_from_ms = now_ms
        self.counters = Counters()
        self._before = {(r.device, r.number): r.tokens for r in self.records if r.tokens}

    def _judge(self, now_ms: float, most_missed: int) -> None:
        """End the run if too many sessions have missed their SLO."""
        from_ms = self.counted_from_ms
        counted = [r for r in self.records if not (r.done and r.last_ms < from_ms)]
        if sum(r.surely_missed(now_ms) for r in counted) > most_missed:
            self.end_ms = now_ms
            self._heap.clear()
        else:
            self.schedule(now_ms + _JUDGE_EVERY_MS, self._judge, most_missed)

    def _catch_up(self, now_ms: float) -> None:
        """Work out the drafting of every edge up to now, so that it is counted in the right window."""
        for edge in self._live.values():
            edge.advance(now_ms)

    def _report(self) -> Report:
        self._catch_up(self.end_ms)
        before = self._before
        window = {
            key: r.tokens - before.get(key, 0)
            for r in self.records
            if r.tokens > before.get(key := (r.device, r.number), 0)
        }
        return summarise(
            self.system.label,
            self.records,
            self.counters,
            window,
            self.counted_from_ms,
            self.end_ms,
            self.events,
        )


def simulate(scenario: Scenario) -> Report:
    """Run a scenario. Equal scenarios give equal reports."""
    return Simulation(scenario).run()
