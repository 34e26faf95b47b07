"""A server that is gone for longer than the edge waits, or comes back as another model. In virtual time."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import httpx
import pytest
from fake_pair import LETTERS, HashDevice, drafting, edge, in_process, plain, truth

from wispprof import protocol
from wispprof.edge import Connection, EdgeClient, LinkLost
from wispprof.edge.edge_runtime import EdgeRuntime
from wispprof.edge.local_api import make_edge_app
from wispprof.errors import HandshakeRefused, RuntimeFault, ServerUnreachable
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.testing.fake_engine import FakeEngine, FakeTarget
from wispprof.testing.in_process_server import InProcessServer
from wispprof.testing.virtual_time import run_virtual

PROMPT = (3, 4, 7)
GIVE_UP_MS = 2000.0


def now() -> float:
    return asyncio.get_running_loop().time()


def gone(server: InProcessServer) -> None:
    server.refuse = True
    server.cut()


def swap(server: InProcessServer, vocab: int, identity: str) -> None:
    """The server is restarted with another model of the same tokenizer."""
    gone(server)
    server.engine = FakeEngine(vocab)
    server.identity = identity
    server.refuse = False


def status(client: EdgeClient, fallback: str = "none") -> dict[str, object]:
    runtime = EdgeRuntime(EdgeSettings(fallback=fallback), LETTERS, HashDevice("none"), client)
    return runtime.status


def test_after_any_outage_the_next_request_is_served() -> None:
    """Twenty outages of three times the give-up time. Requests fail clearly meanwhile."""

    async def main() -> None:
        async with in_process() as server, edge(server.connect, give_up_ms=GIVE_UP_MS) as client:
            for cycle in range(20):
                under_way = asyncio.create_task(drafting(client, (cycle, 5, 5), max_new=500).run())
                await asyncio.sleep(0.2)
                gone(server)
                lost = now()
                await asyncio.sleep(0.0)
                with pytest.raises(ServerUnreachable, match=r"No server for"):
                    await under_way
                assert now() - lost <= GIVE_UP_MS / 1000 + 0.1
                assert status(client)["status"] == "unavailable"
                begun = now()
                with pytest.raises(ServerUnreachable):  # one attempt, then an error at once
                    await plain(client, PROMPT).run()
                assert now() - begun <= 0.2
                await asyncio.sleep(3 * GIVE_UP_MS / 1000 - (now() - lost))
                server.refuse = False
                back = now()
                if cycle % 2:  # without a request, the edge finds the server itself
                    await asyncio.sleep(1.6)
                    assert status(client)["status"] == "ok"
                    back = now()
                generation = drafting(client, PROMPT, max_new=16)
                stats = await generation.run()
                assert stats.first_ms is not None
                assert stats.first_ms <= 2000.0
                assert list(generation.output) == truth(PROMPT, 16)
                assert now() - back <= 3.0
            assert client.target_changes == 0

    run_virtual(main())


def test_health_tells_the_truth() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect, give_up_ms=GIVE_UP_MS) as client:
            await plain(client, PROMPT, 4).run()
            assert (status(client)["status"], status(client)["ready"]) == ("ok", True)
            gone(server)
            await asyncio.sleep(0.5)
            assert (status(client)["status"], status(client)["ready"]) == ("reconnecting", False)
            await asyncio.sleep(GIVE_UP_MS / 1000)
            said = status(client)
            assert (said["status"], said["ready"], said["link"]) == ("unavailable", False, False)
            assert "No server for" in str(said["error"])
            assert status(client, fallback="draft")["ready"]

    run_virtual(main())


def test_a_request_waits_for_a_server_that_is_back_in_time() -> None:
    """It does not wait for the end of a long pause between attempts."""

    async def main() -> None:
        async with in_process() as server, edge(server.connect, give_up_ms=60_000.0) as client:
            gone(server)
            await asyncio.sleep(20.0)  # pauses are at their longest
            server.refuse = False
            begun = now()
            await plain(client, PROMPT, 4).run()
            assert now() - begun <= 0.3

    run_virtual(main())


def test_an_edge_that_starts_offline_serves_when_the_server_comes() -> None:
    async def main() -> None:
        async with in_process() as server:
            server.refuse = True
            begun = now()
            async with edge(server.connect, offline_ok=True) as client:
                assert now() - begun <= 0.1  # it does not wait for --give-up
                alone = drafting(client, PROMPT, fallback=True)
                assert (await alone.run()).draft_only == 48
                server.refuse = False
                verified = drafting(client, PROMPT)
                await verified.run()
                assert list(verified.output) == truth(PROMPT, 48)

    run_virtual(main())


@pytest.mark.parametrize("told", [True, False], ids=["server refuses", "server ignores the identity"])
def test_an_answer_never_continues_on_another_model(told: bool) -> None:
    class Ignorant:
        """A connection whose server does not read the identity in hello."""

        def __init__(self, inner: Connection) -> None:
            self._inner = inner

        async def send(self, data: bytes) -> None:
            frame = protocol.decode_edge(data)
            if isinstance(frame, protocol.Hello):
                data = protocol.encode(protocol.Hello(frame.protocol, frame.tokenizer))
            await self._inner.send(data)

        async def receive(self) -> bytes:
            return await self._inner.receive()

        async def close(self) -> None:
            await self._inner.close()

    async def main() -> None:
        async with in_process() as server:

            async def connect() -> Connection:
                inner = await server.connect()
                return inner if told else Ignorant(inner)

            server.identity = "model A"
            async with edge(connect, give_up_ms=GIVE_UP_MS) as client:
                generation = drafting(client, PROMPT, max_new=400)
                asked = asyncio.create_task(generation.run())
                await asyncio.sleep(0.2)
                swap(server, 128, "model B")
                with pytest.raises(HandshakeRefused, match="no longer serves the target"):
                    await asked
                count = len(generation.output)
                assert 0 < count < 400
                assert list(generation.output) == truth(PROMPT, count)
                await asyncio.sleep(2.0)
                assert client.target_changes == 1
                # New requests go on with the new target.
                fresh = plain(client, PROMPT, 16)
                await fresh.run()
                assert list(fresh.output) == FakeTarget(128).generate(PROMPT, 16)

    run_virtual(main())


def test_requests_that_never_cease_do_not_keep_the_edge_on_a_model_that_is_gone() -> None:
    """Some session is open at each hello: those of six users who ask again at once."""

    async def main() -> None:
        async with in_process() as server:
            server.identity = "model A"
            async with edge(server.connect, give_up_ms=GIVE_UP_MS) as client:
                new = FakeTarget(128).generate(PROMPT, 16)
                refused = 0

                async def user() -> None:
                    nonlocal refused
                    while True:
                        generation = plain(client, PROMPT, 16)
                        try:
                            await generation.run()
                        except HandshakeRefused:
                            refused += 1
                            await asyncio.sleep(0.01)
                        else:
                            if list(generation.output) == new:
                                return
                            assert list(generation.output) == truth(PROMPT, 16)

                users = [asyncio.create_task(user()) for _ in range(6)]
                await asyncio.sleep(0.5)
                gone(server)
                await asyncio.sleep(0.1)
                swap(server, 128, "model B")
                async with asyncio.timeout(3.0):
                    await asyncio.gather(*users)
                assert client.target_changes == 1
                assert refused <= 12

    run_virtual(main())


def test_the_same_model_on_another_server_continues() -> None:
    async def main() -> None:
        async with in_process() as server:
            server.identity = "model A"
            async with edge(server.connect) as client:
                generation = drafting(client, PROMPT, max_new=100)
                task = asyncio.create_task(generation.run())
                await asyncio.sleep(0.2)
                swap(server, 256, "model A")
                await task
                assert list(generation.output) == truth(PROMPT, 100)
                assert client.target_changes == 0

    run_virtual(main())


def test_a_target_of_another_tokenizer_is_refused_until_the_right_one_is_back() -> None:
    async def main() -> None:
        tokenizer = "right"
        async with in_process() as server:

            class Named:
                def __init__(self, inner: Connection) -> None:
                    self._inner = inner

                async def send(self, data: bytes) -> None:
                    await self._inner.send(data)

                async def receive(self) -> bytes:
                    data = await self._inner.receive()
                    frame = protocol.decode_server(data)
                    if isinstance(frame, protocol.Welcome):
                        data = protocol.encode(protocol.Welcome(3, "m", tokenizer, 4096, 32, False))
                    return data

                async def close(self) -> None:
                    await self._inner.close()

            async def connect() -> Connection:
                return Named(await server.connect())

            async with edge(connect, tokenizer="right") as client:
                gone(server)
                tokenizer = "wrong"
                server.refuse = False
                with pytest.raises(HandshakeRefused, match="tokenizer"):
                    await plain(client, PROMPT, 4).run()
                assert status(client)["status"] == "unavailable"
                tokenizer = "right"
                generation = plain(client, PROMPT, 4)
                await generation.run()
                assert list(generation.output) == truth(PROMPT, 4)

    run_virtual(main())


def test_a_busy_servers_pause_is_kept_but_bounded() -> None:
    attempts: list[float] = []

    class Draining:
        async def send(self, data: bytes) -> None:
            attempts.append(now())

        async def receive(self) -> bytes:
            return protocol.encode(protocol.Problem(-1, "draining", "later", retry))

        async def close(self) -> None:
            pass

    async def main() -> None:
        async def connect() -> Connection:
            return Draining()

        with pytest.raises(ServerUnreachable, match="draining"):
            async with edge(connect, give_up_ms=200_000.0):
                pass

    for asked, pause_s in ((5000.0, 5.0), (1e9, 60.0)):
        retry = asked
        attempts.clear()
        run_virtual(main())
        pauses = [after - before for before, after in pairwise(attempts)]
        assert pause_s <= min(pauses) <= max(pauses) <= pause_s + 0.1


def test_an_unexpected_error_of_a_connection_is_an_outage_like_any_other() -> None:
    async def main() -> None:
        broken = False
        async with in_process() as server:

            async def connect() -> Connection:
                if broken:
                    raise ValueError("a fault in the link")
                return await server.connect()

            async with edge(connect, give_up_ms=GIVE_UP_MS) as client:
                broken = True
                server.cut()
                with pytest.raises(ServerUnreachable, match="a fault in the link"):
                    await plain(client, PROMPT, 4).run()
                broken = False
                await plain(client, PROMPT, 4).run()

    run_virtual(main())


def test_an_idle_edge_notices_a_dead_link() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect, dead_ms=4000.0) as client:
            await asyncio.sleep(30.0)
            assert client.up
            server._connections[0]._closed = True  # nothing is delivered any more, and nobody says so
            server.refuse = True
            server._connections[0].send = lambda data: asyncio.sleep(0)  # type: ignore[method-assign]
            await asyncio.sleep(12.0)
            assert not client.up

    run_virtual(main())


def test_a_closed_client_refuses_sessions() -> None:
    async def main() -> None:
        async with in_process() as server:
            client = edge(server.connect)
            async with client:
                pass
            with pytest.raises(RuntimeFault, match="closed"):
                await plain(client, PROMPT, 4).run()

    run_virtual(main())


async def test_the_local_api_reports_health_and_readiness() -> None:
    async def nobody() -> Connection:
        raise LinkLost("nobody is there")

    client = edge(nobody)
    runtime = EdgeRuntime(EdgeSettings(), LETTERS, HashDevice("none"), client)
    transport = httpx.ASGITransport(make_edge_app(runtime))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        for fault, status in (
            (None, "reconnecting"),
            (ServerUnreachable("No server for 9 s."), "unavailable"),
        ):
            client.fault = fault
            health, ready = await http.get("/health"), await http.get("/ready")
            assert (health.status_code, health.json()["status"]) == (200, status)
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert ready.json()["error"] == "No server for 9 s."
