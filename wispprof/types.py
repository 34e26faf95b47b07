"""Records and interfaces that every package shares. Nothing here imports torch.

Units live in names: ``*_ms`` are milliseconds, ``*_j`` joules, ``*_w`` watts, ``tokens_per_s`` a rate.
Positions count tokens from the start of a session, prompt included: the first prompt token stands at
position 0, and the first generated token of a prompt of ``n`` tokens at position ``n``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

Progress = Callable[[int, int, str], None]  # (done, total, status), from long work


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objective of a session.

    ``tokens_per_s``: sustained token speed after the first token (the inverse of TPOT).
    ``ttft_ms``: time from the request to its first token; ``None``: no objective.
    ``best_effort``: nobody asked for ``tokens_per_s``. Scheduling aims at it, admission does not check it.
    """

    tokens_per_s: float
    ttft_ms: float | None = None
    best_effort: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.tokens_per_s < np.inf and (self.ttft_ms is None or 0 < self.ttft_ms < np.inf)):
            raise ValueError(f"tokens_per_s and ttft_ms must be positive and finite, got {self}")

    @classmethod
    def of(cls, tokens_per_s: float | None, ttft_ms: float | None = None) -> Slo:
        """The SLO of a request; without a token speed (``None`` or 0) a best-effort one of 1 token/s."""
        return cls(tokens_per_s or 1.0, ttft_ms, best_effort=not tokens_per_s)

    @property
    def tpot_ms(self) -> float:
        """Milliseconds a token may take on average."""
        return 1000.0 / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target chooses a token. ``temperature == 0`` is plain argmax.

    ``top_k == 0``, ``top_p == 1`` and ``min_p == 0`` switch the filters off. ``seed`` feeds the position
    noise, so a session with the same seed, prompt and target gives the same text whatever was drafted.
    None of ``stop_tokens`` is chosen at a position before ``min_length`` (prompt included).
    ``logprobs``: how many likeliest tokens to report beside each chosen one; ``None``: report nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    min_length: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        shares = 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        if not (shares and 0 <= self.temperature < np.inf and self.top_k >= 0):
            needs = "finite temperature >= 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1"
            raise ValueError(f"sampling needs {needs}, got {self}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation in tokens, on every endpoint: it ends after ``max_new`` tokens or at a stop token.

    ``tokens``: prompt and committed output, the last ``generated`` of them output. ``max_new`` bounds the
    whole output. ``undrafted``: nobody sends drafts for it (server-only serving).
    """

    tokens: tuple[int, ...]
    max_new: int
    sampling: Sampling = Sampling()
    slo: Slo = Slo(1.0, best_effort=True)
    stop_tokens: tuple[int, ...] = ()
    generated: int = 0
    undrafted: bool = False


class TokenLogprob(NamedTuple):
    """Log-probability of a decided token, and the likeliest tokens there, most likely first. Both are of
    the target's raw logits: no temperature, no filters (as vLLM's ``raw_logprobs``)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class VerifyItem(NamedTuple):
    """One session's share of a step: ``new`` tokens fed over ``cached`` tokens.

    ``new`` counts the pending token and the drafts, or the tokens of a prompt chunk (``prefill``).
    """

    new: int
    cached: int
    prefill: bool = False


@dataclass(frozen=True, slots=True)
class BatchShape:
    """All that a step's time depends on besides the hardware. The order of items does not matter."""

    items: tuple[VerifyItem, ...]

    @classmethod
    def of(cls, items: Iterable[Sequence[int]]) -> BatchShape:
        """Build from ``(new, cached)`` or ``(new, cached, prefill)`` sequences."""
        return cls(tuple(VerifyItem(int(i[0]), int(i[1]), bool(i[2:] and i[2])) for i in items))

    @classmethod
    def uniform(cls, items: int, new: int, cached: int) -> BatchShape:
        return cls((VerifyItem(new, cached),) * items)

    @property
    def new_tokens(self) -> int:
        return sum(i.new for i in self.items)

    @property
    def cached_tokens(self) -> int:
        return sum(i.cached for i in self.items)

    @property
    def prefill_tokens(self) -> int:
        return sum(i.new for i in self.items if i.prefill)

    @property
    def attention_pairs(self) -> int:
        """Query-key pairs that causal attention touches: Σ new·cached + new(new+1)/2."""
        return sum(i.new * i.cached + i.new * (i.new + 1) // 2 for i in self.items)

    @property
    def max_cached(self) -> int:
        return max((i.cached for i in self.items), default=0)

    @property
    def max_new(self) -> int:
        return max((i.new for i in self.items), default=0)

    def key(self) -> str:
        """A stable name of the shape, equal for equal multisets: ``3x(5@128)+1x(64@0p)``."""
        counts: dict[VerifyItem, int] = {}
        for item in sorted(self.items):
            counts[item] = counts.get(item, 0) + 1
        return "+".join(f"{n}x({i.new}@{i.cached}{'p' if i.prefill else ''})" for i, n in counts.items())


Number = TypeVar("Number")


class BatchTotals(NamedTuple, Generic[Number]):
    """Totals of a batch shape, from which step times are predicted; each is updated in O(1) per item.

    Every field is an integer, or an array (n,) over n batches. No field falls if work is added.
    ``sum_new_cached`` and ``sum_new_sq`` are Σ new·cached and Σ new²; ``prefill`` counts the new tokens
    of prompt chunks.
    """

    items: Number
    sum_new: Number
    sum_cached: Number
    sum_new_cached: Number
    sum_new_sq: Number
    max_cached: Number
    max_new: Number
    prefill: Number

    @property
    def attention_pairs(self) -> Any:
        """Query-key pairs that causal attention touches."""
        totals: BatchTotals[Any] = self
        return totals.sum_new_cached + (totals.sum_new_sq + totals.sum_new) / 2

    @classmethod
    def stack(cls, totals: Sequence[BatchTotals[int]]) -> BatchTotals[Any]:
        """Totals of n batches as arrays (n,)."""
        return BatchTotals(*np.array(totals, dtype=np.float64).reshape(-1, 8).T)

    @classmethod
    def empty(cls, count: int) -> BatchTotals[Any]:
        """Arrays (count,) to be filled in place."""
        return BatchTotals(*np.empty((8, count)))


class DraftFeatures(NamedTuple):
    """What the draft model knew when it chose a token (WISP section 4: four statistics).

    All are taken from the draft's raw logits (temperature 1, unfiltered): ``confidence`` the top-1
    probability, ``entropy`` in nats, ``margin`` the top-1 minus top-2 logit, ``spread`` the standard
    deviation of the logits.
    """

    confidence: float
    entropy: float
    margin: float
    spread: float


class DraftToken(NamedTuple):
    """A proposed token and the features it was proposed with."""

    token: int
    features: DraftFeatures


class StepInput(NamedTuple):
    """One session's tokens in one engine step.

    ``tokens`` are appended to the session's cached tokens; the last ``drafts`` of them are proposals.
    With ``needs_logits`` the target's own token is computed after each of the last ``drafts + 1`` tokens.
    Without it (a prompt chunk before the last one) nothing is decided and ``drafts`` must be 0.

    ``parents`` makes the drafts a tree of at most 64 nodes, for engines whose capabilities include
    ``trees``: draft ``i`` follows draft ``parents[i]`` < ``i``, or at -1 the last token that is no draft.
    """

    session: str
    tokens: Sequence[int]
    drafts: int = 0
    needs_logits: bool = True
    parents: Sequence[int] = ()


class VerifyResult(NamedTuple):
    """What a step decided for one input: the accepted drafts, then the target's own next token.

    ``accepted`` is ``len(tokens) - 1``, or 0 with no tokens if the input did not need logits. The session
    then caches its input up to the last accepted draft; of a tree only the accepted path. The target's own
    token is not cached yet: the next input of the session must begin with it. ``logprobs``: one per token, if
    the session's sampling asks for them.
    """

    session: str
    accepted: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class TokenChunk(NamedTuple):
    """Tokens that were committed together. ``logprobs``: one per token, if the request asks for them.
    ``verified`` is false if a draft model generated them without a server."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    verified: bool = True


class BatchCost(ABC):
    """A batch being built, whose predicted time is known after every addition in O(1).

    Immutable: :meth:`add` returns the batch with one more item, so a refused candidate costs nothing
    to take back. Neither prediction ever falls when work is added. Estimators override the methods that
    price or add many items if they can do better than one :meth:`add` per item; results stay equal.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def p50_ms(self) -> float: ...

    @property
    @abstractmethod
    def bound_ms(self) -> float: ...

    @abstractmethod
    def add(self, new: int, cached: int, prefill: bool = False) -> BatchCost:
        """The batch with one more item."""

    def add_all(self, new: Sequence[int], cached: Sequence[int]) -> BatchCost:
        """The batch with n more decode items."""
        batch: BatchCost = self
        for item in zip(new, cached, strict=True):
            batch = batch.add(*item)
        return batch

    def add_many(
        self, new: np.ndarray, cached: np.ndarray, prefill: np.ndarray | bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(p50, bound), each (n,), of this batch with each of n candidates added alone."""
        columns = np.broadcast_arrays(new, cached, prefill)
        items = zip(*(column.tolist() for column in columns), strict=True)
        return _prices([self.add(*item) for item in items])

    def add_in_turn(self, new: np.ndarray, cached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(p50, bound), each (n,), after each of n decode items that join one after another."""
        batches: list[BatchCost] = []
        batch: BatchCost = self
        for item in zip(new.tolist(), cached.tolist(), strict=True):
            batch = batch.add(*item)
            batches.append(batch)
        return _prices(batches)


def _prices(batches: Sequence[BatchCost]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([b.p50_ms for b in batches]), np.array([b.bound_ms for b in batches])


class StepTimeEstimator(ABC):
    """Batch shape to time: a median and an upper bound with a stated coverage."""

    __slots__ = ()

    @property
    @abstractmethod
    def coverage(self) -> float: ...

    @abstractmethod
    def start(self) -> BatchCost:
        """The empty batch: costs the fixed part of a step once an item is added, 0 before."""

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        """(p50 ms, bound ms) of a whole shape, by default from adding its items one by one."""
        batch = self.start()
        for item in shape.items:
            batch = batch.add(*item)
        return batch.p50_ms, batch.bound_ms

    def predict_totals(self, totals: BatchTotals[Any]) -> tuple[np.ndarray, np.ndarray] | None:
        """(p50, bound), each (n,), of n decode batches from their totals.

        ``None``, the default, if the totals do not determine this estimator's predictions.
        """
        return None


class RejectionPredictor(Protocol):
    """Features of a draft token to the probability that the target rejects it."""

    def acceptance_prob(self, features: DraftFeatures, depth: int) -> float:
        """Calibrated P(accepted | all earlier drafts of the round were), ``depth`` counted from 0.

        Plain floats, numpy at most, tens of microseconds: it runs after every draft token.
        """

    def acceptance_prob_batch(self, features: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """The same for rows (n, 4) and depths (n,); returns (n,)."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity and sizes of a model; fields are empty or 0 if unknown.

    ``id``: folder name, hub id or preset. ``family``: the config's ``model_type``. ``parameters`` counts
    tied weights once. ``weights_hash`` of random weights is ``random:<seed>``. ``max_context``: maximum
    tokens a session may cache. ``kv_bytes_per_token``: K and V of all layers.
    """

    id: str
    dtype: str = ""
    parameters: int = 0
    family: str = ""
    config_hash: str = ""
    weights_hash: str = ""
    tokenizer_hash: str = ""
    max_context: int = 0
    vocab_size: int = 0
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets that does not say: the target's ``generation_config.json``, else OpenAI's."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The target, as an edge must know it. ``tokenizer``: its vocabulary's hash, empty without one.

    ``identity``: hash of the weights digest, the dtype and the noise version. A session only ever
    continues on a target of the same identity. ``stop_tokens``, ``chat_template`` and ``defaults`` are
    the target's own, so that every endpoint ends and begins an answer alike.
    """

    id: str
    tokenizer: str
    vocab_size: int
    max_context: int
    identity: str = ""
    stop_tokens: tuple[int, ...] = ()
    chat_template: str = ""
    defaults: GenerationDefaults = GenerationDefaults()
