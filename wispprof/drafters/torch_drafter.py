"""Draft models on PyTorch: one sequence each, whose KV is cut at a rollback, and a tree after it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wispprof.backends import Continuations, DraftCandidate, TreeDrafter
from wispprof.drafters.model_drafter import ModelDrafter, features_numpy, features_torch
from wispprof.engines.loading import LoadedModel
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.kv_store import additive_mask, causal, causal_mask, grouped_attention
from wispprof.sampling.candidates import noise_ranked
from wispprof.sampling.sampler import UNDECIDED, sample_tokens
from wispprof.token_tree import HELD_NODES, ROOT, TokenTree
from wispprof.types import DraftFeatures, DraftToken, ModelInfo, Sampling

_PREFILL_CHUNK = 512


def torch_drafter(loaded: LoadedModel) -> TorchModelDrafter:
    """The drafter of a loaded model: by the engine's own forward if it knows the family."""
    return TorchDrafter(loaded) if loaded.servable else AnyFamilyDrafter(loaded)


class TorchModelDrafter(ModelDrafter):
    """What drafts on PyTorch share. Raises :class:`EngineError` if a sequence outgrows its context."""

    def __init__(self, loaded: LoadedModel, max_context: int | None = None) -> None:
        super().__init__(min(max_context or loaded.info.max_context, loaded.info.max_context))
        self.info: ModelInfo = loaded.info
        self._on_cpu = loaded.device.type == "cpu"
        self._cached = 0

    @abstractmethod
    def _forward(self, start: int, stop: int) -> Tensor:
        """Cache these tokens; what :meth:`_logits` needs of them, the last row for the last token."""

    @abstractmethod
    def _logits(self, last: Tensor) -> Tensor:
        """The logits (1, V) of the last row that :meth:`_forward` returned."""

    @torch.inference_mode()
    def draft(self) -> DraftToken:
        """Propose the next token and append it: one forward over all tokens without KV."""
        self._check(len(self._tokens) + 1)
        logits = self._logits(self._advance())
        if self._on_cpu:
            return self._propose(logits.float().numpy()[0])
        drawn = sample_tokens(logits, [len(self._tokens)], [self._sampling])
        *features, token = features_and_token(logits, drawn).tolist()
        self._check_drawn(int(token))
        self._tokens.append(int(token))
        return DraftToken(int(token), DraftFeatures(*features))

    @torch.inference_mode()
    def prefill(self) -> None:
        last = len(self._tokens) - 1
        while self._cached < last:
            self._forward(self._cached, min(last, self._cached + _PREFILL_CHUNK))

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """One step without features and sampling, for profiling: logits (V,) after the last token."""
        if self._cached == len(self._tokens):
            self._cached -= 1
        return self._logits(self._advance())[0]

    def _advance(self) -> Tensor:
        """Cache every token; returns the last row of :meth:`_forward`."""
        total = len(self._tokens)
        # If everything is cached (after a rollback), feed the last token again.
        if self._cached >= total:
            self._cached = total - 1
        while True:
            rows = self._forward(self._cached, min(total, self._cached + _PREFILL_CHUNK))
            if self._cached >= total:
                return rows[-1:]


def features_and_token(logits: Tensor, drawn: Tensor) -> Tensor:
    """Features of the one row of ``logits`` (1, V), then the token ``drawn`` (1,): (5,) on their device, so
    that one transfer fetches all. float32 holds ids below 2**24 exactly."""
    return torch.cat((features_torch(logits)[0], drawn.float()))


class AnyFamilyDrafter(TorchModelDrafter):
    """Any causal model of transformers whose cache can be cut, by the model's own forward."""

    def __init__(self, loaded: LoadedModel, max_context: int | None = None) -> None:
        from wispprof.engines.croppable_cache import CroppableForward

        super().__init__(loaded, max_context)
        self._run = CroppableForward(loaded.model)

    def cached_kv(self) -> list[Tensor]:
        """Copies of cached keys and values (2, heads, n, d) by layer, for integrity checks."""
        return self._run.kv(self._cached)

    def _forward(self, start: int, stop: int) -> Tensor:
        self._run.cut(start)
        self._cached = start
        logits = self._run(self._tokens[start:stop])
        self._cached = stop
        return logits

    def _logits(self, last: Tensor) -> Tensor:
        return last


class TorchDrafter(TorchModelDrafter, TreeDrafter):
    """A model of a family that the engine serves, over one static KV cache that doubles when full.

    The KV of expanded nodes stands in the rows after the sequence, in the order of ``_expanded``. While
    there is any, every token of the sequence has KV.
    """

    def __init__(self, loaded: LoadedModel, max_context: int | None = None) -> None:
        super().__init__(loaded, max_context)
        self._decoder: Decoder = decoder_for(loaded.model)
        self._decoder.reserve(self.max_context)
        self._device = loaded.device
        self._dtype = loaded.dtype
        self._group = loaded.model.config.num_attention_heads // loaded.info.kv_heads
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = 0
        self._expanded = TokenTree(HELD_NODES)
        self._grow(min(256, self.max_context))

    def cached_kv(self) -> Tensor:
        """A copy of cached keys and values (layers, 2, kv_heads, n, d), for integrity checks: of the
        sequence, then of expanded nodes."""
        n = self._cached + len(self._expanded)
        layers = zip(self._keys, self._values, strict=True)
        return torch.stack([torch.stack((k[0, :, :n], v[0, :, :n])) for k, v in layers])

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        self._expanded = TokenTree(HELD_NODES)
        super().open(tokens, sampling)

    def draft(self) -> DraftToken:
        """Propose the next token and append it: one forward over all tokens without KV. Forgets the tree."""
        self._expanded = TokenTree(HELD_NODES)
        return super().draft()

    def rollback(self, length: int) -> None:
        self._expanded = TokenTree(HELD_NODES)
        super().rollback(length)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens. Expanded nodes that spell the first of them keep their KV. If these are
        all tokens, so do the expanded nodes below."""
        super().extend(tokens)
        if len(tokens) and len(self._expanded):
            path = self._expanded.walk(tokens)
            below = self._expanded.descendants(path[-1]) if len(path) == len(tokens) else []
            self._keep([*path, *below])
            self._cached += len(path)
            self._expanded = self._expanded.below(path[-1]) if below else TokenTree(HELD_NODES)

    @torch.inference_mode()
    def expand(self, tree: TokenTree, nodes: Sequence[int], width: int) -> list[Continuations]:
        """See :class:`~wispprof.backends.TreeDrafter`. Raises :class:`EngineError` if a candidate would
        outgrow the context, ``ValueError`` for a node whose parent was not expanded."""
        total, depths = len(self._tokens), [0 if node == ROOT else tree.depths[node] for node in nodes]
        self._check(total + max(depths) + 1)
        # Set aside: if the forward fails, no node has KV.
        expanded, self._expanded = self._expanded, TokenTree(HELD_NODES)
        if len(expanded) + len(nodes) > expanded.limit:
            expanded = self._keep_only(tree, expanded)
        places = {node: _place(tree, node, expanded) for node in nodes if node != ROOT}
        while total - self._cached > _PREFILL_CHUNK:
            self._forward(self._cached, self._cached + _PREFILL_CHUNK)
        first = min(self._cached, total - 1) if ROOT in nodes else self._cached
        if places:
            hidden = self._forward_tree(first, list(places.values()), expanded)
        else:
            hidden = self._forward(first, total)
        row_of = {ROOT: total - first - 1}
        row_of |= {node: total - first + number for number, node in enumerate(places)}
        logits = self._logits(hidden[[row_of[node] for node in nodes]])
        found = noise_ranked(logits, [total + depth for depth in depths], self._sampling, width)
        rows = _features_and_candidates(logits, *found)
        if not all(math.isfinite(value) for row in rows for value in row):
            self._check_drawn(UNDECIDED)
        self._expanded = expanded
        return [_continuations(row) for row in rows]

    def _logits(self, last: Tensor) -> Tensor:
        return self._decoder.logits(last)

    def _forward(self, start: int, stop: int) -> Tensor:
        self._reserve(stop, min(2 * self._capacity, self.max_context))
        new = stop - start
        ids = torch.tensor(self._tokens[start:stop], device=self._device)
        positions = torch.arange(start, stop, device=self._device)
        mask = None
        if new > 1:
            mask = causal_mask(positions[None], stop, self._group, self._dtype)
        keys, values, scale = self._keys, self._values, self._decoder.scale

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache_k, cache_v = keys[layer], values[layer]
            cache_k[0, :, start:stop] = k.transpose(0, 1)
            cache_v[0, :, start:stop] = v.transpose(0, 1)
            out = grouped_attention(q[None], cache_k[:, :, :stop], cache_v[:, :, :stop], mask, scale)
            return out[0]

        hidden = self._decoder.forward(ids, positions, attend)
        self._cached = stop
        return hidden

    def _forward_tree(self, first: int, places: list[int], expanded: TokenTree) -> Tensor:
        """The sequence from ``first`` on, then the nodes at ``places`` of ``expanded``, in one forward.

        A node sees the sequence, its ancestors and itself. Returns one row for each.
        """
        total = len(self._tokens)
        stop = total + len(expanded)
        self._reserve(stop, 2 * self._capacity)
        sequence = range(first, total)
        ids = [*self._tokens[first:], *(expanded.tokens[place] for place in places)]
        positions = [*sequence, *(total - 1 + expanded.depths[place] for place in places)]
        slots = [*sequence, *(total + place for place in places)]
        fed, at, rows = torch.tensor([ids, positions, slots], device=self._device).unbind()
        related = np.zeros((len(places), len(expanded)), dtype=bool)
        for row, place in enumerate(places):
            related[row, expanded.path(place)] = True
        mask = None
        if len(sequence) or not related.all():
            seen = causal(at.clamp(max=total - 1)[None], stop)
            seen[0, len(sequence) :, total:] = torch.from_numpy(related).to(self._device)
            mask = additive_mask(seen, self._group, self._dtype)
        keys, values, scale = self._keys, self._values, self._decoder.scale

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache_k, cache_v = keys[layer], values[layer]
            cache_k[0].index_copy_(1, rows, k.transpose(0, 1))
            cache_v[0].index_copy_(1, rows, v.transpose(0, 1))
            out = grouped_attention(q[None], cache_k[:, :, :stop], cache_v[:, :, :stop], mask, scale)
            return out[0]

        hidden = self._decoder.forward(fed, at, attend)
        self._cached = total
        return hidden

    def _keep_only(self, tree: TokenTree, expanded: TokenTree) -> TokenTree:
        """Forget the expanded nodes that ``tree`` lacks; returns the others."""
        texts = ((place, expanded.spelled(place)) for place in range(len(expanded)))
        known = [place for place, text in texts if len(tree.walk(text)) == len(text)]
        self._keep(known)
        kept = TokenTree(HELD_NODES)
        for token, parent in zip(*expanded.part(known), strict=True):
            kept.add(parent, token, 1.0)
        return kept

    @torch.inference_mode()
    def _keep(self, places: Sequence[int]) -> None:
        """Move the KV of expanded nodes, in rising order, to the first rows after those with KV."""
        first = next((row for row, place in enumerate(places) if row != place), len(places))
        if first == len(places):
            return
        begin = self._cached
        moved = torch.tensor([begin + place for place in places[first:]], device=self._device)
        for cache in (*self._keys, *self._values):
            cache[0, :, begin + first : begin + len(places)] = cache[0].index_select(1, moved)

    def _reserve(self, rows: int, generous: int) -> None:
        """Have at least so many rows; ``generous``: how many to have if there are too few."""
        if rows > self._capacity:
            self._grow(max(rows, generous))

    # Ordinary tensors, so that they can be written in and out of inference mode.
    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        shape = (1, self.info.kv_heads, capacity, self.info.head_dim)
        kept = self._capacity
        for cache in (self._keys, self._values):
            fresh = [
                torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self.info.layers)
            ]
            for old, new in zip(cache, fresh, strict=False):
                new[:, :, :kept] = old
            cache[:] = fresh
        self._capacity = capacity


def _place(tree: TokenTree, node: int, expanded: TokenTree) -> int:
    """The number of ``node`` among expanded nodes, which it joins if it is not one of them."""
    *above, token = tree.spelled(node)
    path = expanded.walk(above)
    if len(path) < len(above):
        raise ValueError(f"The parent of node {node} was not expanded.")
    place = expanded.add(path[-1] if path else ROOT, token, 1.0)
    if place is None:
        raise ValueError(f"At most {expanded.limit} nodes can be expanded.")
    return place


def _features_and_candidates(logits: Tensor, ids: Tensor, probs: Tensor) -> list[list[float]]:
    """By row of ``logits``, which are not kept intact: four features, then ids and probabilities."""
    if logits.device.type == "cpu":
        with np.errstate(invalid="ignore"):  # the caller looks for what is not finite
            features = [features_numpy(row) for row in logits.float().numpy()]
        return [[*f, *i, *p] for f, i, p in zip(features, ids.tolist(), probs.tolist(), strict=True)]
    # One transfer fetches all; float32 holds ids below 2**24 exactly.
    rows: list[list[float]] = torch.cat((features_torch(logits), ids.float(), probs), 1).tolist()
    return rows


def _continuations(row: Sequence[float]) -> Continuations:
    """From a row of :func:`_features_and_candidates`."""
    size = len(DraftFeatures._fields)
    width = (len(row) - size) // 2
    ids, probs = row[size : size + width], row[size + width :]
    candidates = [DraftCandidate(int(token), prob) for token, prob in zip(ids, probs, strict=True)]
    return Continuations(candidates, DraftFeatures(*row[:size]))
