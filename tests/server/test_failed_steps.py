"""A step that fails costs the session that made it fail, and no other a token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest

from wispprof.errors import EngineError, InputRefused
from wispprof.server import RunningServer, ServerSession, VerificationServer, running_server
from wispprof.sessions.session_state import CommitResult
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import GenerationRequest, StepInput, VerifyResult

POISON = [60, 61, 62]
SESSIONS, TOKENS = 16, 40


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("wispprof.server")
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(logging.NOTSET)


class Poisoned(FakeEngine):
    """Fails on every step with the poisoned session, in one of the ways that engines have."""

    def __init__(self, kind: str) -> None:
        super().__init__(64, max_context=512)
        self.kind = kind
        self.largest_failed = 0

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        poisoned = [
            given for given in inputs if [*self._caches[given.session].tokens, *given.tokens][:3] == POISON
        ]
        if not poisoned:
            return super().step(inputs)
        self.largest_failed = max(self.largest_failed, len(inputs))
        if self.kind == "named":
            raise InputRefused(poisoned[0].session, "Its logits are not finite.")
        if self.kind == "unnamed":
            raise EngineError("Something cannot be done.")
        if self.kind == "before":
            raise OverflowError("int too large to convert to float")
        results = super().step(inputs)
        if self.kind == "result":
            return [
                one._replace(accepted=9) if one.session == poisoned[0].session else one for one in results
            ]
        # The caches have grown: this must be undone.
        raise OverflowError("int too large to convert to float")


class Listener:
    """Takes the commits of one session."""

    key = kind = ""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.problem = ""
        self.ended = asyncio.Event()

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None:
        self.tokens += commit.tokens
        if commit.finished:
            self.ended.set()

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        self.problem = code
        self.ended.set()


class Unreachable(Listener):
    """A connection that cannot take anything."""

    def committed(
        self, session: ServerSession, commit: CommitResult, verify_ms: float, load_level: int
    ) -> None:
        self.ended.set()
        raise RuntimeError("cannot take it")

    def failed(self, session: ServerSession, code: str, message: str, retry_ms: float = 0.0) -> None:
        raise RuntimeError("cannot take it")


def opened(server: VerificationServer, prompt: list[int], listener: Listener) -> Listener:
    server.open(GenerationRequest(tuple(prompt), TOKENS, undrafted=True), listener)
    return listener


@asynccontextmanager
async def serving(engine: FakeEngine) -> AsyncIterator[RunningServer]:
    settings = ServerSettings(policy="fcfs", admit="all", prefix_cache_sessions=2)
    async with running_server(settings, engine=engine, model=engine.served) as running:
        yield running


@pytest.mark.parametrize("kind", ["named", "unnamed", "before", "after", "result"])
async def test_one_poisoned_request_among_sixteen(kind: str) -> None:
    engine = Poisoned(kind)
    async with serving(engine) as running:
        server = running.server
        prompts = [[number, 3, 9] for number in range(SESSIONS - 1)]
        others = [opened(server, prompt, Listener()) for prompt in prompts[:7]]
        poisoned = opened(server, POISON, Listener())
        others += [opened(server, prompt, Listener()) for prompt in prompts[7:]]
        await asyncio.gather(*(one.ended.wait() for one in (poisoned, *others)))
        assert [one.tokens for one in others] == [engine.target.generate(p, TOKENS) for p in prompts]
        assert (poisoned.tokens, poisoned.problem) == ([], "internal")
        assert engine.largest_failed == SESSIONS
        await server.check_integrity()
        assert server.state == "ok"


async def test_a_connection_that_fails_costs_its_session_only() -> None:
    engine = FakeEngine(64)
    async with serving(engine) as running:
        others = [opened(running.server, [n, 3, 9], Listener()) for n in range(3)]
        broken = opened(running.server, [9, 9], Unreachable())
        await asyncio.gather(*(one.ended.wait() for one in (broken, *others)))
        assert [one.tokens for one in others] == [engine.target.generate([n, 3, 9], TOKENS) for n in range(3)]
        assert len(running.server.manager) == 0
        await running.server.check_integrity()


class Dying(FakeEngine):
    """Its device is gone from a certain step on."""

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        if self.steps >= 25:
            raise RuntimeError("device lost")
        return super().step(inputs)


async def a_loss_told(engine: FakeEngine) -> None:
    async with serving(engine) as running:
        one = opened(running.server, [1], Listener())
        await one.ended.wait()
        assert one.problem == "internal"
        await running.server.wait_loop_ended()
        async with httpx.AsyncClient(base_url=running.http_url) as client:
            health, ready = await client.get("/health"), await client.get("/ready")
        assert (health.status_code, ready.status_code) == (503, 503)
        assert health.json()["status"] == ready.json()["status"] == "failed"
        assert "device lost" in health.json()["reason"]


async def test_a_lost_engine_is_told_and_ends_the_server() -> None:
    with pytest.raises(EngineError, match="engine is lost: device lost"):
        await a_loss_told(Dying(64))
