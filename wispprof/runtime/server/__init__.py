"""The verification server: doors (``edgelink``, ``http``), sessions (``house``), and the step loop.

edge ──frame──▶ edgelink ──merge──▶ ledger (in house)
                                       │ view
steploop: collect → plan (policy) → verify (engine thread) → commit ──▶ edgelink ──commit──▶ edge
"""

from wispprof.runtime.server.admission import Refused
from wispprof.runtime.server.double import HashDrafter, HashEngine, HashTarget
from wispprof.runtime.server.engine import Engine, ServedModel
from wispprof.runtime.server.frontloop import run_front
from wispprof.runtime.server.live import GenerationRequest, LiveSession, Owner
from wispprof.runtime.server.run import RunningServer, running_server, serve
from wispprof.runtime.server.server import VerificationServer
from wispprof.runtime.server.settings import ServerSettings, read_api_keys

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
