"""The verification server: doors (``edgelink``, ``http``), sessions (``manager``), and the step loop.

edge ──frame──▶ edgelink ──merge──▶ ledger (in house)
                                       │ view
steploop: collect → plan (policy) → verify (engine thread) → commit ──▶ edgelink ──commit──▶ edge
"""

from wispprof.server.admission import Refused
from wispprof.server.coalescing_loop import run_coalescing
from wispprof.server.process import RunningServer, running_server, serve
from wispprof.server.session import ServerSession, SessionListener, SessionRequest
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings, read_api_keys
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import Engine, ServedModel

__all__ = [
    "Engine",
    "FakeDrafter",
    "FakeEngine",
    "FakeTarget",
    "Refused",
    "RunningServer",
    "ServedModel",
    "ServerSession",
    "ServerSettings",
    "SessionListener",
    "SessionRequest",
    "VerificationServer",
    "read_api_keys",
    "run_coalescing",
    "running_server",
    "serve",
]
