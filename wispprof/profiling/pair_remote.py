"""Times of a pair whose target runs on a server: its steps over the wire, the draft's rounds here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    """The server's steps with the answers' own tokens as drafts, and rounds of the draft, at the same time: a
    server and a device that share a machine slow each other. Sessions without drafts come first, alone.

    Raises the errors of the connection, and :class:`ProtocolError` if the server refuses a session.
    """
    undrafted, warm, busy, drafting = PairTimes(), PairTimes(), PairTimes(), threading.Event()
    numbers, lengths = count(), cycle([*range(0, depth + 1, 2), *range(1, depth + 1, 2)])

    async def alone() -> None:
        async with ServerClient.open(server, access, "check-pair", timeout_s) as client:
            for path in paths:
                await _undrafted_answer(client, next(numbers), path, sampling, undrafted, clock)
            await _verify_answer(client, next(numbers), paths[0], lengths, sampling, warm)

    async def together() -> None:
        async with ServerClient.open(server, access, "check-pair", timeout_s) as client:
            for number, path in enumerate(cycle(paths)):
                if number >= len(paths) and not drafting.is_set():
                    return
                await _verify_answer(client, next(numbers), path, lengths, sampling, busy)

    asyncio.run(alone())
    first = warm.estimator()
    target = _RecordedTarget(paths, lambda drafts: rtt_ms + first.step_ms(1 + drafts), sleep)
    drafting.set()
    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(asyncio.run, together())
        try:
            drafted = rehearse(drafter, target, paths, depth, sampling, clock)
        finally:
            drafting.clear()
        steps.result()
    drafted.verify, drafted.prefill, drafted.undrafted = busy.verify, undrafted.prefill, undrafted.undrafted
    return drafted


async def _verify_answer(
    client: ServerClient,
    number: int,
    path: TracePath,
    lengths: Iterator[int],
    sampling: Sampling,
    times: PairTimes,
) -> None:
    """One session whose drafts are right. A server in stream mode takes as many as its policy wants."""
    await client.send(_opening(number, path, sampling, undrafted=False))
    welcome = client.welcome
    while True:
        frame = await _commit(client, number)
        place = frame.committed_len - len(path.prompt)
        if place == len(frame.tokens):
            times.prefill.append((len(path.prompt), frame.queue_ms + frame.verify_ms))
        else:
            times.verified(frame.drafted, frame.queue_ms + frame.verify_ms)
        if frame.finished:
            return
        if frame.accepted < frame.drafted:  # near ties: the answer went another way, so no drafts are known
            await client.send(protocol.Close(number))
            return
        most = welcome.max_drafts if welcome.stream else next(lengths)
        drafts = list(path.path[place : len(path.path) - 1][:most])
        sure = bytes([255]) * len(drafts)
        await client.send(protocol.Draft(number, 0, frame.committed_len, drafts, sure, 0.0, _SLACK_MS))


async def _undrafted_answer(
    client: ServerClient, number: int, path: TracePath, sampling: Sampling, times: PairTimes, clock: Clock
) -> None:
    """Its prefill, and the time of a later token between arrivals of commits: a server that steps without a
    pause also has to send them meanwhile."""
    await client.send(_opening(number, path, sampling, undrafted=True))
    frame = await _commit(client, number)
    times.prefill.append((len(path.prompt), frame.queue_ms + frame.verify_ms))
    began, later = clock(), 0
    while not frame.finished:
        frame = await _commit(client, number)
        later += len(frame.tokens)
    if later:
        times.undrafted += [(clock() - began) * 1000.0 / later] * later


def _opening(number: int, path: TracePath, sampling: Sampling, undrafted: bool) -> protocol.Open:
    return protocol.Open(
        number,
        list(path.prompt),
        len(path.path),
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
