"""Checks of an installation: what could go wrong on this machine, found before it does, with its fix.

A check is a function from a :class:`DoctorContext` to a :class:`Finding`. It reads the world through the
situation where it can, so that tests can plant each fault.
"""

from wispprof.doctor.findings import Check, DoctorContext, Finding, examine
from wispprof.doctor.machine_checks import (
    artifacts,
    clock,
    devices,
    installation,
    load,
    memory,
    open_files,
    output_folder,
    sensors,
    threads,
)
from wispprof.doctor.model_checks import engine, models, tokenizers
from wispprof.doctor.server_checks import api_keys, port, server, tls

CHECKS: tuple[Check, ...] = (
    installation,
    devices,
    threads,
    memory,
    load,
    clock,
    sensors,
    open_files,
    models,
    tokenizers,
    engine,
    port,
    api_keys,
    tls,
    server,
    output_folder,
    artifacts,
)

__all__ = ["CHECKS", "Check", "DoctorContext", "Finding", "examine"]
