"""A profiler process that is killed repeatedly loses no measured block."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from wispprof.artifacts import RowJournal, load_server
from wispprof.artifacts.rows import decode_row
from wispprof.profiling import server_profiler
from wispprof.profiling.shape_grid import Axes
from wispprof.settings import profiler_settings
from wispprof.settings.profiler_settings import Output, SweepSettings

KILLS = 2
# Imported once and inherited by every process: a model's own module takes longer than its profile.
PRELOAD = ["wispprof.profiling.server_profiler", "transformers.models.llama.modeling_llama"]


def measure(path: Path, resume: bool, orders: Any) -> None:
    """Run the profiler; sends the order of each block once it is on disk."""
    # Times of so small a model are all overhead; the physics checks have their own tests.
    server_profiler.check_physics = lambda rows, model: type("Passed", (), {"as_dict": lambda self: {}})()
    append = RowJournal.append

    def appended(journal: RowJournal, row: Any) -> None:
        append(journal, row)
        orders.send(row.order)

    RowJournal.append = appended  # type: ignore[method-assign]
    settings = profiler_settings.ServerProfilerSettings(
        shape="tiny-llama",
        device="cpu",
        axes=Axes(items=(1, 3), new=(1, 4), cached=(8, 32), chunk=(16,), mixed_items=(2,)),
        kv_tokens=600,
        sweep=SweepSettings(min_samples=6, max_samples=6, target=0.9, sentinel_every=4),
        output=Output(path, resume=resume),
    )
    server_profiler.profile_server(settings)


def blocks(journal: Path) -> dict[int, tuple[str, tuple[float, ...]]]:
    """Order → (key, samples) of every whole line."""
    whole = [line for line in journal.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
    rows = [decode_row(line, "server", "journal") for line in whole[1:]]
    return {row.order: (row.key, row.samples_ms) for row in rows}


def test_killed_at_random_blocks_and_resumed(tmp_path: Path) -> None:
    """Every key once, every block's samples in their row, no block measured twice."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    generator = random.Random(7)
    journal = tmp_path / "p.journal.jsonl"
    kept: dict[int, tuple[str, tuple[float, ...]]] = {}
    for attempt in range(KILLS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(tmp_path / "p", attempt > 0, sender))
        process.start()
        sender.close()
        for _ in range(generator.randint(1, 5)):
            receiver.recv()  # EOFError: it ended before it could be killed
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = blocks(journal)
        assert len(now) > len(kept)
        assert kept.items() <= now.items()  # a resumed run changes nothing that is there
        kept = now
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(tmp_path / "p", True, sender))
    process.start()
    sender.close()
    made = set()
    while True:
        try:
            made.add(receiver.recv())
        except EOFError:
            break
    process.join()
    assert process.exitcode == 0
    assert not journal.exists()
    assert not made & kept.keys()

    rows = [row for row in load_server(tmp_path / "p").rows if row.kind != "sentinel"]
    assert len({row.key for row in rows}) == len(rows) == 8 + 1 + 2
    by_key = {row.key: row for row in rows}
    for row in rows:
        assert len(row.samples_ms) + len(row.set_aside_ms) == 6
    for key, samples in kept.values():
        if key in by_key:  # reference measurements are not
            have = Counter((*by_key[key].samples_ms, *by_key[key].set_aside_ms))
            assert not Counter(samples) - have, f"samples of {key} were lost"
