"""vLLM alone beside wispprof on vLLM, one after another on one machine: ``python benchmarks/vllm_peer.py``.

(a) vLLM's API server, undrafted; (b) with its draft model on the server; (c) with n-gram speculation;
(d) wispprof on vLLM, server-only over HTTP; (e) wispprof on vLLM with replayed drafting edges.
All serve the same target and prompts to closed fleets of devices with two SLO classes. Speculation on the
server pays with the server's compute; edges pay with their own, and with the link. Prints a table and one
JSON line. Needs an environment with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from wispprof.artifacts import AcceptanceTrace, bundled_model, load_trace, save_trace
from wispprof.bench import bench
from wispprof.profiling.acceptance_trace import trace_pair
from wispprof.settings.fleet_settings import BenchSettings
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.devices import device_of

TARGET, DRAFT = bundled_model("target"), bundled_model("draft")
SYSTEMS = {
    "a": "vLLM, undrafted",
    "b": "vLLM, draft model on the server",
    "c": "vLLM, n-grams",
    "d": "wispprof on vLLM, server-only",
    "e": "wispprof on vLLM, drafting edges",
}
CONTEXT, START_S = 2048, 300.0


def command(system: str, port: int, eager: bool) -> list[str]:
    """The command line of a server."""
    if system in "de":
        more = ["--vllm-arg", "enforce_eager=true"] if eager else []
        policy = "server-only" if system == "d" else "wispprof"
        return [
            *(sys.executable, "-m", "wispprof", "serve", "--engine", "vllm", "--port", str(port)),
            *(
                "--policy",
                policy,
                "--kv-tokens",
                str(1 << 16),
                "--admit",
                "all",
                "--log-level",
                "warning",
                *more,
            ),
        ]
    speculation = {
        "b": {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 4},
        "c": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4},
    }.get(system)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TARGET, "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-num-seqs", "64"),
        *("--kv-cache-memory-bytes", str(1 << 28), "--served-model-name", "target"),
        *(("--speculative-config", json.dumps(speculation)) if speculation else ()),
        *(("--enforce-eager",) if eager else ()),
    ]


@contextlib.contextmanager
def serving(system: str, eager: bool, log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server of a system: its address and process, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ}
    with log.open("w") as out:
        process = subprocess.Popen(
            command(system, port, eager), stdout=out, stderr=subprocess.STDOUT, env=environment
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


async def over_http(
    address: str, trace: AcceptanceTrace, args: argparse.Namespace, devices: int
) -> dict[str, Any]:
    """A closed fleet of HTTP clients, two SLO classes in turns."""
    done: list[tuple[float, float, bool, bool]] = []

    async def one(client: httpx.AsyncClient, device: int) -> None:
        slo = args.slo[device % len(args.slo)]
        for number in range(args.requests):
            path = trace.paths[(device * args.requests + number) % len(trace.paths)]
            count = min(args.tokens, len(path.path))
            body = {
                "model": "target",
                "prompt": list(path.prompt),
                "max_tokens": count,
                "temperature": 0,
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
            done.append(((first - sent) * 1000, tpot_ms, tpot_ms <= 1000 / slo, exact))

    begin = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(one(client, device) for device in range(devices)))
    seconds = time.perf_counter() - begin
    return {
        "attainment": sum(d[2] for d in done) / len(done),
        "goodput": sum(args.tokens for d in done if d[2]) / seconds,
        "ttft_ms": statistics.median(d[0] for d in done),
        "tpot_ms": statistics.median(d[1] for d in done),
        "exact": sum(d[3] for d in done) / len(done),
    }


def over_edges(
    address: str, trace: AcceptanceTrace, args: argparse.Namespace, devices: int
) -> dict[str, Any]:
    """The same fleet as drafting edges."""
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
    figures = result.figures
    return {
        "attainment": figures["attainment"],
        "goodput": figures["goodput_tokens_per_s"],
        "ttft_ms": figures["ttft_p50_ms"],
        "tpot_ms": figures["tpot_p50_ms"],
        "exact": sum(one.lossless for one in result.results) / max(1, len(result.results)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", default="abcde", help="Letters of the systems to run.")
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 16], help="Loads, in devices.")
    parser.add_argument("--requests", type=int, default=2, help="Requests per device.")
    parser.add_argument("--tokens", type=int, default=48, help="Tokens per request.")
    parser.add_argument("--slo", type=float, nargs="+", default=[10.0, 40.0], help="Classes, tokens/s.")
    parser.add_argument("--device", default="fast", help="Kind of a drafting device.")
    parser.add_argument("--rtt", type=float, default=20.0, help="Round trip of the edges, ms.")
    parser.add_argument("--trace", type=Path, help="Acceptance trace of the pair; default: taken now.")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation.")
    parser.add_argument("--out", type=Path, default=Path("out/vllm-peer"), help="Folder of logs and trace.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.trace is None:
        args.trace = args.out / "trace.jsonl"
        taken = trace_pair(TraceSettings(count=12, prompt_tokens=96, path_tokens=args.tokens))
        save_trace(taken, args.trace)
    trace = load_trace(args.trace)
    rows = []
    for system in args.systems:
        with serving(system, args.eager, args.out / f"{system}.log") as (address, process):
            asyncio.run(over_http(address, trace, argparse.Namespace(**{**vars(args), "requests": 1}), 2))
            for devices in args.devices:
                before, begin = cpu_s(process), time.perf_counter()
                if system == "e":
                    figures = over_edges(address, trace, args, devices)
                else:
                    figures = asyncio.run(over_http(address, trace, args, devices))
                used = cpu_s(process) - before
                tokens = devices * args.requests * args.tokens
                row = {
                    "system": system,
                    "devices": devices,
                    **figures,
                    "cpu_ms_per_token": 1000 * used / tokens,
                }
                rows.append({**row, "seconds": time.perf_counter() - begin})
                print(
                    f"({system}) {SYSTEMS[system]:34s} {devices:4d} devices  "
                    f"attainment {row['attainment']:5.0%}  "
                    f"goodput {row['goodput']:7.1f} tokens/s  TTFT {row['ttft_ms']:7.0f} ms  "
                    f"TPOT {row['tpot_ms']:6.1f} ms  server CPU {row['cpu_ms_per_token']:5.1f} ms/token  "
                    f"exact {row['exact']:4.0%}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "vllm_peer", "load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
