"""A real server in a process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from wispprof.errors import WispprofError

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A ``wispprof serve`` process on a known port. ``options``: more of its command line."""

    def __init__(self, *options: str) -> None:
        self._options = options
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = int(taken.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["serve", "--port", str(self.port), "--admit", "all", "--log-level", "error"]
        command += self._options
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def ready(self, seconds: float = 180.0) -> None:
        """Wait until it answers; raises where it ended or is silent for so long."""
        assert self._process is not None
        until = time.monotonic() + seconds
        async with httpx.AsyncClient(trust_env=False) as http:
            while time.monotonic() < until and self._process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(f"http://127.0.0.1:{self.port}/health")).is_success:
                        return
                await asyncio.sleep(0.1)
        raise WispprofError("The server did not start.", "Run `wispprof serve` to see why.")

    def signal_fronts(self, number: int) -> int:
        """Send a signal to the processes that hold the connections; returns how many there are."""
        return self._signal(number, fronts=True)

    def signal_engine(self, number: int) -> int:
        """Send a signal to the engine process; returns how many there are."""
        return self._signal(number, fronts=False)

    def _signal(self, number: int, fronts: bool) -> int:
        assert self._process is not None
        pid = self._process.pid
        sent = 0
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if (b"front_process" in Path(f"/proc/{child}/cmdline").read_bytes()) is fronts:
                os.kill(int(child), number)
                sent += 1
        return sent

    def kill(self) -> None:
        """``kill -9``: no farewell."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
