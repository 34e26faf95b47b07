"""Live edges in one process: real frames and draft buffers, drafting that costs nothing but its time.

    python -m _live.edges PORT EDGES SECONDS OUTPUT

Each edge drafts a token every ``DRAFT_MS`` and sends them in bursts. It looks the target's text up and errs
at random, so that the server accepts what it should. Writes frames sent and the (edge, committed length,
arrival) of each commit to OUTPUT.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import struct
import sys
import time
from collections import deque
from pathlib import Path

from _live.scripted_text import text
from wispprof import protocol
from wispprof.sessions.draft_buffer import DraftBuffer

DRAFT_MS, BURST, ACCURACY, PROMPT = 10.0, 4, 0.8, 32

_UPGRADE = (
    b"GET /v1/split HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Edge(asyncio.Protocol):
    """One edge with one session. Its WebSocket masks with zeros, which is valid and costs nothing."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.commits: list[tuple[int, int, float]] = []
        self.frames = 0
        self.problem = ""
        self._rng = random.Random(number)
        self._data = b""
        self._stamped: deque[tuple[bytes, float]] = deque()
        self._upgraded = False
        prompt = [number, *text(number, 1, PROMPT)]
        self._prompt = prompt
        self._buffer = DraftBuffer(prompt, stream=True, draft_ahead_limit=16)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.write(_UPGRADE)

    def data_received(self, data: bytes) -> None:
        # First every socket's data is stamped, then it is read: an edge would wait for no other edge.
        self._stamped.append((data, time.monotonic()))
        asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        data, now = self._stamped.popleft()
        data = self._data + data
        if not self._upgraded:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                self._data = data
                return
            self._upgraded, data = True, rest
            assert b" 101 " in head, head
            self._send(protocol.Hello(protocol.PROTOCOL_VERSION, ""))
            self._send(protocol.Open(0, self._prompt, 4096, tokens_per_s=8.0))
            self._draft()
        at = 0
        while len(data) - at >= 2:
            size, body = data[at + 1], at + 2
            if size == 126:
                size, body = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            if len(data) < body + size:
                break
            if data[at] == 0x82:
                self._receive(protocol.decode_server(data[body : body + size]), now)
            at = body + size
        self._data = data[at:]

    def _receive(self, frame: protocol.ServerFrame, now: float) -> None:
        if isinstance(frame, protocol.Problem):
            self.problem = frame.message
        elif isinstance(frame, protocol.Commit):
            end = frame.committed_len
            assert frame.tokens == text(self.number, end - len(frame.tokens), end), "wrong tokens"
            self._buffer.on_commit(end, frame.tokens, frame.accepted, frame.drafted)
            self.commits.append((self.number, end, now))

    def _draft(self) -> None:
        buffer = self._buffer
        count = min(BURST, buffer.capacity_left)
        start = buffer.length
        for token in text(self.number, start, start + count):
            right = self._rng.random() < ACCURACY
            buffer.propose(token if right else (token + 1) % 1000, ACCURACY, DRAFT_MS)
        if (out := buffer.take()) is not None:
            probs = bytes([int(255 * ACCURACY)]) * len(out.tokens)
            self._send(protocol.Draft(0, out.epoch, out.base, list(out.tokens), probs, out.draft_ms, 1e6))
        delay = BURST * DRAFT_MS / 1000.0 if self.frames > 3 else self._rng.random() * 0.1
        asyncio.get_running_loop().call_later(delay, self._draft)

    def _send(self, frame: protocol.EdgeFrame) -> None:
        body = protocol.encode(frame)
        size = len(body)
        head = bytes((0x82, 0x80 | size)) if size < 126 else struct.pack(">BBH", 0x82, 0xFE, size)
        self._transport.write(head + bytes(4) + body)
        self.frames += 1


async def run(port: int, count: int, seconds: float, output: Path) -> None:
    loop = asyncio.get_running_loop()
    edges = [Edge(number) for number in range(count)]
    for edge in edges:
        await loop.create_connection(lambda edge=edge: edge, "127.0.0.1", port)  # type: ignore[misc]
    while not all(edge.commits or edge.problem for edge in edges):
        await asyncio.sleep(0.02)
    print("ready", flush=True)
    before = sum(edge.frames for edge in edges)
    await asyncio.sleep(seconds)
    problems = [edge.problem for edge in edges if edge.problem]
    assert not problems, problems[0]
    found = {
        "frames": sum(edge.frames for edge in edges) - before,
        "seconds": seconds,
        "commits": [commit for edge in edges for commit in edge.commits],
    }
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    os.nice(10)  # Edges are other machines: they take no time from the server.
    asyncio.run(run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])))
