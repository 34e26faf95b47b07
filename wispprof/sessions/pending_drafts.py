"""Drafts that the server holds beyond a session's committed tokens: merged by position, counted, and
forecast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from wispprof.sessions.pending_tree import FrameTree, as_tree, best_part, graft, successive, trunk
from wispprof.token_tree import MAX_NODES, ROOT, TokenTree

_WEIGHT = 0.25
_OVERDUE = 2.0
"""A frame later than this many times the usual wait is no longer expected at a known time."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix; bisection over slice comparisons, which run in C."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(slots=True)
class DraftCounters:
    """Counts of draft tokens. ``drafted == accepted + matched + wasted + pending`` at all times.

    ``drafted``: merged. ``accepted``: verified and committed. ``matched``: committed without having been
    verified. ``wasted``: contradicted or withdrawn. ``cut_drafts``: left out of a step by the policy
    (they may be verified later). ``dropped``: tokens refused by merge, by reason; ``frames`` likewise
    counts the frames. Reasons: ``epoch`` (old), ``contradiction`` (differs from committed text), ``gap``
    (begins beyond the pending drafts), ``conflict`` (differs from them within one epoch), ``overflow``,
    ``finished``. Of a tree, nodes that follow another text than the committed one count as
    ``contradiction`` too, even if others stand.
    """

    drafted: int = 0
    accepted: int = 0
    matched: int = 0
    wasted: int = 0
    cut_drafts: int = 0
    steps: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)

    def add(self, other: DraftCounters) -> None:
        """Count what another session counted."""
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.matched += other.matched
        self.wasted += other.wasted
        self.cut_drafts += other.cut_drafts
        self.steps += other.steps
        self.dropped.update(other.dropped)
        self.frames.update(other.frames)


@dataclass(slots=True, eq=False)
class DraftArrivals:
    """Running means of one session's draft frames: gap, length, acceptance probability by index in the frame.

    Two waits are measured separately: the gap between frames of one epoch, and the recovery from a
    contradicting commit to the first frame of the next epoch, which adds the link's round trip.
    ``rtt_ms``: the least such recovery without the frame's drafting time, ``inf`` before the first.
    """

    rtt_ms: float = math.inf

    _last_ms: float | None = None
    _gap_ms: float | None = None
    _recover_ms: float | None = None
    _recovering: bool = False
    _answers_commit: bool = False
    _length: float | None = None
    _acceptance_probs: list[float] = field(default_factory=list)

    def arrived(self, now_ms: float, acceptance_prob: Sequence[float], draft_ms: float) -> None:
        """A frame that added drafts came; ``draft_ms``: their drafting time."""
        if self._last_ms is not None:
            gap_ms = max(0.0, now_ms - self._last_ms)
            if self._recovering:
                mean_ms = self._recover_ms
                self._recover_ms = gap_ms if mean_ms is None else mean_ms + _WEIGHT * (gap_ms - mean_ms)
                self._recovering = False
                if self._answers_commit:
                    self.rtt_ms = min(self.rtt_ms, max(0.0, gap_ms - draft_ms))
            else:
                mean_ms = self._gap_ms
                self._gap_ms = gap_ms if mean_ms is None else mean_ms + _WEIGHT * (gap_ms - mean_ms)
        elif draft_ms > 0:
            self._gap_ms = draft_ms
        self._last_ms = now_ms
        count, length = float(len(acceptance_prob)), self._length
        self._length = count if length is None else length + _WEIGHT * (count - length)
        means = self._acceptance_probs
        for index, (mean, value) in enumerate(zip(means, acceptance_prob, strict=False)):
            means[index] = mean + _WEIGHT * (value - mean)
        means += acceptance_prob[len(means) :]

    def contradicted(self, now_ms: float, by_commit: bool) -> None:
        """A commit that left at ``now_ms`` (or before, unless ``by_commit``) sends the edge back: drafting
        restarts from there."""
        self._recovering = True
        self._answers_commit = by_commit
        self._last_ms = now_ms

    def due(self, now_ms: float) -> tuple[float | None, tuple[float, ...], float]:
        """(expected arrival of the next frame, its expected acceptance probabilities, expiry of this
        forecast).

        ``(None, (), inf)`` while too little is known, and once the frame is overdue.
        """
        wait_ms = self._recover_ms if self._recovering else self._gap_ms
        last_ms, length = self._last_ms, self._length
        if wait_ms is None or last_ms is None or now_ms >= last_ms + _OVERDUE * wait_ms:
            return None, (), math.inf
        probs = () if length is None else tuple(self._acceptance_probs[: max(1, round(length))])
        return last_ms + wait_ms, probs, last_ms + _OVERDUE * wait_ms

    def next_ms(self, arrival_ms: float) -> float | None:
        """When the frame after one that comes at ``arrival_ms`` is expected; ``None`` if unknown."""
        return None if self._gap_ms is None else arrival_ms + self._gap_ms


@dataclass(slots=True, eq=False)
class PendingDrafts:
    """The drafts themselves: ``tokens`` and their ``acceptance_probs``, from the committed length on.

    At most ``limit`` are held. ``withdrawn``: the drafts left while the engine verified them.

    ``tree``: the drafts if they have branches, else ``None``. ``tokens`` are its nodes in best-first order
    then, so that steps take them from the front as they do with a chain, and ``acceptance_probs`` are
    :func:`~wispprof.sessions.pending_tree.successive`.
    """

    limit: int
    tokens: list[int] = field(default_factory=list)
    acceptance_probs: list[float] = field(default_factory=list)
    counters: DraftCounters = field(default_factory=DraftCounters)
    arrivals: DraftArrivals = field(default_factory=DraftArrivals)
    epoch: int = 0
    withdrawn: bool = False
    tree: TokenTree | None = None
    _order: list[int] = field(default_factory=list)
    _min_epoch: int = 0

    def merge(
        self,
        committed: list[int],
        epoch: int,
        base: int,
        tokens: Sequence[int],
        acceptance_prob: Sequence[float],
        now_ms: float,
        draft_ms: float,
        parents: Sequence[int] = (),
        depth: int = MAX_NODES,
    ) -> str:
        """Take in drafts that begin at position ``base``; returns why some were dropped, or "".

        A newer epoch drops the drafts that are held; what it repeats of a tree counts once. With ``parents``
        the frame is a tree, which is merged by path: a token that differs from a draft that is held stands
        beside it. ``depth``: of the deepest node that is any use.
        """
        count = len(tokens)
        if epoch != self.epoch or epoch < self._min_epoch:
            if epoch < max(self._min_epoch, self.epoch):
                return self.drop("epoch", count)
            replaced = self.tree
            self.clear()
            self.epoch = epoch
            if replaced is not None:
                rest = (tokens, acceptance_prob, now_ms, draft_ms, parents, depth)
                dropped = self.merge(committed, epoch, base, *rest)
                now = self.tree or as_tree(self.tokens, self.acceptance_probs, len(self.tokens))
                repeated = replaced.shared(now)
                self.counters.drafted -= repeated
                self.counters.wasted -= repeated
                return dropped
        if parents or self.tree is not None:
            frame = FrameTree.of(tokens, parents, acceptance_prob)
            return self._merge_tree(committed, base, frame, depth, now_ms, draft_ms)
        committed_len, held = len(committed), len(self.tokens)
        if base == committed_len + held and count <= self.limit - held:
            # Nearly every frame: the next drafts, none of them known yet.
            self._append(tokens, acceptance_prob, now_ms, draft_ms)
            return ""
        overlap = 0
        if base < committed_len:
            overlap = min(committed_len - base, count)
            if base < 0 or list(tokens[:overlap]) != committed[base : base + overlap]:
                self.contradicted(now_ms)
                return self.drop("contradiction", count)
        start = max(0, base - committed_len)
        if start > held:
            return self.drop("gap", count)
        known = overlap + min(held - start, count - overlap)
        if list(tokens[overlap:known]) != self.tokens[start : start + known - overlap]:
            return self.drop("conflict", count)
        fresh = slice(known, known + self.limit - held)
        lost = count - known - len(tokens[fresh])
        self._append(tokens[fresh], acceptance_prob[fresh], now_ms, draft_ms)
        return self.drop("overflow", lost) if lost else ""

    def _merge_tree(
        self, committed: list[int], base: int, frame: FrameTree, depth: int, now_ms: float, draft_ms: float
    ) -> str:
        count, behind = len(frame.tokens), len(committed) - base
        tree, path = self.tree, list[int]()
        if tree is None:
            held, limit = self.tokens[:depth], min(self.limit, MAX_NODES)
            if len(held) > limit:
                return self.drop("overflow", count)
            tree = as_tree(held, self.acceptance_probs[:depth], limit)
        else:
            tree = tree.below(ROOT)  # a copy: a step that is planned may read the one that is held
        at = ROOT
        if behind > 0:
            path, contradicted = frame.spell(committed[base : base + count + 1] if base >= 0 else ())
            if contradicted or base < 0:
                self.contradicted(now_ms)
                return self.drop("contradiction", count)
            if len(path) < behind:
                return ""  # a late frame: all of it was decided
        elif behind < 0:
            known = trunk(tree)
            if -behind > len(known):
                return self.drop("gap", count)
            at = known[-behind - 1]
        grafted = graft(tree, at, frame, path[-1] if path else ROOT, path, depth)
        added = grafted.added
        if added:
            self.counters.wasted += len(self.tokens) + len(added) - len(tree)
            self.counters.drafted += len(added)
            self._hold(tree)
            above = 1.0 if at == ROOT else tree.cum_acceptance[at] or 1.0
            fresh = sorted((tree.cum_acceptance[node] / above for node in added), reverse=True)
            self.arrivals.arrived(now_ms, successive(fresh), draft_ms)
        dropped = self.drop("contradiction", grafted.foreign) if grafted.foreign else ""
        return self.drop("overflow", grafted.excess) if grafted.excess else dropped

    def _hold(self, tree: TokenTree) -> None:
        """Hold these drafts, those without branches as a chain."""
        if tree.is_chain:
            self.tree, self._order = None, []
            self.tokens, self.acceptance_probs = list(tree.tokens), list(tree.acceptance_probs)
            return
        self.tree, self._order = tree, tree.best_first()
        self.tokens = [tree.tokens[node] for node in self._order]
        self.acceptance_probs = successive([tree.cum_acceptance[node] for node in self._order])

    def useful(self, depth: int, context_left: int) -> int:
        """Leading drafts that a step can use: at most ``depth`` can be accepted, ``context_left`` cached. No
        node of a tree is deeper, but there may be more of them."""
        held = len(self.tokens)
        return min(held, context_left if self.tree is not None else depth) if held else 0

    def parents(self, drafts: int) -> Sequence[int]:
        """Of the first ``drafts`` tokens, as in :class:`~wispprof.types.StepInput`: empty if they are a
        chain."""
        if self.tree is None:
            return ()
        return best_part(self.tree, drafts, self._order)[1]

    def after(self, drafts: int) -> list[float]:
        """Acceptance probabilities of what is held beyond a step with the first ``drafts`` of a tree, if the
        likeliest node left is the target's own token: that is the next one in order."""
        if self.tree is None or drafts >= len(self._order):
            return []
        kept = self.tree.below(self._order[drafts])
        return successive([kept.cum_acceptance[node] for node in kept.best_first()])

    def holds(self, tokens: Sequence[int], parents: Sequence[int]) -> bool:
        """Whether drafts in a step are held still."""
        tree = self.tree
        if tree is None:
            return not parents and self.tokens[: len(tokens)] == list(tokens)
        nodes: list[int] = []
        for token, parent in zip(tokens, parents or range(ROOT, len(tokens) - 1), strict=True):
            node = tree.child(ROOT if parent == ROOT else nodes[parent], token)
            if node is None:
                return False
            nodes.append(node)
        return True

    def _append(
        self, tokens: Sequence[int], acceptance_prob: Sequence[float], now_ms: float, draft_ms: float
    ) -> None:
        if not tokens:
            return
        for prob in acceptance_prob:
            if not 0.0 <= prob <= 1.0:
                acceptance_prob = [p if 0.0 <= p <= 1.0 else float(p > 1.0) for p in acceptance_prob]
                break
        self.tokens += tokens
        self.acceptance_probs += acceptance_prob
        self.counters.drafted += len(tokens)
        self.arrivals.arrived(now_ms, acceptance_prob, draft_ms)

    def drop(self, reason: str, tokens: int) -> str:
        """Count refused tokens; returns ``reason``."""
        self.counters.dropped[reason] += tokens
        self.counters.frames[reason] += 1
        return reason

    def clear(self) -> None:
        """Drop all, as wasted."""
        self.counters.wasted += len(self.tokens)
        self.withdrawn = True
        self.tokens.clear()
        self.acceptance_probs.clear()
        self.tree = None

    def contradicted(self, now_ms: float, by_commit: bool = False) -> None:
        """The drafts differ from committed text: drop them, and refuse frames of this epoch from now on.
        ``by_commit``: from text that is committed now."""
        self.clear()
        self._min_epoch = self.epoch + 1
        self.arrivals.contradicted(now_ms, by_commit)

    def reconcile(self, committed: Sequence[int], accepted: int, now_ms: float) -> None:
        """Compare with newly committed tokens, of which ``accepted`` were verified drafts; keep what
        agrees."""
        counters, pending, tree = self.counters, self.tokens, self.tree
        if tree is not None:
            path = tree.walk(committed)
            agreed, last = len(path), path[-1] if path else ROOT
            contradicted = agreed < len(committed) and last in tree.parents
            kept = tree.below(last) if agreed == len(committed) else TokenTree(tree.limit)
            counters.wasted += len(tree) - agreed - len(kept)
            self._hold(kept)
        else:
            agreed = common_prefix(list(committed), pending)
            contradicted = agreed < len(committed) and agreed < len(pending)
        counters.accepted += accepted
        if self.withdrawn:
            # Verified drafts were counted as wasted when they left, unless they are held again.
            again = min(accepted, agreed)
            counters.wasted -= accepted - again
            counters.matched += agreed - again
        else:
            counters.matched += agreed - accepted
        if contradicted:
            if tree is None:
                del pending[:agreed]
            self.contradicted(now_ms, by_commit=True)
        elif agreed and tree is None:
            del pending[:agreed], self.acceptance_probs[:agreed]
