"""A long run of ordinary, careless and hostile clients together: does anything grow, leak or go wrong?

One server with the real engine on the bundled target and eight edges behind emulated links run in this
process, so its memory is the memory of both sides. Every ordinary session takes a random prompt, drafter
(model, lookup or none), draft length and sampling. Some sessions are aborted and links are cut at random. A
tenth of all texts is requested over the server's OpenAI API instead. Meanwhile two clients misbehave: they
send frames with wrong bytes or impossible numbers, invalid JSON, requests that they never
finish, and they leave in the middle of an answer.

What must hold at the end:

- every finished text of an ordinary client equals, token for token, the engine's own (0 wrong);
- no response to anybody has a status of 500 or more;
- resident memory at rest is at most 1.05 × what it was after warm-up (a fifth of the run), and no more
  files and sockets are open;
- after the last session no KV token is used, no session is open, no task and no future is pending.

    python benchmarks/soak.py                       # 30 minutes
    python benchmarks/soak.py --minutes 2

At rest means: no edge, no session, an empty prefix cache, garbage collected. Under load memory follows the
number of sessions, which says nothing about leaks. For the same reason both models first see every number of
rows: oneDNN keeps the kernels that it compiles for each (100 MiB at its bound of 1,024). The table also shows
the bytes that the C library's allocator has handed out: if only resident memory grows, nothing leaks, but
memory is fragmented.

Minutes count while the process runs, not while it is stopped (SIGSTOP).

Exit code 1 if something does not hold. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EDGES, SESSIONS_PER_EDGE, MISBEHAVING = 8, 2, 2
PROMPTS, LONGEST = 24, 40
LARGEST_STEP = 256
WARM_UP, MAX_GROWTH = 0.2, 1.05


def main() -> int:

    arguments = _arguments()
    summary = asyncio.run(_soak(arguments.minutes * 60.0, arguments.seed))
    print(json.dumps(summary))
    return 0 if summary["holds"] else 1


async def _soak(seconds: float, seed: int) -> dict[str, Any]:
    from wispprof.artifacts import bundled_path
    from wispprof.drafters.torch_drafter import TorchDrafter
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.openai_api.tokenizer import ChatTokenizer
    from wispprof.profiling.prompts import held_out_prompts
    from wispprof.server import running_server
    from wispprof.settings.server_settings import ServerSettings
    from wispprof.types import ServedModel

    target = load_model(bundled_path("models/reference-pair/target"))
    draft = load_model(bundled_path("models/reference-pair/draft"))
    prompts = [tuple(p) for p in held_out_prompts(target.tokenizer, PROMPTS, 64)]
    engine = TorchEngine(target, kv_tokens=4096, max_sessions=128)
    total = engine.kv_free
    world = World(prompts, _alone(engine, prompts), lambda: TorchDrafter(draft), seed)
    info = target.info
    model = ServedModel(info.id, info.tokenizer_hash, info.vocab_size, engine.max_context)
    settings = ServerSettings(admit="all", prefix_cache_sessions=16)
    for engine_of in (engine, TorchEngine(draft, kv_tokens=LARGEST_STEP)):
        _fill_kernel_cache(engine_of)
    before = _waiting()
    with ThreadPoolExecutor(2, thread_name_prefix="draft") as world.executor:
        tokenizer = ChatTokenizer(target.tokenizer)
        async with running_server(settings, engine=engine, model=model, tokenizer=tokenizer) as running:
            clock = asyncio.create_task(world.keep_time())
            watch = asyncio.create_task(_watch(world))
            resting = []
            for share in (WARM_UP, 1.0):
                async with asyncio.TaskGroup() as group:
                    for number in range(EDGES):
                        group.create_task(world.edge(number, running, share * seconds))
                    for _ in range(MISBEHAVING):
                        group.create_task(world.misbehave(running, share * seconds))
                while len(running.server.manager):
                    await asyncio.sleep(0.01)
                await running.server.check_integrity()
                await running.server.manager.clear_prefix_cache()
                resting.append((_resident_mib(), _allocated_mib(), await _descriptors_at_rest()))
                print("at rest: {:.1f} MiB, {:.1f} of it allocated, {} descriptors".format(*resting[-1]))
            watch.cancel()
            clock.cancel()
            await asyncio.gather(watch, clock, return_exceptions=True)
            left = {
                "kv_tokens": total - engine.kv_free,
                "engine_sessions": len(engine.sessions),
                "deferred operations": running.server._engine_thread.pending_ops,
            }
    await asyncio.sleep(0)
    left["tasks and futures"] = max(0, _waiting() - before)
    (early, early_out, early_files), (late, late_out, late_files) = resting
    level = late <= MAX_GROWTH * early and late_files <= early_files
    holds = level and not world.wrong and not world.counts["server_errors"] and not any(left.values())
    return {
        "benchmark": "soak",
        "minutes": round(world.seconds / 60.0, 1),
        **dict(world.counts),
        "tokens": world.tokens,
        "wrong": world.wrong,
        "rss_warm_mib": round(early, 1),
        "rss_end_mib": round(late, 1),
        "growth": round(late / early, 4),
        "descriptors_warm": early_files,
        "descriptors_end": late_files,
        "allocated_warm_mib": round(early_out, 1),
        "allocated_end_mib": round(late_out, 1),
        "left": left,
        "holds": holds,
    }


class World:
    """The inputs that edges draw from, and counts of what happened."""

    def __init__(
        self,
        prompts: list[tuple[int, ...]],
        right: dict[tuple[int, int], list[int]],
        drafter: Callable[[], Any],
        seed: int,
    ) -> None:
        self.prompts = prompts
        self.right = right
        self.drafter = drafter
        self.random = random.Random(seed)
        self.executor: Any = None
        self.counts: Counter[str] = Counter(
            finished=0, aborted=0, cuts=0, over_http=0, hostile=0, server_errors=0
        )
        self.tokens = self.wrong = 0
        self.seconds = 0.0

    async def keep_time(self) -> None:
        """Count the time that this process runs; a long gap means that it was stopped."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            now = time.monotonic()
            self.seconds += min(now - last, 5.0)
            last = now

    async def edge(self, number: int, running: Any, until: float) -> None:
        """One edge: connections of a few sessions each, over a link that is cut at times."""
        from wispprof.edge import EdgeClient, websocket_connections
        from wispprof.settings.shared_settings import LinkModel, LinkSettings
        from wispprof.testing.link_emulator import LinkProxy

        link = LinkSettings(LinkModel(rtt_ms=2.0 + number, jitter_ms=1.0), seed=number)
        async with LinkProxy("127.0.0.1", 0, running.host, running.port, link) as proxy:
            while self.seconds < until:
                async with EdgeClient(websocket_connections(f"127.0.0.1:{proxy.port}")) as client:
                    for _ in range(self.random.randrange(2, 8)):
                        work = [
                            self.over_http(running.http_url)
                            if self.random.random() < 0.1
                            else self.session(client)
                            for _ in range(SESSIONS_PER_EDGE)
                        ]
                        cut = asyncio.create_task(self.maybe_cut(proxy))
                        await asyncio.gather(*work)
                        cut.cancel()
                        await asyncio.gather(cut, return_exceptions=True)

    async def maybe_cut(self, proxy: Any) -> None:
        if self.random.random() < 0.1:
            await asyncio.sleep(self.random.random())
            proxy.cut()
            self.counts["cuts"] += 1

    async def session(self, client: Any) -> None:
        from wispprof.drafters.ngram import LookupDrafter
        from wispprof.edge import Generation, GenerationRequest, ThreadWorker
        from wispprof.policies import make_controller
        from wispprof.settings.edge_settings import DraftingSettings
        from wispprof.types import Sampling

        which, heat = self.random.randrange(len(self.prompts)), self.random.randrange(2)
        count, k = self.random.randrange(1, LONGEST + 1), self.random.choice([1, 2, 4, 8])
        request = GenerationRequest(self.prompts[which], count, sampling=Sampling(0.8 * heat, seed=which))
        kind = self.random.choice(["model", "lookup", "none"])
        made: dict[str, Callable[[], Any]] = {"model": self.drafter, "lookup": LookupDrafter}
        worker = ThreadWorker(made[kind](), self.executor) if kind in made else None
        controller = make_controller("fixed", k=k) if worker else None
        generation = Generation(
            client, request, worker, controller, DraftingSettings(draft_ahead=2 * k, proactive=k)
        )
        task = asyncio.create_task(generation.run())
        if self.random.random() < 0.2:
            await asyncio.wait([task], timeout=self.random.random() * 0.3)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if task.cancelled():
            self.counts["aborted"] += 1
        self.judge(which, heat, list(generation.output), None if task.cancelled() else count)

    async def over_http(self, url: str) -> None:
        import httpx

        which = self.random.randrange(len(self.prompts))
        body = {"prompt": list(self.prompts[which]), "max_tokens": 8, "temperature": 0}
        async with httpx.AsyncClient(timeout=None) as client:
            answer = await client.post(f"{url}/v1/completions", json={**body, "ignore_eos": True})
        self.counts["over_http"] += 1
        if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != 8:
            self.wrong += 1

    # --- clients that misbehave ---

    async def misbehave(self, running: Any, until: float) -> None:
        """One attack after the other, at most twenty a second."""
        attacks = (self.send_bad_frames, self.send_bad_body, self.never_finish, self.leave_mid_answer)
        while self.seconds < until:
            with contextlib.suppress(OSError, EOFError, TimeoutError):
                await self.random.choice(attacks)(running)
            self.counts["hostile"] += 1
            await asyncio.sleep(0.05)

    async def send_bad_frames(self, running: Any) -> None:
        """Frames with wrong bytes or impossible numbers, until the server hangs up."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import ConnectionClosed

        from wispprof import protocol

        numbers = (-1, 0, 1, 1 << 31, (1 << 63) - 1)
        pick = self.random.choice
        async with connect(running.split_url, compression=None) as socket:
            with contextlib.suppress(ConnectionClosed):
                await socket.send(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "")))
                for _ in range(self.random.randrange(1, 20)):
                    tokens = [pick((0, 1, 5, *numbers)) for _ in range(self.random.randrange(1, 9))]
                    opening = protocol.Open(
                        pick((0, 1)), tokens, pick(numbers), temperature=pick((0.0, 1e-300, 2.0))
                    )
                    draft = protocol.Draft(
                        pick((0, 1)), 0, pick(numbers), tokens, b"x" * len(tokens), 1.0, 9.0
                    )
                    data = bytearray(protocol.encode(pick((opening, draft))))
                    if self.random.random() < 0.3:
                        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                    await socket.send(bytes(data))

    async def send_bad_body(self, running: Any) -> None:
        import httpx

        invalid = (
            b"",
            b"[" * 5000,
            b"\xff",
            b'{"prompt": 5}',
            b'{"prompt": "a", "top_k": 1e999}',
            b"x" * (4 << 20),
        )
        async with httpx.AsyncClient(timeout=30.0) as client:
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(
                    f"{running.http_url}/v1/completions", content=self.random.choice(invalid)
                )
                self.counts["server_errors"] += answer.status_code >= 500

    async def never_finish(self, running: Any) -> None:
        """Half a request, then silence for a while."""
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 999\r\n\r\n{")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), self.random.random())
        writer.close()

    async def leave_mid_answer(self, running: Any) -> None:
        reader, writer = await asyncio.open_connection(running.host, running.port)
        body = json.dumps({"prompt": "def", "max_tokens": 200, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await asyncio.wait_for(reader.readline(), 30.0)
        self.counts["server_errors"] += status.split()[1:2] >= [b"500"]
        writer.transport.abort()

    def judge(self, which: int, heat: int, found: list[int], count: int | None) -> None:
        """An aborted text must be a prefix of the right one, a finished one complete."""
        right = self.right[which, heat]
        self.tokens += len(found)
        if count is not None:
            self.counts["finished"] += 1
        if found != right[: len(found)] or (count is not None and len(found) != count):
            self.wrong += 1


def _alone(engine: Any, prompts: list[tuple[int, ...]]) -> dict[tuple[int, int], list[int]]:
    """The right texts, greedy and sampled: every prompt alone, without drafts."""
    from wispprof.types import Sampling, StepInput

    texts: dict[tuple[int, int], list[int]] = {}
    for which, prompt in enumerate(prompts):
        for heat in (0, 1):
            engine.open("alone", Sampling(0.8 * heat, seed=which))
            out = list(engine.step([StepInput("alone", prompt)])[0].tokens)
            while len(out) < LONGEST:
                out.extend(engine.step([StepInput("alone", out[-1:])])[0].tokens)
            engine.close("alone")
            texts[which, heat] = out
    return texts


def _fill_kernel_cache(engine: Any) -> None:
    """Run steps of every number of rows once."""
    from wispprof.types import Sampling, StepInput

    for rows in range(1, LARGEST_STEP + 1):
        engine.open("rows", Sampling())
        engine.step([StepInput("rows", (5,) * rows)])
        engine.close("rows")


async def _watch(world: World) -> None:
    """A line every half minute."""
    head = ("RSS MiB", "allocated", "finished", "aborted")
    print(f"{'minute':>7} " + " ".join(f"{name:>9}" for name in head) + "  cuts  wrong")
    while True:
        await asyncio.sleep(30.0)
        counts = world.counts
        print(
            f"{world.seconds / 60:7.1f} {_resident_mib():9.1f} {_allocated_mib():9.1f} "
            f"{counts['finished']:9} {counts['aborted']:9} "
            f"{counts['cuts']:5} {world.wrong:6}",
            flush=True,
        )


def _resident_mib() -> float:
    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss / 2**20)


async def _descriptors_at_rest() -> int:
    """Open files and sockets, once closed connections are gone."""
    import psutil

    process, count = psutil.Process(), 1 << 30
    for _ in range(50):
        await asyncio.sleep(0.1)
        before, count = count, process.num_fds()
        if count == before:
            break
    return count


def _allocated_mib() -> float:
    """Bytes the C library's allocator has handed out, in MiB; NaN before glibc 2.33."""
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    fields = [(name, ctypes.c_size_t) for name in names.split()]
    info = type("mallinfo2", (ctypes.Structure,), {"_fields_": fields})
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return math.nan
    ask.restype = info
    counts: Any = ask()
    return float((counts.uordblks + counts.hblkhd) / 2**20)


def _waiting() -> int:
    """Tasks and futures that are not done."""
    gc.collect()
    # By type: isinstance would import lazy modules.
    return sum(issubclass(type(o), asyncio.Future) and not o.done() for o in gc.get_objects())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
