"""How long one scheduling decision takes.

Physics: while a policy decides, the engine idles. A step takes some 5 to 200 ms, so a decision over a
thousand queued items should take at most a millisecond. What it costs: reading a thousand views (each
a few attribute look-ups), ranking them (a sort, or a few vectorised passes over sessions × drafts), and
pricing what joins (one addition to the estimator's running totals per item; refused candidates cost
the same). The step here holds at most 64 items, as a queue of a thousand implies.

Run: python benchmarks/scheduler.py [--items 1000] [--seconds 1.0]. Prints a table, and one JSON line last.
All policies are measured in the same run, interleaved, each over several queues. ``cpu ms`` is the
median of the thread's own processor time: on a machine that does other work too it says what the
decision costs, the wall clock what it waited for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.policies import BATCH_POLICIES, Limits, SessionView, make_batch_policy
from wispprof.types import BatchTotals, Slo, StepTimeEstimator

QUEUES = 8


def fitted() -> StepTimeEstimator:
    """An estimator as a server loads it: the linear step-time model with a conformal bound."""
    from wispprof.fitting.batch_totals import EMPTY
    from wispprof.fitting.conformal import LEVELS, RatioBound
    from wispprof.fitting.estimator import Domain, FittedEstimator
    from wispprof.fitting.step_time_models import WispLinear

    step_model = WispLinear()
    step_model.coef_ = (0.12, 1e-7, 0.06e-3, 18.0)
    ratio = RatioBound(40.0, ((1.1,) * len(LEVELS),) * 4, (99, 99, 99, 99))
    most = BatchTotals(1024, 8192, 1 << 24, 1 << 34, 1 << 34, 1 << 15, 4096, 4096)
    return FittedEstimator(step_model, ratio, Domain(EMPTY, most))


def queue(items: int, seed: int) -> list[SessionView]:
    """Sessions of mixed contexts, drafts and slack; one in fifty has a prompt to read."""
    rng = random.Random(seed)
    views = []
    for number in range(items):
        prompt = rng.randint(64, 1500) if rng.random() < 0.02 else 0
        acceptance_probs = tuple(rng.uniform(0.3, 0.98) for _ in range(0 if prompt else rng.randint(0, 8)))
        due = rng.uniform(0.0, 60.0) if rng.random() < 0.5 and not prompt else None
        views.append(
            SessionView(
                session=f"s{number}",
                slo=Slo(rng.choice((2.0, 4.0, 6.0, 8.0))),
                cached=rng.randint(50, 4000),
                arrived_ms=-rng.uniform(0.0, 200.0),
                deadline_ms=rng.uniform(-20.0, 900.0),
                prompt_left=prompt,
                acceptance_probs=acceptance_probs,
                stream=True,
                due_ms=due,
                due_acceptance_probs=(0.8, 0.7) if due is not None else (),
            )
        )
    return views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="most items of a step")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per policy, about")
    options = parser.parse_args()
    estimator = fitted()
    limits = Limits(options.batch, 4096, 512, 1 << 30)
    queues = [queue(options.items, seed) for seed in range(QUEUES)]
    policies = {name: make_batch_policy(name) for name in BATCH_POLICIES}
    times: dict[str, list[float]] = {name: [] for name in policies}
    spent: dict[str, list[float]] = {name: [] for name in policies}
    for policy in policies.values():
        policy.plan(0.0, queues[0], estimator, limits)  # marginal costs are cached once
    end = time.perf_counter() + options.seconds * len(policies)
    turn = 0
    while time.perf_counter() < end:
        for name, policy in policies.items():
            begin, cpu = time.perf_counter(), time.thread_time()
            policy.plan(0.0, queues[turn % QUEUES], estimator, limits)
            spent[name].append((time.thread_time() - cpu) * 1000.0)
            times[name].append((time.perf_counter() - begin) * 1000.0)
        turn += 1
    print(f"one decision over {options.items} items, at most {options.batch} of them in a step")
    print(f"{'policy':20s} {'median ms':>10s} {'p95 ms':>10s} {'cpu ms':>10s} {'runs':>6s}")
    found, cpu_ms = {}, {}
    for name, values in times.items():
        values.sort()
        found[name] = statistics.median(values)
        cpu_ms[name] = statistics.median(spent[name])
        p95 = values[min(len(values) - 1, int(0.95 * len(values)))]
        print(f"{name:20s} {found[name]:10.3f} {p95:10.3f} {cpu_ms[name]:10.3f} {len(values):6d}")
    print(
        json.dumps({"benchmark": "scheduler", "items": options.items, "median_ms": found, "cpu_ms": cpu_ms})
    )


if __name__ == "__main__":
    main()
