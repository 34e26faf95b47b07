"""The web server's end of a WebSocket, reading as fast as small frames come.

uvicorn stops reading from a connection after every message until the application has taken it. That costs two
calls into the kernel per frame, more than all the rest of a draft frame does. Here reading stops only where
messages are left lying: the bound on memory is the same, the price is paid by slow readers alone.
"""

from __future__ import annotations

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

__all__ = ["MOST_UNREAD", "EagerReader"]

MOST_UNREAD = 16
"""Messages that may wait for the application before reading from their connection stops."""


class EagerReader(WebSocketsSansIOProtocol):
    """Give it to :class:`uvicorn.Config` as ``ws``."""

    def send_receive_event_to_app(self) -> None:
        # The base class pauses unless it believes it has, and resumes once the queue is empty;
        # asyncio lets reading resume that was never paused.
        self.read_paused = True
        super().send_receive_event_to_app()
        if self.queue.qsize() >= MOST_UNREAD and not self.close_sent:
            self.transport.pause_reading()
