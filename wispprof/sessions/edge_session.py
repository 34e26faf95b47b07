"""The edge's side of one generation, as a state machine that runtime and simulator share. Pure.

The driver owns the clock, the link and the drafter. It reports what happened and when, and asks what is next:

    begin_step, end_step around a draft step · next_frame for what leaves · on_commit for what arrives
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from wispprof.backends import Continuations
from wispprof.policies.interface import Controller, RoundContext
from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer, Outgoing
from wispprof.sessions.draft_scheduler import DraftScheduler
from wispprof.sessions.edge_timing import EdgeTiming
from wispprof.sessions.edge_tree import RatedCandidates
from wispprof.sessions.pending_tree import in_order
from wispprof.sessions.tree_drafting import TreeStep
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.token_tree import MAX_NODES
from wispprof.types import DraftToken, Slo


class EdgeSession:
    """One generation: which drafts it holds, when it drafts and sends, what its link and server take.

    ``tokens``: the prompt. ``max_new``: most tokens to generate. ``controller`` ``None``: the session never
    drafts (server-only). ``trees``: drafter and server support draft trees, of which the server holds
    ``max_drafts`` nodes. The driver keeps ``rtt_ms`` and
    ``load_level`` up to date. At most one draft step runs at a time; a commit may arrive while it runs.
    ``step_overtaken``: such a commit decided the step's position.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        max_new: int,
        slo: Slo,
        settings: DraftingSettings,
        controller: Controller | None = None,
        *,
        stop: Sequence[int] = (),
        stream: bool = False,
        rtt_ms: float = 0.0,
        trees: bool = False,
        max_drafts: int = MAX_NODES,
    ) -> None:
        end = len(tokens) + max_new
        self.buffer = DraftBuffer(tokens, stream=stream, draft_ahead_limit=settings.draft_ahead, end=end)
        self.scheduler = DraftScheduler(self.buffer, controller, settings, stop, trees, max_drafts)
        self.timing = EdgeTiming(slo, settings.carry)
        self.rtt_ms = rtt_ms
        self.load_level = 0
        self._controlled = controller is not None
        self._step_epoch = -1
        self.step_overtaken = False
        # Of :meth:`drafted`: the mean after its last step, and the hold rule that belongs to it.
        self._mean_draft_ms = math.nan
        self._hold = self.timing.hold_rule(rtt_ms)

    # --- drafting ---

    def may_draft(self, now_ms: float) -> bool:
        """Whether to begin a draft step. Call :meth:`next_frame` before: it begins rounds and bursts."""
        scheduler, timing = self.scheduler, self.timing
        if self.buffer.stream:
            return scheduler.may_draft()
        left_ms = timing.left_ms if self.buffer.tree is None else timing.until_commit_ms
        return scheduler.may_draft(left_ms(now_ms, self.rtt_ms), timing.draft_ms)

    def begin_step(self) -> TreeStep | None:
        """A draft step begins: for the next position, or for the nodes of the tree step that is returned."""
        self._step_epoch = self.buffer.epoch
        self.step_overtaken = False
        return self.scheduler.trees.step()

    def end_tree_step(self, found: Sequence[Continuations], draft_ms: float, waited_ms: float = 0.0) -> bool:
        """The running tree step ended with what it found after each node; returns ``False`` if a commit has
        overtaken it, so that nothing of it is left. See :meth:`end_step`."""
        return self.grow_tree(self.scheduler.trees.rate(found), draft_ms, waited_ms)

    def grow_tree(self, found: Sequence[RatedCandidates], draft_ms: float, waited_ms: float = 0.0) -> bool:
        """:meth:`end_tree_step` with candidates whose acceptance probabilities are known."""
        trees = self.scheduler.trees
        self.timing.drafted(max(0.0, draft_ms - trees.node_ms * (len(found) - 1)), waited_ms)
        self._mean_draft_ms = math.nan
        return trees.grown(found, draft_ms)

    def end_step(
        self, draft: Callable[[], DraftToken], draft_ms: float, waited_ms: float = 0.0
    ) -> float | None:
        """The running draft step ended; ``draft`` returns its token, and is called only if that still counts.

        ``waited_ms``: how long it waited for a device that other sessions share. Returns ``None`` if the
        token is held now. If a commit has overtaken it, the token is dropped and the wasted part of
        ``draft_ms`` is returned: all of it after a rejected draft, else 0.
        """
        self.timing.drafted(draft_ms, waited_ms)
        self._mean_draft_ms = math.nan
        if self.step_overtaken or self.buffer.tree is not None:
            return draft_ms if self.buffer.epoch != self._step_epoch else 0.0
        token = draft()
        self.buffer.propose(token.token, 1.0, draft_ms)
        self.scheduler.drafted(token)
        return None

    def drafted(self, token: DraftToken, draft_ms: float, now_ms: float) -> Outgoing | None:
        """A draft step that no commit can have overtaken ended; returns the frame that is due, if one is.

        :meth:`begin_step`, :meth:`end_step` and :meth:`next_frame` in one call, for a driver that works
        out many steps at once. In stream mode the next step may follow while nothing is due.
        """
        stream = self.buffer.stream
        if draft_ms != self._mean_draft_ms:  # otherwise the means stay as they are
            timing = self.timing
            timing.drafted(draft_ms)
            self._mean_draft_ms = timing.draft_ms
            if stream:
                self._hold = timing.hold_rule(self.rtt_ms)
        if stream:
            # As EdgeTiming.may_hold, without a call per draft.
            needed_ms, period_ms, margin_ms, last_commit_ms, rtt_ms = self._hold
            phase_ms = (now_ms - last_commit_ms + rtt_ms) % period_ms
            hold = needed_ms <= period_ms - phase_ms - margin_ms
            return self.scheduler.streamed(token, draft_ms, self._context, hold)
        return self.scheduler.rounded(token, draft_ms, self._context)

    # --- sending ---

    def next_frame(self, now_ms: float) -> Outgoing | None:
        """The draft frame to send now, if one is due; :meth:`sent` must follow."""
        buffer = self.buffer
        # With nothing unsent there is nothing to hold.
        unsent = buffer.stream and (buffer.unsent > 0 or buffer.tree is not None)
        hold = unsent and self.timing.may_hold(now_ms, self.rtt_ms)
        return self.scheduler.due(self._context, hold)

    def sent(self, frame: Outgoing, now_ms: float) -> float:
        """``frame`` leaves; returns its slack in ms (0 in stream mode, where the server sets the
        deadlines)."""
        self.timing.sent(now_ms)
        if self.buffer.stream:
            return 0.0
        probs: Sequence[float] = frame.acceptance_prob
        if frame.parents:
            probs = in_order(probs, frame.parents)
        return self.timing.slack_ms(probs, now_ms, self.rtt_ms)

    def _context(self, draft_ahead: int) -> RoundContext:
        return self.timing.context(self.rtt_ms, self.load_level, draft_ahead, self.buffer.committed_len)

    # --- commits ---

    def on_commit(
        self,
        now_ms: float,
        committed_len: int,
        tokens: Sequence[int],
        accepted: int,
        drafted: int,
        server_ms: float,
    ) -> CommitEffect | None:
        """A commit arrived, for which the server queued and verified ``server_ms``.

        Returns its effect, which is empty for a duplicate; ``None`` if an earlier commit was lost: reopen
        the session. Raises :class:`ProtocolError` if it contradicts committed tokens.
        """
        buffer = self.buffer
        if committed_len - len(tokens) > buffer.committed_len:
            return None
        effect = buffer.on_commit(committed_len, tokens, accepted, drafted)
        if self._controlled and effect.tokens:
            self.timing.committed(now_ms, server_ms, len(effect.tokens))
            self._mean_draft_ms = math.nan
            if effect.rejected or effect.extend:
                self.step_overtaken = True
            self.scheduler.committed(effect, drafted)
            self.scheduler.trees.committed()
        return effect

    def reopened(self, stream: bool, trees: bool = False) -> tuple[int, float]:
        """The session was opened anew from its committed tokens; ``stream``: the server's mode now;
        ``trees``: as at first. Returns (drafts dropped for it, their drafting time)."""
        self._mean_draft_ms = math.nan
        self.buffer.stream = stream
        self.buffer.reopened()
        self.scheduler.reset()
        self.scheduler.trees.allowed = trees
        return (0, 0.0) if trees else self.buffer.drop_tree()
