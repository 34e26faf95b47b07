"""How long an edge waits for a server: to the end of the time it is given. In virtual time."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from fake_pair import LETTERS, HashDevice, edge, in_process, plain, truth

from wispprof import protocol
from wispprof.edge import Connection, EdgeClient
from wispprof.edge.edge_runtime import EdgeRuntime
from wispprof.errors import ServerBusy, ServerUnreachable
from wispprof.settings.edge_settings import EdgeSettings
from wispprof.testing.in_process_server import InProcessServer, _InProcessConnection
from wispprof.testing.virtual_time import run_virtual

PROMPT = (3, 4, 7)
GIVE_UP_MS = 2000.0


def now() -> float:
    return asyncio.get_running_loop().time()


def gone(server: InProcessServer) -> None:
    server.refuse = True
    server.cut()


def status(client: EdgeClient) -> tuple[str, bool]:
    said = EdgeRuntime(EdgeSettings(), LETTERS, HashDevice("none"), client).status
    return said["status"], said["ready"]


def test_the_last_attempt_is_made_when_the_edge_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    """At the start and after a loss. The log says once that requests fail."""
    attempts: list[float] = []

    async def main() -> None:
        async with in_process() as server:

            async def connect() -> Connection:
                attempts.append(now())
                return await server.connect()

            server.refuse = True
            with pytest.raises(ServerUnreachable, match=r"No server for 3\.0 s"):
                async with edge(connect, give_up_ms=3000.0):
                    pass
            assert attempts[-1] == pytest.approx(3.0, abs=0.002)
            server.refuse = False
            async with edge(connect, give_up_ms=3000.0) as client:
                await plain(client, PROMPT, 4).run()
                attempts.clear()
                gone(server)
                lost = now()
                with pytest.raises(ServerUnreachable, match=r"No server for 3\.0 s"):
                    await plain(client, PROMPT, 4).run()
                assert attempts[-1] == pytest.approx(lost + 3.0, abs=0.002)
                await asyncio.sleep(20.0)

    run_virtual(main())
    said = [record.getMessage() for record in caplog.records if record.name == "wispprof.edge"]
    assert [line for line in said if "requests fail until a server answers: No server for 3.0 s" in line] == [
        said[-1]
    ]


def test_sessions_that_a_leaving_server_refuses_wait_for_the_next_server() -> None:
    """For the give-up time from the refusal on, whether that server is still there or not."""

    async def main() -> None:
        # Pauses of 0.3 s at most: a server that is back at 1.5 s is found before 2.0 s.
        settings = {"give_up_ms": GIVE_UP_MS, "backoff_max_ms": 200.0}
        async with in_process() as server, edge(server.connect, **settings) as client:
            await plain(client, PROMPT, 4).run()
            leaving = protocol.Problem(0, "draining", "The server is shutting down.")

            def refuse(connection: _InProcessConnection, frame: protocol.Open, now_ms: float) -> None:
                connection.reply(msgspec.structs.replace(leaving, session=frame.session))

            for stays in (True, False):
                admit, server._open = server._open, refuse  # type: ignore[method-assign]
                begun = now()
                waiting = plain(client, PROMPT, 8)
                asked = asyncio.create_task(waiting.run())
                await asyncio.sleep(1.0)
                assert status(client) == ("reconnecting", False)
                if not stays:
                    gone(server)
                with pytest.raises(ServerBusy, match="shutting down") as refused:
                    await asked
                assert refused.value.code == "draining"
                assert now() - begun == pytest.approx(GIVE_UP_MS / 1000, abs=0.01)
                server.refuse = False

                asked = asyncio.create_task((waiting := plain(client, PROMPT, 8)).run())
                await asyncio.sleep(1.0)
                gone(server)
                server._open = admit  # type: ignore[method-assign]
                await asyncio.sleep(0.5)
                server.refuse = False  # the next server
                await asked
                assert list(waiting.output) == truth(PROMPT, 8)
                assert status(client) == ("ok", True)

    run_virtual(main())
