"""CPU time of estimator and predictor predictions in the scheduler's and the edge's inner loop.

Physics: a scheduler that fills a step prices every candidate item. With a thousand sessions and steps of
10 ms, a thousand prices must take well under a millisecond. The benchmark compares three ways in one run,
interleaved: one call of ``add`` per candidate, one call of ``add_many`` for all, and ``predict`` of every
grown batch from its items.

On the edge the rejection predictor runs after every drafted token, and a fast device drafts one in 5 ms.
Every kind must answer in under 20 µs with numpy at most.

    python benchmarks/estimator.py [--estimator fit/estimator.json] [--candidates 1000] [--json]

Without ``--estimator`` every kind is fitted on a small synthetic profile: prediction time does not depend
on the source of the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.fitting import (
    ESTIMATOR_KINDS,
    PREDICTOR_KINDS,
    FittedEstimator,
    FittedPredictor,
    load_estimator,
)
from wispprof.fitting.evaluation import fit_on
from wispprof.fitting.observations import Observations
from wispprof.fitting.rejection_predictor import SCORERS, Calibration
from wispprof.fitting.rejection_scorers import TokenRows
from wispprof.types import BatchShape, DraftFeatures, VerifyItem

ROUNDS = 15
LIMIT_US = 1000.0
TOKEN_LIMIT_US = 20.0


def synthetic_rows(count: int, rng: np.random.Generator) -> list[StepRow]:
    """Times with a staircase, skew and noise, so that every part of an estimator has work."""
    rows = []
    for order in range(count):
        size = int(2 ** rng.uniform(0, 5.5))
        items = [VerifyItem(int(rng.integers(1, 10)), int(2 ** rng.uniform(5, 13))) for _ in range(size)]
        if rng.random() < 0.25:
            items.append(VerifyItem(int(rng.choice([64, 128, 256])), 0, True))
        shape = BatchShape(tuple(items))
        padded = 16 * -(-shape.new_tokens // 16)
        base = 3 + max(8.0, 0.1 * padded) + 6e-5 * shape.cached_tokens + 3e-4 * shape.max_cached
        samples = tuple(float(t) for t in base * np.exp(0.02 * rng.standard_normal(5)))
        rows.append(StepRow(f"row{order}", "verify", shape, samples, (), padded, order))
    return rows


def measure(estimator: FittedEstimator, candidates: int, rng: np.random.Generator) -> dict[str, float]:
    """Median microseconds of CPU time to price all candidates, by method.

    CPU time of the calling thread, so that a busy machine does not count as a slow estimator.
    """
    items = [VerifyItem(int(rng.integers(1, 9)), int(rng.integers(16, 4096))) for _ in range(24)]
    batch = estimator.start()
    for item in items:
        batch = batch.add(*item)
    new = rng.integers(1, 9, candidates)
    cached = rng.integers(16, 4096, candidates)
    pairs = list(zip(new.tolist(), cached.tolist(), strict=True))
    shapes = [BatchShape((*items, VerifyItem(n, c))) for n, c in pairs]

    def one_by_one() -> list[float]:
        return [batch.add(n, c).bound_ms for n, c in pairs]

    def all_at_once() -> list[float]:
        return batch.add_many(new, cached)[1].tolist()

    def from_scratch() -> list[float]:
        return [estimator.predict(shape)[1] for shape in shapes]

    ways: dict[str, Callable[[], list[float]]] = {
        "add_many": all_at_once,
        "add": one_by_one,
        "predict": from_scratch,
    }
    answers = {name: way() for name, way in ways.items()}
    spread = max(abs(a / b - 1) for name in ways for a, b in zip(answers[name], answers["add"], strict=True))
    if spread > 1e-9:
        raise SystemExit(f"the methods disagree by {spread:.2e}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begin = time.thread_time()
            way()
            times[name].append((time.thread_time() - begin) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_predictor(kind: str, rng: np.random.Generator) -> float:
    """Median microseconds of CPU time for one token's acceptance probability."""
    count = 4000
    table = np.abs(rng.normal(1.0, 0.5, (count, 4)))
    accepted = rng.random(count) < 1 / (1 + np.exp(-3 * (table[:, 0] - 0.5)))
    tokens = TokenRows(table, rng.integers(0, 8, count), accepted, np.zeros(count, dtype=int))
    scorer = SCORERS[kind]().fit(tokens)
    calibration = Calibration.fit(scorer.score_many(table, tokens.depth), accepted)
    predictor = FittedPredictor(scorer, calibration)
    features_list = [DraftFeatures(*row) for row in table[:300].tolist()]
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        for features in features_list:
            predictor.acceptance_prob(features, 3)
        times.append((time.thread_time() - begin) / len(features_list) * 1e6)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimator", type=Path, help="a fitted estimator; else one of each kind")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    chosen = parser.parse_args()
    rng = np.random.default_rng(0)
    if chosen.estimator is not None:
        fitted = [load_estimator(chosen.estimator)]
    else:
        data = Observations.of(synthetic_rows(160, rng))
        fitted = [fit_on(kind, data) for kind in ESTIMATOR_KINDS if kind != "forest"]
    results = {e.kind: measure(e, chosen.candidates, rng) for e in fitted}
    if not chosen.json:
        print(f"Median µs to price {chosen.candidates} candidates (limit {LIMIT_US:.0f})\n")
        print(f"{'estimator':<14}{'add_many':>12}{'add':>12}{'predict':>12}")
        for kind, row in results.items():
            print(f"{kind:<14}" + "".join(f"{row[n]:>12.0f}" for n in ("add_many", "add", "predict")))
        print()
    tokens = {kind: measure_predictor(kind, rng) for kind in PREDICTOR_KINDS}
    if not chosen.json:
        print(f"Median µs of a predictor per drafted token (limit {TOKEN_LIMIT_US:.0f})\n")
        for kind, micros in tokens.items():
            print(f"{kind:<18}{micros:>8.2f}")
        print()
    slowest = max(row["add_many"] for row in results.values())
    print(
        json.dumps(
            {
                "benchmark": "estimator",
                "candidates": chosen.candidates,
                "us": results,
                "limit_us": LIMIT_US,
                "predictor_us": tokens,
                "predictor_limit_us": TOKEN_LIMIT_US,
                "within_limit": slowest * 1000 / chosen.candidates < LIMIT_US
                and max(tokens.values()) < TOKEN_LIMIT_US,
            }
        )
    )


if __name__ == "__main__":
    main()
