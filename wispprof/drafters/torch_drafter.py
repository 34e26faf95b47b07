"""The draft model on an edge device: one token at a time, with the features a controller reads.

One sequence, one static cache that doubles when full, rollback by length. Tokens that came from
elsewhere (a prompt, a correction) are only noted; their keys and values are computed in the same
forward as the next draft. Draws use the target's position noise (see
:mod:`~wispprof.sampling.sampler`), which makes draft and target agree more often than chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wispprof.engines.loading import LoadedModel
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.kv_store import causal_mask, grouped_attention
from wispprof.errors import EngineError
from wispprof.sampling.sampler import sample_tokens, sample_tokens_numpy
from wispprof.types import Drafter, DraftFeatures, DraftToken, ModelInfo, Sampling

__all__ = ["TorchDrafter", "features_numpy", "features_torch"]

_PREFILL_CHUNK = 512


class TorchDrafter(Drafter):
    """A transformers model as a :class:`~wispprof.types.Drafter`. Not thread-safe.

    Raises :class:`EngineError` where a sequence would outgrow the model's context.
    """

    def __init__(self, loaded: LoadedModel, max_context: int | None = None) -> None:
        self.info: ModelInfo = loaded.info
        self.max_context = min(max_context or loaded.info.max_context, loaded.info.max_context)
        self._decoder: Decoder = decoder_for(loaded.model)
        self._decoder.reserve(self.max_context)
        self._device = loaded.device
        self._dtype = loaded.dtype
        self._on_cpu = loaded.device.type == "cpu"
        self._group = loaded.model.config.num_attention_heads // loaded.info.kv_heads
        self._tokens: list[int] = []
        self._cached = 0
        self._sampling = Sampling()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = 0
        self._grow(min(256, self.max_context))

    @property
    def length(self) -> int:
        """Tokens held, committed and drafted."""
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        return list(self._tokens)

    def open(self, tokens: Sequence[int], sampling: Sampling) -> None:
        """Start anew from committed tokens (at least one). KV of a prefix shared with the old ones stays."""
        new = [int(t) for t in tokens]
        if not new:
            raise EngineError("A draft sequence begins with at least one token.")
        self._check(len(new))
        shared = 0
        for old, fresh in zip(self._tokens[: self._cached], new, strict=False):
            if old != fresh:
                break
            shared += 1
        self._tokens, self._cached, self._sampling = new, shared, sampling

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens; they are prefilled together with the next draft."""
        self._check(len(self._tokens) + len(tokens))
        self._tokens.extend(int(t) for t in tokens)

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens (at least one)."""
        if not 1 <= length <= len(self._tokens):
            raise EngineError(f"Cannot roll {len(self._tokens)} draft tokens back to {length}.")
        del self._tokens[length:]
        self._cached = min(self._cached, length)

    @torch.inference_mode()
    def draft(self) -> DraftToken:
        """Propose the next token and append it: one forward over all tokens without KV."""
        self._check(len(self._tokens) + 1)
        logits = self._decoder.logits(self._advance())
        position = len(self._tokens)
        if self._on_cpu:
            row = logits.float().numpy()[0]
            token, features = (
                sample_tokens_numpy(row, position, self._sampling),
                features_numpy(row),
            )
        else:
            picked = sample_tokens(logits, [position], [self._sampling])
            numbers = torch.cat((features_torch(logits)[0], picked.double())).tolist()
            token, features = int(numbers[4]), DraftFeatures(*numbers[:4])
        self._tokens.append(token)
        return DraftToken(token, features)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Compute KV of all tokens but the last now, where there is time for it (after a prompt)."""
        last = len(self._tokens) - 1
        while self._cached < last:
            self._forward(self._cached, min(last, self._cached + _PREFILL_CHUNK))

    @torch.inference_mode()
    def forward(self) -> Tensor:
        """The bare forward of a draft step: logits (V,) after the last token, nothing appended.

        For profiling what features and sampling cost on top.
        """
        if self._cached == len(self._tokens):
            self._cached -= 1
        return self._decoder.logits(self._advance())[0]

    def cached_kv(self) -> Tensor:
        """Cached keys and values (layers, 2, kv_heads, n, d), copied, for integrity checks."""
        n = self._cached
        return torch.stack(
            [
                torch.stack((k[0, :, :n], v[0, :, :n]))
                for k, v in zip(self._keys, self._values, strict=True)
            ]
        )

    # --- inside --------------------------------------------------------------------------------

    def _advance(self) -> Tensor:
        """Cache every token; the last one's hidden state (1, hidden)."""
        total = len(self._tokens)
        # A rollback to exactly what is cached leaves nothing to feed: the last token goes in again.
        if self._cached >= total:
            self._cached = total - 1
        hidden = self._forward(self._cached, min(total, self._cached + _PREFILL_CHUNK))
        while self._cached < total:
            hidden = self._forward(self._cached, min(total, self._cached + _PREFILL_CHUNK))
        return hidden[-1:]

    def _forward(self, start: int, stop: int) -> Tensor:
        if stop > self._capacity:
            self._grow(min(max(stop, 2 * self._capacity), self.max_context))
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
            out = grouped_attention(
                q[None], cache_k[:, :, :stop], cache_v[:, :, :stop], mask, scale
            )
            return out[0]

        hidden = self._decoder.forward(ids, positions, attend)
        self._cached = stop
        return hidden

    # Ordinary tensors: written in and out of inference mode.
    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        shape = (1, self.info.kv_heads, capacity, self.info.head_dim)
        for cache in (self._keys, self._values):
            fresh = [
                torch.zeros(shape, dtype=self._dtype, device=self._device)
                for _ in range(self.info.layers)
            ]
            for old, new in zip(cache, fresh, strict=False):
                new[:, :, : self._cached] = old[:, :, : self._cached]
            cache[:] = fresh
        self._capacity = capacity

    def _check(self, length: int) -> None:
        if length > self.max_context:
            raise EngineError(
                f"A draft sequence of {length} tokens exceeds the draft's context of {self.max_context}.",
                "Stop drafting for this session, or use a draft model with a longer context.",
            )


def features_numpy(logits: np.ndarray) -> DraftFeatures:
    """Features of one row of raw logits (V,) float32; does not keep ``logits`` intact."""
    size = len(logits)
    best = int(logits.argmax())
    top = float(logits[best])
    spread = float(logits.std())
    logits -= top
    weights = np.exp(logits)
    total = float(weights.sum())
    # H = log Z - E[l - top]
    entropy = float(np.log(total)) - float(weights @ logits) / total
    logits[best] = -np.inf
    second = float(logits.max()) if size > 1 else -np.inf
    return DraftFeatures(1.0 / total, max(0.0, entropy), -second, spread)


def features_torch(logits: Tensor) -> Tensor:
    """The same for rows (n, V) on any device: (n, 4) float64, in the order of the fields."""
    rows = logits.float()
    log_p = rows.log_softmax(-1)
    p = log_p.exp()
    two = rows.topk(2, dim=-1).values
    return torch.stack(
        (
            p.amax(-1),
            -(p * log_p).sum(-1).clamp(max=0.0),
            two[:, 0] - two[:, 1],
            rows.std(-1, correction=0),
        ),
        -1,
    ).double()
