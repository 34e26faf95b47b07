"""KV of any transformers model that can be cut to a length, for drafts of families that the engine lacks.

Layers with sliding-window attention keep the whole text here, so that any rollback finds what it needs; their
masks hide what lies outside the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from wispprof.errors import ModelUnsupported

_FIRST = 256
_TOLERANCE = 1e-3
_PROBE, _KEPT = 12, 5
"""Tokens of the check; how many of them it keeps."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values (1, heads, n, d) at the beginning of buffers that double when full."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        stop = held + key_states.shape[-2]
        keys, values = self._room(key_states, value_states, held, stop)
        keys[:, :, held:stop], values[:, :, held:stop] = key_states, value_states
        self._hold(stop)
        return keys[:, :, :stop], values[:, :, :stop]

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        if self.get_seq_length() > length:
            self._hold(length)

    def kept(self, length: int) -> Tensor:
        """A copy of keys and values (2, heads, length, d)."""
        assert self._buffers is not None
        return torch.stack([part[0, :, :length] for part in self._buffers])

    def _hold(self, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (part[:, :, :length] for part in self._buffers)

    def _room(self, keys: Tensor, values: Tensor, held: int, stop: int) -> tuple[Tensor, Tensor]:
        """Buffers for ``stop`` tokens, the first ``held`` of them kept."""
        old = self._buffers
        if old is not None and stop <= old[0].shape[-2]:
            return old
        capacity = max(_FIRST, 2 * held, stop)
        fresh = (
            keys.new_empty((*keys.shape[:2], capacity, keys.shape[-1])),
            values.new_empty((*values.shape[:2], capacity, values.shape[-1])),
        )
        if old is not None:
            for new, before in zip(fresh, old, strict=True):
                new[:, :, :held] = before[:, :, :held]
        self._buffers = fresh
        return fresh


class CroppableForward:
    """A transformers model and its KV of one sequence."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device: torch.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)

    def cut(self, length: int) -> None:
        """Keep the KV of the first ``length`` tokens."""
        for layer in self._layers():
            layer.cut(length)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Append ``tokens``; the logits (1, V) after the last of them."""
        ids = torch.tensor([list(tokens)], device=self._device)
        out = self._model(ids, past_key_values=self._cache, use_cache=True, **self._options)
        logits: Tensor = out.logits[:, -1]
        return logits

    def kv(self, length: int) -> list[Tensor]:
        """Copies of keys and values (2, heads, length, d) by layer, for integrity checks."""
        return [layer.kept(length) for layer in self._layers()]

    def _layers(self) -> list[GrowingLayer]:
        """Those that hold KV; some models share that of one layer with others."""
        layers: list[Any] = self._cache.layers
        return [layer for layer in layers if layer.is_initialized]


@torch.inference_mode()
def check_croppable(model: Any, name: str) -> None:
    """Try a rollback. Raises :class:`ModelUnsupported` if the model then computes something else."""
    if getattr(model, "_is_stateful", False):
        raise ModelUnsupported(
            f"{name} keeps recurrent state, which cannot be rolled back by length.",
            "Use a draft with attention in every layer, or a GGUF of this model: llama.cpp saves its state.",
        )
    vocab = int(model.config.get_text_config().vocab_size)
    tokens = [(7 * i + 3) % vocab for i in range(_PROBE)]
    try:
        plain, cut = CroppableForward(model), CroppableForward(model)
        wanted = plain(tokens)
        cut([*tokens[:_KEPT], *([vocab - 1] * _KEPT)])
        cut.cut(_KEPT)
        found = cut(tokens[_KEPT:])
        cached = len(cut.kv(_PROBE))
    except Exception as err:
        reason = [*str(err).strip().splitlines(), type(err).__name__][0]
        raise ModelUnsupported(
            f"{name} does not run with a cache that can be cut: {reason}",
            "Use a decoder-only model that transformers runs with its DynamicCache.",
        ) from err
    # In float32 the two agree to rounding; bfloat16 keeps eight bits.
    allowed = _TOLERANCE if found.dtype == torch.float32 else 0.1
    scale = max(1.0, float(wanted.float().abs().max()))
    if not cached or float((found - wanted).float().abs().max()) > allowed * scale:
        raise ModelUnsupported(
            f"{name} computes something else after a rollback of its cache.",
            "Use a draft whose cache holds one key and value for each token.",
        )
