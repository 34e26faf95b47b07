"""Drafting resources of one device, shared by its requests: a draft model, n-gram lookup, or both."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from wispprof.backends import Drafter
from wispprof.drafters import GgufDraft, make_drafter
from wispprof.drafters.ngram import LookupMemory
from wispprof.edge.draft_worker import CatchUp, DraftStep, DraftThread, DraftWorker, ThreadWorker
from wispprof.edge.energy_shares import EnergyShares
from wispprof.hardware import EnergyMeter
from wispprof.policies.interface import Controller
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.types import RejectionPredictor, Sampling

log = logging.getLogger("wispprof.edge")


class DraftDevice:
    """Lends a draft worker and a speculation controller to each request.

    ``kind``: ``model``, ``lookup``, ``both`` (lookup first) or ``none`` (server-only). ``loaded``: the
    draft model from :func:`~wispprof.engines.loading.load_model`, or a :class:`GgufDraft`. All steps run
    in one thread. Drafters are reused, so the next request of a conversation finds its KV.
    ``meter``: the device's energy meter; :attr:`energy` divides its readings among the requests.
    ``memory``: what n-gram lookup keeps of earlier answers. ``timeout_ms``: longest wait for a draft
    step. If one hangs, later requests draft in a new thread.
    """

    def __init__(
        self,
        kind: str,
        controller: str = "wisp",
        options: dict[str, Any] | None = None,
        predictor: RejectionPredictor | None = None,
        loaded: Any = None,
        meter: EnergyMeter | None = None,
        timeout_ms: float = 30_000.0,
        memory: LookupMemory | None = None,
    ) -> None:
        self.kind = kind
        self._memory = memory
        self.stream = True
        self.energy = EnergyShares(meter or EnergyMeter())
        self._controller = (controller, dict(options or {}))
        self._predictor = predictor
        self._loaded = loaded
        self._timeout_ms = timeout_ms
        self._thread = DraftThread()
        self._idle: list[tuple[list[int], Drafter]] = []
        self._keep = 2 if isinstance(loaded, GgufDraft) else 8  # llama.cpp allocates a whole context
        if kind != "none":
            # Report a wrong name, option or file now, not at the first request.
            self.controller()
            self._idle.append(([], self._make()))

    def controller(self) -> Controller:
        """A new speculation controller for one request."""
        from wispprof.policies import make_controller

        name, options = self._controller
        if name == "wispprof":
            options = {"stream": self.stream, **options}
        return make_controller(name, predictor=self._predictor, **options)

    @contextmanager
    def lend(self, prompt: Sequence[int]) -> Iterator[tuple[DraftWorker | None, Controller | None]]:
        """``with device.lend(prompt) as (worker, controller)``; both ``None`` for server-only."""
        if self.kind == "none":
            yield None, None
            return
        try:
            held, drafter = self._take(list(prompt))
        except Exception as err:  # the answer needs no drafts
            yield _NoDrafter(err), self.controller()
            return
        thread = self._thread
        worker = ThreadWorker(drafter, thread, self._timeout_ms, held)
        try:
            yield worker, self.controller()
        finally:
            if not worker.stuck:
                self._idle.append((worker.held, drafter))
                del self._idle[: -self._keep]
            elif self._thread is thread:
                log.warning("a draft step hangs; later requests draft in a new thread")
                thread.shutdown(wait=False)
                self._thread = DraftThread()

    def _take(self, prompt: list[int]) -> tuple[list[int], Drafter]:
        if not self._idle:
            return [], self._make()
        best = max(range(len(self._idle)), key=lambda i: common_prefix(self._idle[i][0], prompt))
        return self._idle.pop(best)

    def _make(self) -> Drafter:
        return make_drafter(self.kind, self._loaded, self._memory)

    def remember(self, tokens: Sequence[int]) -> None:
        """Let later requests look up the prompt and the verified answer of a finished one."""
        if self._memory is not None:
            self._memory.remember(tokens)

    def close(self) -> None:
        """Stop the drafting thread."""
        self._thread.shutdown()


class _NoDrafter:
    """The worker of a request for which no drafter could be made."""

    def __init__(self, err: Exception) -> None:
        self._err = err

    async def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        raise self._err

    async def step(self, sequence: Sequence[int]) -> DraftStep | CatchUp | None:
        return None
