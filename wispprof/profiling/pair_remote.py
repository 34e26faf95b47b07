"""Times of a pair whose target runs on a server: its steps over the wire, the draft's rounds here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, cycle

from wispprof import protocol
from wispprof.artifacts import TracePath
from wispprof.backends import Drafter
from wispprof.errors import ProtocolError
from wispprof.profiling.link_profiler import ServerClient
from wispprof.profiling.pair_rehearsal import Clock, PairTimes, rehearse
from wispprof.settings.shared_settings import ServerAccess
from wispprof.types import Sampling

_SLACK_MS = 10_000.0
_PINGS = 5


class _RecordedTarget:
    """Commits along recorded answers after a pause, in which the device rests as it does in serving."""

    def __init__(
        self, paths: Sequence[TracePath], pause_ms: Callable[[int], float], sleep: Callable[[float], None]
    ) -> None:
        self._answers = {path.prompt: path.path for path in paths}
        self._pause_ms, self._sleep = pause_ms, sleep
        self._answer: Sequence[int] = ()
        self._place = 0

    def begin(self, prompt: Sequence[int]) -> tuple[float, int]:
        self._answer, self._place = self._answers[tuple(prompt)], 1
        return 0.0, self._answer[0]

    def verify(self, drafts: Sequence[int]) -> tuple[float, Sequence[int]]:
        ms = self._pause_ms(len(drafts))
        self._sleep(ms / 1000.0)
        truth = self._answer[self._place :]
        right = 0
        while right < min(len(drafts), len(truth) - 1) and drafts[right] == truth[right]:
            right += 1
        self._place += right + 1
        return ms, truth[: right + 1]


def rehearse_remote(
    server: str,
    access: ServerAccess,
    drafter: Drafter,
    paths: Sequence[TracePath],
    depth: int,
    sampling: Sampling,
    rtt_ms: float,
    *,
    timeout_s: float = 60.0,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> PairTimes:
    """Times of a server and of this device, which slow each other if they share a machine: asynchronous
    drafting never rests, and a synchronous edge drafts on while its round is out. So the server's steps are
    timed while the device drafts without a pause. Draft steps are timed beside them, and in rounds during
    which the server rests. Sessions without drafts come first, alone.

    Raises the errors of the connection, and :class:`ProtocolError` if the server refuses a session.
    """
    undrafted, warm, busy, drafting = PairTimes(), PairTimes(), PairTimes(), threading.Event()
    numbers, lengths = count(), cycle([*range(0, depth + 1, 2), *range(1, depth + 1, 2)])

    async def alone() -> None:
        async with ServerClient.open(server, access, "check-pair", timeout_s) as client:
            for path in paths:
                prompt = _turned(path.prompt, 2)
                ms = await _prefill_ms(client, next(numbers), prompt, sampling)
                undrafted.undrafted_prefill.append((len(prompt), ms))
                await _undrafted_answer(client, next(numbers), path, sampling, undrafted, clock)
            link_ms = min([await client.ping(n, 0, 0, clock) for n in range(_PINGS)])
            await _verify_answer(client, next(numbers), paths[0], lengths, sampling, warm, link_ms, clock)
            warm.prefill = undrafted.undrafted_prefill

    async def openings() -> None:
        async with ServerClient.open(server, access, "check-pair", timeout_s) as client:
            for path in paths:
                prompt = _turned(path.prompt, 1)
                ms, draft_ms = await asyncio.gather(
                    _prefill_ms(client, next(numbers), prompt, sampling),
                    asyncio.to_thread(_draft_prefill_ms, drafter, prompt, sampling, clock),
                )
                busy.prefill.append((len(prompt), ms))
                busy.draft_prefill.append((len(prompt), draft_ms))

    async def together() -> None:
        async with ServerClient.open(server, access, "check-pair", timeout_s) as client:
            link_ms = min([await client.ping(n, 0, 0, clock) for n in range(_PINGS)])
            for number, path in enumerate(cycle(paths)):
                if number >= len(paths) and not drafting.is_set():
                    return
                await _verify_answer(client, next(numbers), path, lengths, sampling, busy, link_ms, clock)

    asyncio.run(alone())
    asyncio.run(openings())
    first = warm.estimator()
    rested = _RecordedTarget(paths, lambda drafts: rtt_ms + first.step_ms(1 + drafts), sleep)
    found = rehearse(drafter, rested, paths[: -(-len(paths) // 2)], depth, sampling, clock)
    drafting.set()
    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(asyncio.run, together())
        try:
            restless = _RecordedTarget(paths, lambda drafts: 0.0, lambda seconds: None)
            beside = rehearse(drafter, restless, paths, depth, sampling, clock)
        finally:
            drafting.clear()
        steps.result()
    return replace(
        found,
        beside=beside.later,
        verify=busy.verify,
        prefill=busy.prefill,
        draft_prefill=busy.draft_prefill,
        undrafted=undrafted.undrafted,
        undrafted_prefill=undrafted.undrafted_prefill,
    )


def _turned(prompt: Sequence[int], by: int) -> list[int]:
    """The prompt from another token on: as long, and no server holds KV of its beginning."""
    by %= len(prompt)
    return [*prompt[by:], *prompt[:by]]


async def _prefill_ms(client: ServerClient, number: int, prompt: Sequence[int], sampling: Sampling) -> float:
    """A session that ends with its first token."""
    await client.send(_opening(number, prompt, 1, sampling, undrafted=True))
    frame = await _commit(client, number)
    return frame.queue_ms + frame.verify_ms


def _draft_prefill_ms(drafter: Drafter, prompt: Sequence[int], sampling: Sampling, clock: Clock) -> float:
    begin = clock()
    drafter.open(prompt, sampling)
    drafter.prefill()
    return (clock() - begin) * 1000.0


async def _verify_answer(
    client: ServerClient,
    number: int,
    path: TracePath,
    lengths: Iterator[int],
    sampling: Sampling,
    times: PairTimes,
    link_ms: float,
    clock: Clock,
) -> None:
    """One session whose drafts are right. Drafts leave at once, so from commit to commit passes what a round
    takes besides the drafting: the step, and whatever else server and device do for it, less the link's
    ``link_ms``. A server in stream mode does not wait for drafts: while they travel, it commits the first of
    them by itself."""
    await client.send(_opening(number, path.prompt, len(path.path), sampling, undrafted=False))
    travel_ms, before = 0.0 if client.welcome.stream else link_ms, clock()
    while True:
        frame = await _commit(client, number)
        place, now = frame.committed_len - len(path.prompt), clock()
        if place > len(frame.tokens):  # not the first, whose prompt the server may hold in its KV cache
            round_ms = (now - before) * 1000.0 - travel_ms
            times.verified(frame.drafted, max(round_ms, frame.queue_ms + frame.verify_ms))
        before = now
        if frame.finished:
            return
        if frame.accepted < frame.drafted:  # near ties: the answer went another way, so no drafts are known
            await client.send(protocol.Close(number))
            return
        most = next(lengths) + client.welcome.stream
        drafts = list(path.path[place : len(path.path) - 1][:most])
        sure = bytes([255]) * len(drafts)
        await client.send(protocol.Draft(number, 0, frame.committed_len, drafts, sure, 0.0, _SLACK_MS))


async def _undrafted_answer(
    client: ServerClient, number: int, path: TracePath, sampling: Sampling, times: PairTimes, clock: Clock
) -> None:
    """The time of a later token between arrivals of commits: a server that steps without a pause also has to
    send them meanwhile."""
    await client.send(_opening(number, path.prompt, len(path.path), sampling, undrafted=True))
    frame = await _commit(client, number)
    began, later = clock(), 0
    while not frame.finished:
        frame = await _commit(client, number)
        later += len(frame.tokens)
    if later:
        times.undrafted += [(clock() - began) * 1000.0 / later] * later


def _opening(
    number: int, prompt: Sequence[int], most: int, sampling: Sampling, undrafted: bool
) -> protocol.Open:
    return protocol.Open(
        number,
        list(prompt),
        most,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        undrafted=undrafted,
    )


async def _commit(client: ServerClient, number: int) -> protocol.Commit:
    while True:
        frame = await client.receive()
        if isinstance(frame, protocol.Problem):
            raise ProtocolError(f"The server refused a session: {frame.message}", "")
        if isinstance(frame, protocol.Commit) and frame.session == number:
            return frame
