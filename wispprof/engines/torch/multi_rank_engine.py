"""One engine over several ranks: rank 0's :class:`MultiRankEngine` serves, the other ranks :func:`follow` it.

Every rank runs a :class:`~wispprof.engines.torch.engine.TorchEngine` over its own heads. All ranks make the
same calls in the same order, so their bookkeeping is equal. Calls without a collective (open, fork,
rollback, close) are deferred and travel with the next step, so a step costs one command.

A failure on one rank ends the group: the other ranks fail in their next collective, ``torchrun`` stops them,
and the edges resume on the next server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from wispprof.backends import Engine, EngineCapabilities, IntegrityReport
from wispprof.engines.tensor_parallel import Ranks
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError
from wispprof.sampling.sampler import bounded
from wispprof.types import Sampling, StepInput, VerifyResult

T = TypeVar("T")


class _Open(msgspec.Struct, array_like=True, tag="o"):
    session: str
    sampling: Sampling | None

    def apply(self, engine: TorchEngine) -> None:
        engine.open(self.session, self.sampling)


class _Rollback(msgspec.Struct, array_like=True, tag="r"):
    session: str
    length: int

    def apply(self, engine: TorchEngine) -> None:
        engine.rollback(self.session, self.length)


class _Close(msgspec.Struct, array_like=True, tag="c"):
    session: str

    def apply(self, engine: TorchEngine) -> None:
        engine.close(self.session)


class _Fork(msgspec.Struct, array_like=True, tag="f"):
    session: str
    child: str
    length: int
    sampling: Sampling | None

    def apply(self, engine: TorchEngine) -> None:
        engine.fork(self.session, self.child, self.length, self.sampling)


class _Step(msgspec.Struct, array_like=True, tag="s"):
    inputs: list[tuple[str, list[int], int, bool, list[int]]]


class _Check(msgspec.Struct, array_like=True, tag="i"):
    session: str | None


class _Shutdown(msgspec.Struct, array_like=True, tag="e"):
    pass


_DeferredOp = _Open | _Rollback | _Close | _Fork


class _Command(msgspec.Struct, array_like=True):
    """Deferred operations, then one task. ``sessions`` and ``kv_free``: rank 0's state between the two."""

    deferred: list[_DeferredOp]
    sessions: int
    kv_free: int
    task: _Step | _Check | _Shutdown


_decode = msgspec.msgpack.Decoder(_Command).decode
_encode = msgspec.msgpack.Encoder().encode


class MultiRankEngine(Engine):
    """Rank 0's engine, with the other ranks behind it. Raises what :class:`TorchEngine` raises.

    After a failure that the ranks do not share, :attr:`broken` says which, ``on_broken`` is called once,
    and every step raises :class:`EngineError`.
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
        self._deferred: list[_DeferredOp] = []

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._engine.capabilities

    @property
    def sessions(self) -> list[str]:
        return self._engine.sessions

    @property
    def kv_tokens(self) -> int:
        return self._engine.kv_tokens

    @property
    def kv_free(self) -> int:
        return self._engine.kv_free

    def cached(self, session: str) -> int:
        return self._engine.cached(session)

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = (), owner: str = ""
    ) -> None:
        self._defer(_Open(session, self._bounded(sampling)))

    def fork(self, session: str, child: str, length: int, sampling: Sampling | None = None) -> None:
        self._defer(_Fork(session, child, length, self._bounded(sampling)))

    def rollback(self, session: str, length: int) -> None:
        self._defer(_Rollback(session, length))

    def close(self, session: str) -> None:
        self._defer(_Close(session))

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        if not inputs:
            return []
        # Before anything is sent: what cannot be sent must not end the group.
        self._engine.check_inputs(inputs)
        plain = [
            (i.session, [int(t) for t in i.tokens], i.drafts, i.needs_logits, [int(p) for p in i.parents])
            for i in inputs
        ]
        self._command(_Step(plain))
        return self._on_all_ranks(lambda: self._engine.step(inputs))

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """Every rank checks its own KV; raises :class:`EngineError` if one of them finds an error."""
        self._command(_Check(session))
        return self._on_all_ranks(lambda: _check(self._engine, self._ranks, session))

    def shutdown(self) -> None:
        """Make :func:`follow` return on the other ranks."""
        if not self.broken:
            self._command(_Shutdown())

    def _bounded(self, sampling: Sampling | None) -> Sampling | None:
        return bounded(sampling, self._engine.info.vocab_size) if sampling else None

    def _defer(self, operation: _DeferredOp) -> None:
        operation.apply(self._engine)
        self._deferred.append(operation)

    def _command(self, task: _Step | _Check | _Shutdown) -> None:
        if self.broken:
            raise EngineError(f"The engine has stopped: {self.broken}.", "Restart the server.")
        deferred, self._deferred = self._deferred, []
        command = _Command(deferred, len(self._engine.sessions), self._engine.kv_free, task)
        self._on_all_ranks(lambda: self._ranks.broadcast(_encode(command)))

    def _on_all_ranks(self, work: Callable[[], T]) -> T:
        """All ranks raise the same :class:`EngineError`; any other error ends the group."""
        try:
            return work()
        except EngineError:
            raise
        except BaseException as err:
            self.broken = f"a rank failed ({type(err).__name__}: {err})"
            self._ranks.leave()
            self._on_broken()
            raise


def follow(engine: TorchEngine, ranks: Ranks) -> None:
    """Execute rank 0's commands until it shuts down. Blocks.

    Raises :class:`EngineError` if this rank's sessions are not those of rank 0, and whatever a collective
    raises when rank 0 is gone.
    """
    while True:
        command = _decode(ranks.recv())
        for operation in command.deferred:
            operation.apply(engine)
        if (len(engine.sessions), engine.kv_free) != (command.sessions, command.kv_free):
            raise EngineError(
                f"Rank {ranks.rank} holds {len(engine.sessions)} sessions with {engine.kv_free} KV tokens "
                f"free; rank 0 holds {command.sessions} with {command.kv_free}.",
                "Restart the server and report a defect.",
            )
        task = command.task
        if isinstance(task, _Shutdown):
            return
        try:
            if isinstance(task, _Step):
                engine.step([StepInput(*one) for one in task.inputs])
            else:
                _check(engine, ranks, task.session)
        except EngineError:
            pass  # rank 0 raises the same error to its caller


def _check(engine: TorchEngine, ranks: Ranks, session: str | None) -> IntegrityReport:
    """Integrity on all ranks: if one of them finds an error, every one raises."""
    err: EngineError | None = None
    report = IntegrityReport({}, 0.0)
    try:
        report = engine.check_integrity(session)
    except EngineError as found:
        err = found
    intact = ranks.all_reduce_min(0 if err else 1)
    if err:
        raise err
    if not intact:
        raise EngineError("The KV of another rank does not match its tokens.", "See that rank's log.")
    return report
