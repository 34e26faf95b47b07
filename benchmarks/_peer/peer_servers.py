"""The servers that are compared, each as its own defaults run it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from wispprof.artifacts import bundled_model

TARGET, DRAFT = bundled_model("target"), bundled_model("draft")
SYSTEMS = {
    "a": "vLLM, undrafted",
    "b": "vLLM, draft model on the server",
    "c": "vLLM, n-grams",
    "d": "wispprof on vLLM, server-only",
    "e": "wispprof on vLLM, drafting edges",
    "f": "vLLM, undrafted, synchronous scheduling",
}
CONTEXT, START_S = 2048, 300.0
OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""The OpenMP library that vLLM asks for on CPUs; its packages bring it."""


@dataclass(frozen=True)
class ServerChoice:
    """What all servers share. ``speculation``: drafts of vLLM's own; ``estimator``: of wispprof."""

    max_sessions: int
    speculation: int = 4
    eager: bool = False
    estimator: Path | None = None


def command(system: str, port: int, choice: ServerChoice) -> list[str]:
    """The command line of a server."""
    if system in "de":
        policy = "server-only" if system == "d" else "wispprof"
        return [
            *(sys.executable, "-m", "wispprof", "serve", "--engine", "vllm", "--port", str(port)),
            *("--policy", policy, "--kv-tokens", str(1 << 15), "--admit", "all", "--log-level", "warning"),
            *("--max-context", str(CONTEXT - 1), "--dtype", "float32"),
            *("--max-items", str(choice.max_sessions)),
            *(("--vllm-arg", "enforce_eager=true") if choice.eager else ()),
            *(("--estimator", str(choice.estimator)) if choice.estimator else ()),
        ]
    speculation = {
        "b": {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": choice.speculation},
        "c": {"method": "ngram", "num_speculative_tokens": choice.speculation, "prompt_lookup_max": 4},
    }.get(system)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", TARGET),
        *("--port", str(port), "--dtype", "float32", "--max-model-len", str(CONTEXT)),
        *("--max-num-seqs", str(choice.max_sessions), "--kv-cache-memory-bytes", str(1 << 29)),
        *("--served-model-name", "target"),
        *(("--speculative-config", json.dumps(speculation)) if speculation else ()),
        *(("--no-async-scheduling",) if system == "f" else ()),
        *(("--enforce-eager",) if choice.eager else ()),
    ]


@dataclass(frozen=True)
class PeerServer:
    """A server that answers."""

    system: str
    address: str
    process: psutil.Popen

    def answers(self) -> bool:
        """Whether it is healthy."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://{self.address}/health", timeout=2).status_code == 200
        return False

    def cpu_s(self) -> float:
        """CPU seconds of the process and its children, so far."""
        total = 0.0
        for one in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                total += times.user + times.system
        return total


@contextlib.contextmanager
def serving(systems: Sequence[str], choice: ServerChoice, logs: Path) -> Iterator[dict[str, PeerServer]]:
    """Servers of these systems, started together, until the block ends. One that does not start is left out,
    and its log is printed."""
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ}
    if OPENMP.exists():
        environment.setdefault("LD_PRELOAD", str(OPENMP))
    with contextlib.ExitStack() as stack:
        started = {}
        for system in systems:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            log = stack.enter_context((logs / f"{system}.log").open("w"))
            process = psutil.Popen(
                command(system, port, choice), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            started[system] = PeerServer(system, f"127.0.0.1:{port}", process)
        stack.callback(_stop, list(started.values()))
        deadline = time.monotonic() + START_S
        for system, server in list(started.items()):
            while system in started and not server.answers():
                if server.process.poll() is not None or time.monotonic() > deadline:
                    print(f"({system}) did not start: {(logs / f'{system}.log').read_text()[-3000:]}")
                    del started[system]
                time.sleep(0.5)
        yield started


def _stop(servers: list[PeerServer]) -> None:
    """End servers and their children."""
    processes = [p for one in servers for p in (one.process, *one.process.children(recursive=True))]
    for one in servers:
        one.process.terminate()
    _, left = psutil.wait_procs(processes, timeout=20)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
