"""The server reads small frames without pausing their connection, and pauses it if they pile up."""

from __future__ import annotations

import asyncio

import pytest

from wispprof.server.coalescing_loop import MAX_UNREAD_MESSAGES, EagerWebSocket


class Transport:
    """Counts changes; like asyncio's transport it ignores a repeated pause or resume."""

    def __init__(self) -> None:
        self.reading = True
        self.changes = 0

    def pause_reading(self) -> None:
        self.changes += self.reading
        self.reading = False

    def resume_reading(self) -> None:
        self.changes += not self.reading
        self.reading = True


@pytest.fixture
def reader() -> EagerWebSocket:
    made = EagerWebSocket.__new__(EagerWebSocket)
    made.queue = asyncio.Queue()
    made.read_paused = made.close_sent = False
    made.curr_msg_data_type = "bytes"
    made.transport = Transport()  # type: ignore[assignment]
    return made


def arrive(reader: EagerWebSocket, frames: int) -> None:
    for number in range(frames):
        reader.frames = [bytes([number])]
        reader.send_receive_event_to_app()


async def test_frames_read_at_once_do_not_pause_the_connection(reader: EagerWebSocket) -> None:
    for _ in range(100):
        arrive(reader, 2)
        assert [(await reader.receive())["bytes"] for _ in range(2)] == [b"\0", b"\1"]
    assert reader.transport.changes == 0


async def test_a_backlog_pauses_reading_until_it_is_read(reader: EagerWebSocket) -> None:
    arrive(reader, MAX_UNREAD_MESSAGES)
    assert not reader.transport.reading
    for left in reversed(range(MAX_UNREAD_MESSAGES)):
        await reader.receive()
        assert reader.transport.reading is (left == 0)


async def test_after_a_close_reading_continues_for_the_peers_reply(reader: EagerWebSocket) -> None:
    arrive(reader, MAX_UNREAD_MESSAGES - 1)
    reader.close_sent = True
    arrive(reader, 5)
    assert reader.transport.reading
    assert reader.queue.qsize() == MAX_UNREAD_MESSAGES - 1
