"""Log-probabilities of committed tokens, from the engine's result to the frame."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from raw_edge import edge

from wispprof import protocol
from wispprof.policies.interface import ScheduledItem
from wispprof.server import running_server
from wispprof.sessions.session_state import SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Slo, StepInput, TokenLogprob, VerifyResult


def logprob_of(token: int) -> TokenLogprob:
    return TokenLogprob(-token / 8.0, ((token, -token / 8.0), (token + 1, -9.0)))


class Reporting(FakeEngine):
    """Reports a log-probability that is a function of the token."""

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        return [
            result._replace(logprobs=tuple(map(logprob_of, result.tokens))) for result in super().step(inputs)
        ]


def test_they_are_cut_with_the_tokens_at_a_stop() -> None:
    state = SessionState(
        "s", [1, 2], slo=Slo(1.0), max_new=10, max_context=50, now_ms=0.0, stop=[7], stream=True
    )
    state.step_input(ScheduledItem("s", prefill=2))
    commit = state.apply(VerifyResult("s", 0, (4,), (logprob_of(4),)), 1.0)
    assert commit.logprobs == (logprob_of(4),)
    state.merge(0, 3, [5, 7, 6], [1.0] * 3, 2.0, 0.0, 1.0)
    state.step_input(ScheduledItem("s", drafts=3))
    decided = (5, 7, 6, 3)
    commit = state.apply(VerifyResult("s", 3, decided, tuple(map(logprob_of, decided))), 3.0)
    assert (commit.tokens, commit.finished) == ((5, 7), "stop")
    assert commit.logprobs == (logprob_of(5), logprob_of(7))


async def test_commit_frames_carry_one_per_token() -> None:
    engine = Reporting(64)
    async with (
        running_server(ServerSettings(policy="fcfs"), engine=engine, model=engine.served) as running,
        edge(running.split_url) as one,
    ):
        one.inbox[0] = asyncio.Queue()
        await one.send(protocol.Open(0, [1, 2, 3], 6, undrafted=True, logprobs=2))
        finished = ""
        while not finished:
            commit = await one.inbox[0].get()
            assert isinstance(commit, protocol.Commit)
            assert commit.logprobs == [logprob_of(token) for token in commit.tokens]
            finished = commit.finished
