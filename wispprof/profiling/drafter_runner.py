"""What profile-edge fires at: points of an edge grid, and a drafter that is asked to do them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from wispprof.artifacts import EdgeRow
from wispprof.backends import Drafter
from wispprof.errors import ProfileError
from wispprof.policies.controllers import WispController
from wispprof.policies.interface import RoundContext
from wispprof.profiling.shape_grid import load_grid_file, parse_axis
from wispprof.profiling.workload import Workload
from wispprof.types import DraftFeatures, Sampling

__all__ = [
    "EDGE_GRIDS",
    "ROUND",
    "ROUND_DRAFTS",
    "DrafterRunner",
    "EdgeAxes",
    "EdgePoint",
    "edge_workloads",
    "load_edge_axes",
    "override_edge_axes",
]

ROUND = 8
"""Tokens drafted before a roll back in the windows, as a round does."""
CATCH_UP = 2
"""Tokens that wait to be read after a round accepted whole: its last draft, and the target's own."""
ROUND_DRAFTS = 4
"""Tokens of a ``round``: enough for what a rest costs to have worn off with the last of them."""
_DECISIONS = 200


@dataclass(frozen=True)
class EdgePoint:
    """What one shot measures: see :class:`~wispprof.artifacts.rows.EdgeRow` for the kinds."""

    context: int
    tokens: int = 1
    rested_ms: float = 0.0


@dataclass(frozen=True)
class EdgeAxes:
    """``contexts`` of draft steps, ``chunks`` of prefill over nothing and over ``chunk_context``;
    windows in seconds (0: none); ``rounds``: contexts of whole rounds begun after a rest of ``rest_ms``."""

    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_context: int
    burst_s: float
    sustained_s: float
    rounds: tuple[int, ...] = ()
    rest_ms: float = 20.0


EDGE_GRIDS: dict[str, EdgeAxes] = {
    "quick": EdgeAxes((64, 256, 1024), (64, 256), 256, 2.0, 0.0, (64, 256)),
    "standard": EdgeAxes(
        (16, 64, 128, 256, 512, 1024, 2048),
        (16, 64, 256, 512),
        512,
        5.0,
        60.0,
        (64, 256, 1024),
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
    """A named grid, or a TOML file whose ``[edge]`` table names axes (lists or range strings) and windows.

    What the file leaves out is that of its ``base`` grid (default ``quick``).
    """
    if name in EDGE_GRIDS:
        return EDGE_GRIDS[name]
    base, table = load_grid_file(name, "edge", EDGE_GRIDS)
    return override_edge_axes(base, table, name)


def override_edge_axes(axes: EdgeAxes, values: dict[str, Any], where: str) -> EdgeAxes:
    """``axes`` with some of them replaced: lists or range strings for axes, numbers for the rest."""
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in EdgeAxes.__dataclass_fields__:
            known = ", ".join(EdgeAxes.__dataclass_fields__)
            raise ProfileError(f"{where}: there is no axis {name!r}.", f"Axes are {known}.")
        if name in ("contexts", "chunks", "rounds"):
            changed[name] = parse_axis(value, name, where)
        elif isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ProfileError(f"{where}: {name} is not a number >= 0.", "Write a number.")
        else:
            changed[name] = int(value) if name == "chunk_context" else float(value)
    return replace(axes, **changed)


class DrafterRunner:
    """Fires points at a drafter. The drafter must offer ``prefill`` and ``forward`` beside
    :class:`~wispprof.backends.Drafter`, as :class:`~wispprof.drafters.torch_drafter.TorchDrafter` does."""

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
        self._drafter, self._vocabulary, self._sampling = drafter, vocabulary, sampling
        self._clock, self._synchronize, self._sleep = clock, synchronize, sleep
        self._random = random.Random(seed)
        self._fire: Callable[[], None] = lambda: None
        self._restore: Callable[[], None] = lambda: None
        self._per_fire, self._rest_s = 1, 0.0

    def prepare(self, workload: Workload[EdgePoint]) -> None:
        point, drafter = workload.subject, cast(Any, self._drafter)
        context = max(1, point.context)
        if workload.kind == "controller":
            self._prepare_controller()
            return
        self.hold(context)
        self._per_fire, self._rest_s = 1, workload.rest_s
        if workload.kind == "prefill":
            chunk = self.tokens(point.tokens + 1)  # the last one waits for the next draft
            drafter.extend(chunk)
            self._fire = drafter.prefill

            def restore() -> None:
                drafter.rollback(context)
                drafter.extend(chunk)

            self._restore = restore
        elif workload.kind == "catch_up":
            waiting = self.tokens(point.tokens)
            drafter.rollback(max(1, context - point.tokens))
            drafter.extend(waiting)
            self._fire = drafter.draft

            def again() -> None:
                drafter.rollback(max(1, context - point.tokens))
                drafter.extend(waiting)

            self._restore = again
        elif workload.kind == "round":

            def draft_all() -> None:
                for _ in range(point.tokens):
                    drafter.draft()

            self._fire, self._restore = draft_all, lambda: drafter.rollback(context)
        else:
            self._fire = drafter.forward if workload.kind == "forward" else drafter.draft
            self._restore = lambda: drafter.rollback(context)

    def hold(self, context: int) -> None:
        """A sequence of ``context`` tokens, all of them in the draft's cache."""
        drafter = cast(Any, self._drafter)
        drafter.open(self.tokens(context), self._sampling)
        drafter.prefill()
        drafter.draft()
        drafter.rollback(context)

    def run_once(self) -> float:
        self._synchronize()
        if self._rest_s:
            self._sleep(self._rest_s)
        begin = self._clock()
        self._fire()
        self._synchronize()
        elapsed = self._clock() - begin
        self._restore()
        return elapsed * 1000 / self._per_fire

    def finish(self) -> None:
        self._fire = self._restore = lambda: None
        self._rest_s = 0.0

    def row(
        self,
        workload: Workload[EdgePoint],
        samples: tuple[float, ...],
        flags: tuple[str, ...],
        order: int,
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

    def round(self, context: int) -> None:
        """One round of steady drafting from ``context``."""
        for _ in range(ROUND):
            self._drafter.draft()
        self._synchronize()
        self._drafter.rollback(context)

    def tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]

    def _prepare_controller(self) -> None:
        """The wisp controller with the predictor that stands in until one is fitted."""
        controller = WispController(k_max=_DECISIONS + 1, threshold=0.0)
        context = RoundContext(draft_ms=10.0, rtt_ms=20.0, server_ms=20.0)
        seen = DraftFeatures(0.7, 1.2, 1.5, 2.0)

        def decide() -> None:
            controller.begin(context)
            for depth in range(_DECISIONS):
                controller.go_on(depth, seen)

        self._fire, self._restore, self._per_fire = decide, lambda: None, _DECISIONS


def edge_workloads(axes: EdgeAxes, most_context: int) -> list[Workload[EdgePoint]]:
    """Every point that the draft's context has room for."""
    workloads = [_shot("controller", EdgePoint(0))]
    for context in axes.contexts:
        if context + ROUND < most_context:
            workloads += [_shot(kind, EdgePoint(context)) for kind in ("draft_step", "forward")]
            if context > CATCH_UP:
                workloads.append(_shot("catch_up", EdgePoint(context, CATCH_UP)))
    for context in axes.rounds:
        if context + ROUND < most_context:
            workloads.append(_shot("round", EdgePoint(context, ROUND_DRAFTS, axes.rest_ms)))
    for chunk in axes.chunks:
        for context in (0, axes.chunk_context):
            if context + chunk + 2 < most_context:
                workloads.append(_shot("prefill", EdgePoint(context, chunk)))
    if len(workloads) < 3:
        raise ProfileError(
            f"The draft's context of {most_context} tokens is too short for this grid.",
            "Choose another draft model.",
        )
    return workloads


def _shot(kind: str, point: EdgePoint) -> Workload[EdgePoint]:
    name = f"{kind} {point.tokens}@{point.context}"
    work = (1.0, float(point.tokens), float(point.context * point.tokens))
    if kind == "controller":
        work = (1e-3, 0.0, 0.0)
    if kind == "round":  # its tokens come one after the other, each at the price of a step
        name += f"/{point.rested_ms:g}ms"
        work = tuple(point.tokens * part for part in (1.0, 1.0, float(point.context)))
    return Workload(name, kind, point, work, point.rested_ms / 1000)
