"""vLLM alone beside wispprof on vLLM, one after another on one machine: ``python benchmarks/vllm_peer.py``.

(a) vLLM's API server, undrafted; (b) with its draft model on the server; (c) with n-gram speculation;
(d) wispprof on vLLM, server-only over HTTP; (e) wispprof on vLLM with replayed drafting edges, whose drafts
come from the draft model and from lookup. All serve the same target and prompts to closed fleets of devices
with SLO classes.

Physics. Speculation on the server pays with the server's compute; edges pay with their own, and with the
link. A small greedy model repeats itself: n-grams are then right without any model, which `repeats` tells
(share of the target's 4-grams that it has written before). With a temperature it does not. On few cores a
step costs nearly as much per drafted token as per session, so drafts pay while there are few sessions.
Clients run on the same cores as the server. A request counts towards goodput if its tokens after the first
came at its SLO's speed. Prints a table and one JSON line. Needs an environment with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from wispprof.artifacts import AcceptanceTrace, bundled_model, load_trace, save_trace
from wispprof.bench import bench
from wispprof.profiling.acceptance_trace import trace_pair
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.devices import device_of
from wispprof.types import Sampling

TARGET, DRAFT = bundled_model("target"), bundled_model("draft")
SYSTEMS = {
    "a": "vLLM, undrafted",
    "b": "vLLM, draft model on the server",
    "c": "vLLM, n-grams",
    "d": "wispprof on vLLM, server-only",
    "e": "wispprof on vLLM, drafting edges",
}
CONTEXT, START_S = 2048, 300.0
OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"
"""The OpenMP library that vLLM asks for on CPUs; its packages bring it."""


def command(system: str, port: int, eager: bool, estimator: Path | None) -> list[str]:
    """The command line of a server."""
    if system in "de":
        more = ["--vllm-arg", "enforce_eager=true"] if eager else []
        policy = "server-only" if system == "d" else "wispprof"
        return [
            *(sys.executable, "-m", "wispprof", "serve", "--engine", "vllm", "--port", str(port)),
            *("--policy", policy, "--kv-tokens", str(1 << 16), "--admit", "all", "--log-level", "warning"),
            *("--max-context", str(CONTEXT - 1), "--dtype", "float32", *more),
            *(("--estimator", str(estimator)) if estimator else ()),
        ]
    speculation = {
        "b": {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 4},
        "c": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    }.get(system)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", TARGET),
        *("--port", str(port), "--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64"),
        *("--kv-cache-memory-bytes", str(1 << 28), "--served-model-name", "target"),
        *(("--speculative-config", json.dumps(speculation)) if speculation else ()),
        *(("--enforce-eager",) if eager else ()),
    ]


@contextlib.contextmanager
def serving(
    system: str, eager: bool, estimator: Path | None, log: Path
) -> Iterator[tuple[str, psutil.Process]]:
    """A server of a system: its address and process, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ}
    if OPENMP.exists():
        environment.setdefault("LD_PRELOAD", str(OPENMP))
    with log.open("w") as out:
        process = subprocess.Popen(
            command(system, port, eager, estimator), stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"({system}) did not start: {log.read_text()[-2000:]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.5)
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and its children, so far."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


class Load(NamedTuple):
    """One load: who asks, and for what."""

    trace: AcceptanceTrace
    devices: int
    args: argparse.Namespace


async def over_http(address: str, load: Load) -> dict[str, float]:
    """A closed fleet of HTTP clients, the SLO classes in turns."""
    trace, devices, args = load
    done: list[tuple[int, float, float, bool, bool]] = []
    sampling = trace.sampling

    async def one(client: httpx.AsyncClient, device: int) -> None:
        slo = args.slo[device % len(args.slo)]
        for number in range(args.requests):
            path = trace.paths[(device + number * devices) % len(trace.paths)]
            count = min(args.tokens, len(path.path))
            body = {
                "model": "target",
                "prompt": list(path.prompt),
                "max_tokens": count,
                "temperature": sampling.temperature,
                # No seed: one for each request slows vLLM's sampler down.
                "stream": True,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            sent = time.perf_counter()
            first, tokens = 0.0, []
            async with client.stream("POST", f"http://{address}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    first = first or time.perf_counter()
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += choice.get("token_ids") or []
            tpot_ms = (time.perf_counter() - first) * 1000 / max(1, count - 1)
            exact = tokens == list(path.path[:count])
            done.append((count, (first - sent) * 1000, tpot_ms, tpot_ms <= 1000 / slo, exact))

    begin = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client, device) for device in range(devices)))
    seconds = time.perf_counter() - begin
    return {
        "attainment": sum(d[3] for d in done) / len(done),
        "goodput": sum(d[0] for d in done if d[3]) / seconds,
        "tokens_per_s": sum(d[0] for d in done) / seconds,
        "ttft_ms": statistics.median(d[1] for d in done),
        "tpot_ms": statistics.median(d[2] for d in done),
        "exact": sum(d[4] for d in done) / len(done),
        "accepted": math.nan,
    }


def over_edges(address: str, load: Load) -> dict[str, float]:
    """The same fleet as drafting edges."""
    trace, devices, args = load
    settings = BenchSettings(
        system="wispprof",
        device=(device_of(args.device),),
        link=LinkModel(rtt_ms=args.rtt),
        devices=devices,
        tokens_per_s=tuple(args.slo),
        requests=args.requests,
        max_new=args.tokens,
        ramp_ms=0.0,
    )
    result = bench(settings, address, trace)
    if result.errors:
        raise SystemExit(f"requests of edges failed: {result.errors}")
    figures = result.figures
    met = [one.stats.tpot_ms <= 1000 / one.slo.tokens_per_s for one in result.results]
    good = sum(one.stats.tokens for one, ok in zip(result.results, met, strict=True) if ok)
    return {
        "attainment": sum(met) / len(met),
        "goodput": good / figures["seconds"],
        "tokens_per_s": figures["tokens_per_s"],
        "ttft_ms": figures["ttft_p50_ms"],
        "tpot_ms": figures["tpot_p50_ms"],
        "exact": sum(one.lossless for one in result.results) / max(1, len(result.results)),
        "accepted": figures["accepted_per_round"],
    }


def traces_of(args: argparse.Namespace) -> dict[float, AcceptanceTrace]:
    """An acceptance trace of the pair for each temperature; taken if it is not there."""
    traces = {}
    for temperature in args.temperature:
        file = args.out / f"trace-{temperature:g}.jsonl"
        if not file.exists():
            settings = TraceSettings(
                count=24,
                prompt_tokens=96,
                path_tokens=args.tokens,
                drafter="both",
                sampling=Sampling(temperature, seed=1),
            )
            save_trace(trace_pair(settings), file)
        traces[temperature] = load_trace(file)
    return traces


def repeats(trace: AcceptanceTrace) -> float:
    """Share of the 4-grams of the target's texts that were in the same text before."""
    seen = total = 0
    for path in trace.paths:
        grams = list(zip(*(path.path[i:] for i in range(4)), strict=False))
        seen, total = seen + len(grams) - len(set(grams)), total + len(grams)
    return seen / max(1, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", default="abcde", help="Letters of the systems to run.")
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 12, 24], help="Loads, in devices.")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.8, 0.0])
    parser.add_argument("--requests", type=int, default=3, help="Requests per device.")
    parser.add_argument("--tokens", type=int, default=64, help="Tokens per request.")
    parser.add_argument("--slo", type=float, nargs="+", default=[20.0, 40.0], help="Classes, tokens/s.")
    parser.add_argument("--device", default="fast", help="Kind of a drafting device.")
    parser.add_argument("--rtt", type=float, default=20.0, help="Round trip of the edges, ms.")
    parser.add_argument("--estimator", type=Path, help="Of (d) and (e); default: learned while serving.")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation.")
    parser.add_argument("--out", type=Path, default=Path("out/vllm-peer"), help="Folder of logs and traces.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    traces = traces_of(args)
    for letter in args.systems:
        print(f"({letter}) {SYSTEMS[letter]}")
    for temperature, trace in traces.items():
        print(f"temperature {temperature:g}: repeats {repeats(trace):.0%} of the target's 4-grams")
    rows = []
    for system in args.systems:
        log = args.out / f"{system}.log"
        with serving(system, args.eager, args.estimator, log) as (address, process):
            # Once without counting: the first steps of a shape compile, and a policy learns.
            warm = argparse.Namespace(**{**vars(args), "requests": 1})
            for trace in traces.values():
                fleet_of(system)(address, Load(trace, max(args.devices), warm))
            for temperature, trace in traces.items():
                for devices in args.devices:
                    before, mine = cpu_s(process), time.process_time()
                    begin = time.perf_counter()
                    figures = fleet_of(system)(address, Load(trace, devices, args))
                    used, seconds = cpu_s(process) - before, time.perf_counter() - begin
                    row = {
                        "system": system,
                        "temperature": temperature,
                        "devices": devices,
                        **figures,
                        "server_cores": used / seconds,
                        "client_cores": (time.process_time() - mine) / seconds,
                        "cpu_ms_per_token": 1000 * used / (seconds * figures["tokens_per_s"]),
                        "seconds": seconds,
                    }
                    rows.append(row)
                    show(row)
    print(json.dumps({"benchmark": "vllm_peer", "load": os.getloadavg()[0], "rows": rows}))


def fleet_of(system: str) -> Callable[[str, Load], dict[str, float]]:
    """What loads a system."""
    return over_edges if system == "e" else lambda address, load: asyncio.run(over_http(address, load))


def show(row: dict[str, Any]) -> None:
    unseeded = row["temperature"] and row["system"] != "e"
    exact = "" if unseeded else f"  exact {row['exact']:.0%}"
    accepted = f"  {row['accepted']:.2f} accepted a round" if row["system"] == "e" else ""
    print(
        f"T {row['temperature']:3g} ({row['system']}) {row['devices']:3d} devices  "
        f"attainment {row['attainment']:5.0%}  goodput {row['goodput']:7.1f} of {row['tokens_per_s']:7.1f} "
        f"tokens/s  TTFT {row['ttft_ms']:5.0f} ms  TPOT {row['tpot_ms']:6.2f} ms  CPU: server "
        f"{row['cpu_ms_per_token']:5.2f} ms/token, {row['server_cores']:.2f} cores, clients "
        f"{row['client_cores']:.2f}{accepted}{exact}",
        flush=True,
    )


if __name__ == "__main__":
    main()
