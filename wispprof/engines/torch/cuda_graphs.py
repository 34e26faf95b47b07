"""Steps as captured CUDA graphs: one per bucket of tokens and of new tokens per input, with trees or without.

A small step on a GPU is bound by its kernel launches; a graph launches all of them at once and pads the
step to its bucket. All that varies between steps lies in one static buffer, which one copy fills.
A padding token is an input of one token that writes to the null block; the remaining inputs are empty.
With ``capture=False`` the same buckets run uncaptured on any device, to test the padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.block_table import NULL_BLOCK, NULL_SLOT
from wispprof.engines.torch.decoder import Decoder
from wispprof.engines.torch.paged_kv import AttentionMetadata, PagedKvStore
from wispprof.token_tree import MAX_NODES

TOKEN_BUCKETS = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)
NEW_TOKEN_BUCKETS = (1, 8, 16)
TREE_TOKEN_BUCKETS = (16, MAX_NODES + 1)


class Bucket(NamedTuple):
    """Sizes a graph is captured for: tokens of the step, maximum new tokens of an input; ``trees``: some
    inputs may hold draft trees."""

    tokens: int
    max_new: int
    trees: bool = False


class _Views(NamedTuple):
    """The inputs of a bucket: views of one buffer, tensors on the device or arrays on the host."""

    ids: Any
    positions: Any
    slot_mapping: Any
    ancestors: Any
    query_start_loc: Any
    seq_lens: Any
    token_to_input: Any
    tree_starts: Any
    block_tables: Any

    @classmethod
    def of(cls, words: Tensor, tokens: int, width: int) -> _Views:
        """Split an int64 buffer: the int64 inputs first, then the int32 inputs, two to a word."""
        ids, positions, slot_mapping, ancestors = torch.split(words[: 4 * tokens], tokens)
        narrow = words[4 * tokens :].view(torch.int32)
        sizes = [tokens + 1, tokens, tokens, tokens, tokens * width]
        parts = torch.split(narrow, [*sizes, len(narrow) - sum(sizes)])
        starts, lengths, inputs, tree_starts, tables = parts[:5]
        tables = tables.view(tokens, width)
        return cls(ids, positions, slot_mapping, ancestors, starts, lengths, inputs, tree_starts, tables)


class _Static(NamedTuple):
    """A bucket's inputs on the host and on the device, and the attention metadata over the latter."""

    host_words: Tensor
    host: _Views
    device_words: Tensor
    device: _Views
    metadata: AttentionMetadata


class StepGraphs:
    """Graphs of one engine, each captured when first needed or by :meth:`capture_all`."""

    def __init__(
        self, decoder: Decoder, store: PagedKvStore, device: torch.device, *, capture: bool = True
    ) -> None:
        self._decoder = decoder
        self._store = store
        self._device = device
        self._capture = capture
        self._static: dict[Bucket, _Static] = {}
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory: Any = None

    def bucket(self, new: np.ndarray, trees: bool = False) -> Bucket | None:
        """The bucket of a step with these new tokens per input; ``None`` if none is large enough."""
        tokens = next((t for t in TOKEN_BUCKETS if t >= int(new.sum())), None)
        sizes = TREE_TOKEN_BUCKETS if trees else NEW_TOKEN_BUCKETS
        max_new = next((n for n in sizes if n >= int(new.max())), None)
        return None if tokens is None or max_new is None else Bucket(tokens, max_new, trees)

    def run(
        self, bucket: Bucket, ids: np.ndarray, positions: np.ndarray, arrays: dict[str, np.ndarray]
    ) -> Tensor:
        """Hidden states (bucket.tokens, hidden), padding last; valid until the next run.

        ``arrays``: from :meth:`PagedKvStore.metadata_arrays`. The output head is not part of the graph.
        """
        static = self._static.get(bucket) or self._make_static(bucket)
        _fill(static.host, ids, positions, arrays)
        static.device_words.copy_(static.host_words, non_blocking=True)
        if not self._capture:
            return self._forward(static)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(static)
        graph, hidden = self._graphs[bucket]
        graph.replay()
        return hidden

    @torch.inference_mode()
    def capture_all(self, max_tokens: int) -> None:
        """Capture every bucket of chains up to ``max_tokens``, so that no served step has to.

        Those of draft trees are captured when first needed: most servers never see one.
        """
        empty = np.empty(0, dtype=np.int64)
        arrays: dict[str, np.ndarray] = {
            "slot_mapping": empty,
            "query_start_loc": np.zeros(1, dtype=np.int32),
            "seq_lens": empty,
            "block_tables": np.zeros((0, 1), dtype=np.int32),
            "token_to_input": empty,
        }
        for max_new in NEW_TOKEN_BUCKETS:
            for tokens in reversed([t for t in TOKEN_BUCKETS if t <= max_tokens]):
                self.run(Bucket(tokens, max_new), empty, empty, arrays)

    def _forward(self, static: _Static) -> Tensor:
        plan = self._store.plan_from(static.metadata)
        return self._decoder.forward(static.device.ids, static.device.positions, plan.attend)

    def _record(self, static: _Static) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and allocates workspaces outside the capture
                self._forward(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            hidden = self._forward(static)
        # Graphs never run at once, so they share their intermediate memory.
        self._memory = self._memory or graph.pool()
        return graph, hidden

    def _make_static(self, bucket: Bucket) -> _Static:
        tokens, width = bucket.tokens, self._store.tables.width
        words = 4 * tokens + (4 * tokens + 1 + tokens * width + 1) // 2
        with torch.inference_mode(False):
            host = torch.zeros(words, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            device = torch.zeros(words, dtype=torch.int64, device=self._device)
        views = _Views.of(device, tokens, width)
        metadata = AttentionMetadata(
            views.slot_mapping,
            views.query_start_loc,
            views.seq_lens,
            views.token_to_input,
            views.block_tables,
            max_query_len=bucket.max_new,
            max_seq_len=min(width * self._store.block_size, self._store.max_context),
            tree_starts=views.tree_starts if bucket.trees else None,
            ancestors=views.ancestors if bucket.trees else None,
        )
        host_views = _Views(*(view.numpy() for view in _Views.of(host, tokens, width)))
        self._static[bucket] = _Static(host, host_views, device, views, metadata)
        return self._static[bucket]


def _fill(host: _Views, ids: np.ndarray, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """Write a step into a bucket's host arrays, padding behind it."""
    size, used, inputs = len(host.ids), len(ids), len(arrays["seq_lens"])
    padded = inputs + size - used  # inputs, with one of one token for each padding token
    host.ids[:used], host.ids[used:] = ids, 0
    host.positions[:used], host.positions[used:] = positions, 0
    host.slot_mapping[:used], host.slot_mapping[used:] = arrays["slot_mapping"], NULL_SLOT
    host.query_start_loc[: inputs + 1] = arrays["query_start_loc"]
    host.query_start_loc[inputs + 1 :] = np.minimum(np.arange(used + 1, used + 1 + size - inputs), size)
    host.seq_lens[:inputs] = arrays["seq_lens"]
    host.seq_lens[inputs:padded], host.seq_lens[padded:] = 1, 0
    host.token_to_input[:used] = arrays["token_to_input"]
    host.token_to_input[used:] = np.arange(inputs, padded)
    host.block_tables[:inputs, : arrays["block_tables"].shape[1]] = arrays["block_tables"]
    host.block_tables[inputs:padded, 0] = NULL_BLOCK
    if "ancestors" in arrays:
        host.ancestors[:used] = arrays["ancestors"]
        host.tree_starts[:inputs] = arrays["tree_starts"]
        host.tree_starts[inputs:] = host.seq_lens[inputs:]
