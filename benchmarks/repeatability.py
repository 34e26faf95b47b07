"""Is a server profile repeatable, and are disturbances of the machine flagged?

    python benchmarks/repeatability.py                # the quick grid on the bundled target
    python benchmarks/repeatability.py --tiny         # a dozen shapes, to see that it works

Three profiles of one grid, each in a process of its own, one after the other. During the third, CPU hogs
(one process per core, plain arithmetic) start when half of its blocks are measured. Then one table:

- first against second: the share of shapes that `profile diff` reports as changed (goal: at most 5 %), and
  beside it the verdict of plain rules on the same rows (medians 5 % apart; intervals apart as well);
- announced against actual seconds of each (goal: within 30 %);
- the third: was the drift flag set (goal: yes), and on the first two (goal: no)?

The physics. Two runs of an undisturbed machine differ by the noise of samples, by where memory happens to
lie, and by the speed of the whole machine. A hog takes cycles and cache from every shape alike, so the
sentinel, which is one shape measured again and again, must slow down too.

The last line is JSON. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wispprof.artifacts import ServerProfile, load_server
from wispprof.profiling.measurement_log import median_interval
from wispprof.profiling.profile_tools import diff_profiles
from wispprof.profiling.workload import format_duration
from wispprof.settings import profiler_settings

CHANGED, ETA, TOLERANCE = 0.05, 0.30, 0.05


@dataclass(frozen=True)
class Run:
    """One profile: its times and its drift."""

    name: str
    seconds: float
    expected_s: float
    drifted: bool
    rows: int
    noisy: int
    marked: int

    @property
    def ratio(self) -> float:
        return self.seconds / self.expected_s


def measure(out: Path, options: dict[str, Any], half: Any) -> None:
    """Take one profile; runs in a fresh process. ``half`` is set when half of the visits are made."""
    from wispprof.profiling import server_profiler
    from wispprof.profiling.shape_grid import Axes
    from wispprof.settings.profiler_settings import Output, SweepSettings

    def report(done: int, total: int, status: str) -> None:
        if status.startswith("ETA") and 2 * done >= total:
            half.set()
        if sys.stderr.isatty():
            print(f"\r{out.name:8} {done}/{total} {status:60.60}", end="", file=sys.stderr)

    more: dict[str, Any] = {"grid": options["grid"], "model": options["model"]}
    if options["tiny"]:
        axes = Axes(items=(1, 4, 16), new=(1, 5), cached=(64, 512))
        more |= {"axes": axes, "sweep": SweepSettings(target=0.1, max_samples=9, sentinel_every=4)}
    if options["budget_minutes"]:
        more["budget_minutes"] = options["budget_minutes"]
    server_profiler.profile_server(
        profiler_settings.ServerProfilerSettings(output=Output(out), **more), report
    )


def burn(until: Any) -> None:
    """Arithmetic over a working set larger than a core's caches, until stopped."""
    numbers = list(range(400_000))
    while not until.is_set():
        sum(numbers)


def run(name: str, folder: Path, options: dict[str, Any], hogs: int = 0) -> Run:
    """One profile, with hogs from its middle on."""
    context = multiprocessing.get_context("spawn")
    half, stop = context.Event(), context.Event()
    process = context.Process(target=measure, args=(folder / name, options, half))
    process.start()
    burning: list[Any] = []
    while process.is_alive():
        process.join(0.2)
        if hogs and half.is_set() and not burning:
            burning = [context.Process(target=burn, args=(stop,)) for _ in range(hogs)]
            for one in burning:
                one.start()
            print(f"{name}: {hogs} hogs", file=sys.stderr)
    stop.set()
    for one in burning:
        one.join()
    if process.exitcode:
        sys.exit(f"error: the profile {name} failed")
    return account(name, load_server(folder / name))


def account(name: str, profile: ServerProfile) -> Run:
    """What a profile records about its own measurement."""
    summary = profile.manifest.summary
    rows = [row for row in profile.rows if row.kind != "sentinel"]
    return Run(
        name,
        summary["seconds"],
        summary["expected_s"],
        summary["drift"]["drifted"],
        len(rows),
        sum("noisy" in row.flags for row in rows),
        sum("drift" in row.flags for row in rows),
    )


def plain_rules(one: ServerProfile, other: ServerProfile) -> tuple[float, float]:
    """Shares of shapes whose medians are 5 % apart, and of those whose intervals are apart as well."""
    before = {row.key: row for row in one.rows if row.kind != "sentinel"}
    far = apart = count = 0
    for row in other.rows:
        if (old := before.get(row.key)) is None:
            continue
        count += 1
        if abs(row.median_ms / old.median_ms - 1) <= TOLERANCE:
            continue
        far += 1
        low, high = median_interval(old.samples_ms)
        low_after, high_after = median_interval(row.samples_ms)
        apart += high < low_after or high_after < low
    return far / count, apart / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="quick")
    parser.add_argument("--model", default="", help="target (default: the bundled one)")
    parser.add_argument("--budget-minutes", type=float, help="for each profile")
    parser.add_argument("--tiny", action="store_true", help="a few shapes only")
    parser.add_argument("--keep", type=Path, help="folder to keep the three profiles in")
    options = vars(parser.parse_args())
    keep = options.pop("keep")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        runs = [run(name, folder, options) for name in ("first", "second")]
        runs.append(run("hogged", folder, options, hogs=os.cpu_count() or 1))
        one, other = load_server(folder / "first"), load_server(folder / "second")
        found = diff_profiles(one, other, TOLERANCE)
        far, apart = plain_rules(one, other)
    print(f"{'':10}{'rows':>6}{'noisy':>7}{'drift':>7}{'announced':>11}{'actual':>8}{'ratio':>7}  flag")
    for each in runs:
        print(
            f"{each.name:10}{each.rows:>6}{each.noisy:>7}{each.marked:>7}"
            f"{format_duration(each.expected_s):>11}{format_duration(each.seconds):>8}{each.ratio:>7.2f}"
            f"  {'drift' if each.drifted else '-'}"
        )
    print(
        f"\nfirst against second: {len(found.changed)} of {len(found.rows)} shapes changed "
        f"({found.changed_share:.1%}); medians 5 % apart: {far:.1%}, intervals apart as well: "
        f"{apart:.1%}; sentinel {found.sentinel_ratio:.3f}, pace divided out {found.slowdown:.3f}"
    )
    goals = {
        "changed": found.changed_share <= CHANGED,
        "eta": all(abs(each.ratio - 1) <= ETA for each in runs[:2]),
        "hog_seen": runs[2].drifted and runs[2].marked > 0,
        "quiet_unflagged": not any(each.drifted for each in runs[:2]),
    }
    for name, met in goals.items():
        print(f"{name:16} {'met' if met else 'MISSED'}")
    document = {
        "runs": [{**asdict(each), "ratio": each.ratio} for each in runs],
        "changed_share": found.changed_share,
        "plain_far": far,
        "plain_apart": apart,
        "sentinel_ratio": found.sentinel_ratio,
        "slowdown": found.slowdown,
        "goals": goals,
        "minutes": (time.monotonic() - begin) / 60,
    }
    print(json.dumps(document))
    sys.exit(0 if all(goals.values()) else 1)


if __name__ == "__main__":
    main()
