"""The verifier engine: one forward pass of the target over a ragged batch, acceptance decided, KV kept.

    engine = TorchEngine(load_model(folder), kv_tokens=65_536)
    engine.open("a", Sampling())
    [first] = engine.step([Feed("a", prompt)])                        # prefill, emits the first token
    [round] = engine.step([Feed("a", (first.tokens[-1], *drafts), drafts=len(drafts))])

A step packs the tokens of all items into one row for the linear layers, and lets the KV store attend
per session. Only rows that emit go through the output head. A step that raises leaves every session as
it was: keys and values written beyond a session's length are never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.loading import FAMILIES, LoadedModel
from wispprof.engines.torch.cuda_graphs import Bucket, StepGraphs
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.integrity import compare_with_fresh
from wispprof.engines.torch.kv_store import KvGeometry, KvStore
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.engines.torch.verify_batch import VerifyBatch
from wispprof.errors import EngineError, OutOfKvMemory
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import (
    BatchShape,
    Engine,
    EngineCapabilities,
    IntegrityReport,
    ModelInfo,
    Sampling,
    StepInput,
    VerifyItem,
    VerifyResult,
)

__all__ = ["StepReport", "TorchEngine"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step computed. ``padded_tokens`` is its graph bucket, 0 where no graph ran."""

    shape: BatchShape
    emitted_rows: int
    padded_tokens: int = 0


@dataclass(slots=True)
class _Session:
    handle: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)


class _Batch(NamedTuple):
    """Validated feeds as arrays, one entry per feed."""

    sessions: list[_Session]
    handles: np.ndarray
    cached: np.ndarray
    new: np.ndarray
    rows: np.ndarray
    """Rows that emit: drafts + 1, or 0."""


class TorchEngine(Engine):
    """Serves up to ``max_sessions`` sessions that cache up to ``kv_tokens`` tokens in all.

    ``backend``: ``slots`` (dense), ``paged``, or ``auto`` (paged on CUDA, slots elsewhere).
    ``attention``: one of :data:`~wispprof.engines.torch.paged_kv.ATTENTIONS` (paged backend). ``graphs``:
    capture verify steps as CUDA graphs (paged on CUDA, one rank). ``keep_memory``: slots that stand empty
    are not given back. Not thread-safe: one thread owns an engine. Lengths and limits count cached tokens;
    a session's pending token (the last one emitted) is not cached until it is fed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        kv_tokens: int,
        max_sessions: int = 256,
        backend: str = "auto",
        max_context: int | None = None,
        graphs: bool = True,
        attention: str = "auto",
        keep_memory: bool = False,
    ) -> None:
        if kv_tokens < 1 or max_sessions < 1:
            raise EngineError("An engine needs kv_tokens >= 1 and max_sessions >= 1.")
        info = loaded.info
        self.info: ModelInfo = info
        self._kv_tokens = kv_tokens
        self.max_sessions = max_sessions
        self.max_context = min(max_context or info.max_context, info.max_context)
        self.last_step: StepReport | None = None
        self.last_logits: list[Tensor] = []
        self._device = loaded.device
        self._dtype = loaded.dtype
        self._ranks = loaded.ranks
        self._decoder: Decoder = decoder_for(loaded.model, loaded.ranks)
        self._decoder.reserve(self.max_context)
        shares = loaded.ranks.size if loaded.ranks else 1
        self._geometry = KvGeometry(
            layers=info.layers,
            heads=loaded.model.config.num_attention_heads // shares,
            kv_heads=info.kv_heads // shares,
            head_dim=info.head_dim,
            max_context=self.max_context,
        )
        self.backend = _pick_backend(backend, self._device)
        self._store = self._make_store(attention, keep_memory)
        self._graphs: StepGraphs | None = None
        # Over several ranks the sums would lie inside the graphs, which nobody here has measured.
        captured = graphs and self._device.type == "cuda" and not loaded.ranks
        if captured and isinstance(self._store, PagedKvStore):
            self._graphs = StepGraphs(self._decoder, self._store, self._device)
        self._sessions: dict[str, _Session] = {}
        self._cached_tokens = 0

    # --- sessions ------------------------------------------------------------------------------

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = ()
    ) -> None:
        self._admit(session)
        self._sessions[session] = _Session(self._store.add(), sampling or Sampling())

    def close(self, session: str) -> None:
        ended = self._get(session)
        self._store.remove(ended.handle)
        self._cached_tokens -= len(ended.tokens)
        del self._sessions[session]

    def rollback(self, session: str, length: int) -> None:
        kept = self._get(session)
        if not 0 <= length <= len(kept.tokens):
            raise EngineError(
                f"Session {session!r} caches {len(kept.tokens)} tokens; it cannot be rolled back to {length}."
            )
        self._cached_tokens -= len(kept.tokens) - length
        del kept.tokens[length:]
        self._store.truncate(kept.handle, length)

    def fork(
        self,
        session: str,
        new_session: str,
        length: int,
        sampling: Sampling | None = None,
        *,
        private: bool = False,
    ) -> None:
        """Begin ``new_session`` with the first ``length`` cached tokens of ``session``, unprefilled.

        Pages may be shared until one side writes. ``private`` copies them at once: sessions that share
        pages also share cache lines, and time faster than strangers would.

        Raises :class:`OutOfKvMemory` if ``length`` exceeds :attr:`kv_free`.
        """
        source = self._get(session)
        if not 0 <= length <= len(source.tokens):
            raise EngineError(
                f"Session {session!r} caches {len(source.tokens)} tokens; {length} cannot be taken."
            )
        self._admit(new_session)
        self._check_room(length)
        handle = self._store.fork(source.handle, length, private)
        self._sessions[new_session] = _Session(
            handle, sampling or source.sampling, source.tokens[:length]
        )
        self._cached_tokens += length

    def cached(self, session: str) -> int:
        return len(self._get(session).tokens)

    def tokens(self, session: str) -> list[int]:
        """The cached tokens of a session, copied."""
        return list(self._get(session).tokens)

    @property
    def sessions(self) -> list[str]:
        return list(self._sessions)

    @property
    def attention(self) -> str:
        """What attends: ``dense``, or on pages one of :data:`~wispprof.engines.torch.paged_kv.ATTENTIONS`."""
        return self._store.attention if isinstance(self._store, PagedKvStore) else "dense"

    @property
    def graphs(self) -> bool:
        """Whether verify steps run as captured graphs."""
        return self._graphs is not None

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            FAMILIES,
            max_context=self.max_context,
            max_drafts=self.max_context - 1,
            max_sessions=self.max_sessions,
            graphs=self.graphs,
            fork=True,
        )

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    @property
    def kv_free(self) -> int:
        return self.kv_tokens - self._cached_tokens

    @property
    def last_padded_tokens(self) -> int:
        """Graph bucket of the last step, 0 where no graph ran."""
        return self.last_step.padded_tokens if self.last_step else 0

    # --- a step --------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, feeds: Sequence[StepInput], *, keep_logits: bool = False) -> list[VerifyResult]:
        """One forward pass: cache what is fed, decide what is accepted. Outcomes in the order of feeds.

        ``keep_logits`` leaves the emitting rows' logits in :attr:`last_logits`, (drafts + 1, V) per feed.

        Raises :class:`EngineError` for feeds that make no sense and :class:`OutOfKvMemory` where they
        do not fit; either way, and on any other failure, every session is as it was.
        """
        if not feeds:
            return []
        batch = self._validate(feeds)
        lengths = batch.cached + batch.new
        self._store.ensure(batch.handles, batch.cached, lengths)
        bucket = self._graphs.bucket(batch.new) if self._graphs else None
        plan = None if bucket else self._store.plan(batch.handles, batch.cached, batch.new)

        order = plan.order if plan else np.arange(len(feeds))
        packed = VerifyBatch.of(feeds, batch.cached, batch.new, batch.rows, order)
        ids, positions, picked = packed.ids, packed.positions, packed.picked
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            raise EngineError(f"A token id lies outside the vocabulary of {self.info.vocab_size}.")
        if plan:
            hidden = self._decoder.forward(self._to(ids), self._to(positions), plan.attend)
        else:
            assert self._graphs is not None
            assert bucket is not None
            hidden = self._replay(self._graphs, bucket, batch, ids, positions)
        emitted = len(picked)
        logits = hidden[:0]
        chosen = np.empty(0, dtype=np.int64)
        if emitted:
            if emitted < len(hidden):
                hidden = hidden.index_select(0, self._to(picked))
            logits = self._decoder.logits(hidden)
            samplings = [
                s for i in order.tolist() for s in [batch.sessions[i].sampling] * int(batch.rows[i])
            ]
            chosen = sample_tokens(logits, positions[picked] + 1, samplings).cpu().numpy()
            if self._ranks:
                chosen = self._ranks.agree(chosen)
        accepted, first = packed.accepted(chosen), packed.first()
        self.last_step = StepReport(
            BatchShape(
                tuple(
                    VerifyItem(n, c, not feed.needs_logits)
                    for n, c, feed in zip(
                        batch.new.tolist(), batch.cached.tolist(), feeds, strict=True
                    )
                )
            ),
            emitted_rows=emitted,
            padded_tokens=bucket.tokens if bucket else 0,
        )
        self.last_logits = (
            [
                logits[a : a + n].clone()
                for a, n in zip(first.tolist(), batch.rows.tolist(), strict=True)
            ]
            if keep_logits
            else []
        )
        return self._commit(feeds, batch, accepted.tolist(), first.tolist(), chosen.tolist())

    def _replay(
        self,
        graphs: StepGraphs,
        bucket: Bucket,
        batch: _Batch,
        ids: np.ndarray,
        positions: np.ndarray,
    ) -> Tensor:
        """Hidden states of a step by its captured graph, padding last."""
        assert isinstance(self._store, PagedKvStore)
        arrays = self._store.arrange(batch.handles, batch.cached, batch.new)
        hidden = graphs.run(bucket, ids, positions, arrays)
        if not batch.rows.any() and self._device.type == "cuda":
            # Nothing will be read back: wait here, before the host image is filled again.
            torch.cuda.current_stream(self._device).synchronize()
        return hidden

    def _commit(
        self,
        feeds: Sequence[StepInput],
        batch: _Batch,
        accepted: list[int],
        first: list[int],
        chosen: list[int],
    ) -> list[VerifyResult]:
        outcomes = []
        for feed, session, kept, start in zip(feeds, batch.sessions, accepted, first, strict=True):
            rejected = feed.drafts - kept
            stays = len(feed.tokens) - rejected
            session.tokens.extend(int(t) for t in feed.tokens[:stays])
            self._cached_tokens += stays
            if rejected:
                self._store.truncate(session.handle, len(session.tokens))
            own = tuple(chosen[start : start + kept + 1]) if feed.needs_logits else ()
            outcomes.append(VerifyResult(feed.session, kept, own))
        return outcomes

    def _validate(self, feeds: Sequence[StepInput]) -> _Batch:
        sessions = [self._get(feed.session) for feed in feeds]
        if len({feed.session for feed in feeds}) != len(feeds):
            raise EngineError("A session may take part in a step only once.")
        count = len(feeds)
        cached = np.fromiter((len(s.tokens) for s in sessions), np.int64, count)
        new = np.fromiter((len(f.tokens) for f in feeds), np.int64, count)
        rows = np.fromiter((f.drafts + 1 if f.needs_logits else 0 for f in feeds), np.int64, count)
        for feed, session in zip(feeds, sessions, strict=True):
            if not len(feed.tokens) or not 0 <= feed.drafts < len(feed.tokens):
                raise EngineError(
                    f"Session {feed.session!r}: {len(feed.tokens)} tokens with {feed.drafts} drafts; a feed "
                    "needs at least one token that is not a draft."
                )
            if feed.drafts and not feed.needs_logits:
                raise EngineError(
                    f"Session {feed.session!r}: drafts can only be fed where it emits."
                )
            if len(session.tokens) + len(feed.tokens) > self.max_context:
                raise EngineError(
                    f"Session {feed.session!r} would cache {len(session.tokens) + len(feed.tokens)} tokens; "
                    f"the context ends at {self.max_context}.",
                    "Feed fewer drafts, or finish the session.",
                )
        self._check_room(int(new.sum()))
        handles = np.fromiter((s.handle for s in sessions), np.int64, count)
        return _Batch(sessions, handles, cached, new, rows)

    # --- trust ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        """Compare cached KV with a fresh prefill of the same tokens, and check the bookkeeping.

        All sessions, or one. Raises :class:`EngineError` where they differ by more than rounding.
        """
        names = list(self._sessions) if session is None else [session]
        lengths = {s.handle: len(s.tokens) for s in self._sessions.values()}
        self._store.check(lengths)
        if sum(lengths.values()) != self._cached_tokens:
            raise EngineError("The count of cached tokens is off.")
        kept = {name: self._get(name) for name in names}
        held = (
            (name, one.tokens, self._store.read(one.handle, len(one.tokens)))
            for name, one in kept.items()
        )
        return compare_with_fresh(self._decoder, self._geometry, self._dtype, held)

    def warm_up(self) -> None:
        """Run a few small steps so that the first real one pays for no lazy initialisation."""
        names = [f"\0warm-up {i}" for i in range(min(3, self.max_sessions - len(self._sessions)))]
        room = self.kv_free // max(1, len(names))
        for name in names:
            self.open(name)
        try:
            for size in (8, 1, 5, 1):
                if size > min(room, self.max_context - 15):
                    break
                self.step([StepInput(name, [0] * size, drafts=size - 1) for name in names])
                for name in names:
                    self.rollback(name, 0)
            if self._graphs:
                self._graphs.capture_all(most_tokens=16 * self.max_sessions)
        finally:
            for name in names:
                self.close(name)
        self.last_step = None

    # --- inside --------------------------------------------------------------------------------

    def _make_store(self, attention: str, keep_memory: bool) -> KvStore:
        common = (self._geometry, self._decoder.scale, self._dtype, self._device)
        if self.backend == "slots":
            return DenseKvStore(*common, keep=keep_memory)
        try:
            return PagedKvStore(*common, self.kv_tokens, self.max_sessions, attention=attention)
        except torch.OutOfMemoryError as err:
            gigabytes = self.kv_tokens * self.info.kv_bytes_per_token / 1e9
            raise OutOfKvMemory(
                f"{self.kv_tokens} KV tokens need {gigabytes:.1f} GB, more than the device has left.",
                "Start with fewer --kv-tokens.",
            ) from err

    def _get(self, session: str) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise EngineError(f"There is no session {session!r}.", "Open it first.") from None

    def _admit(self, session: str) -> None:
        if session in self._sessions:
            raise EngineError(f"Session {session!r} is open already.")
        if len(self._sessions) >= self.max_sessions:
            raise OutOfKvMemory(
                f"All {self.max_sessions} sessions of the engine are taken.",
                "Close some, or start with more --max-sessions.",
            )

    def _check_room(self, tokens: int) -> None:
        if tokens > self.kv_free:
            raise OutOfKvMemory(
                f"{tokens} tokens do not fit: {self.kv_free} of {self.kv_tokens} are free.",
                "Close sessions, feed fewer tokens, or start with more --kv-tokens.",
            )

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _pick_backend(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return "paged" if device.type == "cuda" else "slots"
    if backend not in ("slots", "paged"):
        raise EngineError(f"Unknown KV backend {backend!r}.", "Use auto, slots or paged.")
    return backend
