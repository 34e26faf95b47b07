"""An engine in a process of its own, behind the same contract.

Its Python code then shares no interpreter lock with the event loop, the policy and the sessions of the
server. Calls go, pickled, over a socket without a name that these two processes alone hold, one at a time.
What the event loop reads between them (``kv_free``) comes with every answer. The process ends with the one
that started it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import wispprof
from wispprof import errors
from wispprof.backends import Engine, EngineCapabilities, IntegrityReport
from wispprof.engines import EngineOptions, LoadedEngine, load_engine
from wispprof.engines.model_folder import find_model
from wispprof.engines.tokenizers import read_tokenizer
from wispprof.errors import EngineLost, InputRefused, WispprofError
from wispprof.types import Sampling, StepInput, VerifyResult

_COMMAND = "from wispprof.engines.engine_process import serve_engine; serve_engine()"
_STOP_S = 5.0


def can_separate() -> bool:
    """Whether this system hands sockets to a new process, and has a core for it."""
    from wispprof.hardware.machine_info import usable_cores

    return hasattr(os, "fork") and usable_cores() > 1


def load_engine_process(name: str, options: EngineOptions, cores: Collection[int] = ()) -> LoadedEngine:
    """As :func:`~wispprof.engines.load_engine`, with the engine in a process of its own, on these ``cores``
    if the system pins (none: all)."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=child_environment(),
            process_group=0,  # Ctrl-C is for the process that holds the sessions
        )
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    pipe = Connection(ours.detach())
    engine = EngineProcess(process, pipe)
    model = engine.load(name, options)
    return LoadedEngine(engine, model, read_tokenizer(find_model(options.target)))


def child_environment() -> dict[str, str]:
    """The environment of a process that is to import this package."""
    package = str(Path(wispprof.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


class EngineProcess(Engine):
    """The engine at the other end of ``pipe``. If its process ends, calls raise :class:`EngineLost`."""

    _capabilities: EngineCapabilities

    def __init__(self, process: subprocess.Popen[bytes], pipe: Connection) -> None:
        self._pipe = pipe
        self._kv_tokens = self._kv_free = 0
        self._end = weakref.finalize(self, _end, process, pipe)

    def load(self, name: str, options: EngineOptions) -> Any:
        """Load the engine; returns its target's identity. Raises what loading raises."""
        try:
            self._capabilities, self._kv_tokens, model = self._call("load", name, options)
        except BaseException:
            self.shutdown()
            raise
        return model

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    @property
    def sessions(self) -> Sequence[str]:
        names: Sequence[str] = self._call("sessions")
        return names

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    @property
    def kv_free(self) -> int:
        return self._kv_free

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        self._call("open", session, sampling, tokens, owner)

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        results: list[VerifyResult] = self._call("step", inputs)
        return results

    def rollback(self, session: str, length: int) -> None:
        self._call("rollback", session, length)

    def close(self, session: str) -> None:
        self._call("close", session)

    def cached(self, session: str) -> int:
        count: int = self._call("cached", session)
        return count

    def fork(self, session: str, child: str, length: int, sampling: Sampling) -> None:
        self._call("fork", session, child, length, sampling)

    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        report: IntegrityReport = self._call("check_integrity", session)
        return report

    def audit(self, expected: Mapping[str, int]) -> None:
        self._call("audit", dict(expected))

    def warm_up(self, every_size: bool = False) -> None:
        self._call("warm_up", every_size)

    def shutdown(self) -> None:
        self._end()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
            found, err, self._kv_free = self._pipe.recv()
        except (OSError, EOFError) as lost:
            raise EngineLost("The engine's process ended.", "Load the engine again.") from lost
        if err is not None:
            raise _error(*err)
        return found


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    process.kill()
    process.wait()


# --- in that process ------------------------------------------------------------------------------


def serve_engine() -> None:
    """Answer calls over the socket of the command line until the other side hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    engine: Engine | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = pipe.recv()
            found = err = None
            try:
                if engine is None:
                    engine, model, _ = load_engine(*arguments)
                    found = engine.capabilities, engine.kv_tokens, model
                    gc.collect()
                    gc.freeze()  # half a million objects that no later collection need visit
                else:
                    asked = getattr(engine, method)
                    found = asked(*arguments) if callable(asked) else asked
            except Exception as failed:
                err = _described(failed)
            pipe.send((found, err, 0 if engine is None else engine.kv_free))
    if engine is not None:
        engine.shutdown()
    gc.unfreeze()  # libraries report what is still frozen then as leaked


def _described(err: Exception) -> tuple[str, str, str, str]:
    """Class, message, hint and session of an error."""
    if not isinstance(err, WispprofError):
        return EngineLost.__name__, f"{type(err).__name__}: {err}", "", ""
    return type(err).__name__, Exception.__str__(err), err.hint, getattr(err, "session", "")


def _error(kind: str, message: str, hint: str, session: str) -> WispprofError:
    if kind == InputRefused.__name__:
        return InputRefused(session, message, hint)
    found: WispprofError = getattr(errors, kind, EngineLost)(message, hint)
    return found
