"""Paths of a target that runs elsewhere: ordinary undrafted sessions on a ``wispprof serve``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.errors import HandshakeRefused, ProtocolError, ServerBusy, ServerUnreachable
from wispprof.types import Sampling

if TYPE_CHECKING:
    from wispprof.edge.connection import Connection, ConnectionFactory

__all__ = ["RemoteTarget"]


@dataclass(frozen=True)
class RemoteTarget:
    """A server to ask. ``timeout_s``: longest silence while it generates. ``ca_file``: who vouches for it
    behind ``wss://`` (``None``: the system knows)."""

    server: str
    key: str = ""
    timeout_s: float = 60.0
    ca_file: Path | None = None

    def greet(self, connect: ConnectionFactory | None = None) -> Any:
        """The server's welcome: target, tokenizer hash, context."""
        return asyncio.run(self._with_link(connect, None))

    def paths(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        path_tokens: int,
        stop: int | None = None,
        connect: ConnectionFactory | None = None,
    ) -> list[list[int]]:
        """What the server's target generates from each prompt, all of them at once.

        Raises :class:`ServerUnreachable`, :class:`HandshakeRefused`, :class:`ServerBusy`,
        :class:`ProtocolError`.
        """
        asked = (prompts, sampling, path_tokens, stop)
        found: list[list[int]] = asyncio.run(self._with_link(connect, asked))
        return found

    async def _with_link(self, connect: ConnectionFactory | None, asked: Any) -> Any:
        from wispprof import protocol
        from wispprof.edge.connection import ssl_context, websocket_connections

        link = await (
            connect or websocket_connections(self.server, ssl=ssl_context(self.ca_file))
        )()
        try:
            hello = protocol.Hello(protocol.PROTOCOL_VERSION, "", key=self.key, edge="trace")
            await link.send(protocol.encode(hello))
            welcome = await self._receive(link)
            if isinstance(welcome, protocol.Problem):
                raise HandshakeRefused(f"The server refused: {welcome.message}", "")
            return welcome if asked is None else await self._generate(link, *asked)
        finally:
            await link.close()

    async def _generate(
        self,
        link: Connection,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        path_tokens: int,
        stop: int | None,
    ) -> list[list[int]]:
        from wispprof import protocol

        for number, prompt in enumerate(prompts):
            opening = protocol.Open(
                number,
                list(prompt),
                path_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop=[] if stop is None else [stop],
                undrafted=True,
            )
            await link.send(protocol.encode(opening))
        paths: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        while live:
            frame = await self._receive(link)
            if isinstance(frame, protocol.Problem):
                if frame.code == "busy":
                    raise ServerBusy(
                        f"The server takes no more sessions: {frame.message}", frame.retry_ms
                    )
                raise ProtocolError(f"The server refused a session: {frame.message}", "")
            if not isinstance(frame, protocol.Commit) or frame.session not in live:
                continue
            path = paths[frame.session]
            path.extend(frame.tokens)
            if frame.committed_len != len(prompts[frame.session]) + len(path):
                raise ProtocolError("Commits of the server are not contiguous.", "Take it anew.")
            if frame.finished:
                live.discard(frame.session)
        return paths

    async def _receive(self, link: Connection) -> Any:
        from wispprof import protocol

        try:
            data = await asyncio.wait_for(link.receive(), self.timeout_s)
        except TimeoutError:
            raise ServerUnreachable(
                f"{self.server} was silent for {self.timeout_s:.0f} s.",
                "Check that the server runs and is not overloaded.",
            ) from None
        return protocol.decode_server(data)
