"""The built-in engine: one forward pass of the target over a ragged batch, drafts verified, KV kept.

    engine = TorchEngine(load_model(folder), kv_tokens=65_536)
    engine.open("a", Sampling())
    [first] = engine.step([StepInput("a", prompt)])
    [verified] = engine.step([StepInput("a", (first.tokens[-1], *drafts), drafts=len(drafts))])

A step packs the tokens of all inputs into one row for the linear layers; the KV store attends per session.
Only rows whose logits are needed pass the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from wispprof.backends import Engine, EngineCapabilities, IntegrityReport
from wispprof.engines.loading import FAMILIES, LoadedModel
from wispprof.engines.torch.cuda_graphs import Bucket, StepGraphs
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.integrity import compare_with_prefill
from wispprof.engines.torch.kv_store import KvGeometry, KvStore
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.engines.torch.verify_batch import StepSizes, VerifyBatch
from wispprof.errors import EngineError, OutOfKvMemory
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import BatchShape, ModelInfo, Sampling, StepInput, VerifyItem, VerifyResult


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step computed. ``padded_tokens``: its graph bucket, 0 if it ran without a graph."""

    shape: BatchShape
    logit_rows: int
    padded_tokens: int = 0


@dataclass(slots=True)
class _Session:
    handle: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)


class TorchEngine(Engine):
    """Serves up to ``max_sessions`` sessions that cache up to ``kv_tokens`` tokens in all.

    ``backend``: ``dense``, ``paged``, or ``auto`` (paged on CUDA, dense elsewhere). ``attention``: one of
    :data:`~wispprof.engines.torch.paged_kv.ATTENTIONS`, for the paged backend. ``graphs``: capture steps as
    CUDA graphs (paged backend on CUDA, one rank). ``keep_memory``: the dense backend keeps the memory of
    sessions that ended.
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
            raise EngineError(
                f"An engine needs kv_tokens >= 1 and max_sessions >= 1, got {kv_tokens} and {max_sessions}."
            )
        info = loaded.info
        self.info: ModelInfo = info
        self.max_sessions = max_sessions
        self.max_context = min(max_context or info.max_context, info.max_context)
        self.last_step: StepReport | None = None
        self.last_logits: list[Tensor] = []
        self._kv_tokens = kv_tokens
        self._device = loaded.device
        self._dtype = loaded.dtype
        self._ranks = loaded.ranks
        self._decoder: Decoder = decoder_for(loaded.model, loaded.ranks)
        self._decoder.reserve(self.max_context)
        shards = loaded.ranks.size if loaded.ranks else 1
        self._geometry = KvGeometry(
            layers=info.layers,
            heads=loaded.model.config.num_attention_heads // shards,
            kv_heads=info.kv_heads // shards,
            head_dim=info.head_dim,
            max_context=self.max_context,
        )
        self.backend = _resolve_backend(backend, self._device)
        self._store = self._make_store(attention, keep_memory)
        self._graphs: StepGraphs | None = None
        # Graphs over several ranks would contain the all-reduces, which is untested.
        captured = graphs and self._device.type == "cuda" and not loaded.ranks
        if captured and isinstance(self._store, PagedKvStore):
            self._graphs = StepGraphs(self._decoder, self._store, self._device)
        self._sessions: dict[str, _Session] = {}
        self._cached_tokens = 0

    # --- sessions ------------------------------------------------------------------------------

    def open(self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = ()) -> None:
        self._check_can_open(session)
        self._sessions[session] = _Session(self._store.add(), sampling or Sampling())

    def close(self, session: str) -> None:
        closed = self._get(session)
        self._store.remove(closed.handle)
        self._cached_tokens -= len(closed.tokens)
        del self._sessions[session]

    def rollback(self, session: str, length: int) -> None:
        held = self._get(session)
        if not 0 <= length <= len(held.tokens):
            raise EngineError(
                f"Session {session!r} caches {len(held.tokens)} tokens; it cannot be rolled back to {length}."
            )
        self._cached_tokens -= len(held.tokens) - length
        del held.tokens[length:]
        self._store.truncate(held.handle, length)

    def fork(
        self,
        session: str,
        child: str,
        length: int,
        sampling: Sampling | None = None,
        *,
        private: bool = False,
    ) -> None:
        """As :meth:`Engine.fork`; without ``sampling`` the child takes over that of ``session``.

        The paged backend shares blocks until one side writes. ``private`` copies them at once: sessions that
        share blocks also share cache lines, so their steps are faster than those of unrelated sessions.
        """
        source = self._get(session)
        if not 0 <= length <= len(source.tokens):
            raise EngineError(
                f"Session {session!r} caches {len(source.tokens)} tokens; it cannot be forked at {length}."
            )
        self._check_can_open(child)
        self._check_kv_free(length)
        handle = self._store.fork(source.handle, length, private)
        self._sessions[child] = _Session(handle, sampling or source.sampling, source.tokens[:length])
        self._cached_tokens += length

    def cached(self, session: str) -> int:
        return len(self._get(session).tokens)

    def tokens(self, session: str) -> list[int]:
        """A copy of the session's cached tokens."""
        return list(self._get(session).tokens)

    @property
    def sessions(self) -> list[str]:
        return list(self._sessions)

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            FAMILIES,
            max_context=self.max_context,
            max_drafts=self.max_context - 1,
            max_sessions=self.max_sessions,
            graphs=self._graphs is not None,
            fork=True,
        )

    @property
    def attention(self) -> str:
        """``dense``, or one of :data:`~wispprof.engines.torch.paged_kv.ATTENTIONS`."""
        return self._store.attention if isinstance(self._store, PagedKvStore) else "dense"

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    @property
    def kv_free(self) -> int:
        return self._kv_tokens - self._cached_tokens

    @property
    def last_padded_tokens(self) -> int:
        """Graph bucket of the last step, 0 if it ran without a graph."""
        return self.last_step.padded_tokens if self.last_step else 0

    # --- a step --------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, inputs: Sequence[StepInput], *, keep_logits: bool = False) -> list[VerifyResult]:
        """As :meth:`Engine.step`; any failure leaves every session as it was.

        ``keep_logits``: store the logits of each input in :attr:`last_logits`, (drafts + 1, V) each.
        """
        if not inputs:
            return []
        sessions = [self._get(one.session) for one in inputs]
        sizes = StepSizes.of(inputs, [len(s.tokens) for s in sessions], self.max_context)
        self._check_kv_free(int(sizes.new.sum()))
        handles = np.fromiter((s.handle for s in sessions), np.int64, len(sessions))
        self._store.allocate(handles, sizes.cached, sizes.cached + sizes.new)
        bucket = self._graphs.bucket(sizes.new) if self._graphs else None
        plan = None if bucket else self._store.plan(handles, sizes.cached, sizes.new)

        batch = VerifyBatch.pack(inputs, sizes, plan.order if plan else np.arange(len(inputs)))
        if batch.ids.min() < 0 or batch.ids.max() >= self.info.vocab_size:
            raise EngineError(f"A token id lies outside the vocabulary of {self.info.vocab_size}.")
        if plan:
            hidden = self._decoder.forward(
                self._to_device(batch.ids), self._to_device(batch.positions), plan.attend
            )
        else:
            assert bucket is not None
            hidden = self._run_graph(bucket, batch, handles, sizes)
        logits, chosen = self._decide(batch, sizes, sessions, hidden)
        accepted, first = batch.accepted(chosen).tolist(), batch.first_rows().tolist()
        self.last_step = StepReport(
            BatchShape(
                tuple(
                    VerifyItem(new, cached, not one.needs_logits)
                    for new, cached, one in zip(
                        sizes.new.tolist(), sizes.cached.tolist(), inputs, strict=True
                    )
                )
            ),
            logit_rows=len(batch.logit_tokens),
            padded_tokens=bucket.tokens if bucket else 0,
        )
        self.last_logits = []
        if keep_logits:
            rows = zip(first, sizes.logit_rows.tolist(), strict=True)
            self.last_logits = [logits[start : start + n].clone() for start, n in rows]
        return self._commit(inputs, sessions, accepted, first, chosen.tolist())

    def _run_graph(self, bucket: Bucket, batch: VerifyBatch, handles: np.ndarray, sizes: StepSizes) -> Tensor:
        """Hidden states of a step by its captured graph, padding last."""
        assert self._graphs is not None
        assert isinstance(self._store, PagedKvStore)
        arrays = self._store.metadata_arrays(handles, sizes.cached, sizes.new)
        hidden = self._graphs.run(bucket, batch.ids, batch.positions, arrays)
        if not len(batch.logit_tokens) and self._device.type == "cuda":
            # Nothing is read back: wait here, before the next step overwrites the host buffer.
            torch.cuda.current_stream(self._device).synchronize()
        return hidden

    def _decide(
        self, batch: VerifyBatch, sizes: StepSizes, sessions: list[_Session], hidden: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        """Logits (rows, V) of the rows that need them, and the target's token of each (rows,)."""
        count = len(batch.logit_tokens)
        if not count:
            return hidden[:0], np.empty(0, dtype=np.int64)
        if count < len(hidden):
            hidden = hidden.index_select(0, self._to_device(batch.logit_tokens))
        logits = self._decoder.logits(hidden)
        samplings = [
            sampling
            for i in batch.order.tolist()
            for sampling in [sessions[i].sampling] * int(sizes.logit_rows[i])
        ]
        positions = batch.positions[batch.logit_tokens] + 1
        chosen = sample_tokens(logits, positions, samplings).cpu().numpy()
        return logits, self._ranks.broadcast_tokens(chosen) if self._ranks else chosen

    def _commit(
        self,
        inputs: Sequence[StepInput],
        sessions: list[_Session],
        accepted: list[int],
        first: list[int],
        chosen: list[int],
    ) -> list[VerifyResult]:
        results = []
        for one, session, count, row in zip(inputs, sessions, accepted, first, strict=True):
            rejected = one.drafts - count
            kept = len(one.tokens) - rejected
            session.tokens.extend(int(t) for t in one.tokens[:kept])
            self._cached_tokens += kept
            if rejected:
                self._store.truncate(session.handle, len(session.tokens))
            tokens = tuple(chosen[row : row + count + 1]) if one.needs_logits else ()
            results.append(VerifyResult(one.session, count, tokens))
        return results

    # --- checks and warm-up ----------------------------------------------------------------------

    @torch.inference_mode()
    def check_integrity(self, session: str | None = None) -> IntegrityReport:
        names = list(self._sessions) if session is None else [session]
        lengths = {s.handle: len(s.tokens) for s in self._sessions.values()}
        self._store.check(lengths)
        if sum(lengths.values()) != self._cached_tokens:
            raise EngineError(
                f"The engine counts {self._cached_tokens} cached tokens; its sessions cache "
                f"{sum(lengths.values())}."
            )
        checked = {name: self._get(name) for name in names}
        held = (
            (name, one.tokens, self._store.read(one.handle, len(one.tokens))) for name, one in checked.items()
        )
        return compare_with_prefill(self._decoder, self._geometry, self._dtype, held)

    def warm_up(self) -> None:
        """Run a few small steps, and capture all graphs, so that no served step pays for it."""
        names = [f"\0warm-up {i}" for i in range(min(3, self.max_sessions - len(self._sessions)))]
        free = self.kv_free // max(1, len(names))
        for name in names:
            self.open(name)
        try:
            for size in (8, 1, 5, 1):
                if size > min(free, self.max_context - 15):
                    break
                self.step([StepInput(name, [0] * size, drafts=size - 1) for name in names])
                for name in names:
                    self.rollback(name, 0)
            if self._graphs:
                self._graphs.capture_all(max_tokens=16 * self.max_sessions)
        finally:
            for name in names:
                self.close(name)
        self.last_step = None

    def _make_store(self, attention: str, keep_memory: bool) -> KvStore:
        common = (self._geometry, self._decoder.scale, self._dtype, self._device)
        if self.backend == "dense":
            return DenseKvStore(*common, keep_memory=keep_memory)
        try:
            return PagedKvStore(*common, self._kv_tokens, self.max_sessions, attention=attention)
        except torch.OutOfMemoryError as err:
            gigabytes = self._kv_tokens * self.info.kv_bytes_per_token / 1e9
            raise OutOfKvMemory(
                f"{self._kv_tokens} KV tokens need {gigabytes:.1f} GB, more than the device has left.",
                "Start with fewer --kv-tokens.",
            ) from err

    def _get(self, session: str) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise EngineError(f"There is no session {session!r}.", "Open it first.") from None

    def _check_can_open(self, session: str) -> None:
        if session in self._sessions:
            raise EngineError(f"Session {session!r} is already open.")
        if len(self._sessions) >= self.max_sessions:
            raise OutOfKvMemory(
                f"All {self.max_sessions} sessions of the engine are taken.",
                "Close some, or start with more --max-sessions.",
            )

    def _check_kv_free(self, tokens: int) -> None:
        if tokens > self.kv_free:
            raise OutOfKvMemory(
                f"{tokens} tokens do not fit: {self.kv_free} of {self._kv_tokens} are free.",
                "Close sessions, feed fewer tokens, or start with more --kv-tokens.",
            )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _resolve_backend(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return "paged" if device.type == "cuda" else "dense"
    if backend not in ("dense", "paged"):
        raise EngineError(f"Unknown KV backend {backend!r}.", "Use auto, dense or paged.")
    return backend
