"""The verification server: fronts, which hold connections, and the engine process, joined by a channel.

    edge ──Draft──▶ websocket_endpoint ─▶ engine_client ═▶ engine_host ─▶ session state ◀─view─ engine_loop
    edge ◀─Commit── websocket_endpoint ◀─ engine_client ◀═ engine_host ◀─ session_manager ◀─── engine_loop

``engine_loop`` runs the steps: collect, plan (batching policy), verify (engine thread), commit.
"""

from wispprof.server.admission import Refused
from wispprof.server.process import RunningServer, running_server, serve
from wispprof.server.session import ServerSession
from wispprof.server.verification_server import VerificationServer

__all__ = [
    "Refused",
    "RunningServer",
    "ServerSession",
    "VerificationServer",
    "running_server",
    "serve",
]
