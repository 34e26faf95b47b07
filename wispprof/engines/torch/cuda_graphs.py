"""A verify step as a captured CUDA graph, one per bucket of tokens and of new tokens per item.

A small step on a GPU waits for its launches, not for its arithmetic; a graph launches all of it at once.
Its price is padding to the bucket, which :attr:`StepGraphs.buckets` states and a step reports, so that the
estimator can know the staircase. Everything a step varies in lies in one static buffer that the host
fills with one copy. Padding tokens are items of one token that write to the null page; items beyond them
are empty.

Without CUDA the same buckets run uncaptured (``capture=False``), which is how the padding is tested.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.torch.decoder import Decoder
from wispprof.engines.torch.paged_kv import PagedInputs, PagedKvStore

__all__ = ["Bucket", "StepGraphs"]

TOKENS = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512)
NEW = (1, 8, 16)


class Bucket(NamedTuple):
    """Sizes a graph is captured for: tokens of the step, most new tokens of an item."""

    tokens: int
    new: int


class _Static(NamedTuple):
    """A bucket's static inputs, views of one device buffer, and their host image."""

    host: Tensor
    device: Tensor
    ids: Tensor
    positions: Tensor
    inputs: PagedInputs


class StepGraphs:
    """Graphs of one engine, captured when first needed (or all by :meth:`capture_all`)."""

    def __init__(
        self, decoder: Decoder, store: PagedKvStore, device: torch.device, *, capture: bool = True
    ) -> None:
        self.buckets = TOKENS
        self._decoder = decoder
        self._store = store
        self._device = device
        self._capture = capture
        self._static: dict[Bucket, _Static] = {}
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory: Any = None

    def bucket(self, new: np.ndarray) -> Bucket | None:
        """The bucket of a step with these new tokens per item; ``None`` where none is large enough."""
        tokens = next((t for t in TOKENS if t >= int(new.sum())), None)
        most = next((n for n in NEW if n >= int(new.max())), None)
        return None if tokens is None or most is None else Bucket(tokens, most)

    def run(
        self, bucket: Bucket, ids: np.ndarray, positions: np.ndarray, arrays: dict[str, np.ndarray]
    ) -> Tensor:
        """Hidden states (bucket.tokens, hidden), padding last; valid until the next run.

        The output head stays outside: it need not see padding, nor rows that emit nothing.
        """
        static = self._static.get(bucket) or self._make_static(bucket)
        self._fill(static, bucket, ids, positions, arrays)
        if not self._capture:
            return self._forward(static)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._record(static)
        graph, hidden = self._graphs[bucket]
        graph.replay()
        return hidden

    @torch.inference_mode()
    def capture_all(self, most_tokens: int) -> None:
        """Capture every bucket up to ``most_tokens``, so that no served step pays for it."""
        empty = np.empty(0, dtype=np.int64)
        nothing: dict[str, np.ndarray] = {
            "write": empty,
            "starts": np.zeros(1, dtype=np.int32),
            "lengths": empty,
            "tables": np.zeros((0, 1), dtype=np.int32),
            "rows": empty,
        }
        for new in NEW:
            for tokens in reversed([t for t in TOKENS if t <= most_tokens]):
                self.run(Bucket(tokens, new), empty, empty, nothing)

    def _forward(self, static: _Static) -> Tensor:
        plan = self._store.plan_on(static.inputs)
        return self._decoder.forward(static.ids, static.positions, plan.attend)

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
        wide, narrow = 3 * tokens, 3 * tokens + 1 + tokens * width
        # int64 parts first, then int32 parts two to a word.
        words = wide + (narrow + 1) // 2
        with torch.inference_mode(False):
            host = torch.zeros(words, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            device = torch.zeros(words, dtype=torch.int64, device=self._device)
        ids, positions, write = torch.split(device[:wide], tokens)
        small = device[wide:].view(torch.int32)
        starts, lengths, rows, tables, _ = torch.split(
            small, [tokens + 1, tokens, tokens, tokens * width, len(small) - narrow]
        )
        inputs = PagedInputs(
            write=write,
            starts=starts,
            lengths=lengths,
            tables=tables.view(tokens, width),
            rows=rows,
            max_new=bucket.new,
            max_length=min(width * self._store.page_size, self._store.max_context),
        )
        self._static[bucket] = _Static(host, device, ids, positions, inputs)
        return self._static[bucket]

    def _fill(
        self,
        static: _Static,
        bucket: Bucket,
        ids: np.ndarray,
        positions: np.ndarray,
        arrays: dict[str, np.ndarray],
    ) -> None:
        size, used, items = bucket.tokens, len(ids), len(arrays["lengths"])
        padding = size - used
        host = static.host.numpy()
        host[:used], host[used:size] = ids, 0
        host[size : size + used], host[size + used : 2 * size] = positions, 0
        write = host[2 * size : 3 * size]
        write[:used], write[used:] = arrays["write"], self._store.null_place
        small = host[3 * size :].view(np.int32)
        starts = small[: size + 1]
        starts[: items + 1] = arrays["starts"]
        starts[items + 1 :] = np.minimum(np.arange(used + 1, used + 1 + size - items), size)
        lengths = small[size + 1 : 2 * size + 1]
        lengths[:items], lengths[items:] = arrays["lengths"], 0
        lengths[items : items + padding] = 1
        rows = small[2 * size + 1 : 3 * size + 1]
        rows[:used], rows[used:] = arrays["rows"], np.arange(items, items + padding)
        width = self._store.tables.width
        tables = small[3 * size + 1 : 3 * size + 1 + size * width].reshape(size, width)
        have = arrays["tables"].shape[1]
        tables[:items, :have] = arrays["tables"]
        tables[items : items + padding, 0] = 0
        static.device.copy_(static.host, non_blocking=True)
