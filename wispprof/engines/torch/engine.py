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

from wispprof.backends import Engine, EngineCapabilities, IntegrityReport, OpenSessions
from wispprof.engines.loading import LoadedModel
from wispprof.engines.model_config import FAMILIES
from wispprof.engines.torch.cuda_graphs import Bucket, StepGraphs
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.draft_tree import Trees, draft_trees
from wispprof.engines.torch.integrity import compare_with_prefill
from wispprof.engines.torch.kv_store import KvGeometry, KvStore, kv_layout
from wispprof.engines.torch.packed_linear import WARM_ROWS
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.engines.torch.step_decision import StepDecision, without_spoiled_drafts
from wispprof.engines.torch.verify_batch import StepSizes, VerifyBatch, token_arrays
from wispprof.engines.warm_up import FEW_ROWS, warm_up
from wispprof.errors import EngineError, InputRefused, OutOfKvMemory
from wispprof.sampling.sampler import bounded, sample_tokens
from wispprof.types import (
    BatchShape,
    ModelInfo,
    Sampling,
    StepInput,
    TokenLogprob,
    VerifyResult,
)


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
        self.backend = kv_layout(backend, self._device)
        self._store = self._make_store(attention, keep_memory)
        self._graphs: StepGraphs | None = None
        # Graphs over several ranks would contain the all-reduces, which is untested.
        captured = graphs and self._device.type == "cuda" and not loaded.ranks
        if captured and isinstance(self._store, PagedKvStore):
            self._graphs = StepGraphs(self._decoder, self._store, self._device)
        self._sessions: OpenSessions[_Session] = OpenSessions()
        self._cached_tokens = 0

    # --- sessions ------------------------------------------------------------------------------

    def open(
        self, session: str, sampling: Sampling | None = None, tokens: Sequence[int] = (), owner: str = ""
    ) -> None:
        self.check_can_open(session)
        settings = bounded(sampling or Sampling(), self.info.vocab_size)
        self._sessions[session] = _Session(self._store.add(), settings)

    def close(self, session: str) -> None:
        closed = self._sessions.take(session)
        self._store.remove(closed.handle)
        self._cached_tokens -= len(closed.tokens)

    def rollback(self, session: str, length: int) -> None:
        held = self._sessions[session]
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
        source = self._sessions[session]
        if not 0 <= length <= len(source.tokens):
            raise EngineError(
                f"Session {session!r} caches {len(source.tokens)} tokens; it cannot be forked at {length}."
            )
        self.check_can_open(child)
        self._check_kv_free(length)
        settings = bounded(sampling or source.sampling, self.info.vocab_size)
        handle = self._store.fork(source.handle, length, private)
        self._sessions[child] = _Session(handle, settings, source.tokens[:length])
        self._cached_tokens += length

    def cached(self, session: str) -> int:
        return len(self._sessions[session].tokens)

    def tokens(self, session: str) -> list[int]:
        """A copy of the session's cached tokens."""
        return list(self._sessions[session].tokens)

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
            trees=self.attention != "varlen",
            graphs=self._graphs is not None,
            fork=True,
            dtype=self.info.dtype,
        )

    @property
    def attention(self) -> str:
        """``ragged`` (in C) or ``dense`` (torch's), or one of
        :data:`~wispprof.engines.torch.paged_kv.ATTENTIONS`."""
        return self._store.attention

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
        sessions = self._step_sessions(inputs)
        sizes = StepSizes.of(inputs, [len(s.tokens) for s in sessions], self.max_context)
        tokens = token_arrays(inputs, self.info.vocab_size)
        trees = self._trees(inputs)
        self._check_kv_free(int(sizes.new.sum()))
        handles = np.fromiter((s.handle for s in sessions), np.int64, len(sessions))
        self._store.allocate(handles, sizes.cached, sizes.cached + sizes.new)
        try:
            batch, bucket, hidden = self._forward(tokens, sizes, handles, trees)
            decision = self._decide(batch, sizes, sessions, hidden)
            self._keep_paths(handles, sizes, decision)
            spoiled = decision.spoiled(batch, sizes, hidden)
            for one in spoiled:
                self._store.clear(int(handles[one.number]), one.start, one.stop)
            if retry := without_spoiled_drafts(inputs, spoiled):
                return self.step(retry, keep_logits=keep_logits)
            logprobs = decision.logprobs([s.sampling for s in sessions], sizes.logit_rows)
        except BaseException as err:
            for handle, length in zip(handles.tolist(), sizes.cached.tolist(), strict=True):
                self._store.truncate(handle, length)
            if isinstance(err, torch.OutOfMemoryError | MemoryError) and not self._ranks:
                raise OutOfKvMemory(
                    f"A step of {int(sizes.new.sum())} new tokens does not fit into the device's memory.",
                    "Start with fewer --kv-tokens or fewer --max-tokens.",
                ) from err
            raise
        self.last_step = StepReport(
            sizes.shape(),
            logit_rows=len(batch.logit_tokens),
            padded_tokens=bucket.tokens if bucket else 0,
        )
        self.last_logits = []
        if keep_logits:
            rows = zip(decision.first, sizes.logit_rows.tolist(), strict=True)
            self.last_logits = [decision.logits[start : start + n].clone() for start, n in rows]
        return self._commit(inputs, sessions, decision, logprobs)

    def check_inputs(self, inputs: Sequence[StepInput]) -> None:
        """Raise :class:`InputRefused` for the first invalid input of a step."""
        cached = [len(one.tokens) for one in self._step_sessions(inputs)]
        StepSizes.of(inputs, cached, self.max_context)
        token_arrays(inputs, self.info.vocab_size)
        self._trees(inputs)

    def _trees(self, inputs: Sequence[StepInput]) -> Trees:
        trees = draft_trees(inputs)
        if trees and not self.capabilities.trees:
            name = inputs[next(iter(trees))].session
            raise InputRefused(name, f"{self.attention!r} attention verifies no draft trees.", "Feed chains.")
        return trees

    def _step_sessions(self, inputs: Sequence[StepInput]) -> list[_Session]:
        for one in inputs:
            if one.session not in self._sessions:
                raise InputRefused(one.session, f"There is no session {one.session!r}.", "Open it first.")
        return [self._sessions[one.session] for one in inputs]

    def _forward(
        self, tokens: Sequence[np.ndarray], sizes: StepSizes, handles: np.ndarray, trees: Trees
    ) -> tuple[VerifyBatch, Bucket | None, Tensor]:
        """The packed step, the graph bucket it ran in, and its hidden states, padding last."""
        bucket = self._graphs.bucket(sizes.new, bool(trees)) if self._graphs else None
        if self._graphs and bucket:
            assert isinstance(self._store, PagedKvStore)
            batch = VerifyBatch.pack(tokens, sizes, np.arange(len(tokens)), trees)
            arrays = self._store.metadata_arrays(handles, sizes.cached, sizes.new, trees)
            return batch, bucket, self._graphs.run(bucket, batch.ids, batch.positions, arrays)
        plan = self._store.plan(handles, sizes.cached, sizes.new, trees)
        batch = VerifyBatch.pack(tokens, sizes, plan.order, trees)
        ids, positions = self._to_device(batch.ids), self._to_device(batch.positions)
        return batch, None, self._decoder.forward(ids, positions, plan.attend)

    def _decide(
        self, batch: VerifyBatch, sizes: StepSizes, sessions: list[_Session], hidden: Tensor
    ) -> StepDecision:
        """Pass the rows that need logits through the output head, and draw the target's tokens."""
        count = len(batch.logit_tokens)
        if not count:
            return StepDecision.of(batch, hidden[:0], np.empty(0, dtype=np.int64))
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
        if self._ranks:
            chosen = self._ranks.broadcast_tokens(chosen)
        return StepDecision.of(batch, logits, chosen)

    def _keep_paths(self, handles: np.ndarray, sizes: StepSizes, decision: StepDecision) -> None:
        """Make the KV of each tree's accepted nodes contiguous, behind its root."""
        moves = []
        for i, path in decision.paths.items():
            first = int(sizes.cached[i] + sizes.new[i] - sizes.logit_rows[i]) + 1
            moves += [(handles[i], first + n, first + d) for d, n in enumerate(path) if n != d]
        if moves:
            self._store.move(*np.array(moves).T)

    def _commit(
        self,
        inputs: Sequence[StepInput],
        sessions: list[_Session],
        decision: StepDecision,
        logprobs: dict[int, tuple[TokenLogprob, ...]],
    ) -> list[VerifyResult]:
        results = []
        chosen = decision.chosen.tolist()
        for i, (one, session) in enumerate(zip(inputs, sessions, strict=True)):
            count = decision.accepted[i]
            rejected = one.drafts - count
            tokens = tuple([chosen[row] for row in decision.rows(i)]) if one.needs_logits else ()
            session.tokens.extend(int(t) for t in one.tokens[: len(one.tokens) - one.drafts])
            session.tokens.extend(tokens[:count])
            self._cached_tokens += len(one.tokens) - rejected
            if rejected:
                self._store.truncate(session.handle, len(session.tokens))
            results.append(VerifyResult(one.session, count, tokens, logprobs.get(i, ())))
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
        checked = {name: self._sessions[name] for name in names}
        held = (
            (name, one.tokens, self._store.read(one.handle, len(one.tokens))) for name, one in checked.items()
        )
        return compare_with_prefill(self._decoder, self._geometry, self._dtype, held)

    def warm_up(self, every_size: bool = False) -> None:
        """Run small steps, and capture all graphs, so that no served step pays for it."""
        rows = WARM_ROWS if every_size and self._device.type == "cpu" else FEW_ROWS
        warm_up(self, rows, longest=min(16, self.max_context))
        if self._graphs:
            self._graphs.capture_all(max_tokens=16 * self.max_sessions)
        self.last_step = None

    def _make_store(self, attention: str, keep_memory: bool) -> KvStore:
        common = (self._geometry, self._decoder.scale, self._dtype, self._device)
        if self.backend == "dense":
            return DenseKvStore(*common, keep_memory=keep_memory)
        try:
            return PagedKvStore(*common, self._kv_tokens, self.max_sessions, attention=attention)
        except torch.OutOfMemoryError as err:
            raise OutOfKvMemory(
                f"{self._kv_tokens} KV tokens and a block for each of {self.max_sessions} sessions are more "
                "than the device has left.",
                "Start with fewer --kv-tokens or fewer --max-sessions.",
            ) from err

    def _check_kv_free(self, tokens: int) -> None:
        if tokens > self.kv_free:
            raise OutOfKvMemory(
                f"{tokens} tokens do not fit: {self.kv_free} of {self._kv_tokens} are free.",
                "Close sessions, feed fewer tokens, or start with more --kv-tokens.",
            )

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
