"""The verification server.

    edge ──Draft──▶ websocket_endpoint ──merge──▶ session state ◀──view── engine_loop
    edge ◀─Commit── websocket_endpoint ◀──────── session_manager ◀─commit─ engine_loop

``engine_loop`` runs the steps: collect, plan (batching policy), verify (engine thread), commit.
"""

from wispprof.server.admission import Refused
from wispprof.server.coalescing_loop import run_coalescing
from wispprof.server.process import RunningServer, running_server, serve
from wispprof.server.session import ServerSession
from wispprof.server.verification_server import VerificationServer

__all__ = [
    "Refused",
    "RunningServer",
    "ServerSession",
    "VerificationServer",
    "run_coalescing",
    "running_server",
    "serve",
]
