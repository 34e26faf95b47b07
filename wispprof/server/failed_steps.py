"""Recovery from a step that raised: the session at fault ends, the others lose nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from wispprof.errors import EngineError, EngineLost, InputRefused, OutOfKvMemory
from wispprof.server.engine_thread import EngineThread
from wispprof.server.metrics import Metrics
from wispprof.server.session import ServerSession
from wispprof.server.session_manager import SessionManager
from wispprof.types import StepInput, VerifyResult

log = logging.getLogger("wispprof.server")

Commit = Callable[[list[ServerSession], Sequence[VerifyResult], float], object]


class FailedSteps:
    """``count``: steps that failed. ``commit`` takes sessions, results and time of a part that did not."""

    def __init__(
        self, manager: SessionManager, engine_thread: EngineThread, metrics: Metrics, commit: Commit
    ) -> None:
        self.count = 0
        self._manager = manager
        self._engine_thread = engine_thread
        self._metrics = metrics
        self._commit = commit

    async def recover(
        self, err: Exception, sessions: list[ServerSession], inputs: Sequence[StepInput]
    ) -> None:
        """End the session that made the step fail. The others lose nothing: they advance here, or in the
        next step. Raises :class:`EngineError` if the engine is lost."""
        self.count += 1
        self._metrics.failed_steps.inc()
        log.error("engine step of %d inputs failed", len(inputs), exc_info=err)
        if isinstance(err, EngineLost):
            await self._manager.reload()
            return
        if isinstance(err, InputRefused):
            for session in sessions:
                session.state.cancel()
            at_fault = [session for session in sessions if session.name == err.session]
            for session in at_fault:
                self._manager.end_failed(session)
            if at_fault:
                return
        if not isinstance(err, EngineError):
            await self._manager.restore(sessions)
        if len(sessions) == 1:
            self._manager.end_failed(sessions[0])
            if not isinstance(err, EngineError):
                await self._manager.probe()
            return
        middle = len(sessions) // 2
        for part in (slice(None, middle), slice(middle, None)):
            if all(session.state.in_flight for session in sessions[part]):
                await self._verify_part(sessions[part], inputs[part])

    async def _verify_part(self, sessions: list[ServerSession], inputs: Sequence[StepInput]) -> None:
        """Half of a step that failed, as a step of its own."""
        try:
            results, actual_ms = await self._engine_thread.step(inputs)
        except OutOfKvMemory:
            for session in sessions:
                session.state.cancel()
        except Exception as err:
            await self.recover(err, sessions, inputs)
        else:
            self._commit(sessions, results, actual_ms)
