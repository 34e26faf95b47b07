"""Inputs and outputs of batching policies (server) and speculation controllers (edge).

Policies are pure: no clock, no I/O, no torch. The server and the simulator build the same views and call
the same objects. All times are milliseconds on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from wispprof.types import DraftFeatures, RejectionPredictor, Slo, StepTimeEstimator

# --- server: which sessions advance in the next step ----------------------------------------------


class SessionView(NamedTuple):
    """What a batching policy sees of one session.

    A prefilling session has ``prompt_left > 0`` and no pending drafts. The step that feeds its last prompt
    token also emits its first token. A decoding session feeds its pending token and a leading part of its
    pending drafts.

    ``cached``: tokens with KV.
    ``acceptance_probs``: of each pending draft, P(accepted | all before it accepted). Of a tree, its nodes in
    falling order of cumulative acceptance, each relative to the node before: the running products are
    P(accepted) here too, and the first j nodes are the best tree of j.
    ``ready``: may be scheduled now. Round mode: its round has arrived, or it has no first token yet.
    Stream mode: always.
    ``arrived_ms``: when it became ready, or when its request arrived.
    ``deadline_ms``: when this step's commit must leave the server to meet the SLO (``inf``: no deadline).
    ``due_ms``: when its next draft is expected (stream mode), ``None`` if unknown.
    ``due_acceptance_probs``: expected acceptance probabilities of the drafts that are due.
    ``committed``: tokens generated so far.
    ``slo_unreachable``: no schedule can meet its SLO any more.
    ``tokens_left``: most tokens that it may still commit; very many if unknown.
    ``standing``: P(the pending drafts still stand when the step begins): below 1 if a step that verifies
    those before them is under way. If they do not, the session has none.
    """

    session: str
    slo: Slo
    cached: int
    arrived_ms: float
    deadline_ms: float
    prompt_left: int = 0
    acceptance_probs: tuple[float, ...] = ()
    ready: bool = True
    stream: bool = False
    due_ms: float | None = None
    due_acceptance_probs: tuple[float, ...] = ()
    committed: int = 0
    slo_unreachable: bool = False
    tokens_left: int = 1 << 20
    standing: float = 1.0


def column(name: str) -> Callable[[SessionView], Any]:
    """Return a getter of one field by index, a quarter faster than by name over a thousand views."""
    return itemgetter(SessionView._fields.index(name))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one step: at most ``max_items`` sessions and ``max_tokens`` rows (prompt tokens; drafts and
    one of each session), of which ``prefill_chunk`` are of prompts, all sessions together. ``kv_free``: cache
    tokens that are not in use; every row takes one."""

    max_items: int
    max_tokens: int
    prefill_chunk: int
    kv_free: int


class ScheduledItem(NamedTuple):
    """One session in a step: its first ``drafts`` pending drafts, or ``prefill`` prompt tokens."""

    session: str
    drafts: int = 0
    prefill: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The items of a step. Without items, call again when a frame arrives or at ``wake_ms``."""

    items: tuple[ScheduledItem, ...] = ()
    wake_ms: float | None = None
    p50_ms: float = 0.0
    bound_ms: float = 0.0
    reason: str = ""


class BatchPolicy(Protocol):
    """Plans each step. ``stream``: its sessions run in stream mode, else in round mode."""

    name: str
    stream: bool

    def plan(
        self, now_ms: float, sessions: list[SessionView], estimator: StepTimeEstimator, limits: Limits
    ) -> StepPlan:
        """Choose the items of the step that starts now.

        A plan holds each session once and stays within ``limits``. If any session is ready, the plan
        has items or a ``wake_ms``.
        """


# --- edge: draft another token, or send -----------------------------------------------------------


class RoundContext(NamedTuple):
    """What the edge knows when a round (or a burst of a stream) begins.

    ``draft_ms``: time of one draft step now. ``rtt_ms``: round-trip time of the link. ``server_ms``: recent
    queue and verify time. ``load_level``: as the server last reported. ``draft_ahead``: drafts beyond the
    committed length. ``committed_len``: the session's context, prompt included. ``timed``: ``draft_ms`` was
    measured, not guessed.
    """

    draft_ms: float
    rtt_ms: float
    server_ms: float
    load_level: int = 0
    draft_ahead: int = 0
    slo: Slo | None = None
    committed_len: int = 0
    timed: bool = True


class CandidatePredictor(RejectionPredictor, Protocol):
    """A rejection predictor that also rates a position's further candidates, for draft trees."""

    def candidate_acceptance(
        self, features: DraftFeatures, probs: Sequence[float] | np.ndarray, depth: int
    ) -> np.ndarray:
        """P(the target's token is this candidate | the parent was accepted), (w,).

        ``features`` of the position; ``probs`` (w,): the draft's, as in
        :class:`~wispprof.backends.DraftCandidate`, best candidate first; ``depth`` counted from 0. The first
        is :meth:`acceptance_prob`, the sum is at most 1, and none depends on the candidates after it.
        """

    def candidate_acceptance_batch(
        self, features: np.ndarray, probs: np.ndarray, depth: np.ndarray
    ) -> np.ndarray:
        """The same for rows (n, 4), probabilities (n, w) and depths (n,); returns (n, w)."""


class TreeShape(NamedTuple):
    """Bounds of a round's draft tree: ``nodes`` in all, ``depth``, children of a node (``width``), and nodes
    expanded in one forward of the draft model (``beams``). The default is a chain of one."""

    nodes: int = 1
    depth: int = 1
    width: int = 1
    beams: int = 1


class Controller(Protocol):
    """Speculation controller: one object per session, which may keep state between rounds."""

    name: str

    def begin(self, context: RoundContext) -> int:
        """Start a round. Return the most tokens to draft; 0 sends at once, undrafted."""

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        """Return whether to draft another token after number ``depth`` (from 0) of the round."""

    def acceptance_prob(self) -> float:
        """P(accepted | all before it accepted) of the last token passed to :meth:`go_on`."""

    def finish(self, drafted: int, accepted: int) -> None:
        """Learn the result of the round."""


def tree_shape(controller: Controller, context: RoundContext) -> TreeShape | None:
    """The tree that a controller wants next; ``None`` for a chain (:meth:`Controller.begin`).

    A controller may have a method ``shape(context) -> TreeShape | None``; others draft chains.
    """
    choose = getattr(controller, "shape", None)
    found: TreeShape | None = choose(context) if choose is not None else None
    return found
