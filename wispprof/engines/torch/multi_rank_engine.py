"""One engine over several ranks: rank 0's :class:`MultiRankEngine` is what the server sees, the others follow.

Every rank has a whole :class:`~wispprof.engines.torch.engine.TorchEngine` over its own heads, and all
of them go through the same calls in the same order, so their books are equal by construction. What needs no
collective (open, rollback, close) waits and travels with the next step: a step costs one order.

A rank that fails where the others do not ends the group: its neighbours fail in their next collective,
``torchrun`` stops what is left, and the edges resume with the server that comes next. Nothing is
served from ranks that disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from wispprof.engines.ranks import Ranks
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError
from wispprof.types import (
    Engine,
    EngineCapabilities,
    IntegrityReport,
    Sampling,
    StepInput,
    VerifyResult,
)

__all__ = ["MultiRankEngine", "follow"]

T = TypeVar("T")


class _Open(msgspec.Struct, array_like=True, tag="o"):
    session: str
    sampling: Sampling | None


class _Rollback(msgspec.Struct, array_like=True, tag="r"):
    session: str
    length: int


class _Close(msgspec.Struct, array_like=True, tag="c"):
    session: str


class _Fork(msgspec.Struct, array_like=True, tag="f"):
    session: str
    child: str
    length: int
    sampling: Sampling | None


class _Step(msgspec.Struct, array_like=True, tag="s"):
    feeds: list[tuple[str, list[int], int, bool]]


class _Check(msgspec.Struct, array_like=True, tag="i"):
    session: str | None


class _End(msgspec.Struct, array_like=True, tag="e"):
    pass


_Chore = _Open | _Rollback | _Close | _Fork


class _Order(msgspec.Struct, array_like=True):
    """Chores, then one piece of work. ``sessions`` and ``kv_free``: the leader's books between the two."""

    chores: list[_Chore]
    sessions: int
    kv_free: int
    work: _Step | _Check | _End


_decode = msgspec.msgpack.Decoder(_Order).decode
_encode = msgspec.msgpack.Encoder().encode


class MultiRankEngine(Engine):
    """Rank 0's engine with its followers behind it; the interface of the server's ``Engine``.

    Raises what the engine raises. After a failure that the ranks do not share (:attr:`broken` says which)
    ``on_broken`` is called once, and every step raises :class:`EngineError`.
    """

    def __init__(
        self,
        engine: TorchEngine,
        ranks: Ranks,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.broken = ""
        self._engine = engine
        self._ranks = ranks
        self._on_broken = on_broken
        self._chores: list[_Chore] = []

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._engine.capabilities

    @property
    def kv_tokens(self) -> int:
        return self._engine.kv_tokens

    @property
    def sessions(self) -> list[str]:
        return self._engine.sessions

    @property
    def kv_free(self) -> int:
        return self._engine.kv_free

    def cached(self, session: str) -> int:
        return self._engine.cached(session)

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = ()
    ) -> None:
        self._engine.open(session, sampling)
        self._chores.append(_Open(session, sampling))

    def fork(self, session: str, child: str, length: int, sampling: Sampling | None = None) -> None:
        self._engine.fork(session, child, length, sampling)
        self._chores.append(_Fork(session, child, length, sampling))

    def rollback(self, session: str, length: int) -> None:
        self._engine.rollback(session, length)
        self._chores.append(_Rollback(session, length))

    def close(self, session: str) -> None:
        self._engine.close(session)
        self._chores.append(_Close(session))

    def step(self, feeds: Sequence[StepInput]) -> list[VerifyResult]:
        if not feeds:
            return []
        packed = [(f.session, [int(t) for t in f.tokens], f.drafts, f.needs_logits) for f in feeds]
        self._order(_Step(packed))
        return self._shared(lambda: self._engine.step(feeds))

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """Every rank compares its own KV; raises :class:`EngineError` where one of them is off."""
        self._order(_Check(session))
        return self._shared(lambda: _check(self._engine, self._ranks, session))

    def shutdown(self) -> None:
        """Tell the followers to return from :func:`follow`."""
        if not self.broken:
            self._order(_End())

    def _order(self, work: _Step | _Check | _End) -> None:
        if self.broken:
            raise EngineError(f"The engine serves nothing more: {self.broken}.")
        chores, self._chores = self._chores, []
        order = _Order(chores, len(self._engine.sessions), self._engine.kv_free, work)
        self._shared(lambda: self._ranks.say(_encode(order)))

    def _shared(self, work: Callable[[], T]) -> T:
        """Errors of the engine's own are raised on every rank alike; any other ends the group."""
        try:
            return work()
        except EngineError:
            raise
        except BaseException as err:
            self.broken = f"its ranks fell apart ({type(err).__name__}: {err})"
            self._ranks.leave()
            self._on_broken()
            raise


def follow(engine: TorchEngine, ranks: Ranks) -> None:
    """Do what the leader orders until it says that it is over. Blocks.

    Raises :class:`EngineError` where this rank's books are not the leader's, and whatever a collective
    raises when the leader is gone.
    """
    while True:
        order = _decode(ranks.hear())
        for deferred_op in order.chores:
            _do(engine, deferred_op)
        if (len(engine.sessions), engine.kv_free) != (order.sessions, order.kv_free):
            raise EngineError(
                f"Rank {ranks.rank} holds {len(engine.sessions)} sessions with {engine.kv_free} KV tokens "
                f"free; the leader {order.sessions} with {order.kv_free}.",
                "Restart the server and report a defect.",
            )
        work = order.work
        if isinstance(work, _End):
            return
        try:
            if isinstance(work, _Step):
                engine.step([StepInput(*feed) for feed in work.feeds])
            else:
                _check(engine, ranks, work.session)
        except EngineError:
            pass  # the leader raises the same one, and answers for it


def _do(engine: TorchEngine, deferred_op: _Chore) -> None:
    if isinstance(deferred_op, _Open):
        engine.open(deferred_op.session, deferred_op.sampling)
    elif isinstance(deferred_op, _Rollback):
        engine.rollback(deferred_op.session, deferred_op.length)
    elif isinstance(deferred_op, _Close):
        engine.close(deferred_op.session)
    else:
        engine.fork(
            deferred_op.session, deferred_op.child, deferred_op.length, deferred_op.sampling
        )


def _check(engine: TorchEngine, ranks: Ranks, session: str | None) -> IntegrityReport:
    """Integrity on all ranks: every one of them raises if any does."""
    err: EngineError | None = None
    report = IntegrityReport({}, 0.0)
    try:
        report = engine.check_integrity(session)
    except EngineError as found:
        err = found
    sound = ranks.least(0 if err else 1)
    if err:
        raise err
    if not sound:
        raise EngineError("The KV of another rank is not what its tokens say.", "See its log.")
    return report
