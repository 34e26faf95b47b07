"""When to draft and when to send: the controller's decisions turned into frames, for both modes. Pure.

Round mode. A round begins with the drafts that are held already (a proactive hit). The controller judges them
one by one as if just drafted, then drafting continues until it stops, and the round leaves. Meanwhile up to
``proactive`` more tokens are drafted beyond it.

Stream mode. Drafting continues in bursts. A burst that reaches its length is followed by the next. One that
the controller ends early, or does not want to begin, pauses drafting until the next commit: what follows a
doubtful token is probably waste.

In both modes a tree may replace the chain (:mod:`~wispprof.sessions.tree_drafting`): from the next round on,
or in stream mode from the next commit on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from wispprof.policies.interface import Controller, RoundContext
from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer, Outgoing
from wispprof.sessions.tree_drafting import TreeDrafting
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.token_tree import MAX_NODES
from wispprof.types import DraftFeatures, DraftToken

ContextOf = Callable[[int], RoundContext]


class DraftScheduler:
    """Decides for one session. It is told each draft and commit, and :meth:`due` returns the frames."""

    def __init__(
        self,
        buffer: DraftBuffer,
        controller: Controller | None,
        settings: DraftingSettings,
        stop: Sequence[int] = (),
        trees: bool = False,
        max_drafts: int = MAX_NODES,
    ) -> None:
        self._buffer = buffer
        self._controller = controller
        self._settings = settings
        self._stop = frozenset(stop)
        self._features: list[DraftFeatures] = []  # of the drafts held, in order
        self._budget: int | None = None
        self._judged = 0  # drafts of this round (burst) that the controller judged
        self._rated = 0  # stream: leading drafts whose acceptance probability is known
        self._closed = False  # round: complete; stream: paused until a commit
        self._exhausted = False  # the drafter has nothing to propose
        self._committed = True  # stream: the next burst is the first after a commit
        self._worthwhile = True  # round: the controller drafted at all last time
        self._group = 1
        self.trees = TreeDrafting(buffer, settings, self._stop, max_drafts)
        self.trees.allowed = trees
        self.declined = 0  # rounds and bursts for which the controller chose no draft

    # --- drafting ---

    def may_draft(self, left_ms: float = math.inf, draft_ms: float = 0.0) -> bool:
        """Whether the next token should be drafted. Call :meth:`due` before: it begins rounds and bursts.

        ``left_ms``: until the commit of the round that is out is expected; ``draft_ms``: a draft step.
        A proactive step that would outlast the wait begins only if that pays. If everything sent is accepted
        and guessed right, the step has used the remaining wait; otherwise it delays the next round.
        """
        buffer = self._buffer
        if self._controller is None:
            return False
        if buffer.tree is not None:
            if buffer.waiting and not buffer.stream:
                return self._worthwhile and self.trees.may_go_on(left_ms, draft_ms)
            drafting = self._budget is not None and not self._closed and not self._exhausted
            return drafting and bool(self.trees.next_nodes())
        if self._exhausted or buffer.capacity_left == 0:
            return False
        if self._stop and self._ends_with_stop():
            return False
        if not buffer.stream and buffer.waiting:
            if not self._worthwhile or buffer.unsent >= self._settings.proactive:
                return False
            overlap_ms = min(max(left_ms, 0.0), draft_ms)
            if overlap_ms >= draft_ms:
                return True
            prob = self._all_accepted_prob()
            return prob * overlap_ms > (1.0 - prob) * (draft_ms - overlap_ms)
        return self._budget is not None and not self._closed

    def drafted(self, token: DraftToken) -> None:
        """A token was drafted and is held by the buffer."""
        self._features.append(token.features)

    def streamed(
        self, token: DraftToken, draft_ms: float, context_of: ContextOf, hold: bool
    ) -> Outgoing | None:
        """Stream mode: hold ``token``, drafted next at a cost of ``draft_ms``; returns what is :meth:`due`.
        If nothing is due, the next token may be drafted.

        Equal to ``buffer.propose``, :meth:`drafted` and :meth:`due`, in one call for a caller that drafts
        many tokens at once. Raises ``ValueError`` if the buffer has no capacity left.
        """
        buffer, controller = self._buffer, self._controller
        judged, budget, rated = self._judged, self._budget, self._rated
        held, features = self._features, token.features
        assert controller is not None
        # Between the first and the last token of a burst there is one judgement to make.
        if budget is None or self._closed or judged >= budget or rated != len(held) or self._stop:
            buffer.propose(token.token, 1.0, draft_ms)
            held.append(features)
            return self._stream_due(context_of, hold)
        go_on = controller.go_on(judged, features)
        unsent, left = buffer.propose(token.token, controller.acceptance_prob(), draft_ms)
        held.append(features)
        self._judged = judged = judged + 1
        self._rated = rated + 1
        if judged >= budget:
            return self._stream_due(context_of, hold)
        if not go_on:
            self._closed = True
            return buffer.take()
        full = unsent >= (self._settings.frame_max if hold else self._group)
        return buffer.take() if full or not left else None

    def rounded(self, token: DraftToken, draft_ms: float, context_of: ContextOf) -> Outgoing | None:
        """Round mode: :meth:`streamed` for the next token of the round that is being drafted."""
        buffer, controller = self._buffer, self._controller
        judged, budget, features = self._judged, self._budget, token.features
        assert controller is not None
        if budget is None or self._closed or self._exhausted or judged != buffer.draft_ahead or self._stop:
            buffer.propose(token.token, 1.0, draft_ms)
            self._features.append(features)
            return self._round_due(context_of)
        go_on = controller.go_on(judged, features)
        _, left = buffer.propose(token.token, controller.acceptance_prob(), draft_ms)
        self._features.append(features)
        self._judged = judged = judged + 1
        if go_on and judged < budget and left:
            return None
        out = buffer.take(judged)
        self.reset()
        return out

    def nothing_to_draft(self) -> None:
        """The drafter has nothing to propose until the text goes on."""
        self._exhausted = True

    def stop(self) -> None:
        """Draft and send nothing any more."""
        self._controller = None

    def resume(self, controller: Controller) -> None:
        """Draft and send again, after :meth:`stop`."""
        self._controller = controller
        self.reset()

    def committed(self, effect: CommitEffect, drafted: int) -> None:
        """A commit changed the buffer; the server verified ``drafted`` of our drafts for it."""
        gone = len(self._features) if effect.rejected else len(effect.tokens)
        del self._features[:gone]
        self._rated = max(0, self._rated - gone)
        if self._controller is not None:
            self._controller.finish(drafted, effect.accepted)
        self.reset()

    def reset(self) -> None:
        """Begin a new round (or burst) with whatever is held."""
        self._budget = None
        self._judged = 0
        self._closed = False
        self._exhausted = False
        self._committed = True

    def _all_accepted_prob(self) -> float:
        """P(all held drafts are accepted); for unsent ones, the draft's confidence stands in."""
        buffer = self._buffer
        sent = buffer.draft_ahead - buffer.unsent
        probs = [held.acceptance_prob for held in buffer.drafts[:sent]]
        probs += [features.confidence for features in self._features[sent:]]
        return math.prod(probs)

    def _ends_with_stop(self) -> bool:
        return bool(self._stop) and self._buffer.last_draft in self._stop

    # --- sending ---

    def due(self, context_of: ContextOf, hold: bool = False) -> Outgoing | None:
        """The next frame to send now, or ``None``.

        ``hold``: in stream mode, drafts that wait for the next one miss no step of the server.
        """
        if self._controller is None:
            return None
        if self._buffer.stream:
            return self._stream_due(context_of, hold)
        return self._round_due(context_of)

    def _round_due(self, context_of: ContextOf) -> Outgoing | None:
        buffer, controller = self._buffer, self._controller
        assert controller is not None
        if buffer.waiting:
            return None
        if self._budget is None:
            context = context_of(buffer.draft_ahead)
            self._budget = controller.begin(context)
            self._judged = 0
            self._closed = self._budget <= 0
            self._worthwhile = not self._closed
            self.declined += self._closed
            self._begin_tree(context)
        if buffer.tree is not None:
            if (frame := self.trees.due(self._exhausted)) is not None:
                self.reset()
            return frame
        while not self._closed and self._judged < buffer.draft_ahead:
            self._closed = not self._judge(self._judged) or self._judged >= self._budget
        if not self._closed and not self._no_next_draft():
            return None
        out = buffer.take(self._judged)
        self.reset()
        return out

    def _stream_due(self, context_of: ContextOf, hold: bool) -> Outgoing | None:
        held = self._buffer.draft_ahead
        if self.trees.allowed or self._buffer.tree is not None:
            if self._committed:
                self._committed = False
                self._begin_burst(context := context_of(held))
                self._begin_tree(context)
                held = self._buffer.draft_ahead
            if self._buffer.tree is not None:
                return self.trees.due(self._exhausted or self._closed, hold)
        while not self._closed:
            budget = self._budget
            if budget is None:
                self._begin_burst(context_of(held))
            elif self._judged >= budget:
                self._budget = None
            elif self._rated < held:
                go_on = self._judge(self._rated)
                self._rated += 1
                self._closed = not go_on and self._judged < budget
            else:
                break
        # The unsent drafts leave if they fill a frame, or if no next draft comes.
        unsent = self._buffer.unsent
        if not unsent:
            return None
        full = unsent >= (self._settings.frame_max if hold else self._group)
        return self._buffer.take() if full or self._closed or self._no_next_draft() else None

    def _no_next_draft(self) -> bool:
        return self._exhausted or self._buffer.capacity_left == 0 or self._ends_with_stop()

    def _begin_burst(self, context: RoundContext) -> None:
        assert self._controller is not None
        self._budget = self._controller.begin(context)
        self._judged = 0
        self._closed = self._budget <= 0
        self.declined += self._closed
        share = self._settings.frame_share * context.rtt_ms / max(context.draft_ms, 1e-3)
        self._group = int(max(1, min(share, self._settings.frame_max)))

    def _begin_tree(self, context: RoundContext) -> None:
        """After the controller's budget: let a tree replace the chain, if it may and pays."""
        assert self._controller is not None
        assert self._budget is not None
        if self.trees.begin(self._controller, context, self._budget):
            self._features.clear()
            self._rated = 0

    def _judge(self, index: int) -> bool:
        """Let the controller judge the held draft at ``index``; returns whether to go on."""
        controller = self._controller
        assert controller is not None
        go_on = controller.go_on(self._judged, self._features[index])
        self._buffer.rate(index, controller.acceptance_prob())
        self._judged += 1
        return go_on
