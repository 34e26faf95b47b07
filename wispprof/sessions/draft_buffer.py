"""The edge's view of one session: committed tokens, and drafts held beyond them. Pure.

    committed (prompt included)  |  drafts: sent  |  drafts: unsent
    ----------------------- committed_len ------ sent ------- length

A drafter (a model's KV cache, a replayed trace) mirrors ``committed + drafts``. Each commit returns a
:class:`CommitEffect`: roll the drafter back to a length, then append tokens. A matching commit leaves
drafts and their KV where they are.

Round mode (synchronous drafting): one round is outstanding at a time. ``take`` returns everything beyond the
committed length, and nothing more until a commit answers. What is drafted meanwhile is *proactive* (SpecEdge,
section 4.2): it continues the fully accepted round, and its first token guesses the target's bonus
token. Opening a session counts as an outstanding round, because the end of the prefill commits a token.

Drafts may be a tree: ``begin_tree``, growth of ``tree``, ``take_tree``. The drafter then mirrors the
committed tokens alone, and the tree hangs at them. What follows the committed path stands. Each of its
frames has an epoch of its own, and so replaces what the server holds.

Stream mode (asynchronous drafting): ``take`` returns what has not been sent yet. Drafting continues up to
``draft_ahead_limit`` drafts beyond the committed length.

Epochs (see :mod:`wispprof.protocol`) rise each time drafts are rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wispprof.errors import ProtocolError
from wispprof.sessions.edge_tree import EdgeTree
from wispprof.token_tree import HELD_NODES


class Held(NamedTuple):
    """A draft token beyond the committed length, P(accepted | those before it were), and its drafting
    time."""

    token: int
    acceptance_prob: float
    draft_ms: float


class Outgoing(NamedTuple):
    """Content of one draft frame. ``draft_ms``: drafting time of its tokens. ``parents``: of each node of a
    tree, -1 for the text before ``base``; none for a chain."""

    epoch: int
    base: int
    tokens: tuple[int, ...]
    acceptance_prob: tuple[float, ...]
    draft_ms: float
    parents: tuple[int, ...] = ()


class CommitEffect(NamedTuple):
    """What a commit means for the edge.

    ``tokens``: newly committed tokens (empty for a duplicate). ``rollback_to``: length the drafter must
    be cut to first, ``None`` to leave it. ``extend``: committed tokens to append to the drafter after that.
    ``hits``: drafts that equal committed tokens. ``accepted``: those of them that the server verified.
    ``kept``: drafts that still stand. ``proactive``: beyond drafts that were verified and accepted, there was
    a guess at the target's bonus token; ``proactive_hit``: it was right. ``rejected``: a draft was
    contradicted. ``wasted_*``: drafts after the first rejected one, dropped with it. ``dropped_*`` count the
    rejected one too. Of a tree, ``wasted_*`` are all nodes beside the committed path but the rejected one;
    ``depth``: of the deepest node verified.
    """

    tokens: tuple[int, ...] = ()
    rollback_to: int | None = None
    extend: tuple[int, ...] = ()
    hits: int = 0
    accepted: int = 0
    kept: int = 0
    proactive: bool = False
    proactive_hit: bool = False
    rejected: bool = False
    wasted_ms: float = 0.0
    wasted_tokens: int = 0
    dropped_ms: float = 0.0
    depth: int = 0

    @property
    def dropped_tokens(self) -> int:
        return self.rejected + self.wasted_tokens


class DraftBuffer:
    """Committed tokens, drafts beyond them, and which of those the server received.

    ``stream``: stream mode instead of round mode. ``draft_ahead_limit``: most drafts held (in round
    mode: round and proactive drafts together). ``end``: position past the last token of the generation.
    The target always adds one token of its own, so no draft is useful at ``end - 1``.

    Read only: ``committed_len``; ``sent``, the position up to which drafts were sent, never below
    ``committed_len``; ``epoch``; ``waiting``: a round (or the prefill) is outstanding in round mode, no
    commit came yet in stream mode; ``tree``: the drafts, if they are a tree; ``moved``: new numbers of
    its nodes that outlasted the last commit.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        *,
        stream: bool = False,
        draft_ahead_limit: int = 64,
        end: int | None = None,
    ) -> None:
        if not tokens:
            raise ValueError("A session starts from at least one committed token.")
        if draft_ahead_limit < 0:
            raise ValueError(f"draft_ahead_limit must not be negative, got {draft_ahead_limit}.")
        self.stream = stream
        self.draft_ahead_limit = draft_ahead_limit
        self.end = end
        self.committed_len = len(tokens)
        self.epoch = 0
        self.waiting = True
        self._committed = list(tokens)
        # Drafts as columns: they are read and written at every draft step.
        self._tokens: list[int] = []
        self._acceptance_probs: list[float] = []
        self._draft_ms: list[float] = []
        self.tree: EdgeTree | None = None
        self._added = 0
        self.moved: dict[int, int] = {}
        self.sent = self.committed_len
        self._capacity = self._draft_capacity()

    @property
    def committed(self) -> tuple[int, ...]:
        """Every committed token, prompt included."""
        return tuple(self._committed)

    @property
    def drafts(self) -> tuple[Held, ...]:
        """Drafts beyond the committed length, oldest first."""
        return tuple(map(Held, self._tokens, self._acceptance_probs, self._draft_ms))

    @property
    def draft_ahead(self) -> int:
        """Number of drafts held."""
        return len(self._tokens)

    @property
    def length(self) -> int:
        """Tokens that a drafter in step with this buffer holds."""
        return self.committed_len + len(self._tokens)

    @property
    def last_draft(self) -> int | None:
        """The newest draft token, if any is held."""
        return self._tokens[-1] if self._tokens else None

    @property
    def unsent(self) -> int:
        """Drafts that have not been sent yet (round mode: the proactive ones)."""
        return self.committed_len + len(self._tokens) - self.sent

    @property
    def capacity_left(self) -> int:
        """How many more drafts may be held: by ``draft_ahead_limit``, and by the end of the generation."""
        left = self._capacity - len(self._tokens)
        return left if left > 0 else 0

    @property
    def depth_left(self) -> int:
        """Depth of the deepest node that a tree may have: by the end of the generation."""
        return HELD_NODES if self.end is None else max(0, self.end - 1 - self.committed_len)

    def _draft_capacity(self) -> int:
        """Most drafts beyond the current committed length."""
        if self.end is None:
            return self.draft_ahead_limit
        return min(self.draft_ahead_limit, self.end - 1 - self.committed_len)

    @property
    def undecided(self) -> tuple[int, float]:
        """(Drafts held in any form, their drafting time)."""
        tree = self.tree
        if tree is None:
            return len(self._tokens), sum(self._draft_ms)
        return len(tree.tree), tree.draft_ms

    def sequence(self) -> list[int]:
        """What a drafter in step with this buffer holds: committed tokens, then drafts."""
        return [*self._committed, *self._tokens]

    def propose(self, token: int, acceptance_prob: float = 1.0, draft_ms: float = 0.0) -> tuple[int, int]:
        """Hold one more draft token; returns (:attr:`unsent`, :attr:`capacity_left`) after it.

        Raises ``ValueError`` if no capacity is left.
        """
        held = len(self._tokens) + 1
        left = self._capacity - held
        if left < 0:
            raise ValueError(
                f"No capacity for a draft: {held - 1} are held beyond position {self.committed_len}."
            )
        self._tokens.append(token)
        self._acceptance_probs.append(acceptance_prob)
        self._draft_ms.append(draft_ms)
        return self.committed_len + held - self.sent, left

    def rate(self, index: int, acceptance_prob: float) -> None:
        """Replace the acceptance probability of the draft at ``index`` (0: the oldest held)."""
        self._acceptance_probs[index] = float(acceptance_prob)

    def take(self, limit: int | None = None) -> Outgoing | None:
        """Content of the next draft frame, or ``None`` if nothing is to be sent.

        Round mode: the whole round (at most ``limit`` tokens; the rest stay as proactive drafts), possibly
        empty, once per commit. Stream mode: up to ``limit`` unsent drafts.
        """
        last = len(self._tokens)
        if self.stream:
            first = self.sent - self.committed_len
            if limit is not None:
                last = min(last, first + limit)
            if last <= first:
                return None
        else:
            if self.waiting:
                return None
            first = 0
            if limit is not None:
                last = min(last, limit)
            self.waiting = True
        base = self.committed_len + first
        self.sent = max(self.sent, self.committed_len + last)
        return Outgoing(
            self.epoch,
            base,
            tuple(self._tokens[first:last]),
            tuple(self._acceptance_probs[first:last]),
            sum(self._draft_ms[first:last]),
        )

    def begin_tree(self) -> EdgeTree:
        """The tree that is drafted from now on; drafts that are held become its first path."""
        if self.tree is None:
            self.tree = EdgeTree(self._tokens, self._acceptance_probs, self._draft_ms)
            self.tree.sent.update(range(self.sent - self.committed_len))
            self._tokens, self._acceptance_probs, self._draft_ms = [], [], []
        return self.tree

    def drop_tree(self) -> tuple[int, float]:
        """Give the tree up, if there is one; returns (nodes dropped, their drafting time)."""
        if self.tree is None:
            return 0, 0.0
        dropped = self.undecided
        self._leave_tree()
        return dropped

    def _leave_tree(self) -> None:
        assert self.tree is not None
        self._added += self.tree.added
        self.tree, self.moved = None, {}
        self.epoch += 1

    def new_nodes(self) -> int:
        """Nodes that trees gained since the last call."""
        added, self._added = self._added, 0
        if self.tree is not None:
            added, self.tree.added = added + self.tree.added, 0
        return added

    def take_tree(self, nodes: Sequence[int]) -> Outgoing | None:
        """As :meth:`take`, for these nodes of the tree, each after its parent."""
        tree = self.tree
        if tree is None or (self.waiting and not self.stream):
            return None
        self.waiting = True
        self.epoch += 1
        tokens, parents, probs, draft_ms = tree.send(nodes)
        branches = parents != list(range(-1, len(parents) - 1))
        return Outgoing(
            self.epoch,
            self.committed_len,
            tuple(tokens),
            tuple(probs),
            draft_ms,
            tuple(parents) if branches else (),
        )

    def on_commit(
        self, committed_len: int, tokens: Sequence[int], accepted: int = 0, drafted: int | None = None
    ) -> CommitEffect:
        """Take in committed ``tokens`` that end at ``committed_len``.

        ``accepted`` of them were our drafts, of ``drafted`` that the server verified (if known: it tells a
        wrong guess from a rejected draft).

        Idempotent: a duplicate or late commit changes nothing, and only the unknown part of an overlapping
        one counts. Raises :class:`ProtocolError` if it leaves a gap (a commit was lost: reopen the session)
        or contradicts committed tokens.
        """
        known = self.committed_len
        start = committed_len - len(tokens)
        # A late draft of a stream that names the next token all the same is no guess beyond a round.
        guess = drafted is None or (accepted >= drafted and (drafted > 0 or not self.stream))
        if start == known and tokens:
            return self._advance(tuple(tokens), accepted, guess, drafted)
        if start > known:
            raise ProtocolError(
                f"A commit starts at position {start}, beyond the committed length {known}.",
                "Reopen the session from its committed tokens.",
            )
        overlap = min(known, committed_len) - start
        if overlap > 0 and (start < 0 or self._committed[start : start + overlap] != list(tokens[:overlap])):
            raise ProtocolError(
                f"A commit contradicts tokens that were committed before position {known}.",
                "The server does not hold the model that began this generation; start again.",
            )
        if committed_len <= known:
            return CommitEffect()
        new = tuple(tokens[known - start :])
        return self._advance(new, max(0, accepted - max(0, overlap)), guess, drafted)

    def reopened(self) -> None:
        """The session was opened anew from :attr:`committed`: the server holds none of our drafts."""
        self.sent = self.committed_len
        self.waiting = True
        if self.tree is not None:
            self.tree.lost()

    def _advance_tree(
        self, tree: EdgeTree, new: tuple[int, ...], accepted: int, drafted: int | None
    ) -> CommitEffect:
        self._committed += new
        self.sent = self.committed_len = self.committed_len + len(new)
        self._capacity = self._draft_capacity()
        done = tree.commit(new, drafted)
        self.moved = done.moved
        if done.hits < len(new):
            self._leave_tree()
        return CommitEffect(
            new,
            None,
            new,
            done.hits,
            accepted,
            len(tree.tree),
            done.proactive,
            done.proactive_hit,
            done.rejected,
            done.wasted_ms,
            done.dropped - done.rejected,
            done.dropped_ms,
            done.depth,
        )

    def _advance(self, new: tuple[int, ...], accepted: int, guess: bool, drafted: int | None) -> CommitEffect:
        self.waiting = False
        if self.tree is not None:
            return self._advance_tree(self.tree, new, accepted, drafted)
        held = self._tokens
        drafts, count = len(held), len(new)
        both = drafts if drafts < count else count
        hits = 0
        while hits < both and held[hits] == new[hits]:
            hits += 1
        self._committed += new
        self.committed_len = committed_len = self.committed_len + count
        self._capacity = self._draft_capacity()
        # The target's own token is the last of the commit: a draft there was a guess at it.
        proactive = guess and drafts >= count and hits >= count - 1
        # By position: an effect is made once per commit, and keywords triple its cost.
        if hits < both:
            draft_ms = self._draft_ms
            self._tokens, self._acceptance_probs, self._draft_ms = [], [], []
            self.epoch += 1
            self.sent = committed_len
            return CommitEffect(
                new,
                committed_len - count + hits,
                new[hits:],
                hits,
                accepted,
                0,
                proactive,
                False,
                True,
                sum(draft_ms[hits + 1 :]),
                drafts - hits - 1,
                sum(draft_ms[hits:]),
            )
        if drafts:
            del held[:count], self._acceptance_probs[:count], self._draft_ms[:count]
        if self.sent < committed_len:
            self.sent = committed_len
        hit = proactive and hits == count
        return CommitEffect(new, None, new[hits:], hits, accepted, drafts - both, proactive, hit)
