"""What an edge gains from its controller, its drafting ahead and its drafter, in one run.

    python benchmarks/edge.py                        # takes a small trace of the bundled pair first
    python benchmarks/edge.py --trace pair.trace.jsonl --quick

Three tables and one JSON line.

1. tokens/s, wasted drafting and accepted drafts per round for every controller, at round trips of 5, 20,
   50 and 100 ms and three device speeds, with the best fixed k chosen in hindsight per cell, server-only
   serving, and a clairvoyant that never drafts a token that would be rejected (the better of its round and
   its stream form): what better predictors could still win.
2. proactive drafting on and off: speed, hit rate, and acceptance (which must not fall: the splice is right).
3. a draft step of the bundled draft model against its bare forward, taking turns: what features, sampling
   and bookkeeping cost on top.

The physics. A round costs k draft steps, the link's round trip, and the server's step, and yields the
accepted drafts plus one token; server-only serving costs one step and no round trip per token, because the
server does not wait for the edge. So rounds win by acceptance and lose by the round trip, and a stream,
which sends drafts without waiting, can only gain: a draft that arrives late costs the server nothing.

Tables 1 and 2 run the real edge loop, wire frames, session books and policies against the trace's own
drafts in virtual time: exact, repeatable, and free of this machine's noise. The server's step costs
``--fixed`` plus ``--row`` ms per new token and is otherwise idle (``--devices`` share it). Table 3 is
measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wispprof.artifacts import bundled_path, load_trace
from wispprof.artifacts.rows import AcceptanceTrace, TracePath
from wispprof.drafters.replay import ReplayDrafter
from wispprof.edge import EdgeClient, Generation, GenerationRequest, RequestStats, TimedWorker
from wispprof.edge.connection import Traffic
from wispprof.errors import WispprofError
from wispprof.policies import make_batch_policy, make_controller
from wispprof.policies.interface import Controller, RoundContext
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.link_emulator import emulate_link
from wispprof.testing.virtual_time import run_virtual
from wispprof.types import (
    BatchCost,
    BatchShape,
    DraftFeatures,
    Sampling,
    StepInput,
    StepTimeEstimator,
    VerifyResult,
)

RTTS = (5.0, 20.0, 50.0, 100.0)
DEVICES = {"fast": 4.0, "medium": 16.0, "slow": 60.0}
FIXED = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Cost(StepTimeEstimator):
    """Step time of the emulated server; a step estimator that is right."""

    fixed_ms: float
    row_ms: float
    coverage: float = 1.0

    def start(self) -> Rows:
        return Rows(self, 0)

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        ms = self.fixed_ms + self.row_ms * shape.new_tokens if shape.items else 0.0
        return ms, ms


@dataclass(frozen=True)
class Rows(BatchCost):
    cost: Cost
    new: int

    @property
    def p50_ms(self) -> float:
        return self.cost.fixed_ms + self.cost.row_ms * self.new if self.new else 0.0

    @property
    def bound_ms(self) -> float:
        return self.p50_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> Rows:
        return Rows(self.cost, self.new + new)


class TraceEngine:
    """A target that says what the trace recorded. Verifies like any other: by comparing."""

    def __init__(self, paths: tuple[TracePath, ...]) -> None:
        self._paths = {path.prompt: path.prompt + path.path for path in paths}
        self._held: dict[str, list[int]] = {}

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None:
        self._held[session] = []

    def step(self, feeds: list[StepInput]) -> list[VerifyResult]:
        return [self._decide(feed) for feed in feeds]

    def _decide(self, feed: StepInput) -> VerifyResult:
        held, tokens = self._held[feed.session], list(feed.tokens)
        sure = len(tokens) - feed.drafts
        held += tokens[:sure]
        if not feed.needs_logits:
            return VerifyResult(feed.session, 0, ())
        text = next(t for p, t in self._paths.items() if tuple(held[: len(p)]) == p)
        out = [text[len(held)]]
        for draft in tokens[sure:]:
            if draft != out[-1]:
                break
            held.append(draft)
            out.append(text[len(held)])
        return VerifyResult(feed.session, len(out) - 1, tuple(out))

    def rollback(self, session: str, length: int) -> None:
        del self._held[session][length:]

    def close(self, session: str) -> None:
        del self._held[session]


class Clairvoyant:
    """Knows the trace: begins rounds with as many drafts as will be accepted, streams while right."""

    name = "clairvoyant"

    def __init__(self, path: TracePath, generation: list[Generation], stream: bool) -> None:
        self._path = path
        self._generation = generation
        self._stream = stream
        self._left = 0

    def begin(self, context: RoundContext) -> int:
        edge = self._generation[0].path
        row = edge.length - len(self._path.prompt)
        ahead = int(self._path.accepted[row]) if row < len(self._path.accepted) else 0
        held = [d.token for d in edge.drafts]
        first = edge.committed_len - len(self._path.prompt)
        wrong = list(self._path.path[first : first + len(held)]) != held
        self._left = 0 if wrong else ahead + (0 if self._stream else len(held))
        return self._left

    def go_on(self, depth: int, features: DraftFeatures) -> bool:
        return depth + 1 < self._left

    def acceptance_prob(self) -> float:
        return 1.0

    def finish(self, drafted: int, accepted: int) -> None:
        """Knows already."""


@dataclass(frozen=True)
class Arm:
    """One way of drafting on one kind of server."""

    name: str
    policy: str
    controller: str | None
    options: tuple[tuple[str, Any], ...] = ()
    drafting: DraftingSettings = DraftingSettings(proactive=0)  # noqa: RUF009


def arms() -> list[Arm]:
    ahead = DraftingSettings(proactive=8)
    found = [Arm("server-only", "server-only", None)]
    found += [Arm(f"fixed {k}", "fcfs", "fixed", (("k", k),)) for k in FIXED]
    found += [
        Arm("sled", "fcfs", "sled", (("k_max", 8),), ahead),
        Arm("wisp", "fcfs", "wisp", (("k_max", 8),)),
        Arm("wispprof round", "fcfs", "wispprof", (("stream", False),), ahead),
        Arm("wispprof stream", "wispprof", "wispprof"),
        Arm("clairvoyant round", "fcfs", "clairvoyant", (("stream", False),)),
        Arm("clairvoyant stream", "wispprof", "clairvoyant", (("stream", True),)),
    ]
    return found


@dataclass(frozen=True)
class Cell:
    tokens_per_s: float
    wasted_ms: float
    accepted: float
    hit_rate: float
    up_bytes: float
    down_bytes: float


def measure(arm: Arm, trace: AcceptanceTrace, rtt: float, draft_ms: float, args: Any) -> Cell:
    """Every path of the trace, ``args.devices`` at a time, over links of their own."""

    traffic = Traffic()

    async def main() -> list[RequestStats]:
        cost = Cost(args.fixed, args.row)
        engine = TraceEngine(trace.paths)
        server = InProcessServer(
            engine, make_batch_policy(arm.policy), cost, lambda shape: cost.predict(shape)[0]
        )
        turn = asyncio.Semaphore(args.devices)

        async def one(path: TracePath) -> RequestStats:
            async with turn, EdgeClient(connect) as client:
                request = GenerationRequest(path.prompt, min(args.tokens, len(path.path) - 1))
                own: list[Generation] = []
                worker, controller = _drafting(arm, path, own, draft_ms)
                own.append(Generation(client, request, worker, controller, arm.drafting))
                stats = await own[0].run()
                if own[0].output != path.path[: request.max_new]:
                    raise AssertionError(f"{arm.name} changed the text")
                traffic.add(client.traffic)
                return stats

        async with server:
            connect = emulate_link(server.connect, LinkSettings(LinkModel(rtt, args.jitter * rtt)))
            return list(await asyncio.gather(*(one(path) for path in trace.paths)))

    stats = run_virtual(main())
    tpot = statistics.fmean(s.tpot_ms for s in stats if s.tpot_ms)
    rounds = sum(s.rounds for s in stats)
    guesses = sum(s.proactive_guesses for s in stats)
    return Cell(
        1000.0 / tpot,
        statistics.fmean(s.wasted_ms for s in stats),
        sum(s.accepted for s in stats) / max(1, rounds),
        sum(s.proactive_hits for s in stats) / max(1, guesses),
        traffic.up_bytes / sum(s.tokens for s in stats),
        traffic.down_bytes / sum(s.tokens for s in stats),
    )


def _drafting(
    arm: Arm, path: TracePath, own: list[Generation], draft_ms: float
) -> tuple[TimedWorker, Controller] | tuple[None, None]:
    if arm.controller is None:
        return None, None
    options = dict(arm.options)
    controller: Controller = (
        Clairvoyant(path, own, **options)
        if arm.controller == "clairvoyant"
        else make_controller(arm.controller, **options)
    )
    return TimedWorker(ReplayDrafter([path]), lambda context: draft_ms), controller


# --- tables ---------------------------------------------------------------------------------------


def controllers(trace: AcceptanceTrace, args: Any) -> dict[str, Any]:
    rtts = (20.0, 100.0) if args.quick else RTTS
    cells: dict[tuple[float, str], dict[str, Cell]] = {}
    for rtt in rtts:
        for device, draft_ms in DEVICES.items():
            cells[rtt, device] = {a.name: measure(a, trace, rtt, draft_ms, args) for a in arms()}
            print(f"  {rtt:g} ms, {device}", file=sys.stderr)
    names = [a.name for a in arms() if not a.name.startswith("fixed")]
    names[1:1] = ["best fixed k"]
    print("\n1. tokens/s of one device (wasted drafting ms per request; accepted per round)\n")
    print(f"{'':20}" + "".join(f"{f'{r:g} ms {d}':>22}" for r, d in cells))
    shown: dict[str, Any] = {}
    for name in names:
        line = f"{name:20}"
        for key, by_arm in cells.items():
            fixed = max((c.tokens_per_s, n) for n, c in by_arm.items() if n.startswith("fixed"))[1]
            cell = by_arm[fixed if name == "best fixed k" else name]
            line += f"{cell.tokens_per_s:>9.1f} ({cell.wasted_ms:>5.0f};{cell.accepted:>4.1f})"
            shown.setdefault(f"{key[0]:g} {key[1]}", {})[name] = round(cell.tokens_per_s, 2)
        print(line)
    ratios, closed = [], []
    for by_name in shown.values():
        rival = max(by_name["best fixed k"], by_name["server-only"])
        ceiling = max(by_name["clairvoyant round"], by_name["clairvoyant stream"])
        ours = by_name["wispprof stream"]
        ratios.append(ours / rival)
        if ceiling > 1.02 * rival:
            closed.append((ours - rival) / (ceiling - rival))
    gap = statistics.fmean(closed) if closed else float("nan")
    wire = _on_the_wire(cells)
    print(
        f"\nwispprof stream / better of (best fixed k, server-only): least {min(ratios):.3f}, "
        f"mean {statistics.fmean(ratios):.3f}; share of the gap to the clairvoyant closed: {gap:.0%}"
    )
    return {"tokens_per_s": shown, "least_ratio": min(ratios), "gap_closed": gap, "wire": wire}


def _on_the_wire(cells: dict[tuple[float, str], dict[str, Cell]]) -> dict[str, Any]:
    """Print bytes per committed token, hello, opening frame (the prompt) and pings included."""
    print("\nbytes per committed token up / down (goal 40 / 40 at k = 4)\n")
    found: dict[str, Any] = {}
    for name in ("server-only", "fixed 4", "wispprof round", "wispprof stream"):
        line = f"{name:20}"
        for (rtt, device), by_arm in cells.items():
            cell = by_arm[name]
            line += f"{cell.up_bytes:>14.1f} /{cell.down_bytes:>6.1f}"
            both = [round(cell.up_bytes, 1), round(cell.down_bytes, 1)]
            found.setdefault(name, {})[f"{rtt:g} {device}"] = both
        print(line)
    return found


def proactive(trace: AcceptanceTrace, args: Any) -> dict[str, Any]:
    print("\n2. proactive drafting, rounds of 4, medium device\n")
    print(f"{'RTT ms':>8}{'off tok/s':>11}{'on tok/s':>11}{'gain':>8}{'hits':>8}{'off acc':>9}{'on acc':>9}")
    found = {}
    for rtt in (20.0, 100.0) if args.quick else RTTS:
        off = Arm("off", "fcfs", "fixed", (("k", 4),))
        on = Arm("on", "fcfs", "fixed", (("k", 4),), DraftingSettings(proactive=8))
        a = measure(off, trace, rtt, DEVICES["medium"], args)
        b = measure(on, trace, rtt, DEVICES["medium"], args)
        gain = b.tokens_per_s / a.tokens_per_s - 1.0
        print(
            f"{rtt:>8g}{a.tokens_per_s:>11.1f}{b.tokens_per_s:>11.1f}{gain:>8.1%}"
            f"{b.hit_rate:>8.0%}{a.accepted:>9.2f}{b.accepted:>9.2f}"
        )
        found[f"{rtt:g}"] = {
            "gain": gain,
            "hit_rate": b.hit_rate,
            "off": a.accepted,
            "on": b.accepted,
        }
    return found


def overhead(args: Any) -> dict[str, Any]:
    """Draft step against bare forward, taking turns over the same positions."""
    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import load_model

    folder = args.draft or str(bundled_path("models/reference-pair/draft"))
    drafter = TorchDrafter(load_model(folder))
    drafter.open(list(range(2, 130)), Sampling())
    drafter.prefill()
    steps, forwards = [], []
    for _ in range(60 if args.quick else 300):
        length = drafter.length
        begun = time.perf_counter()
        drafter.forward()
        between = time.perf_counter()
        drafter.rollback(length)
        again = time.perf_counter()
        drafter.draft()
        ended = time.perf_counter()
        drafter.rollback(length)
        forwards.append((between - begun) * 1000.0)
        steps.append((ended - again) * 1000.0)
    ratio = statistics.median(s / f for s, f in zip(steps, forwards, strict=True))
    print(
        f"\n3. draft step {statistics.median(steps):.2f} ms, bare forward "
        f"{statistics.median(forwards):.2f} ms, median ratio {ratio:.3f} (goal 1.15)"
    )
    return {"step_ms": statistics.median(steps), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="acceptance trace (default: take a small one)")
    parser.add_argument("--draft", default="", help="draft model of table 3")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request")
    parser.add_argument("--devices", type=int, default=1, help="devices at a time")
    parser.add_argument("--fixed", type=float, default=18.0, help="fixed ms of a server step")
    parser.add_argument("--row", type=float, default=0.12, help="ms per new token of a step")
    parser.add_argument("--jitter", type=float, default=0.0, help="added each way, share of the RTT")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.trace is not None:
        trace = load_trace(args.trace)
    else:
        from wispprof.profiling.acceptance_trace import trace_pair
        from wispprof.settings.profiler_settings import TraceSettings

        print("taking a trace of the bundled pair", file=sys.stderr)
        trace = trace_pair(TraceSettings(count=8, path_tokens=args.tokens + 16, depth=8))
    table = controllers(trace, args)
    ahead = proactive(trace, args)
    step = overhead(args)
    print(json.dumps({"controllers": table, "proactive": ahead, "draft_step": step}))


if __name__ == "__main__":
    try:
        main()
    except WispprofError as err:
        sys.exit(f"error: {err}")
