"""What the server's page costs: engine time, processor time and bytes, with and without somebody looking.

    python benchmarks/server_page.py                # 200 sessions at 20 ms a step; 0 and 1 viewers, in turns
    python benchmarks/server_page.py --viewers 0 1 4 --step-ms 50

Physics. The engine sleeps for a fixed time, as in live_edges.py, so what a cycle takes beyond that is the
host's. A viewer asks as the page does: once a second, gzip, only what it does not have. Its bytes are
counted on the wire, headers included. Turns alternate, so that a slow minute meets all of them.

``cycle``: start of a step to the start of the next, over the engine's time: median and mean. ``cpu``: share
of one core, engine process, then front. ``kB/s``: to one viewer; ``plain``: before gzip. ``answer``: median
ms of a request. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from live_edges import HERE, WARM_S, cpu_seconds, family


class Viewer(threading.Thread):
    """Asks once a second until told to end."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.bytes = self.raw_bytes = 0
        self.answers_ms: list[float] = []
        self.over = threading.Event()
        self._port = port
        self._since = 0

    def run(self) -> None:
        while not self.over.is_set():
            begin = time.monotonic()
            self._ask()
            self.answers_ms.append((time.monotonic() - begin) * 1000.0)
            self.over.wait(max(0.0, begin + 1.0 - time.monotonic()))

    def _ask(self) -> None:
        request = (
            f"GET /dashboard?since={self._since} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Accept-Encoding: gzip\r\nConnection: close\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(request.encode())
            data = b""
            while part := connection.recv(1 << 16):
                data += part
        head, _, body = data.partition(b"\r\n\r\n")
        assert b" 200 " in head, head
        plain = gzip.decompress(body)
        self.bytes += len(data)
        self.raw_bytes += len(plain)
        self._since = json.loads(plain)["steps"]["next"]


def run(step_ms: float, edges: int, viewers: int, seconds: float) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        seen, got = Path(folder, "engine.json"), Path(folder, "edges.json")
        server = subprocess.Popen(
            [sys.executable, "-m", "_live.scripted_server", str(step_ms), str(max(64, edges)), str(seen)],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            fleet = subprocess.Popen(
                [sys.executable, "-m", "_live.edges", port, str(edges), str(2 * WARM_S + seconds), str(got)],
                env=environment,
                cwd=folder,
                stdout=subprocess.PIPE,
            )
            assert fleet.stdout is not None
            fleet.stdout.readline()
            looking = [Viewer(int(port)) for _ in range(viewers)]
            for one in looking:
                one.start()
            time.sleep(WARM_S)
            begin, processes = time.monotonic(), family(server.pid)
            before = [cpu_seconds(pid) for pid in processes]
            bytes_before = [(one.bytes, one.raw_bytes) for one in looking]
            time.sleep(seconds)
            end = time.monotonic()
            spent = [cpu_seconds(pid) - start for pid, start in zip(processes, before, strict=True)]
            sent = [
                (one.bytes - a, one.raw_bytes - b) for one, (a, b) in zip(looking, bytes_before, strict=True)
            ]
            for one in looking:
                one.over.set()
            if fleet.wait():
                raise SystemExit("the edges failed")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        steps = [at for at, *_ in json.loads(seen.read_text())["steps"] if begin <= at <= end]
    cycles = [(b - a) * 1000.0 / step_ms for a, b in pairwise(steps)]
    answers = [ms for one in looking for ms in one.answers_ms]
    return {
        "viewers": viewers,
        "cycle": round(statistics.median(cycles), 4),
        "cycle_mean": round(statistics.mean(cycles), 4),
        "cpu": [round(one / (end - begin), 4) for one in spent],
        "kb_per_s": round(max((wire for wire, _ in sent), default=0) / (end - begin) / 1000.0, 2),
        "plain_kb_per_s": round(max((raw for _, raw in sent), default=0) / (end - begin) / 1000.0, 2),
        "answer_ms": round(statistics.median(answers), 1) if answers else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--viewers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    rows = []
    print(f"{options.sessions} sessions, {options.step_ms:g} ms a step")
    print(
        f"{'turn':>4} {'viewers':>7} {'cycle':>7} {'mean':>7} {'kB/s':>6} {'plain':>6} {'answer ms':>9}  cpu"
    )
    for turn in range(options.turns):
        for viewers in options.viewers if turn % 2 == 0 else reversed(options.viewers):
            row = run(options.step_ms, options.sessions, viewers, options.seconds)
            rows.append({"turn": turn} | row)
            shown = row["answer_ms"]
            print(
                f"{turn:>4} {viewers:>7} {row['cycle']:>7.4f} {row['cycle_mean']:>7.4f} "
                f"{row['kb_per_s']:>6.1f} {row['plain_kb_per_s']:>6.1f} "
                f"{'–' if shown is None else shown:>9}  {row['cpu']}",
                flush=True,
            )
    means = {
        viewers: statistics.mean(row["cycle_mean"] for row in rows if row["viewers"] == viewers)
        for viewers in options.viewers
    }
    first = options.viewers[0]
    for viewers, mean in means.items():
        print(
            f"{viewers} viewers: mean cycle {mean:.4f}, {100 * (mean / means[first] - 1):+.2f} % of {first}"
        )
    document = {"benchmark": "server_page", "cores": os.cpu_count(), "rows": rows}
    print(json.dumps(document | {"step_ms": options.step_ms, "sessions": options.sessions}))


if __name__ == "__main__":
    main()
