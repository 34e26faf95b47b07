"""Which shape of draft tree is fastest, by the same arithmetic for trees and chains. Pure.

Trees are grown with the same rates at every node: P(the target takes the candidate of rank r). Real growth
follows the candidates' own probabilities and accepts more, chains included, so choices are careful.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from wispprof.policies.interface import RoundContext, TreeShape
from wispprof.token_tree import MAX_NODES

Milliseconds = Callable[[int], float]

NODES = (4, 8, 16, 32, MAX_NODES)
BEAMS = (2, 4, 8, 16, 32)
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
WIDTH = 16
STREAM_NODES = 256
"""Nodes of an asynchronous session's tree: it reaches beyond what the server holds, by a round trip."""
_SHARES = "423 178 84 56 48 26 25 17 16 14 8 11 5 8 5"
LATER_RANKS = tuple(int(share) / 1000 for share in _SHARES.split())
"""P(the target takes rank 1, 2, … 15 | not rank 0): bundled pair, T = 0.8, 6,144 positions. At T = 0 and 1
the first share is 0.442 and 0.370. What is missing to 1 is none of the 16."""
MIN_GAIN = 1.05
"""What a tree must gain over the best chain. Below it the model would decide by its own error."""
LARGEST = TreeShape(MAX_NODES, DEPTHS[-1], WIDTH, BEAMS[-1])
_FREE_ROWS_LEVEL = 1


class Growth(NamedTuple):
    """A tree grown forward by forward. ``expanded[f]``: nodes in forward f; ``cum_acceptance[f]``: of the
    nodes that it holds after it, falling."""

    expanded: tuple[int, ...]
    cum_acceptance: tuple[tuple[float, ...], ...]

    def accepted(self, forwards: int, nodes: int) -> float:
        """Expected accepted tokens of the best ``nodes`` after so many forwards."""
        return sum(self.cum_acceptance[forwards - 1][:nodes])


class ShapeChoice(NamedTuple):
    """A shape, the expected tokens of its round (accepted and the target's own), and the round's time."""

    shape: TreeShape
    tokens: float
    round_ms: float

    @property
    def tokens_per_ms(self) -> float:
        return self.tokens / self.round_ms


@lru_cache(maxsize=4096)
def grow(rates: tuple[float, ...], shape: TreeShape, forwards: int = 1 << 10) -> Growth:
    """How a tree of a shape grows with equal rates at every node, as
    :mod:`~wispprof.sessions.tree_growth` does."""
    rates = rates[: shape.width]
    open_nodes = [(-1.0, 0)]  # (−cumulative acceptance, depth) of nodes not expanded
    held: list[float] = []
    expanded: list[int] = []
    after: list[tuple[float, ...]] = []
    while open_nodes and len(expanded) < forwards:
        least = held[shape.nodes - 1] if len(held) >= shape.nodes else 0.0
        taken: list[tuple[float, int]] = []
        while open_nodes and len(taken) < (shape.beams if expanded else 1):
            node = heapq.heappop(open_nodes)
            if -node[0] >= least:
                taken.append(node)
        if not taken:
            break
        offers = sorted(((a * rate, d + 1) for a, d in taken for rate in rates), key=lambda o: o[0])
        fresh = [(a, d) for a, d in offers[: shape.nodes] if -a >= least and a < 0.0]
        held = sorted([*held, *(-a for a, _ in fresh)], reverse=True)[: shape.nodes]
        for node in fresh:
            if node[1] < shape.depth:
                heapq.heappush(open_nodes, node)
        expanded.append(len(taken))
        after.append(tuple(held))
    return Growth(tuple(expanded), tuple(after))


def rank_rates(first: float) -> tuple[float, ...]:
    """P(the target takes rank 0, 1, …) if it takes rank 0 with probability ``first``."""
    return (first, *((1.0 - first) * share for share in LATER_RANKS))


def chain_of(k: int) -> TreeShape:
    """A chain of ``k`` drafts as a shape."""
    return TreeShape(k, k, 1, 1)


def best_shape(
    rates: Sequence[float],
    forward_ms: Milliseconds,
    rtt_ms: float,
    step_ms: Milliseconds,
    *,
    draft_ms: float | None = None,
    max_nodes: int = MAX_NODES,
    max_depth: int = DEPTHS[-1],
    min_gain: float = MIN_GAIN,
) -> ShapeChoice:
    """The shape with the most tokens/ms of a synchronous round: (1 + expected accepted) / (drafting +
    ``rtt_ms`` + the server's step).

    ``rates``: P(the target takes the candidate of rank r). ``forward_ms``: of a tree forward over n nodes;
    ``draft_ms``: of a chain's draft step, which needs no tree attention (default: ``forward_ms(1)``).
    ``step_ms``: of a server step with n rows; n = 1 is the pending token alone. A tree must be ``min_gain``
    better than the best chain, and a draft better than none (``nodes`` 0).
    """
    chain_ms = forward_ms(1) if draft_ms is None else draft_ms
    best = ShapeChoice(TreeShape(0, 0, 1, 1), 1.0, max(1e-6, rtt_ms + step_ms(1)))
    tokens, cum_acceptance, first = 1.0, 1.0, rates[0] if rates else 0.0
    for k in range(1, min(max_nodes, max_depth) + 1):
        cum_acceptance *= first
        tokens += cum_acceptance
        choice = ShapeChoice(chain_of(k), tokens, max(1e-6, k * chain_ms + rtt_ms + step_ms(1 + k)))
        if choice.tokens_per_ms > best.tokens_per_ms:
            best = choice
    least = best.tokens_per_ms * min_gain
    for nodes in (n for n in NODES if n <= max_nodes and rates):
        server_ms = rtt_ms + step_ms(1 + nodes)
        for beams in (b for b in BEAMS if b <= nodes):
            for depth in (d for d in DEPTHS if d <= min(max_depth, nodes)):
                shape = TreeShape(nodes, depth, min(WIDTH, nodes), beams)
                growth = grow(tuple(rates), shape)
                drafting_ms = sum(map(forward_ms, growth.expanded))
                tokens = 1.0 + growth.accepted(len(growth.expanded), nodes)
                choice = ShapeChoice(shape, tokens, max(1e-6, drafting_ms + server_ms))
                if choice.tokens_per_ms > least:
                    best, least = choice, choice.tokens_per_ms
    return best


def best_stream_shape(
    rates: Sequence[float],
    forward_ms: Milliseconds,
    window_ms: float,
    *,
    draft_ms: float | None = None,
    depth: int = DEPTHS[-1],
    min_gain: float = MIN_GAIN,
) -> TreeShape | None:
    """The shape of an asynchronous session's tree; ``None``: a chain is at least as good.

    A session whose drafts were rejected waits one round trip and step, ``window_ms``, for new ones. Compared
    is what a tree, and a chain, grown in that time is expected to have accepted, and in half and twice of it:
    slow forwards must not cost depth. The server takes from either as many as its step pays for.
    """
    chain_ms = forward_ms(1) if draft_ms is None else draft_ms
    best, most = None, min_gain
    for beams in BEAMS if rates else ():
        shape = TreeShape(STREAM_NODES, depth, WIDTH, beams)
        growth = grow(tuple(rates), shape, 2 * depth)
        gain = math.inf
        for time_ms in (window_ms / 2.0, window_ms, 2.0 * window_ms):
            drafts = max(1, min(depth, int(time_ms / max(chain_ms, 1e-6))))
            forwards = min(len(growth.expanded), max(1, int(time_ms / max(forward_ms(beams), 1e-6))))
            chain = sum(rates[0] ** d for d in range(1, drafts + 1))
            gain = min(gain, growth.accepted(forwards, STREAM_NODES) / max(chain, 1e-9))
        if gain > most:
            best, most = shape, gain
    return best


class MeasuredShapes:
    """The fastest shape by what the edge measures: its draft step, the link and the server. Rows of the
    server count as free up to load level ``_FREE_ROWS_LEVEL``; beyond it trees are not worth them.

    ``node_ms``: what each further node adds to a forward; ``inf``: not measured. ``bounds``: of a round's
    shape.
    """

    def __init__(self, node_ms: float, stream: bool, bounds: TreeShape = LARGEST) -> None:
        self.node_ms = node_ms
        self._stream = stream
        self._bounds = bounds
        self._shapes: dict[tuple[int, ...], TreeShape | None] = {}

    def choose(self, context: RoundContext, acceptance_prob: float) -> TreeShape | None:
        """``acceptance_prob``: of the draft's first candidate; ``None``: a chain is at least as good."""
        if math.isinf(self.node_ms) or not context.timed or context.load_level > _FREE_ROWS_LEVEL:
            return None
        # Shapes are the same for times that differ by 5 %, and rates by a fiftieth.
        times = (context.draft_ms, context.rtt_ms + context.server_ms)
        key = (round(50 * acceptance_prob), *(round(20.0 * math.log(max(ms, 0.1))) for ms in times))
        if key not in self._shapes:
            rates = rank_rates(key[0] / 50)
            draft_ms, wait_ms = (math.exp(place / 20.0) for place in key[1:])
            self._shapes[key] = self._best(rates, draft_ms, wait_ms)
        return self._shapes[key]

    def _best(self, rates: Sequence[float], draft_ms: float, wait_ms: float) -> TreeShape | None:
        def forward_ms(nodes: int) -> float:
            return draft_ms + self.node_ms * (nodes - 1)

        if self._stream:
            return best_stream_shape(rates, forward_ms, wait_ms)
        most = self._bounds
        shape = best_shape(
            rates, forward_ms, wait_ms, lambda rows: 0.0, max_nodes=most.nodes, max_depth=most.depth
        ).shape
        return TreeShape(*map(min, shape, most)) if shape.beams > 1 else None
