"""Time the server adds to a round besides the engine's step, and the cost of one scheduling decision.

Physics: a draft frame is decoded, merged, planned, handed to the engine's thread and back, committed and
encoded. With an engine that takes no time, a round trip over loopback minus a bare ping-pong over the same
socket is exactly that. Rounds and pings are interleaved, so a busy machine moves both.

The decision is timed over sessions with a round waiting each: building the views and calling the policy.

    python benchmarks/server_overhead.py [--rounds 400]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from websockets.asyncio.client import connect

from wispprof import protocol
from wispprof.policies import Limits, ScheduledItem, make_batch_policy
from wispprof.policies.linear_cost import LinearCost
from wispprof.server import running_server
from wispprof.sessions.session_state import SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Slo, VerifyResult


async def overhead_ms(rounds: int) -> tuple[float, float]:
    """(median round, median ping) in ms over loopback, engine time zero."""
    engine = FakeEngine(64)
    settings = ServerSettings(policy="wisp")
    round_ms, ping_ms = [], []
    async with (
        running_server(settings, engine=engine, model=engine.served) as running,
        connect(running.split_url, compression=None) as socket,
    ):
        await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
        await socket.recv()
        await socket.send(protocol.encode(protocol.Open(0, [1, 2, 3], 4000)))
        commit = protocol.decode_server(await socket.recv(decode=False))
        for number in range(rounds):
            assert isinstance(commit, protocol.Commit)
            drafts = [1, 2, 3, 4]
            frame = protocol.Draft(0, number, commit.committed_len, drafts, bytes(4), 1.0, 50.0)
            begin = time.perf_counter()
            await socket.send(protocol.encode(frame))
            commit = protocol.decode_server(await socket.recv(decode=False))
            round_ms.append((time.perf_counter() - begin) * 1000)
            begin = time.perf_counter()
            await socket.send(protocol.encode(protocol.Ping(number)))
            await socket.recv()
            ping_ms.append((time.perf_counter() - begin) * 1000)
    return statistics.median(round_ms), statistics.median(ping_ms)


def decision_ms(policy_name: str, sessions: int, repeats: int = 15) -> tuple[float, float]:
    """(median views, median plan) in ms over so many sessions with a round waiting."""
    estimator = LinearCost(10.0, 0.2, 0.0005)
    policy = make_batch_policy(policy_name)
    states = []
    for number in range(sessions):
        state = SessionState(
            f"s{number}",
            [1, 2, 3],
            slo=Slo(4.0),
            max_new=500,
            max_context=4096,
            now_ms=0.0,
            stream=policy.stream,
        )
        state.step_input(ScheduledItem(state.session, prefill=3), 0.0)
        state.apply(VerifyResult(state.session, 0, (4,)), 1.0)
        odds = [0.9 - 0.01 * (number % 9)] * 4
        state.merge(0, 4, [5, 6, 7, 8], odds, 2.0, 50.0 + number % 100, 10.0)
        states.append(state)
    limits = Limits(64, 512, 128, 1 << 20)
    views_ms, plan_ms = [], []
    for repeat in range(repeats):
        now = 3.0 + repeat
        begin = time.perf_counter()
        views = [state.view(now) for state in states]
        between = time.perf_counter()
        policy.plan(now, views, estimator, limits)
        plan_ms.append((time.perf_counter() - between) * 1000)
        views_ms.append((between - begin) * 1000)
    return statistics.median(views_ms), statistics.median(plan_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    arguments = parser.parse_args()
    round_ms, ping_ms = asyncio.run(overhead_ms(arguments.rounds))
    added = round_ms - ping_ms
    print(f"round with a free engine {round_ms:.2f} ms, ping {ping_ms:.2f} ms: server adds {added:.2f} ms")
    print(f"{'policy':>18} {'sessions':>8} {'views ms':>9} {'plan ms':>8}")
    decisions = {}
    for policy in ("fcfs", "wisp", "wispprof"):
        for sessions in (16, 1000):
            views, plan = decision_ms(policy, sessions)
            decisions[f"{policy}/{sessions}"] = round(views + plan, 3)
            print(f"{policy:>18} {sessions:>8} {views:>9.3f} {plan:>8.3f}")
    summary = {
        "benchmark": "server_overhead",
        "added_ms": round(added, 3),
        "decision_ms": decisions,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
