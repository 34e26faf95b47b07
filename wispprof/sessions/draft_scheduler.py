"""When to draft and when to send: the controller's decisions turned into frames, for both modes. Pure.

Round mode. A round begins with the drafts that are held already (a proactive hit); they are put before
the controller one by one as if just drafted, then it drafts on until the controller stops, and the round
leaves. While it is out, up to ``proactive`` more tokens are drafted beyond it.

Stream mode. Drafting goes on ahead of the frontier in stretches. A stretch that ends by its length is
followed by the next; one that the controller ends early, or does not want to begin, pauses drafting
until the next commit: what follows a doubtful token is probably waste.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wispprof.policies.api import Controller, RoundContext
from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer, Outgoing
from wispprof.types import DraftFeatures, DraftToken

__all__ = ["DraftScheduler", "DraftingSettings"]

ContextOf = Callable[[int], RoundContext]


@dataclass(frozen=True, slots=True)
class DraftingSettings:
    """How far an edge drafts.

    ``draft_ahead``: most drafts held beyond the committed_len, bounded by what the server takes. ``proactive``: in
    round mode, how many tokens to draft beyond a round that is out (0: wait instead); the first of them
    guesses the target's own token. ``frame_share``: in stream mode, drafts are grouped into one frame
    as long as drafting the group takes at most this share of the round trip, or loses no step of the
    server (:meth:`~wispprof.sessions.edge_timing.EdgeTiming.may_hold`), and up to ``frame_max`` of them.
    ``stream``: override the server's mode (``None``: as the server says). ``carry``: see
    :class:`~wispprof.sessions.edge_timing.EdgeTiming`.
    """

    draft_ahead: int = 24
    proactive: int = 8
    frame_share: float = 0.25
    frame_max: int = 8
    stream: bool | None = None
    carry: bool = False

    def __post_init__(self) -> None:
        if self.draft_ahead < 0 or self.proactive < 0 or self.frame_max < 1:
            raise ValueError("lead and proactive must not be negative, frame_max at least 1")


class DraftScheduler:
    """Decides for one session. Told of every draft and commit, asked for frames by :meth:`due`."""

    def __init__(
        self,
        path: DraftBuffer,
        controller: Controller | None,
        settings: DraftingSettings,
        stop: Sequence[int] = (),
    ) -> None:
        self._buffer = path
        self._controller = controller
        self._settings = settings
        self._stop = frozenset(stop)
        self._features: list[DraftFeatures] = []  # of the drafts held, in order
        self._budget: int | None = None
        self._judged = 0  # drafts of this round (stretch) that were put before the controller
        self._rated = 0  # stream: leading drafts whose survival is known
        self._closed = False  # round: complete; stream: paused until a commit
        self._silent = False
        self._worthwhile = True  # round: the controller drafted at all last time
        self._group = 1

    # --- may a token be drafted now? ---

    def may_draft(self, left_ms: float = math.inf, draft_ms: float = 0.0) -> bool:
        """Whether the next token beyond the path should be drafted. Ask :meth:`due` before: it begins
        rounds and stretches, and before one has begun nothing says how far to draft.

        ``left_ms``: until the commit of the round that is out is expected, ``draft_ms``: a draft step.
        A proactive step that would outlast the wait is begun only where that pays: if everything out
        is accepted and guessed right it has used the time that was left, if not it delays the next
        round by the rest of itself.
        """
        path = self._buffer
        if self._controller is None or self._silent or path.room == 0:
            return False
        if self._stop and self._ends():
            return False
        if not path.stream and path.waiting:
            if not self._worthwhile or path.unsent >= self._settings.proactive:
                return False
            overlap = min(max(left_ms, 0.0), draft_ms)
            if overlap >= draft_ms:
                return True
            chance = self._chance()
            return chance * overlap > (1.0 - chance) * (draft_ms - overlap)
        return self._budget is not None and not self._closed

    def drafted(self, token: DraftToken) -> None:
        """A token was drafted and is held by the path."""
        self._features.append(token.features)

    def streamed(
        self, token: DraftToken, draft_ms: float, context_of: ContextOf, hold: bool
    ) -> Outgoing | None:
        """Stream mode: a token was drafted as the path's next, at a cost of ``draft_ms``. Holds it and
        answers with what is :meth:`due`. With nothing due the next token may be drafted.

        Equal to ``path.propose``, :meth:`drafted` and :meth:`due`, in one call for a caller that drafts
        many tokens at once. Raises ``ValueError`` with no room.
        """
        path, controller = self._buffer, self._controller
        judged, budget, rated = self._judged, self._budget, self._rated
        held, features = self._features, token.features
        assert controller is not None
        # Between the first and the last token of a stretch there is one judgement to make.
        if budget is None or self._closed or judged >= budget or rated != len(held) or self._stop:
            path.propose(token.token, 1.0, draft_ms)
            held.append(features)
            return self._stream_due(context_of, hold)
        go_on = controller.go_on(judged, features)
        unsent, room = path.hold(token.token, controller.acceptance_prob(), draft_ms)
        held.append(features)
        self._judged = judged = judged + 1
        self._rated = rated + 1
        if judged >= budget:
            return self._stream_due(context_of, hold)
        if not go_on:
            self._closed = True
            return path.take()
        full = unsent >= (self._settings.frame_max if hold else self._group)
        return path.take() if full or not room else None

    def rounded(self, token: DraftToken, draft_ms: float, context_of: ContextOf) -> Outgoing | None:
        """Round mode: :meth:`streamed` for the next token of a round that is being drafted."""
        path, controller = self._buffer, self._controller
        judged, budget, features = self._judged, self._budget, token.features
        assert controller is not None
        if (
            budget is None
            or self._closed
            or self._silent
            or judged != path.draft_ahead
            or self._stop
        ):
            path.propose(token.token, 1.0, draft_ms)
            self._features.append(features)
            return self._round_due(context_of)
        go_on = controller.go_on(judged, features)
        _, room = path.hold(token.token, controller.acceptance_prob(), draft_ms)
        self._features.append(features)
        self._judged = judged = judged + 1
        if go_on and judged < budget and room:
            return None
        out = path.take(judged)
        self.reset()
        return out

    def nothing_to_draft(self) -> None:
        """The drafter has nothing to propose until the text goes on."""
        self._silent = True

    def committed(self, effect: CommitEffect, drafted: int) -> None:
        """A commit changed the path; ``drafted`` of our drafts were verified for it."""
        gone = len(self._features) if effect.rejected else len(effect.tokens)
        del self._features[:gone]
        self._rated = max(0, self._rated - gone)
        if self._controller is not None:
            self._controller.finish(drafted, effect.accepted)
        self.reset()

    def reset(self) -> None:
        """Begin a new round (or stretch) with whatever is held."""
        self._budget = None
        self._judged = 0
        self._closed = False
        self._silent = False

    def _chance(self) -> float:
        """P(everything held stands): survival of what was sent, the draft's confidence in the rest."""
        path = self._buffer
        sent = path.draft_ahead - path.unsent
        odds = [held.acceptance_prob for held in path.drafts[:sent]]
        odds += [features.confidence for features in self._features[sent:]]
        return math.prod(odds)

    def _ends(self) -> bool:
        return bool(self._stop) and self._buffer.last_draft in self._stop

    # --- what leaves now? ---

    def due(self, context_of: ContextOf, hold: bool = False) -> Outgoing | None:
        """The next frame to send now, or ``None``.

        ``hold``: in stream mode, drafts may wait for the next one and lose nothing.
        """
        if self._controller is None:
            return None
        if self._buffer.stream:
            return self._stream_due(context_of, hold)
        return self._round_due(context_of)

    def _round_due(self, context_of: ContextOf) -> Outgoing | None:
        path, controller = self._buffer, self._controller
        assert controller is not None
        if path.waiting:
            return None
        if self._budget is None:
            self._budget = controller.begin(context_of(path.draft_ahead))
            self._judged = 0
            self._closed = self._budget <= 0
            self._worthwhile = not self._closed
        while not self._closed and self._judged < path.draft_ahead:
            self._closed = not self._judge(self._judged) or self._judged >= self._budget
        if not self._closed and (path.room == 0 or self._silent or self._ends()):
            self._closed = True
        if not self._closed:
            return None
        out = path.take(self._judged)
        self.reset()
        return out

    def _stream_due(self, context_of: ContextOf, hold: bool) -> Outgoing | None:
        held = self._buffer.draft_ahead
        while not self._closed:
            budget = self._budget
            if budget is None:
                self._begin_stretch(context_of(held))
            elif self._judged >= budget:
                self._budget = None
            elif self._rated < held:
                go_on = self._judge(self._rated)
                self._rated += 1
                self._closed = not go_on and self._judged < budget
            else:
                break
        return self._group_due(hold)

    def _group_due(self, hold: bool) -> Outgoing | None:
        """The unsent drafts, where they are enough for a frame or no next one comes."""
        path = self._buffer
        unsent = path.unsent
        if not unsent:
            return None
        if unsent >= (self._settings.frame_max if hold else self._group):
            return path.take()
        alone = self._closed or self._silent or path.room == 0 or self._ends()
        return path.take() if alone else None

    def _begin_stretch(self, context: RoundContext) -> None:
        assert self._controller is not None
        self._budget = self._controller.begin(context)
        self._judged = 0
        self._closed = self._budget <= 0
        share = self._settings.frame_share * context.rtt_ms / max(context.draft_ms, 1e-3)
        self._group = int(max(1, min(share, self._settings.frame_max)))

    def _judge(self, place: int) -> bool:
        """Put the draft at ``place`` of the lead before the controller; whether to go on."""
        controller, path = self._controller, self._buffer
        assert controller is not None
        go_on = controller.go_on(self._judged, self._features[place])
        path.rate(path.committed_len + place, controller.acceptance_prob())
        self._judged += 1
        return go_on
