"""One commit as the device saw it, for those who watch a generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer, Held
from wispprof.token_tree import ROOT, TokenTree

if TYPE_CHECKING:
    from wispprof import protocol
    from wispprof.edge.request_stats import RequestStats

ACCEPTED, MATCHED, TARGET, UNVERIFIED = "accepted", "matched", "target", "unverified"


class TokenOrigin(NamedTuple):
    """How a token came.

    ``kind``: ``accepted`` (drafted here, verified), ``matched`` (the target's own; the unverified draft there
    is the same), ``target`` (the target's own) or ``unverified`` (of a draft model without a server).
    ``acceptance_prob``: of the verified draft that stood there; ``None`` without one. ``draft``: the token
    that this device held instead of the target's; ``None`` if it held none. ``alternatives``: other drafts of
    a tree that it had sent for this place, with their acceptance probabilities, likeliest first.
    """

    kind: str
    acceptance_prob: float | None = None
    draft: int | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class HeldTree(NamedTuple):
    """The draft tree before a commit, and which nodes the server had."""

    tree: TokenTree
    sent: Collection[int]


def held_by(buffer: DraftBuffer) -> Sequence[Held] | HeldTree:
    """The drafts, as :func:`origins` takes them."""
    tree = buffer.tree
    return buffer.drafts if tree is None else HeldTree(tree.tree, tree.sent)


def likeliest(buffer: DraftBuffer) -> list[int]:
    """The drafts beyond the committed tokens; of a tree, the likeliest child after the likeliest."""
    if buffer.tree is None:
        return [held.token for held in buffer.drafts]
    tree, node, tokens = buffer.tree.tree, ROOT, list[int]()
    while children := _likeliest_first(tree, node):
        node = children[0]
        tokens.append(tree.tokens[node])
    return tokens


def _likeliest_first(tree: TokenTree, parent: int) -> list[int]:
    return sorted(tree.children(parent), key=tree.acceptance_probs.__getitem__, reverse=True)


class RoundRecord(NamedTuple):
    """One commit, with as many ``origins`` as it has tokens. Times in ms.

    ``at_ms``: since the request began; ``round_ms``: since the commit before, or the request. ``drafted``:
    drafts that the server verified, ``accepted`` of them stand. ``draft_ms``: spent on draft steps that ended
    within ``round_ms``. ``drafting``: whether drafts were wanted.
    """

    at_ms: float
    round_ms: float
    origins: tuple[TokenOrigin, ...]
    drafted: int
    accepted: int
    draft_ms: float
    rtt_ms: float
    queue_ms: float
    verify_ms: float
    drafting: bool


def origins(effect: CommitEffect, held: Sequence[Held] | HeldTree, drafted: int) -> tuple[TokenOrigin, ...]:
    """Origin of each token of a commit. ``held``: the drafts before it; ``drafted`` of them were verified."""
    if isinstance(held, HeldTree):
        return _tree_origins(effect, held)
    made: list[TokenOrigin] = []
    for index in range(len(effect.tokens)):
        # The edge may have drafted anew since, so what it holds need not be what was verified.
        probability = held[index].acceptance_prob if index < min(drafted, len(held)) else None
        if index < effect.accepted:
            made.append(TokenOrigin(ACCEPTED, probability if index < effect.hits else None))
        elif index < effect.hits:
            made.append(TokenOrigin(MATCHED))
        elif index == effect.hits < len(held):
            made.append(TokenOrigin(TARGET, probability, held[index].token))
        else:
            made.append(TokenOrigin(TARGET))
    return tuple(made)


def _tree_origins(effect: CommitEffect, held: HeldTree) -> tuple[TokenOrigin, ...]:
    tree, sent = held
    made: list[TokenOrigin] = []
    node: int | None = ROOT
    for index, token in enumerate(effect.tokens):
        beside = [] if node is None else [child for child in _likeliest_first(tree, node) if child in sent]
        node = None if node is None else tree.child(node, token)
        rated = [(tree.tokens[child], tree.acceptance_probs[child]) for child in beside if child != node]
        prob = tree.acceptance_probs[node] if node in beside else None
        if index < effect.accepted:
            made.append(TokenOrigin(ACCEPTED, prob, None, tuple(rated)))
        elif node is not None:
            made.append(TokenOrigin(MATCHED, None, None, tuple(rated)))
        elif rated:
            (draft, prob), *others = rated
            made.append(TokenOrigin(TARGET, prob, draft, tuple(others)))
        else:
            made.append(TokenOrigin(TARGET))
    return tuple(made)


class RoundWatch:
    """Reports a generation's commits, each before its tokens are streamed."""

    def __init__(self, report: Callable[[RoundRecord], None]) -> None:
        self._report = report
        self._last_ms = self._draft_ms = 0.0

    def committed(
        self,
        effect: CommitEffect,
        held: Sequence[Held] | HeldTree,
        commit: protocol.Commit,
        stats: RequestStats,
        rtt_ms: float,
        drafting: bool,
    ) -> None:
        """A commit, which ``stats`` counts already. ``held``: the drafts before it."""
        self._add(
            stats.last_ms or 0.0,
            stats.draft_ms,
            origins(effect, held, commit.drafted),
            (commit.drafted, effect.accepted),
            (rtt_ms, commit.queue_ms, commit.verify_ms),
            drafting,
        )

    def unverified(self, at_ms: float, stats: RequestStats) -> None:
        """A token of the draft model alone, ``at_ms`` after the request began."""
        self._add(at_ms, stats.draft_ms, (TokenOrigin(UNVERIFIED),), (0, 0), (0.0, 0.0, 0.0), True)

    def _add(
        self,
        at_ms: float,
        draft_ms: float,
        tokens: tuple[TokenOrigin, ...],
        drafts: tuple[int, int],
        server_ms: tuple[float, float, float],
        drafting: bool,
    ) -> None:
        since_ms, spent_ms = at_ms - self._last_ms, draft_ms - self._draft_ms
        self._last_ms, self._draft_ms = at_ms, draft_ms
        self._report(RoundRecord(at_ms, since_ms, tokens, *drafts, spent_ms, *server_ms, drafting))
