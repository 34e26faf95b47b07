"""Position noise: a counter-based hash of (seed, position, token id), the same in numpy and torch.

Each token gets 32 random bits from two rounds of a 32-bit finalizer (the ``lowbias32`` constants of the
hash-prospector project) over its id, each keyed by half of a 64-bit SplitMix of (seed, position). The bits
give a uniform ``v`` in (0, 1) with full relative precision near 0, where large Gumbel values come from, so
that unlikely tokens are drawn with their exact probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NOISE_VERSION = 1
"""Version of the noise and of how a token is drawn with it: other versions may draw other tokens."""

_M64 = (1 << 64) - 1
_TOKEN = 0x9E3779B1
_MUL1 = 0x21F0AAAD
_MUL2 = 0xD35A2D97
_SCALE = 2.0**-31
_BELOW_ONE = 1.0 - 2.0**-24


def position_keys(seeds: Sequence[int], positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Two 32-bit keys for each (seed, position): (n, 2) uint32. Seeds are taken modulo 2**64."""
    seed = np.array([s & _M64 for s in seeds], dtype=np.uint64)
    mixed = _splitmix(_splitmix(seed) ^ np.asarray(positions).astype(np.uint64))
    return np.stack([mixed >> np.uint64(32), mixed & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def gumbel_numpy(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Gumbel noise (n, m) float32 for tokens ``ids`` (n, m) or (m,) under ``keys`` (n, 2)."""
    x = ids.astype(np.uint32) * np.uint32(_TOKEN) + keys[:, :1]
    x = _round_numpy(x)
    x += keys[:, 1:]
    x = _round_numpy(x)
    x >>= np.uint32(1)
    v = (x.astype(np.float32) + np.float32(0.5)) * np.float32(_SCALE)
    np.minimum(v, np.float32(_BELOW_ONE), out=v)
    return np.asarray(-np.log(-np.log1p(-v)))


def _round_numpy(x: np.ndarray) -> np.ndarray:
    x ^= x >> np.uint32(16)
    x *= np.uint32(_MUL1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(_MUL2)
    x ^= x >> np.uint32(15)
    return x


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """The same in torch on any device: ``keys`` (n, 2) int32 (bit patterns), ``ids`` (n, m) or (m,)."""
    # int32 products wrap; right shifts are arithmetic, hence the masks.
    x = ids.to(torch.int32) * _signed(_TOKEN) + keys[:, :1]
    x = _round(x)
    x += keys[:, 1:]
    x = _round(x)
    x = (x >> 1) & 0x7FFFFFFF
    v = x.to(torch.float32).add_(0.5).mul_(_SCALE).clamp_(max=_BELOW_ONE)
    return v.neg_().log1p_().neg_().log_().neg_()


def _round(x: Tensor) -> Tensor:
    x ^= (x >> 16) & 0xFFFF
    x *= _MUL1
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(_MUL2)
    x ^= (x >> 15) & 0x1FFFF
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
