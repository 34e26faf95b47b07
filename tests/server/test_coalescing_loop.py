"""Frames wait while the engine computes, and nothing else changes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import pytest
from raw_edge import edge

from wispprof import protocol
from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import RttMeter
from wispprof.server import running_server
from wispprof.server.coalescing_loop import (
    CoalescingLoop,
    CoalescingSelector,
    coalescing,
    run_coalescing,
    socket_wait_ms,
)
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.testing.virtual_time import run_virtual

ENDLESS_S = 3600.0
"""A wait that only a wake-up can end within a test."""


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def selector_over(end: socket.socket) -> CoalescingSelector:
    selector = CoalescingSelector()
    selector.register(end, 1)
    return selector


def test_without_coalescing_a_frame_is_read_at_once(pair):
    near, far = pair
    with selector_over(near) as selector:
        far.send(b"x")
        assert [key.fileobj for key, _ in selector.select(ENDLESS_S)] == [near]
        assert selector.waited_s == 0.0


def test_coalesced_frames_are_read_together_after_a_wake_up(pair):
    near, far = pair
    with selector_over(near) as selector:
        selector.max_wait_s = ENDLESS_S

        def end_of_step() -> None:
            far.send(b"x")
            selector.wake_selector()

        thread = threading.Thread(target=end_of_step)
        thread.start()
        assert [key.fileobj for key, _ in selector.select(None)] == [near]
        thread.join()
        assert selector.waited_s > 0.0


def test_a_wake_up_before_the_wait_is_not_lost(pair):
    near, _ = pair
    with selector_over(near) as selector:
        selector.max_wait_s = ENDLESS_S
        selector.wake_selector()
        assert selector.select(None) == []


def test_an_old_wake_up_does_not_end_a_later_wait(pair):
    near, _ = pair
    with selector_over(near) as selector:
        selector.wake_selector()
        selector.coalesce(0.01)
        selector.select(None)
        assert selector.waited_s > 0.001  # it waited, as a pending wake-up would prevent


def test_a_loop_with_work_does_not_wait(pair):
    near, far = pair
    with selector_over(near) as selector:
        selector.max_wait_s = ENDLESS_S
        far.send(b"x")
        assert len(selector.select(0)) == 1


def test_timers_are_on_time(pair):
    near, _ = pair
    with selector_over(near) as selector:
        selector.max_wait_s = ENDLESS_S
        assert selector.select(0.001) == []


def test_the_wait_of_a_frame_holds_until_the_next_idle_select(pair):
    near, far = pair
    with selector_over(near) as selector:
        selector.max_wait_s = 0.001
        far.send(b"x")
        selector.select(None)
        waited = selector.waited_s
        assert waited > 0.0
        selector.select(0)  # callbacks of what was found run meanwhile
        assert selector.waited_s == waited
        selector.max_wait_s = 0.0
        selector.select(ENDLESS_S)
        assert selector.waited_s == 0.0


def test_work_in_a_thread_ends_the_wait():
    async def main() -> str:
        loop = asyncio.get_running_loop()
        with coalescing(ENDLESS_S * 1000.0):
            return await loop.run_in_executor(None, lambda: "done")

    assert run_coalescing(main()) == "done"


def test_coalescing_ends_with_its_block_even_if_that_raises():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CoalescingLoop)
        with coalescing(5.0):
            assert loop.selector.max_wait_s == 0.005
        assert loop.selector.max_wait_s == 0.0
        with contextlib.suppress(ZeroDivisionError), coalescing(5.0):
            raise ZeroDivisionError
        assert loop.selector.max_wait_s == 0.0

    run_coalescing(main())


def test_another_event_loop_is_not_affected():
    async def main() -> float:
        with coalescing(ENDLESS_S * 1000.0):
            await asyncio.sleep(0)
            return socket_wait_ms()

    assert asyncio.run(main()) == 0.0


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"])
def test_a_server_on_it_commits_the_targets_own_text(policy: str):
    prompts = [[n, n + 1, n + 2] for n in range(6)]
    engine = FakeEngine(64, step_ms=lambda shape: 1.0)

    async def main() -> list[list[int]]:
        settings = ServerSettings(policy=policy, admit="all", coalesce_ms=ENDLESS_S * 1000.0)
        async with (
            running_server(settings, engine=engine, model=engine.served) as running,
            edge(running.split_url) as one,
        ):
            drafter = FakeDrafter(engine.target, 0.6)
            jobs = [one.generate(n, prompt, 24, k=4, drafter=drafter) for n, prompt in enumerate(prompts)]
            return list(await asyncio.gather(*jobs))

    assert run_coalescing(main()) == [engine.target.generate(prompt, 24) for prompt in prompts]


class SlowToRead:
    """A connection to a server that reports late reads: 10 ms of link, 20 ms unread."""

    def __init__(self) -> None:
        self._down: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(self, data: bytes) -> None:
        frame = protocol.decode_edge(data)
        answer: protocol.ServerFrame = protocol.Welcome(protocol.PROTOCOL_VERSION, "", "", 64, 8, True)
        delay_s = 0.010
        if isinstance(frame, protocol.Ping):
            answer, delay_s = protocol.Pong(frame.number, b"", 20.0), 0.030
        loop = asyncio.get_running_loop()
        loop.call_later(delay_s, self._down.put_nowait, protocol.encode(answer))

    async def receive(self) -> bytes:
        return await self._down.get()

    async def close(self) -> None: ...


def test_the_round_trip_excludes_the_time_a_ping_waited_unread():
    async def connect() -> SlowToRead:
        return SlowToRead()

    async def main() -> RttMeter:
        async with EdgeClient(connect, ClientSettings(ping_ms=50.0)) as client:
            while client.rtt.samples < 2:
                await asyncio.sleep(0.01)
            return client.rtt

    rtt = run_virtual(main())
    assert rtt.mean_ms == pytest.approx(10.0)
    assert rtt.spread_ms < 5.0
