"""Compare cached keys and values with those of a fresh prefill of the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from wispprof.backends import IntegrityReport
from wispprof.engines.torch.decoder import Decoder
from wispprof.engines.torch.dense_kv import DenseKvStore
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.errors import EngineError

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.02}
_CHUNK = 512


def compare_with_prefill(
    decoder: Decoder,
    geometry: KvGeometry,
    dtype: torch.dtype,
    held: Iterable[tuple[str, list[int], Tensor]],
) -> IntegrityReport:
    """``held``: session, its n cached tokens, and their KV of ``dtype``, (layers, 2, kv_heads, n, d).

    An error is relative to the largest fresh value. Raises :class:`EngineError` if one exceeds rounding.
    """
    errors, tolerance = {}, _TOLERANCE[dtype]
    for session, tokens, found in held:
        if not tokens:
            errors[session] = 0.0
            continue
        fresh = _prefill(decoder, geometry, tokens, found).float()
        difference = (found.float() - fresh).abs().max()
        errors[session] = float(difference / fresh.abs().max().clamp(min=1e-6))
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    if bad:
        raise EngineError(
            f"Cached KV differs from a fresh prefill in {len(bad)} sessions: {bad} (tolerance {tolerance}).",
            "Close these sessions and report a defect.",
        )
    return IntegrityReport(errors, tolerance)


def _prefill(decoder: Decoder, geometry: KvGeometry, tokens: list[int], like: Tensor) -> Tensor:
    """KV of tokens, computed in a store of its own with the dtype and device of ``like``."""
    store = DenseKvStore(geometry, decoder.scale, like.dtype, like.device, native=False)
    handle = np.array([store.add()])
    for start in range(0, len(tokens), _CHUNK):
        ids = np.array(tokens[start : start + _CHUNK])
        cached, new = np.array([start]), np.array([len(ids)])
        store.allocate(handle, cached, cached + new)
        plan = store.plan(handle, cached, new)
        positions = np.arange(start, start + len(ids))
        decoder.forward(
            torch.from_numpy(ids).to(like.device),
            torch.from_numpy(positions).to(like.device),
            plan.attend,
        )
    return store.read(int(handle[0]), len(tokens))
