"""Draft models on PyTorch: one sequence each, whose KV is cut at a rollback."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from wispprof.drafters.model_drafter import ModelDrafter, features_torch
from wispprof.engines.loading import LoadedModel
from wispprof.engines.torch.decoder import Decoder, decoder_for
from wispprof.engines.torch.kv_store import causal_mask, grouped_attention
from wispprof.sampling.sampler import sample_tokens
from wispprof.types import DraftFeatures, DraftToken, ModelInfo

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


class TorchDrafter(TorchModelDrafter):
    """A model of a family that the engine serves, over one static KV cache that doubles when full."""

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
        self._grow(min(256, self.max_context))

    def cached_kv(self) -> Tensor:
        """A copy of cached keys and values (layers, 2, kv_heads, n, d), for integrity checks."""
        n = self._cached
        layers = zip(self._keys, self._values, strict=True)
        return torch.stack([torch.stack((k[0, :, :n], v[0, :, :n])) for k, v in layers])

    def _logits(self, last: Tensor) -> Tensor:
        return self._decoder.logits(last)

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
            out = grouped_attention(q[None], cache_k[:, :, :stop], cache_v[:, :, :stop], mask, scale)
            return out[0]

        hidden = self._decoder.forward(ids, positions, attend)
        self._cached = stop
        return hidden

    # Ordinary tensors, so that they can be written in and out of inference mode.
    @torch.inference_mode(False)
    def _grow(self, capacity: int) -> None:
        shape = (1, self.info.kv_heads, capacity, self.info.head_dim)
        for cache in (self._keys, self._values):
            fresh = [
                torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(self.info.layers)
            ]
            for old, new in zip(cache, fresh, strict=False):
                new[:, :, : self._cached] = old[:, :, : self._cached]
            cache[:] = fresh
        self._capacity = capacity
