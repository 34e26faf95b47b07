"""Outages that last longer than an edge waits, and a change of the model in the middle of an answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from _serving.server_process import Server
from wispprof.artifacts import bundled_path
from wispprof.edge import EdgeClient, Generation, GenerationRequest, websocket_connections
from wispprof.edge.draft_device import DraftDevice
from wispprof.errors import HandshakeRefused, ServerUnreachable, WispprofError
from wispprof.settings.edge_settings import ClientSettings
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.link_emulator import LinkProxy
from wispprof.types import Sampling

UNDER_WAY = 8
"""Tokens that a generation has before it is disturbed."""

GIVE_UP_S = 2.0
OUTAGE_GIVE_UPS = 3
HEAL_S = 2.0
SWAP_EVERY = 4


@dataclass
class Outages:
    """``refused``: requests that ended with a clear error during an outage, two a cycle. ``first_token_s``:
    from the server's return to the next request's first token. ``up_s``: from its return to the link that the
    edge found by itself. ``swaps``: answers in whose middle the model changed; ``swap_refused`` of them ended
    with a refusal. ``wrong_tokens``: of all texts, those cut short included."""

    cycles: int = 0
    refused: int = 0
    served: int = 0
    first_token_s: list[float] = field(default_factory=list)
    up_s: list[float] = field(default_factory=list)
    swaps: int = 0
    swap_refused: int = 0
    compared_tokens: int = 0
    wrong_tokens: int = 0


class OutageTrial:
    """Two servers, of which a proxy makes one reachable at the edge's address."""

    def __init__(self, client: EdgeClient, device: DraftDevice, proxy: LinkProxy) -> None:
        self.found = Outages()
        self._client = client
        self._device = device
        self._proxy = proxy
        self._wanted: dict[int, tuple[int, ...]] = {}

    async def answer(self, number: int, prompt: list[int], tokens: int, err: type[Exception] | None) -> float:
        """Generate, compare with the undisturbed text; returns the loop time of the first token.

        ``err``: what must end it early, if anything must.
        """
        sampling = Sampling(0.8, 0, 0.95, seed=number) if number % 2 else Sampling()
        first_s = 0.0
        with self._device.lend(prompt) as (worker, controller):
            request = GenerationRequest(tuple(prompt), tokens, sampling)
            generation = Generation(self._client, request, worker, controller)
            try:
                async for _ in generation.stream():
                    first_s = first_s or time.monotonic()
            except WispprofError as raised:
                if err is None or not isinstance(raised, err):
                    raise
            else:
                if err is not None:
                    raise WispprofError("An answer went on where it had to end.", "Raise --tokens.")
        wanted = self._wanted.setdefault(number, generation.output)
        pairs = list(zip(generation.output, wanted, strict=False))
        self.found.compared_tokens += len(pairs)
        self.found.wrong_tokens += sum(a != b for a, b in pairs)
        return first_s

    async def cycle(self, number: int, server: Server, prompts: list[list[int]], tokens: int) -> None:
        """One outage of ``server``."""
        found, which = self.found, number % len(prompts)
        under_way = asyncio.create_task(self.answer(which, prompts[which], tokens, ServerUnreachable))
        received = self._client.traffic.down_frames
        while self._client.traffic.down_frames < received + UNDER_WAY:
            await asyncio.sleep(0.005)
        gone_s = time.monotonic()
        address, self._proxy.target = self._proxy.target, ("127.0.0.1", 9)
        server.kill()
        server.start()
        await under_way
        await self.answer(which, prompts[which], tokens, ServerUnreachable)
        found.refused += 2
        await server.ready()
        await asyncio.sleep(max(0.0, gone_s + OUTAGE_GIVE_UPS * GIVE_UP_S - time.monotonic()))
        self._proxy.target = address
        back_s = time.monotonic()
        if number % 2 == 0:
            while not self._client.up and time.monotonic() < back_s + 60.0:
                await asyncio.sleep(0.005)
            found.up_s.append(time.monotonic() - back_s)
        asked_s = time.monotonic() if number % 2 == 0 else back_s
        found.first_token_s.append(await self.answer(which, prompts[which], tokens, None) - asked_s)
        found.served += 1
        found.cycles += 1

    async def swap(self, other: Server, prompt: list[int], tokens: int) -> None:
        """Another model takes the address in the middle of an answer, and leaves it again."""
        address = self._proxy.target
        under_way = asyncio.create_task(self.answer(0, prompt, tokens, HandshakeRefused))
        received = self._client.traffic.down_frames
        while self._client.traffic.down_frames < received + UNDER_WAY:
            await asyncio.sleep(0.005)
        for target, changes in ((("127.0.0.1", other.port), 1), (address, 2)):
            expected = 2 * self.found.swaps + changes
            self._proxy.target = target
            self._proxy.cut()
            while self._client.target_changes < expected:
                await asyncio.sleep(0.005)
        await under_way
        self.found.swaps += 1
        self.found.swap_refused += 1


async def outages(device: DraftDevice, prompts: list[list[int]], args: Any) -> Outages:
    """Run all cycles."""
    server, other = Server(), Server("--target", str(bundled_path("models/reference-pair/draft")))
    settings = ClientSettings(give_up_ms=GIVE_UP_S * 1000.0)
    try:
        server.start()
        other.start()
        await server.ready()
        await other.ready()
        link = LinkSettings(LinkModel(0.0))
        async with (
            LinkProxy("127.0.0.1", 0, "127.0.0.1", server.port, link) as proxy,
            EdgeClient(websocket_connections(f"127.0.0.1:{proxy.port}"), settings) as client,
        ):
            trial = OutageTrial(client, device, proxy)
            for number, prompt in enumerate(prompts):
                await trial.answer(number, prompt, args.tokens, None)
            for number in range(args.cycles):
                print(f"outage {number + 1} of {args.cycles} …", file=sys.stderr)
                await trial.cycle(number, server, prompts, args.tokens)
                if number % SWAP_EVERY == SWAP_EVERY - 1 or number == args.cycles - 1:
                    await trial.swap(other, prompts[0], args.tokens)
            return trial.found
    finally:
        server.kill()
        other.kill()


def report_outages(found: Outages) -> None:
    """Print the figures; raise where one is not as it must be."""
    outage = f"{OUTAGE_GIVE_UPS} x {GIVE_UP_S:g} s"
    for text, figure in (
        (f"outages of {outage} or more", found.cycles),
        ("requests refused meanwhile", found.refused),
        ("served after the return", found.served),
        ("longest time to the first token, s", round(max(found.first_token_s), 2)),
        ("longest time to the link without a request, s", round(max(found.up_s), 2)),
        ("changes of the model in mid-answer", found.swaps),
        ("of them refused", found.swap_refused),
        ("tokens compared", found.compared_tokens),
        ("wrong tokens", found.wrong_tokens),
    ):
        print(f"{text:48}{figure:>8}")
    print()
    print(json.dumps({"benchmark": "resilience", "outage": asdict(found)}))
    if found.wrong_tokens or found.swap_refused < found.swaps:
        raise WispprofError("outage: a text was changed, or continued on another model.")
    if max(found.first_token_s + found.up_s) > HEAL_S:
        raise WispprofError(
            f"outage: the edge needed more than {HEAL_S:g} s.", "Is the machine idle otherwise?"
        )
