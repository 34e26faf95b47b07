"""The answers of a trace, served one after the other to one device by a server that serves nobody else.

The session code of edge and server decides, the recorded proposals are drafted, and the times are given. So
what follows from both sides is in the result: drafts made while a round is out, a controller's choices, steps
that wait for drafts, and the last round of an answer, which is cut short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import ClosedFleet, Request
from wispprof.simulation.devices import DeviceProfile
from wispprof.simulation.event_loop import Simulation
from wispprof.simulation.scenario import Scenario, ServerModel, System
from wispprof.simulation.simulated_edge import SimulatedEdge
from wispprof.simulation.trace_replay import TraceReplay
from wispprof.types import BatchCost, Slo, StepTimeEstimator

UNDRAFTED = System("undrafted", "server-only")
STREAM = System("stream", "wispprof", "wispprof", drafting=DraftingSettings())
"""Asynchronous drafting as edges and servers do by default."""


def rounds_of(k: int) -> System:
    """Synchronous drafting of ``k`` tokens a round, as edges do by default."""
    return System(f"k={k}", "fcfs", "fixed", controller_options={"k": k}, drafting=DraftingSettings())


class SessionSteps(StepTimeEstimator):
    """Steps of a server with one session: ``decode`` (new tokens, drafts included → ms) and ``prefill``
    (prompt tokens → ms)."""

    def __init__(self, decode: Callable[[int], float], prefill: Callable[[int], float]) -> None:
        self._decode, self._prefill = decode, prefill

    @property
    def coverage(self) -> float:
        return 0.5

    def step_ms(self, new: int) -> float:
        """A step with ``new`` tokens, drafts included."""
        return self._decode(new)

    def start(self) -> BatchCost:
        return _OneSession(self._decode, self._prefill, 0, 0)


class _OneSession(BatchCost):
    __slots__ = ("_decode", "_new", "_prefill", "_prompt")

    def __init__(
        self, decode: Callable[[int], float], prefill: Callable[[int], float], new: int, prompt: int
    ) -> None:
        self._decode, self._prefill, self._new, self._prompt = decode, prefill, new, prompt

    @property
    def p50_ms(self) -> float:
        decoding = self._decode(self._new) if self._new else 0.0
        return decoding + (self._prefill(self._prompt) if self._prompt else 0.0)

    @property
    def bound_ms(self) -> float:
        return self.p50_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> BatchCost:
        more = (0, new) if prefill else (new, 0)
        return _OneSession(self._decode, self._prefill, self._new + more[0], self._prompt + more[1])


class AnswerCounts(NamedTuple):
    """Of one answer, or sums over ``answers``: drafts ``accepted``, ``rounds`` (commits after the first),
    tokens ``drafted``, ``tokens``; ``ms`` of whole answers, and ``later_ms`` from their first tokens on."""

    answers: float
    accepted: float
    rounds: float
    drafted: float
    tokens: float
    ms: float
    later_ms: float

    @property
    def tokens_per_s(self) -> float:
        """Of the whole answer, its first token's wait included."""
        return 1000.0 * self.tokens / self.ms

    @property
    def later_tokens_per_s(self) -> float:
        """After the first token of each."""
        return 1000.0 * (self.tokens - self.answers) / self.later_ms


@dataclass(frozen=True)
class AnswerReplay:
    """``answers``: those of :meth:`of`, read once for all replays. ``overhead_ms``: of the server between
    steps."""

    answers: TraceReplay
    device: DeviceProfile
    rtt_ms: float
    overhead_ms: float = ServerModel.overhead_ms

    @staticmethod
    def of(trace: AcceptanceTrace) -> TraceReplay:
        """The answers of a trace with two tokens and more."""
        paths = tuple(path for path in trace.paths if len(path.path) > 1)
        return TraceReplay(replace(trace, paths=paths), ConfidenceAcceptance(), 1)

    def serve(self, system: System, steps: StepTimeEstimator) -> list[AnswerCounts]:
        """Serve every answer; times are exact, without spread."""
        scenario = Scenario(
            system,
            ServerModel(steps, spread=0.0, overhead_ms=self.overhead_ms),
            ClosedFleet(1),
            self.answers,
            devices=((self.device, 1.0),),
            links=((LinkModel(rtt_ms=self.rtt_ms), 1.0),),
            slos=((Slo.of(None, None), 1.0),),
            seconds=86_400.0,
            warmup_s=0.0,
        )
        return [self._answer(scenario, number) for number in range(len(self.answers))]

    def _answer(self, scenario: Scenario, number: int) -> AnswerCounts:
        run = _OneAnswer(scenario, number)
        run.run()
        [record], counters = run.records, run.counters
        return AnswerCounts(
            1.0,
            counters.accepted,
            counters.rounds,
            counters.drafted,
            record.tokens,
            record.last_ms - record.arrival_ms,
            record.last_ms - record.first_ms,
        )


def total(answers: list[AnswerCounts]) -> AnswerCounts:
    """Sums over answers."""
    sums = np.array(answers).sum(0)
    return AnswerCounts(*sums.tolist())


class _OneAnswer(Simulation):
    """One request of one device, along one path of its trace."""

    def __init__(self, scenario: Scenario, answer: int) -> None:
        super().__init__(scenario)
        self._answer = answer

    def _load(self) -> None:
        source, number = self.scenario.acceptance, self._answer
        assert isinstance(source, TraceReplay)
        self.schedule(0.0, self._request, (0, number, Request(0.0, *source.lengths(0, number))))

    def ended(self, now_ms: float, edge: SimulatedEdge) -> None:
        self.end_ms = now_ms
