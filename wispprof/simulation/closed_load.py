"""A server under a closed load, as the frameworks schedule it: continuous batching with chunked prefill.

Clients send prompts of ``isl`` tokens and read ``osl`` each, one request after another. Every step
takes all running sessions, then prompt chunks in order of arrival up to a token budget. Steps
without prompts differ by one cached token a session, so a run of them is one event: thousands of loads take
minutes. :class:`~wispprof.simulation.event_loop.Simulation` has drafts, links and policies; this has none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from wispprof.types import BatchTotals

StepMs = Callable[[BatchTotals[int]], float]


@dataclass(frozen=True)
class Scheduler:
    """How a framework forms steps.

    ``step_tokens``: most tokens of a step. ``chunked``: a prompt may be cut to what is left of them.
    ``reserve``: a session is admitted once its whole answer fits into the KV memory; otherwise once its
    prompt does, and the last one to come is preempted and computed again if memory runs out (vLLM).
    ``overhead_ms``: of the framework, for each session of a step (scheduling, sampling, answering).
    """

    step_tokens: int = 8192
    max_sessions: int = 1024
    chunked: bool = True
    reserve: bool = False
    overhead_ms: float = 0.0


@dataclass(frozen=True)
class ClosedLoad:
    """``requests``: of each client. ``turnaround_ms``: mean time from an answer's end to the client's next
    request, exponential: without it, sessions that end together stay together for good."""

    concurrency: int
    isl: int
    osl: int
    requests: int = 10
    turnaround_ms: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class LoadResult:
    """Means over requests, as load generators report them. ``steps``: of the server; ``preemptions``."""

    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    steps: int
    preemptions: int


@dataclass(slots=True)
class _Request:
    arrival_ms: float
    prompt: int  # tokens to compute before the next token: more than the prompt's after a preemption
    left: int  # tokens to generate
    computed: int = 0
    first_ms: float = -1.0

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt


def replay(load: ClosedLoad, step_ms: StepMs, kv_tokens: int, scheduler: Scheduler) -> LoadResult:
    """Run the load to its end."""
    return _Replay(load, step_ms, kv_tokens, scheduler).run()


class _Replay:
    def __init__(self, load: ClosedLoad, step_ms: StepMs, kv_tokens: int, scheduler: Scheduler) -> None:
        self._load, self._step_ms, self._kv_tokens, self._scheduler = load, step_ms, kv_tokens, scheduler
        self._rng = Random(load.seed)
        self._now_ms = 0.0
        self._arrivals: list[tuple[float, int]] = []
        self._sent = 0
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._kv = 0
        self._done: list[tuple[float, float]] = []
        self._steps = self._preemptions = 0

    def run(self) -> LoadResult:
        load = self._load
        for _ in range(load.concurrency):
            self._send(0.0)
        while len(self._done) < load.concurrency * load.requests:
            while self._arrivals and self._arrivals[0][0] <= self._now_ms:
                self._waiting.append(_Request(heappop(self._arrivals)[0], load.isl, load.osl))
            if not self._running and not self._waiting:
                self._now_ms = self._arrivals[0][0]
                continue
            self._step()
        count = len(self._done)
        return LoadResult(
            sum(first for first, _ in self._done) / count,
            sum(each for _, each in self._done) / count,
            1000.0 * count * load.osl / self._now_ms,
            self._steps,
            self._preemptions,
        )

    def _send(self, now_ms: float) -> None:
        if self._sent == self._load.concurrency * self._load.requests:
            return
        self._sent += 1
        pause_ms = self._load.turnaround_ms
        pause_ms = self._rng.expovariate(1.0 / pause_ms) if pause_ms > 0 else 0.0
        heappush(self._arrivals, (now_ms + pause_ms, self._sent))

    def _step(self) -> None:
        chunks = self._chunks()
        decoding = [r for r in self._running if r.decoding]
        items, cached, deepest = len(decoding), 0, 0
        for r in decoding:
            cached += r.computed
            deepest = max(deepest, r.computed)
        new, pairs, squares, longest, prompt = items, cached, items, min(items, 1), 0
        for r, tokens in chunks:
            new += tokens
            prompt += tokens
            cached += r.computed
            pairs += tokens * r.computed
            squares += tokens * tokens
            longest, deepest = max(longest, tokens), max(deepest, r.computed)
        count = items + len(chunks)
        totals = BatchTotals(count, new, cached, pairs, squares, deepest, longest, prompt)
        took_ms = self._step_ms(totals) + self._scheduler.overhead_ms * count
        steps = 1
        if not chunks:
            steps, took_ms = self._run_of_steps(decoding, totals, took_ms)
        self._now_ms += took_ms
        self._steps += steps
        for r in decoding:
            r.computed += steps
            r.left -= steps
        self._kv += steps * items
        for r, tokens in chunks:
            r.computed += tokens
            self._kv += tokens
            if r.decoding:
                if r.first_ms < 0:
                    r.first_ms = self._now_ms
                r.left -= 1
        if steps or chunks:
            self._finish()

    def _run_of_steps(
        self, decoding: list[_Request], totals: BatchTotals[int], first_ms: float
    ) -> tuple[int, float]:
        """(steps, ms) until a session ends, a request arrives or memory runs out."""
        steps = min(r.left for r in decoding)
        items = totals.items
        steps = min(steps, max(1, (self._kv_tokens - self._kv) // items))
        grown = items * (steps - 1)
        last = totals._replace(
            sum_cached=totals.sum_cached + grown,
            sum_new_cached=totals.sum_new_cached + grown,
            max_cached=totals.max_cached + steps - 1,
        )
        last_ms = self._step_ms(last) + self._scheduler.overhead_ms * items
        slope = (last_ms - first_ms) / max(1, steps - 1)
        if self._arrivals and len(self._running) < self._scheduler.max_sessions:
            wait_ms = self._arrivals[0][0] - self._now_ms
            if steps * (first_ms + last_ms) / 2 > wait_ms:
                # n·first + slope·n²/2 = wait; the step that runs at the arrival is finished.
                root = math.sqrt(first_ms**2 + 2 * slope * wait_ms) if slope > 1e-12 else first_ms
                steps = min(steps, max(1, math.ceil(2 * wait_ms / (root + first_ms))))
        return steps, steps * first_ms + slope * steps * (steps - 1) / 2

    def _chunks(self) -> list[tuple[_Request, int]]:
        """Prompt chunks of the next step: of sessions that began, then of waiting ones that fit."""
        s = self._scheduler
        while (
            not s.reserve
            and len(self._running) > 1
            and self._kv + sum(r.decoding for r in self._running) > self._kv_tokens
        ):
            self._preempt(self._running.pop())
        budget = s.step_tokens - sum(r.decoding for r in self._running)
        chunks: list[tuple[_Request, int]] = []
        for r in self._running:
            if not r.decoding and budget > 0:
                tokens = min(budget, r.prompt - r.computed)
                chunks.append((r, tokens))
                budget -= tokens
        # Memory that sessions which are admitted will still take.
        claimed = self._kv + sum(r.prompt - r.computed if not r.decoding else 0 for r in self._running)
        if s.reserve:
            claimed = sum(r.prompt + self._load.osl for r in self._running)
        while self._waiting and len(self._running) < s.max_sessions and budget > 0:
            r = self._waiting[0]
            need = r.prompt + (self._load.osl if s.reserve else 0)
            if self._running and claimed + need > self._kv_tokens:
                break
            if (
                not s.chunked
                and r.prompt > budget
                and (chunks or budget < s.step_tokens - len(self._running))
            ):
                break
            tokens = min(budget, r.prompt) if s.chunked else r.prompt
            self._running.append(self._waiting.popleft())
            claimed += need
            chunks.append((r, tokens))
            budget -= tokens
        return chunks

    def _preempt(self, r: _Request) -> None:
        """Its KV is dropped; it is first in the queue, and computes its tokens again."""
        self._preemptions += 1
        self._kv -= r.computed
        r.prompt, r.computed = max(r.prompt, r.computed), 0
        self._waiting.appendleft(r)

    def _finish(self) -> None:
        ended = [r for r in self._running if r.left <= 0]
        if not ended:
            return
        self._running = [r for r in self._running if r.left > 0]
        for r in ended:
            self._kv -= r.computed
            took_ms = self._now_ms - r.first_ms
            self._done.append((r.first_ms - r.arrival_ms, took_ms / max(1, self._load.osl - 1)))
            self._send(self._now_ms)
