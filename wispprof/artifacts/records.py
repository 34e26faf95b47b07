"""What a profile and an acceptance trace are made of. How they lie on disk is ``store``'s business.

A profile is a list of keyed rows and one manifest. Every row keeps its raw samples; aggregation is
done late, by whoever reads.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import numpy as np

from wispprof.core import BatchShape, DraftFeatures, Sampling

__all__ = ["AcceptanceTrace", "EdgeRow", "LinkRow", "StepRow", "TracePath"]


@dataclass(frozen=True, slots=True)
class StepRow:
    """Times of one batch shape on the verifier engine.

    ``kind``: ``verify`` (pending tokens and drafts), ``prefill`` (prompt chunks alone), ``mixed``
    (both), ``sentinel`` (the shape repeated through the sweep to show drift).
    ``flags`` mark rows that a reader should distrust: ``drift``, ``noisy``, ``throttled``.
    ``padded_tokens``: tokens the step really computed (graph bucket), 0 where it is not padded.
    ``source``: ``measured``, or ``published`` with ``citation``.
    ``visits``: of each visit of the sweep to this shape, in turn, its place in the order of measurement
    and how many of ``samples_ms`` it gave; empty for a single visit. ``set_aside_ms``: samples taken
    beside a sentinel that was off, where enough others remained to do without them; ``aside_visits``:
    their visits.
    """

    key: str
    kind: str
    shape: BatchShape
    samples_ms: tuple[float, ...]
    flags: tuple[str, ...] = ()
    padded_tokens: int = 0
    order: int = 0
    source: str = "measured"
    citation: str = ""
    visits: tuple[tuple[int, int], ...] = ()
    set_aside_ms: tuple[float, ...] = ()
    aside_visits: tuple[tuple[int, int], ...] = ()

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """One measurement on an edge device.

    ``kind``: ``draft_step`` (one token over ``context`` cached, features included), ``catch_up`` (the same
    where ``tokens`` must be read first, as after a round of which everything was accepted), ``round``
    (``tokens`` drafted one after the other by a device that did nothing for ``rested_ms`` before; the rest
    is not in the samples), ``forward`` (the bare forward of a step), ``prefill`` (``tokens`` at once over
    ``context``), ``controller`` (deciding once), ``burst`` and ``sustained`` (a drafted token within a short
    and a long window), ``energy`` (``energy_j`` per drafted token; ``None`` where there is no sensor).
    ``visits``, ``set_aside_ms`` and ``aside_visits`` as in :class:`StepRow`.
    """

    key: str
    kind: str
    context: int
    samples_ms: tuple[float, ...]
    tokens: int = 1
    energy_j: float | None = None
    temperature_c: float | None = None
    flags: tuple[str, ...] = ()
    order: int = 0
    source: str = "measured"
    citation: str = ""
    visits: tuple[tuple[int, int], ...] = ()
    set_aside_ms: tuple[float, ...] = ()
    aside_visits: tuple[tuple[int, int], ...] = ()
    rested_ms: float = 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class LinkRow:
    """Transfers between an edge and a server, in the wire's own frames.

    ``kind``: ``rtt`` (a small frame there and back), ``uplink`` and ``downlink`` (``payload_bytes`` one
    way, a small frame back; the samples hold the whole exchange).
    """

    key: str
    kind: str
    payload_bytes: int
    samples_ms: tuple[float, ...]
    flags: tuple[str, ...] = ()
    order: int = 0
    source: str = "measured"
    citation: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclass(frozen=True, slots=True)
class TracePath:
    """One held-out prompt, the target's own path from it, and the draft's view at every position.

    With ``n = len(prompt)`` and ``m = len(path)``: row ``i`` of ``drafts`` (m, K) holds what the draft
    proposes for positions ``n + i … n + i + K - 1`` given the prompt and ``path[:i]``; ``features``
    (m, K, 4) are those of :class:`~wispprof.core.DraftFeatures`; ``accepted`` (m,) is the length of
    the proposal's prefix that equals the path (proposals past the end of the path are not counted,
    so rows with ``i + K > m`` are censored).
    """

    prompt: tuple[int, ...]
    path: tuple[int, ...]
    drafts: np.ndarray
    features: np.ndarray
    accepted: np.ndarray

    @property
    def depth(self) -> int:
        """K: how many tokens were drafted at each position."""
        return int(self.drafts.shape[1])

    def features_at(self, position: int, depth: int) -> DraftFeatures:
        return DraftFeatures(*(float(v) for v in self.features[position, depth]))

    def scored_rows(self) -> int:
        """Number of leading rows whose ``accepted`` is not censored by the end of the path."""
        return max(0, len(self.path) - self.depth)


@dataclass(frozen=True)
class AcceptanceTrace:
    """Paths of one draft-target pair under one sampling setting.

    Its three uses: it trains rejection predictors, drives the simulator, and lets a replay edge propose
    what the real draft would. Hashes identify the tokenizer and models it was taken with.
    """

    target: str
    draft: str
    tokenizer_hash: str
    sampling: Sampling
    paths: tuple[TracePath, ...]
    meta: dict[str, object] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return self.paths[0].depth

    def survival_by_position(self) -> np.ndarray:
        """Share of proposals whose first j+1 tokens were all accepted, (K,), uncensored rows only."""
        counts = np.concatenate([p.accepted[: p.scored_rows()] for p in self.paths])
        return np.array([(counts > j).mean() if len(counts) else np.nan for j in range(self.depth)])
