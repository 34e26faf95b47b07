"""The installation and the machine it runs on.

Where results are written, and whether those already there can be read.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from wispprof.doctor.findings import DoctorContext, Finding

__all__ = [
    "artifacts",
    "clock",
    "devices",
    "installation",
    "load",
    "memory",
    "open_files",
    "output_folder",
    "sensors",
    "threads",
]

GIB = 1 << 30


def installation(_: DoctorContext) -> Finding:
    """Every required package is there in a version this project works with."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires("wispprof") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "installation",
            "fail",
            "wispprof itself is not installed in this environment.",
            "Run `make demo`, or `pip install -e .` in the checkout.",
        )
    faults = []
    requirements = [Requirement(line) for line in wanted]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if faults:
        return Finding(
            "installation",
            "fail",
            "; ".join(faults) + ".",
            "Run `pip install -r requirements.lock` in the checkout, or `pip install -U wispprof`.",
        )
    python = ".".join(map(str, sys.version_info[:3]))
    own = importlib.metadata.version("wispprof")
    return Finding(
        "installation", "ok", f"wispprof {own}, Python {python}, {len(needed)} packages fit"
    )


def devices(_: DoctorContext) -> Finding:
    """What torch can compute on."""
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            names.append(f"{name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)")
        return Finding("devices", "ok", ", ".join(names))
    from wispprof.hardware import fingerprint

    machine = fingerprint()
    if machine.gpus:
        return Finding(
            "devices",
            "warn",
            f"There is a {machine.gpus[0].name}, but torch {torch.__version__} cannot use it.",
            "Install a CUDA build of torch that fits the driver (see docs/install.md).",
        )
    return Finding("devices", "ok", f"{machine.title}; no GPU, the CPU backend serves")


def threads(situation: DoctorContext) -> Finding:
    """Compute threads of this process against the cores it may use."""
    asked = situation.environ.get("OMP_NUM_THREADS", "")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if asked and (not asked.isdigit() or not 1 <= int(asked) <= cores):
        return Finding(
            "threads",
            "warn",
            f"OMP_NUM_THREADS={asked}, but this process may use {cores} cores.",
            f"Unset it, or set it to a number from 1 to {cores}: oversubscribed steps jitter.",
        )
    count = int(asked or cores)
    word = "thread" if count == 1 else "threads"
    return Finding("threads", "ok", f"{count} compute {word} on {cores} cores")


def memory(situation: DoctorContext) -> Finding:
    """Free memory: a 4-bit 7 B draft needs about 5 GiB, the bundled pair well under one."""
    import psutil

    free = psutil.virtual_memory().available
    if free < GIB:
        return Finding(
            "memory",
            "warn",
            f"{free / GIB:.1f} GiB are free.",
            "Close other programs: a machine that swaps measures its disk.",
        )
    return Finding("memory", "ok", f"{free / GIB:.1f} GiB free")


def load(_: DoctorContext) -> Finding:
    """Whether others compute here now: measurements would carry their noise."""
    if not hasattr(os, "getloadavg"):
        return Finding("load", "skip", "This system states no load average.")
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.7 * cores:
        return Finding(
            "load",
            "warn",
            f"Load {busy:.1f} on {cores} cores: other programs are computing.",
            "Profile when the machine is idle; profiles flag rows measured under drift.",
        )
    return Finding("load", "ok", f"load {busy:.1f} on {cores} cores")


def clock(_: DoctorContext) -> Finding:
    """Resolution of the clock that measures steps, and whether the date can be right."""
    ticks = []
    for _round in range(200):
        first = time.perf_counter_ns()
        while (second := time.perf_counter_ns()) == first:
            pass
        ticks.append(second - first)
    tick_us = sorted(ticks)[len(ticks) // 2] / 1000
    if tick_us > 50:
        return Finding(
            "clock",
            "fail",
            f"The finest clock ticks every {tick_us:.0f} µs: steps cannot be timed.",
            "Run on the machine itself, or choose another clock source in its kernel.",
        )
    if time.time() < 1_735_689_600:  # 2025-01-01: older than this code
        return Finding(
            "clock",
            "warn",
            f"The date is {time.strftime('%Y-%m-%d')}: certificates and provenance will be wrong.",
            "Set the clock (`timedatectl set-ntp true`).",
        )
    return Finding("clock", "ok", f"ticks of {tick_us:.2f} µs")


def sensors(_: DoctorContext) -> Finding:
    """Clock, temperature and energy sensors: without them the profile's columns stay empty."""
    from wispprof import hardware

    seen: list[str] = []
    missing: list[str] = []
    found = hardware.sensors()
    reading = found.read()
    for name, value in (("clock", reading.clock_mhz), ("temperature", reading.temperature_c)):
        (missing if value is None else seen).append(name)
    meter = hardware.energy_meter()
    (missing if isinstance(meter, hardware.NullMeter) else seen).append("energy")
    if missing:
        return Finding(
            "sensors",
            "warn",
            f"No sensor for {', '.join(missing)}; those columns stay empty.",
            "Nothing to do in a container or virtual machine; on bare Linux, allow reading of "
            "/sys/class/powercap and /sys/class/thermal.",
        )
    return Finding("sensors", "ok", f"{', '.join(seen)} readable")


def open_files(_: DoctorContext) -> Finding:
    """Connections a server may hold: each takes one file descriptor."""
    try:
        import resource
    except ImportError:
        return Finding("open files", "skip", "This system has no such limit.")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 < limit < 512:
        return Finding(
            "open files",
            "warn",
            f"This shell allows {limit} open files: about {max(0, limit - 64)} edges at once.",
            "Raise it before serving: `ulimit -n 4096`.",
        )
    return Finding("open files", "ok", f"{limit} allowed")


MIN_FREE_BYTES = 200 << 20


def output_folder(situation: DoctorContext) -> Finding:
    """Results can be written, and the disk has space for them."""
    folder = situation.out.absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    if not there.is_dir():
        return Finding(
            "output folder", "fail", f"{there} is a file.", "Move it, or choose another --out."
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as err:
        return Finding(
            "output folder",
            "fail",
            f"Nothing can be written to {there}: {err.strerror}.",
            "Choose another --out, or change its permissions.",
        )
    free = shutil.disk_usage(there).free
    if free < MIN_FREE_BYTES:
        return Finding(
            "output folder",
            "warn",
            f"{free >> 20} MiB are free on the disk of {there}.",
            "Free some disk space: profiles keep every raw sample.",
        )
    return Finding("output folder", "ok", f"{situation.out}, {free >> 30} GiB free")


def artifacts(situation: DoctorContext) -> Finding:
    """Every artifact of a run is whole, of a version this tool reads, and made from its neighbours."""
    if situation.run is None:
        return Finding("artifacts", "skip", "no --run folder named")
    if not situation.run.is_dir():
        return Finding("artifacts", "fail", f"There is no folder {situation.run}.", "Check --run.")
    from wispprof.reporting.run_folder import load_run

    run = load_run(Path(situation.run))
    stale = run.stale()
    if stale:
        return Finding(
            "artifacts",
            "warn",
            f"Made from files that have changed since: {', '.join(stale)}.",
            "Fit and plan again.",
        )
    return Finding("artifacts", "ok", f"{', '.join(run.names())} are whole and belong together")
