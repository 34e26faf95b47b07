"""Step times of an imagined server that obeys physics, for tests: graph staircase, skew, noise."""

from __future__ import annotations

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.types import BatchShape, VerifyItem

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)


def true_ms(shape: BatchShape) -> float:
    """Weights from memory or compute per padded token, KV reads, attention, and the longest item."""
    bucket = next((b for b in BUCKETS if b >= shape.new_tokens), shape.new_tokens)
    matmul = max(9.0 + 0.01 * bucket, 0.11 * bucket)
    kv = 0.00006 * shape.cached_tokens + 0.00025 * shape.max_cached
    pairs = 2.0e-6 * shape.attention_pairs
    return 1.5 + matmul + kv + pairs + 0.03 * len(shape.items)


def random_shape(rng: np.random.Generator, largest: int = 48) -> BatchShape:
    count = int(2 ** rng.uniform(0, np.log2(largest)))
    items = []
    base = 2 ** rng.uniform(5, 13)
    for _ in range(count):
        cached = int(base * 2 ** rng.normal(0, 0.6)) if rng.random() < 0.8 else int(2 ** rng.uniform(5, 13))
        items.append(VerifyItem(int(rng.integers(1, 10)), min(cached, 16384)))
    if rng.random() < 0.25:
        items.append(VerifyItem(int(rng.choice([32, 64, 128, 256])), int(rng.integers(0, 2048)), True))
    return BatchShape(tuple(items))


def synthetic_rows(
    count: int = 240, seed: int = 0, noise: float = 0.015, samples: int = 7, factor: float = 1.0
) -> list[StepRow]:
    rng = np.random.default_rng(seed)
    rows: list[StepRow] = []
    seen: set[str] = set()
    while len(rows) < count:
        shape = random_shape(rng)
        if shape.key() in seen:
            continue
        seen.add(shape.key())
        base = factor * true_ms(shape)
        times = base * np.exp(
            noise * rng.standard_normal(samples) + 0.3 * noise * rng.exponential(1.0, samples)
        )
        kind = "mixed" if shape.prefill_tokens else "verify"
        bucket = next((b for b in BUCKETS if b >= shape.new_tokens), shape.new_tokens)
        rows.append(
            StepRow(
                shape.key(),
                kind,
                shape,
                tuple(float(t) for t in times),
                padded_tokens=bucket,
                order=len(rows),
            )
        )
    return rows
