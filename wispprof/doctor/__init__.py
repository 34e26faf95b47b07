"""Checks of an installation and its intended use; each finding says what to do.

A check is a function from a :class:`DoctorContext` to a :class:`Finding`.
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
from wispprof.doctor.serving_checks import api_keys, engine, models, port, server, tls, tokenizers
from wispprof.doctor.vllm_checks import vllm, vllm_on_cpu, vllm_target

CHECKS: tuple[Check, ...] = (
    installation,
    devices,
    threads,
    memory,
    load,
    clock,
    sensors,
    open_files,
    vllm,
    vllm_on_cpu,
    models,
    tokenizers,
    engine,
    vllm_target,
    port,
    api_keys,
    tls,
    server,
    output_folder,
    artifacts,
)

__all__ = ["CHECKS", "Check", "DoctorContext", "Finding", "examine"]
