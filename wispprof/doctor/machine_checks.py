"""Checks of the installation, the machine, the output folder and existing artifacts."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from wispprof.doctor.findings import DoctorContext, Finding
from wispprof.hardware.machine_info import usable_cores

GIB = 1 << 30


def installation(_: DoctorContext) -> Finding:
    """Every required package is installed in a supported version."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("wispprof") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "fail",
            "wispprof is not installed in this environment.",
            "Run `make demo`, or `pip install -e .` in the checkout.",
        )
    problems = []
    requirements = [Requirement(line) for line in required]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if problems:
        return Finding(
            "fail",
            "; ".join(problems) + ".",
            "Run `pip install -r requirements.lock` in the checkout, or `pip install -U wispprof`.",
        )
    python = ".".join(map(str, sys.version_info[:3]))
    own = importlib.metadata.version("wispprof")
    return Finding("ok", f"wispprof {own}, Python {python}, {len(needed)} required packages")


def devices(_: DoctorContext) -> Finding:
    """Torch can use the GPUs of this machine."""
    import torch

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            names.append(f"{name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)")
        return Finding("ok", ", ".join(names))
    from wispprof.hardware import fingerprint

    machine = fingerprint()
    if machine.gpus:
        return Finding(
            "warn",
            f"torch {torch.__version__} cannot use the {machine.gpus[0].name}.",
            "Install the CUDA build of torch for its driver (see docs/install.md).",
        )
    from wispprof.engines.torch.ragged_attention import kernel

    missing = kernel().missing
    attention = f"torch; in C it is faster, but {missing}" if missing else "C"
    return Finding("ok", f"{machine.title}; no GPU, using the CPU backend, attention in {attention}")


def threads(context: DoctorContext) -> Finding:
    """``OMP_NUM_THREADS`` does not exceed the cores of this process."""
    requested = context.environ.get("OMP_NUM_THREADS", "")
    cores = usable_cores()
    if requested and (not requested.isdigit() or not 1 <= int(requested) <= cores):
        return Finding(
            "warn",
            f"OMP_NUM_THREADS={requested}, but this process may use {cores} cores.",
            f"Unset it, or set it to 1–{cores}; step times vary on oversubscribed cores.",
        )
    count = int(requested or cores)
    word = "thread" if count == 1 else "threads"
    return Finding("ok", f"{count} compute {word} on {cores} cores")


def memory(_: DoctorContext) -> Finding:
    """At least 1 GiB is free. The bundled pair needs less, a 4-bit 7 B draft about 5 GiB."""
    import psutil

    free = psutil.virtual_memory().available
    if free < GIB:
        return Finding(
            "warn",
            f"Only {free / GIB:.1f} GiB of memory are free.",
            "Close other programs; swapping invalidates measurements.",
        )
    return Finding("ok", f"{free / GIB:.1f} GiB free")


def load(_: DoctorContext) -> Finding:
    """No other program uses most of the CPU, which would disturb measurements."""
    if not hasattr(os, "getloadavg"):
        return Finding("skip", "This system reports no load average.")
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    if busy > 0.7 * cores:
        return Finding(
            "warn",
            f"The load average is {busy:.1f} on {cores} cores; other programs are running.",
            "Profile on an idle machine. Rows measured under drift are flagged.",
        )
    return Finding("ok", f"load {busy:.1f} on {cores} cores")


def clock(_: DoctorContext) -> Finding:
    """The clock has a resolution of at most 50 µs, and the date is plausible."""
    ticks = []
    for _round in range(200):
        first = time.perf_counter_ns()
        while (second := time.perf_counter_ns()) == first:
            pass
        ticks.append(second - first)
    tick_us = sorted(ticks)[len(ticks) // 2] / 1000
    if tick_us > 50:
        return Finding(
            "fail",
            f"The clock resolution is {tick_us:.0f} µs, too coarse to time steps.",
            "Run outside the virtual machine, or select another kernel clock source.",
        )
    if time.time() < 1_735_689_600:  # 2025-01-01: older than this code
        return Finding(
            "warn",
            f"The date is {time.strftime('%Y-%m-%d')}; certificates and provenance need a correct one.",
            "Set the clock (`timedatectl set-ntp true`).",
        )
    return Finding("ok", f"resolution {tick_us:.2f} µs")


def sensors(_: DoctorContext) -> Finding:
    """Sensors of clock, temperature and energy are readable."""
    from wispprof import hardware

    reading = hardware.sensors().read()
    readable = {
        "clock": reading.clock_mhz is not None,
        "temperature": reading.temperature_c is not None,
        "energy": type(hardware.energy_meter()) is not hardware.EnergyMeter,
    }
    missing = [name for name, found in readable.items() if not found]
    if missing:
        return Finding(
            "warn",
            f"No sensor for {', '.join(missing)}; profiles leave these columns empty.",
            "On bare-metal Linux, make /sys/class/powercap and /sys/class/thermal readable. "
            "Containers and virtual machines usually have no sensors.",
        )
    return Finding("ok", f"{', '.join(readable)} readable")


def open_files(_: DoctorContext) -> Finding:
    """The limit of open files is at least 512; every connection takes one."""
    try:
        import resource
    except ImportError:
        return Finding("skip", "This system has no limit of open files.")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 < limit < 512:
        return Finding(
            "warn",
            f"The limit of open files is {limit}, enough for about {max(0, limit - 64)} edges.",
            "Raise it before serving with `ulimit -n 4096`.",
        )
    return Finding("ok", f"{limit} allowed")


MIN_FREE_BYTES = 200 << 20


def output_folder(context: DoctorContext) -> Finding:
    """The output folder is writable and its disk has at least 200 MiB free."""
    folder = context.out.absolute()
    parent = next(f for f in (folder, *folder.parents) if f.exists())
    if not parent.is_dir():
        return Finding("fail", f"{parent} is a file.", "Move the file, or choose another --out.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as err:
        return Finding(
            "fail",
            f"Cannot write to {parent}: {err.strerror}.",
            "Change its permissions, or choose another --out.",
        )
    free = shutil.disk_usage(parent).free
    if free < MIN_FREE_BYTES:
        return Finding(
            "warn",
            f"Only {free >> 20} MiB are free on the disk of {parent}.",
            "Free disk space; profiles store every raw sample.",
        )
    return Finding("ok", f"{context.out}, {free >> 30} GiB free")


def artifacts(context: DoctorContext) -> Finding:
    """All artifacts of a run are intact, of a supported version, and made from one another."""
    if context.run is None:
        return Finding("skip", "no --run folder given")
    if not context.run.is_dir():
        return Finding("fail", f"Folder {context.run} does not exist.", "Check --run.")
    from wispprof.reporting.run_folder import load_run

    run = load_run(Path(context.run))
    stale = run.stale()
    if stale:
        return Finding(
            "warn", f"Inputs have changed since these were made: {', '.join(stale)}.", "Fit and plan again."
        )
    return Finding("ok", f"{', '.join(run.names())} are intact and consistent")
