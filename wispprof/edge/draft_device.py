"""Drafting resources of one device, shared by its requests: a draft model, n-gram lookup, or both."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from wispprof.backends import Drafter
from wispprof.drafters import make_drafter
from wispprof.edge.draft_worker import ThreadWorker
from wispprof.edge.request_stats import EnergyShares
from wispprof.hardware import EnergyMeter
from wispprof.policies.interface import Controller
from wispprof.sessions.pending_drafts import common_prefix
from wispprof.types import RejectionPredictor


class DraftDevice:
    """Lends a draft worker and a speculation controller to each request.

    ``kind``: ``model``, ``lookup``, ``both`` (lookup first) or ``none`` (server-only). ``loaded``: the
    draft model from :func:`~wispprof.engines.loading.load_model`, or a :class:`GgufDraft`. All steps run
    in one thread. Drafters are reused, so the next request of a conversation finds its KV.
    ``meter``: the device's energy meter; :attr:`energy` divides its readings among the requests.
    """

    def __init__(
        self,
        kind: str,
        controller: str = "wisp",
        options: dict[str, Any] | None = None,
        predictor: RejectionPredictor | None = None,
        loaded: Any = None,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.kind = kind
        self.stream = True
        self.energy = EnergyShares(meter or EnergyMeter())
        self._controller = (controller, dict(options or {}))
        self._predictor = predictor
        self._loaded = loaded
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._idle: list[tuple[list[int], Drafter]] = []
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
    def lend(self, prompt: Sequence[int]):  # type: ignore[no-untyped-def]
        """``with device.lend(prompt) as (worker, controller)``; both ``None`` for server-only."""
        if self.kind == "none":
            yield None, None
            return
        held, drafter = self._take(list(prompt))
        worker = ThreadWorker(drafter, self._threads)
        try:
            yield worker, self.controller()
        finally:
            self._idle.append((worker.held or held, drafter))
            del self._idle[:-8]

    def _take(self, prompt: list[int]) -> tuple[list[int], Drafter]:
        if not self._idle:
            return [], self._make()
        best = max(range(len(self._idle)), key=lambda i: common_prefix(self._idle[i][0], prompt))
        return self._idle.pop(best)

    def _make(self) -> Drafter:
        return make_drafter(self.kind, self._loaded)

    def close(self) -> None:
        """Stop the drafting thread."""
        self._threads.shutdown(wait=True)
