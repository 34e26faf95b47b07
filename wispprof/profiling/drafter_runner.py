"""Points of an edge grid, and the runner that measures them on a drafter, for profile-edge."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from wispprof.artifacts import EdgeRow
from wispprof.backends import Drafter
from wispprof.errors import ProfileError
from wispprof.policies.controllers import WispController
from wispprof.policies.interface import RoundContext
from wispprof.profiling.shape_grid import load_grid
from wispprof.profiling.workload import Workload
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree
from wispprof.types import DraftFeatures, Sampling

ROUND = 8
"""Tokens drafted before a rollback in steady drafting."""
CATCH_UP = 2
"""Unread tokens after a fully accepted round: its last draft, and the target's own token."""
ROUND_DRAFTS = 4
"""Tokens of a ``round``: by the last of them, the effect of the rest is over."""
NODE_CANDIDATES = 4
"""Candidates after each node of a forward over ``nodes``."""
_DECISIONS = 200


@dataclass(frozen=True)
class EdgePoint:
    """What a workload measures; :class:`~wispprof.artifacts.rows.EdgeRow` describes the kinds."""

    context: int
    tokens: int = 1
    rested_ms: float = 0.0


@dataclass(frozen=True)
class EdgeAxes:
    """``contexts``: of draft steps. ``chunks``: of prefill, over nothing and over ``chunk_context``.
    ``burst_s``, ``sustained_s``: steady drafting, 0 for none. ``rounds``: contexts of rounds after
    ``rest_ms``. ``nodes``: of a draft tree in one forward, over a middle one of ``contexts``."""

    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_context: int
    burst_s: float
    sustained_s: float
    rounds: tuple[int, ...] = ()
    rest_ms: float = 20.0
    nodes: tuple[int, ...] = (1, 2, 4, 8, 16)


EDGE_GRIDS: dict[str, EdgeAxes] = {
    "quick": EdgeAxes((64, 256, 1024), (64, 256), 256, 2.0, 0.0, (64, 256)),
    "standard": EdgeAxes(
        (16, 64, 128, 256, 512, 1024, 2048), (16, 64, 256, 512), 512, 5.0, 60.0, (64, 256, 1024)
    ),
    "full": EdgeAxes(
        (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        (16, 32, 64, 128, 256, 512, 1024),
        1024,
        10.0,
        300.0,
        (64, 256, 1024, 4096),
    ),
}


def load_edge_axes(name: str) -> EdgeAxes:
    """The edge grid of :func:`~wispprof.profiling.shape_grid.load_grid`, from a file's ``[edge]`` table."""
    return load_grid(name, "edge", EDGE_GRIDS)


class DrafterRunner:
    """Runs points of an edge grid on a drafter.

    The drafter must offer ``prefill`` and ``forward`` beside :class:`~wispprof.backends.Drafter`, as
    :class:`~wispprof.drafters.torch_drafter.TorchDrafter` does. ``sleep``: idles before a ``round``.
    """

    def __init__(
        self,
        drafter: Drafter,
        vocabulary: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._drafter, self._vocabulary, self._sampling = cast(Any, drafter), vocabulary, sampling
        self._clock, self._synchronize, self._sleep = clock, synchronize, sleep
        self._random = random.Random(seed)
        self._run: Callable[[], None] = lambda: None
        self._restore: Callable[[], None] = lambda: None
        self._operations_per_run, self._rest_s = 1, 0.0

    def prepare(self, workload: Workload[EdgePoint]) -> None:
        point, drafter = workload.subject, self._drafter
        if workload.kind == "controller":
            self._run, self._restore = _controller_decisions(), lambda: None
            self._operations_per_run = _DECISIONS
            return
        context = max(1, point.context)
        self.fill_context(context)
        self._operations_per_run, self._rest_s = 1, workload.rest_s
        restored_len, unread = context, []
        if workload.kind == "prefill":
            unread = self._random_tokens(point.tokens + 1)  # the next draft reads the last one
            self._run = drafter.prefill
        elif workload.kind == "catch_up":
            restored_len, unread = max(1, context - point.tokens), self._random_tokens(point.tokens)
            self._run = drafter.draft
        elif workload.kind == "nodes":
            siblings = TokenTree(HELD_NODES)
            nodes = [siblings.add(ROOT, token, 1.0) for token in range(point.tokens)]
            self._run = lambda: drafter.expand(siblings, nodes, NODE_CANDIDATES)
        elif workload.kind == "round":
            self._run = lambda: self._draft(point.tokens)
        else:
            self._run = drafter.forward if workload.kind == "forward" else drafter.draft

        def restore() -> None:
            drafter.rollback(restored_len)
            if unread:
                drafter.extend(unread)

        self._restore = restore
        if unread:
            restore()

    def fill_context(self, context: int) -> None:
        """Open a sequence of ``context`` tokens, all in the draft's cache."""
        self._drafter.open(self._random_tokens(context), self._sampling)
        self._drafter.prefill()
        self._drafter.draft()
        self._drafter.rollback(context)

    def run_once(self) -> float:
        self._synchronize()
        if self._rest_s:
            self._sleep(self._rest_s)
        begin = self._clock()
        self._run()
        self._synchronize()
        elapsed = self._clock() - begin
        self._restore()
        return elapsed * 1000 / self._operations_per_run

    def finish(self) -> None:
        self._run = self._restore = lambda: None
        self._rest_s = 0.0

    def row(
        self, workload: Workload[EdgePoint], samples: tuple[float, ...], flags: tuple[str, ...], order: int
    ) -> EdgeRow:
        point = workload.subject
        return EdgeRow(
            workload.key,
            workload.kind,
            point.context,
            samples,
            point.tokens,
            flags=flags,
            order=order,
            rested_ms=point.rested_ms,
        )

    def draft_round(self, context: int) -> None:
        """One round of steady drafting from ``context``."""
        self._draft(ROUND)
        self._synchronize()
        self._drafter.rollback(context)

    def _draft(self, tokens: int) -> None:
        for _ in range(tokens):
            self._drafter.draft()

    def _random_tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]


def _controller_decisions() -> Callable[[], None]:
    """:data:`_DECISIONS` decisions of the wisp controller, with the default predictor."""
    controller = WispController(k_max=_DECISIONS + 1, threshold=0.0)
    context = RoundContext(draft_ms=10.0, rtt_ms=20.0, server_ms=20.0)
    features = DraftFeatures(0.7, 1.2, 1.5, 2.0)

    def decide() -> None:
        controller.begin(context)
        for depth in range(_DECISIONS):
            controller.go_on(depth, features)

    return decide


def edge_workloads(axes: EdgeAxes, max_context: int, trees: bool = False) -> list[Workload[EdgePoint]]:
    """Every point that fits into the draft's context. ``trees``: the drafter drafts trees."""
    workloads = [_workload("controller", EdgePoint(0))]
    contexts = [context for context in axes.contexts if context + ROUND < max_context]
    for context in contexts:
        workloads += [_workload(kind, EdgePoint(context)) for kind in ("draft_step", "forward")]
        if context > CATCH_UP:
            workloads.append(_workload("catch_up", EdgePoint(context, CATCH_UP)))
    if trees and contexts:
        middle = contexts[len(contexts) // 2]
        workloads += [_workload("nodes", EdgePoint(middle, nodes)) for nodes in axes.nodes]
    for context in axes.rounds:
        if context + ROUND < max_context:
            point = EdgePoint(context, ROUND_DRAFTS, axes.rest_ms)
            workloads.append(_workload("round", point))
    for chunk in axes.chunks:
        for context in (0, axes.chunk_context):
            if context + chunk + 2 < max_context:
                workloads.append(_workload("prefill", EdgePoint(context, chunk)))
    if len(workloads) < 3:
        raise ProfileError(
            f"The draft's context of {max_context} tokens is too short for this grid.",
            "Choose another draft model.",
        )
    return workloads


def _workload(kind: str, point: EdgePoint) -> Workload[EdgePoint]:
    key = f"{kind} {point.tokens}@{point.context}"
    work: tuple[float, ...] = (1.0, float(point.tokens), float(point.context * point.tokens))
    if kind == "controller":
        work = (1e-3, 0.0, 0.0)
    if kind == "round":  # its tokens are drafted one by one, each at the cost of a step
        key += f"/{point.rested_ms:g}ms"
        work = tuple(point.tokens * part for part in (1.0, 1.0, float(point.context)))
    return Workload(key, kind, point, work, point.rested_ms / 1000)
