"""A fault of the draft model ends the drafting, never the answer, and the statistics say so in words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from fake_pair import HashDevice, edge, fake_runtime, in_process, linear_cost, truth

from wispprof.backends import Drafter
from wispprof.edge import Generation, GenerationRequest, RequestStats, TimedWorker
from wispprof.edge.draft_device import DraftDevice
from wispprof.edge.edge_runtime import Prompt
from wispprof.edge.request_stats import EdgeMetrics
from wispprof.errors import ServerUnreachable
from wispprof.policies import make_controller
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.testing.virtual_time import run_virtual
from wispprof.types import DraftToken, Sampling

PROMPT = (3, 4, 7)


class Faulty(FakeDrafter):
    """Fails where it is told to: at ``open``, or at draft number ``at``."""

    def __init__(self, at: int | None, fails_to_open: bool = False) -> None:
        super().__init__(FakeTarget(), 0.8)
        self._left = at
        self._fails_to_open = fails_to_open

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        if self._fails_to_open:
            raise RuntimeError("the device ran out of memory")
        super().open(tokens, sampling)

    def draft(self) -> DraftToken:
        if self._left == 0:
            raise IndexError("index 300 is out of range")
        if self._left is not None:
            self._left -= 1
        return super().draft()


class Foreign(FakeDrafter):
    """Each draft after the first two is a token that the target does not have."""

    def draft(self) -> DraftToken:
        drafted = super().draft()
        return drafted if self.length < len(PROMPT) + 5 else drafted._replace(token=drafted.token + 256)


def answer(
    drafter: Drafter, policy: str, draft_ms: float = 5.0, k: int = 4, prefill_ms: float = 0.0
) -> tuple[RequestStats, list[int]]:
    async def main() -> tuple[RequestStats, list[int]]:
        async with in_process(policy) as server:
            server.vocab_size = 256
            async with edge(server.connect) as client, asyncio.timeout(600.0):
                worker = TimedWorker(drafter, lambda context: draft_ms, prefill_ms / len(PROMPT))
                controller = make_controller("fixed", k=k)
                generation = Generation(client, GenerationRequest(PROMPT, 40), worker, controller)
                return await generation.run(), list(generation.output)

    return run_virtual(main())


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("at", [None, 0, 1, 9])
def test_an_answer_goes_on_without_a_draft_model_that_raises(at: int | None, policy: str) -> None:
    stats, output = answer(Faulty(at, fails_to_open=at is None), policy)
    assert output == truth(PROMPT, 40)
    assert stats.finished == "length"
    assert stats.draft_obstacle == "fault"
    reason = "ran out of memory" if at is None else "IndexError: index 300"
    assert reason in stats.draft_note
    assert reason in stats.line()
    assert stats.summary()["draft_fault"] == stats.draft_fault


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"], ids=["synchronous", "asynchronous"])
def test_a_draft_outside_the_targets_vocabulary_is_not_sent(policy: str) -> None:
    stats, output = answer(Foreign(FakeTarget(), 1.0), policy)
    assert output == truth(PROMPT, 40)
    assert stats.foreign > 0
    assert not stats.draft_fault
    assert stats.sent <= stats.drafted - stats.foreign
    # Those inside the vocabulary were used.
    assert 0 < stats.accepted <= 3


def test_a_lost_server_and_a_broken_draft_model_give_the_servers_error() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect, give_up_ms=500.0) as client:
            worker = TimedWorker(Faulty(30), lambda context: 5.0)
            request = GenerationRequest(PROMPT, 400)
            generation = Generation(client, request, worker, make_controller("fixed", k=2), fallback=True)
            task = asyncio.create_task(generation.run())
            await asyncio.sleep(0.1)
            server.refuse = True
            server.cut()
            with pytest.raises(ServerUnreachable):
                await task

    run_virtual(main())


@pytest.mark.parametrize(
    ("stats", "obstacle", "words"),
    [
        (lambda: answer(FakeDrafter(FakeTarget(), 0.0), "fcfs")[0], "rejected", "rejected all"),
        (
            lambda: answer(FakeDrafter(FakeTarget(), 1.0), "wispprof", 5000.0)[0],
            "late",
            "no draft step ended",
        ),
        (
            lambda: answer(FakeDrafter(FakeTarget(), 1.0), "wispprof", 5.0, prefill_ms=60_000.0)[0],
            "late",
            "still reading the prompt",
        ),
        (lambda: answer(FakeDrafter(FakeTarget(), 1.0), "fcfs", k=0)[0], "controller", "k = 0"),
        (lambda: answer(FakeDrafter(FakeTarget(), 1.0), "fcfs")[0], "", ""),
        (RequestStats, "off", "Server-only"),
    ],
    ids=["rejected", "late", "prefill", "k = 0", "accepted", "server-only"],
)
def test_statistics_say_what_kept_the_device_from_drafting(
    stats: Callable[[], RequestStats], obstacle: str, words: str
) -> None:
    found = stats()
    assert (found.draft_obstacle, words in found.draft_note) == (obstacle, True)
    assert found.summary()["draft_note"] == found.draft_note


def test_mostly_declined_rounds_are_named_though_some_drafts_were_accepted() -> None:
    found = RequestStats(drafting=True, rounds=343, declined=253, drafted=333, accepted=56, sent=300)
    found.plan_row = "laptop/20/0/4/stream/512"
    said = "mostly chose k = 0 (253 times by plan row laptop/20/0/4/stream/512)"
    assert said in found.draft_note
    assert said in found.line()
    assert found.draft_obstacle == ""  # drafts were accepted: not a request without any
    assert RequestStats(drafting=True, rounds=343, declined=171, drafted=333, accepted=256).draft_note == ""


def test_what_became_of_drafts_is_said_if_most_were_not_accepted() -> None:
    found = RequestStats(drafting=True, rounds=40, drafted=73, accepted=15, dropped=41, matched=17, late=6)
    found.verified_drafts = 23
    assert found.draft_note == (
        "15 of 73 drafts were accepted; 27 followed a rejected draft or the last token, "
        "17 were committed before they were verified, 8 were rejected, 6 were overtaken by a commit."
    )
    assert found.draft_note in found.line()
    assert found.draft_obstacle == ""
    found.accepted, found.dropped = 37, 19
    assert found.draft_note == ""


# --- the device -----------------------------------------------------------------------------------


async def reply(device: DraftDevice, **settings: object) -> tuple[str, RequestStats, bytes]:
    async with fake_runtime() as runtime:
        runtime.device = device
        metrics = EdgeMetrics()
        one = runtime.reply(Prompt(PROMPT, 40, Sampling()))
        async for _ in metrics.watch(one, one.stream()):
            pass
        assert one.tokens == truth(PROMPT, 40)
        return one.stats.draft_obstacle, one.stats, metrics.text()


async def test_a_hanging_draft_step_is_left_and_the_next_request_drafts_again() -> None:
    released = threading.Event()

    class Hanging(FakeDrafter):
        def draft(self) -> DraftToken:
            released.wait()
            return super().draft()

    class Device(HashDevice):
        made = 0

        def _make(self) -> Drafter:
            self.made += 1
            return Hanging(FakeTarget(), 0.8) if self.made == 1 else FakeDrafter(FakeTarget(), 0.8)

    device = Device("model", "fixed", {"k": 3}, loaded=object(), timeout_ms=50.0)
    try:
        obstacle, stats, scraped = await reply(device)
        assert obstacle == "fault"
        assert "No draft within 50 ms" in stats.draft_note
        assert b"wispprof_edge_draft_faults_total 1.0" in scraped
        assert b'wispprof_edge_undrafted_requests_total{reason="fault"} 1.0' in scraped
        _, stats, _ = await reply(device)
        assert not stats.draft_fault
        assert device.made == 2
    finally:
        released.set()
        device.close()


async def test_a_drafter_that_cannot_be_made_costs_the_drafts_only() -> None:
    class Device(HashDevice):
        made = 0

        def _make(self) -> Drafter:
            self.made += 1
            if self.made == 2:
                raise MemoryError("no memory for a second model")
            return super()._make()

    device = Device("model", "fixed", {"k": 3}, loaded=object())
    try:
        with device.lend(PROMPT):  # a request that runs at the same time
            obstacle, stats, _ = await reply(device)
        assert obstacle == "fault"
        assert "no memory for a second model" in stats.draft_note
        _, stats, _ = await reply(device)
        assert not stats.draft_fault
    finally:
        device.close()


def test_the_drafter_masks_stop_tokens_as_the_target_does() -> None:
    seen: list[Sampling] = []

    class Watched(FakeDrafter):
        def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
            seen.append(sampling)
            super().open(tokens, sampling)

    async def main() -> None:
        async with in_process(cost=linear_cost()) as server, edge(server.connect) as client:
            request = GenerationRequest(
                PROMPT, 8, Sampling(min_p=0.1, min_length=7, logprobs=2), stop_tokens=(999,)
            )
            worker = TimedWorker(Watched(FakeTarget(), 1.0), lambda context: 1.0)
            generation = Generation(client, request, worker, make_controller("fixed", k=1))
            await generation.run()
            frame = generation.opening()
            assert (frame.min_p, frame.min_new, frame.logprobs, frame.stop) == (0.1, 4, 2, [999])

    run_virtual(main())
    assert seen[0].stop_tokens == (999,)
    assert seen[0].min_length == 7


def test_a_server_only_request_has_nothing_to_explain_in_its_line() -> None:
    stats = RequestStats(tokens=4, first_ms=1.0, last_ms=9.0)
    assert "Server-only" not in stats.line()
