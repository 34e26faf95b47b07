"""The verification server: doors (``edgelink``, ``http``), sessions (``house``), and the step loop.

edge ──frame──▶ edgelink ──merge──▶ ledger (in house)
                                       │ view
steploop: collect → plan (policy) → verify (engine thread) → commit ──▶ edgelink ──commit──▶ edge
"""

from wispprof.server.admission import Refused
from wispprof.server.coalescing_loop import run_front
from wispprof.server.process import RunningServer, running_server, serve
from wispprof.server.session import GenerationRequest, LiveSession, Owner
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings, read_api_keys
from wispprof.testing.fake_engine import HashDrafter, HashEngine, HashTarget
from wispprof.types import Engine, ServedModel

__all__ = [
    "Engine",
    "GenerationRequest",
    "HashDrafter",
    "HashEngine",
    "HashTarget",
    "LiveSession",
    "Owner",
    "Refused",
    "RunningServer",
    "ServedModel",
    "ServerSettings",
    "VerificationServer",
    "read_api_keys",
    "run_front",
    "running_server",
    "serve",
]
