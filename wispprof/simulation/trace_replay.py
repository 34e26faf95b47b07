"""Simulated outputs replayed from an acceptance trace: recorded proposals and their features."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.errors import ProfileError
from wispprof.simulation.candidate_ranks import Candidates, calibrated_candidates
from wispprof.simulation.simulated_output import SimulatedOutput, mix
from wispprof.types import DraftFeatures, DraftToken, RejectionPredictor


class MemoPredictor:
    """Caches another predictor: replayed outputs repeat the same few features."""

    def __init__(self, predictor: RejectionPredictor) -> None:
        self._predictor = predictor
        self._known: dict[tuple[DraftFeatures, int], float] = {}

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        key = (features, depth)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._predictor.acceptance_prob(features, depth)
        return known

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return self._predictor.acceptance_prob_batch(features, depth)


class _Segment(NamedTuple):
    """The scored part of one trace path, as plain lists. ``ranks`` and ``candidates`` are empty if the trace
    has none."""

    path: list[int]
    proposals: list[DraftToken]
    off_path: list[list[DraftToken]]
    ranks: list[int]
    candidates: Candidates


class TraceAcceptance:
    """Outputs cut from an acceptance trace: recorded paths, proposals and features, in random order.

    A generation longer than one path goes on with another. Rows that the end of a path censors are left out.
    Beyond the recorded depth of a wrong path its last feature row repeats. Prompt length is the caller's.
    Raises :class:`ProfileError` if the trace holds no scored row.
    """

    def __init__(self, trace: AcceptanceTrace, predictor: RejectionPredictor) -> None:
        self.predictor: RejectionPredictor = MemoPredictor(predictor)
        known = calibrated_candidates(trace) or [()] * len(trace.paths)
        segments = (_segment(p, p.scored_rows(), c) for p, c in zip(trace.paths, known, strict=True))
        self._segments = [s for s in segments if s.path]
        if not self._segments:
            raise ProfileError(
                "The acceptance trace holds no path longer than its own depth.",
                "Record longer paths: wispprof profile-edge --trace.",
            )

    def output(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> SimulatedOutput:
        rng = Random(mix(seed))
        path: list[int] = []
        proposals: list[DraftToken] = []
        off_path: list[list[DraftToken]] = []
        ranks: list[int] = []
        candidates: list[Sequence[float]] = []
        while len(path) < output_tokens:
            segment = rng.choice(self._segments)
            start = rng.randrange(len(segment.path)) if not path else 0
            path += segment.path[start:]
            proposals += segment.proposals[start:]
            off_path += segment.off_path[start:]
            ranks += segment.ranks[start:]
            candidates += segment.candidates[start:]
        return SimulatedOutput(prompt_tokens, path[:output_tokens], proposals, off_path, ranks, candidates)


class TraceReplay:
    """Outputs that are whole paths of a trace, selected by number as ``wispprof bench`` does.

    Device d's request r follows path ``(r · devices + d) mod paths``. Rows that the end of a path censors are
    included: on the path, the proposal at a position is known for every row.
    """

    def __init__(self, trace: AcceptanceTrace, predictor: RejectionPredictor, devices: int) -> None:
        self.predictor: RejectionPredictor = MemoPredictor(predictor)
        self._paths = trace.paths
        self._candidates = calibrated_candidates(trace) or [()] * len(trace.paths)
        self._devices = devices
        self._known: dict[int, _Segment] = {}

    def __len__(self) -> int:
        """Number of paths."""
        return len(self._paths)

    def lengths(self, device: int, number: int) -> tuple[int, int]:
        """Prompt and path tokens of a device's request."""
        path = self._paths[self._index(device, number)]
        return len(path.prompt), len(path.path)

    def output(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> SimulatedOutput:
        """``seed``: (of the scenario, device, number of its request)."""
        index = self._index(*seed[-2:])
        whole = self._known.get(index)
        if whole is None:
            path = self._paths[index]
            whole = self._known[index] = _segment(path, len(path.path), self._candidates[index])
        return SimulatedOutput(
            prompt_tokens,
            whole.path[:output_tokens],
            whole.proposals,
            whole.off_path,
            whole.ranks,
            whole.candidates,
        )

    def _index(self, device: int, number: int) -> int:
        return (number * self._devices + device) % len(self._paths)


def _segment(path: TracePath, rows: int, candidates: Candidates) -> _Segment:
    drafted = [
        [
            DraftToken(int(token), DraftFeatures(*features))
            for token, features in zip(tokens, features_of, strict=True)
        ]
        for tokens, features_of in zip(
            path.drafts[:rows].tolist(), path.features[:rows].tolist(), strict=True
        )
    ]
    return _Segment(
        list(map(int, path.path[:rows])),
        [row[0] for row in drafted],
        [row[1:] or row for row in drafted],
        [] if path.target_ranks is None else path.target_ranks[:rows].tolist(),
        candidates[:rows],
    )
