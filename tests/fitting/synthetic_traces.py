"""Acceptance traces of an imagined pair, for tests: features that tell a good part of the outcome."""

from __future__ import annotations

import numpy as np

from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.types import Sampling


def synthetic_path(rng: np.random.Generator, prompt: int, length: int, depth: int) -> TracePath:
    """The target's path is random tokens; each position has a difficulty that the features show."""
    path = rng.integers(0, 1000, length)
    difficulty = rng.normal(0, 1.0, length + depth) + rng.normal(0, 0.5)
    drafts = np.zeros((length, depth), dtype=np.int64)
    features = np.zeros((length, depth, 4), dtype=np.float32)
    accepted = np.zeros(length, dtype=np.int64)
    for i in range(length):
        lost = False
        for j in range(depth):
            hard = difficulty[i + j] + 0.3 * rng.normal()
            chance = 1 / (1 + np.exp(-(2.2 - 1.8 * hard)))
            seen = chance * 0.8 + 0.2 * rng.random()
            if lost:
                seen = rng.random()
            confidence = float(np.clip(seen, 0.01, 0.999))
            features[i, j] = (
                confidence,
                -confidence * np.log(confidence) + 2 * (1 - confidence),
                6 * confidence**2 + 0.3 * rng.normal(),
                3 + confidence + 0.2 * rng.normal(),
            )
            right = not lost and rng.random() < chance
            within = i + j < length
            drafts[i, j] = path[i + j] if within and right else 1000 + rng.integers(0, 10)
            lost = lost or not right
            if right and within:
                accepted[i] += 1
    return TracePath(
        (*tuple(int(t) for t in rng.integers(0, 1000, 4)), prompt),
        tuple(int(t) for t in path),
        drafts,
        features,
        accepted,
    )


def synthetic_trace(prompts: int = 24, length: int = 72, depth: int = 8, seed: int = 0) -> AcceptanceTrace:
    rng = np.random.default_rng(seed)
    paths = tuple(synthetic_path(rng, number, length, depth) for number in range(prompts))
    return AcceptanceTrace("target", "draft", "tokenizer", Sampling(), paths)
