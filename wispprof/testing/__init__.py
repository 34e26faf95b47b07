"""Test doubles for code that builds on wispprof: no network, no models, no torch.

An engine and a drafter of a fake model pair, a server in the test's own process, emulated links, and an event
loop in virtual time. Each docstring has an example. :mod:`wispprof.testing.lossless` proves that a real pair
on a real server gives exactly the target's text; it loads torch and is imported by its own name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wispprof.testing.cpu_burner import CpuBurner
    from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
    from wispprof.testing.in_process_server import InProcessServer
    from wispprof.testing.link_emulator import LinkProxy, emulate_link
    from wispprof.testing.virtual_time import VirtualTimeLoop, run_virtual

__all__ = [
    "CpuBurner",
    "FakeDrafter",
    "FakeEngine",
    "FakeTarget",
    "InProcessServer",
    "LinkProxy",
    "VirtualTimeLoop",
    "emulate_link",
    "run_virtual",
]

_MODULE_OF = {
    "CpuBurner": "cpu_burner",
    "FakeDrafter": "fake_engine",
    "FakeEngine": "fake_engine",
    "FakeTarget": "fake_engine",
    "InProcessServer": "in_process_server",
    "LinkProxy": "link_emulator",
    "VirtualTimeLoop": "virtual_time",
    "emulate_link": "link_emulator",
    "run_virtual": "virtual_time",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because the server loads many modules."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
