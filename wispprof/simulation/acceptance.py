"""What a draft model would have proposed, and what the target would have said: replayed or drawn.

A :class:`Script` is one generation's whole future: the target's path, and for every position the proposal
that the draft makes there with the features it makes it with. It is a :class:`~wispprof.core.Drafter`, so the
edge of the simulator drives it exactly as it would drive a model, and controllers decide on real features.

As long as everything drafted equals the target's path, the proposal at a position depends on that position
alone (the draft saw the true prefix). From the first difference on the draft follows a wrong path of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from wispprof.artifacts.records import AcceptanceTrace
from wispprof.core import DraftFeatures, DraftToken, RejectionPredictor, Sampling
from wispprof.errors import ProfileError

__all__ = [
    "AcceptanceSource",
    "MemoPredictor",
    "Script",
    "SyntheticAcceptance",
    "TraceAcceptance",
    "TrustConfidence",
    "mix",
    "survival_curve",
]

PROMPT_TOKEN = 7
"""Prompts only count by their length: every prompt token is this one."""


class Script:
    """One generation's future. Positions as everywhere: prompt tokens first.

    ``path``: output tokens of the target. ``tokens[i]`` and ``features[i]``: proposal for output position
    ``i`` after the true prefix. ``astray``: for each output position a sequence of (token, features) that the
    draft would go on with if its proposal there was wrong; its last entry repeats.
    """

    __slots__ = (
        "_astray",
        "_features",
        "_length",
        "_tokens",
        "_wrong_from",
        "path",
        "prompt_tokens",
    )

    def __init__(
        self,
        prompt_tokens: int,
        path: Sequence[int],
        tokens: Sequence[int],
        features: Sequence[DraftFeatures],
        astray: Sequence[Sequence[DraftToken]],
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.path = path
        self._tokens = tokens
        self._features = features
        self._astray = astray
        self._length = prompt_tokens
        self._wrong_from = -1

    @property
    def prompt(self) -> list[int]:
        return [PROMPT_TOKEN] * self.prompt_tokens

    @property
    def length(self) -> int:
        """Tokens held, committed and drafted."""
        return self._length

    @property
    def on_path(self) -> bool:
        """Whether everything held so far is what the target says."""
        return self._wrong_from < 0

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start over from committed tokens (they are on the path by definition)."""
        self._length = len(tokens)
        self._wrong_from = -1

    def draft(self) -> DraftToken:
        """Propose the next token and hold it."""
        place = self._length - self.prompt_tokens
        self._length += 1
        wrong = self._wrong_from
        if wrong < 0:
            token = self._tokens[place]
            if token != self.path[place]:
                self._wrong_from = place
            return DraftToken(token, self._features[place])
        tail = self._astray[wrong]
        depth = place - wrong - 1
        return tail[depth] if depth < len(tail) else tail[-1]

    def rollback(self, length: int) -> None:
        """Hold only the first ``length`` tokens."""
        if length > self._length:
            raise ValueError(f"cannot roll {self._length} tokens back to {length}")
        self._length = length
        if length - self.prompt_tokens <= self._wrong_from:
            self._wrong_from = -1

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self._length += len(tokens)

    def ahead(self, most: int) -> int:
        """How many proposals from here on the target will accept, at most ``most`` (clairvoyant)."""
        if self._wrong_from >= 0:
            return 0
        start = self._length - self.prompt_tokens
        tokens, path = self._tokens, self.path
        last = min(len(path), start + most)
        place = start
        while place < last and tokens[place] == path[place]:
            place += 1
        return place - start


class AcceptanceSource(Protocol):
    """Where scripts come from. ``predictor`` reads the features that its scripts carry."""

    @property
    def predictor(self) -> RejectionPredictor: ...

    def script(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> Script:
        """The generation that this seed stands for, equal for equal arguments."""


class MemoPredictor:
    """Another predictor, each answer computed once: scripts repeat the same few features many times."""

    def __init__(self, predictor: RejectionPredictor) -> None:
        self._predictor = predictor
        self._known: dict[tuple[DraftFeatures, int], float] = {}

    def survival(self, features: DraftFeatures, depth: int) -> float:
        key = (features, depth)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._predictor.survival(features, depth)
        return known

    def survival_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return self._predictor.survival_batch(features, depth)


# --- replayed -------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """The scored part of one trace path, as plain lists."""

    path: list[int]
    tokens: list[int]
    features: list[DraftFeatures]
    astray: list[list[DraftToken]]


class TraceAcceptance:
    """Scripts cut from an acceptance trace: recorded paths, proposals and features, in random order.

    A generation longer than one path goes on with another. Rows that the end of a path censors are left out.
    Beyond the recorded depth of a wrong path its last feature row repeats. Prompt length is the caller's.
    Raises :class:`ProfileError` if the trace holds no scored row.
    """

    def __init__(self, trace: AcceptanceTrace, predictor: RejectionPredictor) -> None:
        self.predictor: RejectionPredictor = MemoPredictor(predictor)
        self._segments = [s for s in map(_segment, trace.paths) if s.path]
        if not self._segments:
            raise ProfileError(
                "The acceptance trace holds no path longer than its own depth.",
                "Record longer paths: wispprof profile-edge --trace.",
            )

    def script(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> Script:
        rng = Random(mix(seed))
        path: list[int] = []
        tokens: list[int] = []
        features: list[DraftFeatures] = []
        astray: list[list[DraftToken]] = []
        while len(path) < output_tokens:
            segment = rng.choice(self._segments)
            start = rng.randrange(len(segment.path)) if not path else 0
            path += segment.path[start:]
            tokens += segment.tokens[start:]
            features += segment.features[start:]
            astray += segment.astray[start:]
        return Script(prompt_tokens, path[:output_tokens], tokens, features, astray)


def _segment(path: object) -> _Segment:
    from wispprof.artifacts.records import TracePath

    assert isinstance(path, TracePath)
    rows = path.scored_rows()
    drafts = path.drafts[:rows].tolist()
    features = path.features[:rows].tolist()
    astray = []
    for row in range(rows):
        held = [
            DraftToken(int(t), DraftFeatures(*f))
            for t, f in zip(drafts[row][1:], features[row][1:], strict=True)
        ]
        astray.append(held or [DraftToken(int(drafts[row][0]), DraftFeatures(*features[row][0]))])
    return _Segment(
        list(map(int, path.path[:rows])),
        [int(row[0]) for row in drafts],
        [DraftFeatures(*row[0]) for row in features],
        astray,
    )


# --- drawn ----------------------------------------------------------------------------------------


class TrustConfidence:
    """A predictor that believes the feature ``confidence``: synthetic features are calibrated already."""

    def survival(self, features: DraftFeatures, depth: int) -> float:
        return features.confidence

    def survival_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        confidence: np.ndarray = np.asarray(features)[:, 0]
        return confidence


_LEVELS = 64
_RIGHT, _WRONG = 1, 0


class SyntheticAcceptance:
    """Scripts drawn from a model with four figures, for setups of which only averages are known.

    Each output position has its own chance ``q`` of a right proposal, from a Beta law of mean
    ``acceptance`` whose concentration is ``concentration`` (small: some positions are easy and some
    hopeless). With probability ``persistence`` a position inherits the chance of the one before it. A
    predictor sees ``logit(q)`` through Gaussian noise of standard deviation ``noise`` and answers with
    the calibrated chance given what it sees; 0 knows ``q`` exactly (not the outcome), large values know
    only the mean.
    """

    def __init__(
        self,
        acceptance: float = 0.75,
        *,
        concentration: float = 2.0,
        persistence: float = 0.0,
        noise: float = 1.0,
    ) -> None:
        if not 0 < acceptance < 1 or concentration <= 0 or not 0 <= persistence <= 1 or noise < 0:
            raise ValueError(
                "synthetic acceptance needs 0 < acceptance < 1, concentration > 0, "
                f"0 <= persistence <= 1 and noise >= 0, got {acceptance}, {concentration}, "
                f"{persistence}, {noise}"
            )
        self.acceptance = acceptance
        self.concentration = concentration
        self.persistence = persistence
        self.noise = noise
        self.predictor: RejectionPredictor = TrustConfidence()
        self._edges, self._levels = _calibration(acceptance, concentration, noise)

    @classmethod
    def from_survival(
        cls, survival: Sequence[float], *, concentration: float = 2.0, noise: float = 1.0
    ) -> SyntheticAcceptance:
        """Match a measured or published curve: ``survival[j]`` = P(first j + 1 proposals accepted).

        The mean is its first value; the persistence is the one whose curve comes closest (least squares).
        """
        if not survival or not 0 < survival[0] < 1:
            raise ValueError("a survival curve begins with a probability between 0 and 1")
        goal = np.asarray(survival, dtype=float)

        def gap(persistence: float) -> float:
            curve = survival_curve(survival[0], concentration, persistence, len(goal))
            return float(((curve - goal) ** 2).sum())

        best = min((i / 50 for i in range(51)), key=gap)
        return cls(survival[0], concentration=concentration, persistence=best, noise=noise)

    def survival(self, depth: int) -> np.ndarray:
        """P(first j + 1 proposals accepted) for j < depth, (depth,)."""
        return survival_curve(self.acceptance, self.concentration, self.persistence, depth)

    def auc(self, samples: int = 20_000) -> float:
        """The predictor's area under the ROC curve over positions, by simulation with a fixed seed."""
        rng = np.random.default_rng(0)
        right, level = self._draw(rng, samples)
        order = np.argsort(level, kind="stable")
        ranks = np.empty(samples)
        ranks[order] = np.arange(1, samples + 1)
        # Ties share their mean rank.
        values, inverse = np.unique(level, return_inverse=True)
        mean_rank = np.bincount(inverse, ranks) / np.bincount(inverse)
        good = int(right.sum())
        rank_sum = float(mean_rank[inverse][right].sum())
        del values
        return (rank_sum - good * (good + 1) / 2) / (good * (samples - good))

    def script(self, seed: Sequence[int], prompt_tokens: int, output_tokens: int) -> Script:
        rng = np.random.default_rng([s & 0xFFFFFFFF for s in seed])
        right, level = self._draw(rng, output_tokens)
        features = [self._levels[i] for i in level.tolist()]
        return Script(
            prompt_tokens,
            [_RIGHT] * output_tokens,
            right.astype(np.int64).tolist(),
            features,
            # A draft that went astray does not know it: its confidence goes on like any other.
            _Astray(features),
        )

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        a = self.acceptance * self.concentration
        q = rng.beta(a, self.concentration - a, count)
        if self.persistence > 0:
            fresh = rng.random(count) >= self.persistence
            fresh[0] = True
            q = q[np.maximum.accumulate(np.where(fresh, np.arange(count), 0))]
        right = rng.random(count) < q
        seen = _logit(q) + self.noise * rng.standard_normal(count)
        return right, np.searchsorted(self._edges, seen)


class _Astray(Sequence[Sequence[DraftToken]]):
    """Lazily, the features of the following positions under wrong tokens."""

    __slots__ = ("_features",)

    def __init__(self, features: list[DraftFeatures]) -> None:
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, place: int) -> Sequence[DraftToken]:  # type: ignore[override]
        return _WrongTail(self._features, place + 1)


class _WrongTail(Sequence[DraftToken]):
    """Wrong tokens with the features of the positions from ``first`` on; at least one."""

    __slots__ = ("_features", "_first")

    def __init__(self, features: list[DraftFeatures], first: int) -> None:
        self._features = features
        self._first = min(first, len(features) - 1)

    def __len__(self) -> int:
        return len(self._features) - self._first

    def __getitem__(self, depth: int) -> DraftToken:  # type: ignore[override]
        place = self._first + depth if depth >= 0 else depth
        return DraftToken(_WRONG, self._features[place])


def survival_curve(
    acceptance: float, concentration: float, persistence: float, depth: int
) -> np.ndarray:
    """P(first j + 1 proposals accepted) of the synthetic model, (depth,).

    By runs: within a run of equal ``q`` of length r the chance is the Beta law's r-th moment.
    """
    a = acceptance * concentration
    moments = [1.0]
    for r in range(depth):
        moments.append(moments[-1] * (a + r) / (concentration + r))
    survive = [1.0]
    for n in range(1, depth + 1):
        # The first run has length r < n and then a fresh q begins, or it covers all n.
        total = persistence ** (n - 1) * moments[n]
        for r in range(1, n):
            total += persistence ** (r - 1) * (1 - persistence) * moments[r] * survive[n - r]
        survive.append(total)
    return np.asarray(survive[1:])


def _logit(q: np.ndarray) -> np.ndarray:
    q = np.clip(q, 1e-6, 1 - 1e-6)
    value: np.ndarray = np.log(q) - np.log1p(-q)
    return value


@lru_cache(maxsize=64)
def _calibration(
    acceptance: float, concentration: float, noise: float
) -> tuple[np.ndarray, tuple[DraftFeatures, ...]]:
    """What a noisy sight of ``logit(q)`` is worth: quantile edges, and mean ``q`` in each bin."""
    rng = np.random.default_rng(20260120)
    a = acceptance * concentration
    q = rng.beta(a, concentration - a, 200_000)
    seen = _logit(q) + noise * rng.standard_normal(q.size)
    edges = np.quantile(seen, np.linspace(0, 1, _LEVELS + 1)[1:-1])
    bins = np.searchsorted(edges, seen)
    mean = np.bincount(bins, q, _LEVELS) / np.maximum(1, np.bincount(bins, minlength=_LEVELS))
    mean = np.maximum.accumulate(mean)
    return edges, tuple(_features(float(p)) for p in mean)


def _features(confidence: float) -> DraftFeatures:
    """Features of a two-way choice with this confidence: plausible, and monotone in it."""
    p = min(max(confidence, 1e-6), 1 - 1e-6)
    entropy = -(p * math.log(p) + (1 - p) * math.log1p(-p))
    margin = math.log(p) - math.log1p(-p)
    return DraftFeatures(p, entropy, margin, 1.0 + abs(margin))


def mix(seed: Sequence[int]) -> int:
    """One integer from several, distinct for distinct small ones."""
    value = 0
    for part in seed:
        value = (value * 1_000_003 + part + 1) & 0xFFFFFFFFFFFFFFFF
    return value
