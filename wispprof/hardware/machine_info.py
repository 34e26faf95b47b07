"""Identify this machine without torch: CPU, cores, memory, GPUs, board, system.

The hash covers hardware only, so it does not change with the kernel, a driver or a library. Artifacts
record the device that computed them; :func:`machine_mismatch` warns if they are used on another one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from wispprof.hardware import nvml

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One accelerator. ``memory_gib`` is rounded to whole GiB, 0 if unknown."""

    name: str
    memory_gib: int = 0
    driver: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """``cores`` are those this process may run on; ``physical_cores`` those of the machine (0: unknown).

    ``board`` names single-board computers (from the device tree) and Macs.
    """

    cpu: str
    cores: int
    physical_cores: int
    memory_gib: int
    gpus: tuple[Gpu, ...]
    arch: str
    system: str
    kernel: str
    board: str = ""

    @property
    def hash(self) -> str:
        """Twelve hex digits over the hardware (not drivers, kernel or libraries)."""
        hard = [
            self.cpu,
            self.cores,
            self.physical_cores,
            self.memory_gib,
            [[gpu.name, gpu.memory_gib] for gpu in self.gpus],
            self.arch,
            self.board,
        ]
        return hashlib.blake2b(json.dumps(hard).encode(), digest_size=6).hexdigest()

    @property
    def title(self) -> str:
        """Short description: ``Raspberry Pi 5, 4 cores, 8 GiB``."""
        name = self.board or self.cpu or self.arch
        gpus = "".join(f", {gpu.name}" for gpu in self.gpus)
        return f"{name}, {cores_text(self.cores)}, {self.memory_gib} GiB{gpus}"

    def as_dict(self) -> dict[str, Any]:
        """For a manifest, hash included."""
        return {**asdict(self), "gpus": [asdict(gpu) for gpu in self.gpus], "hash": self.hash}


@functools.cache
def fingerprint() -> Fingerprint:
    """This machine, probed once per process."""
    return probe_machine(Path("/"))


def probe_machine(root: Path) -> Fingerprint:
    """Probe the machine. ``root`` contains ``proc`` and ``sys``, so that tests can fake them."""
    return Fingerprint(
        cpu=_cpu(root),
        cores=usable_cores(),
        physical_cores=psutil.cpu_count(logical=False) or 0,
        memory_gib=round(psutil.virtual_memory().total / GIB),
        gpus=_gpus(root),
        arch=platform.machine(),
        system=platform.system(),
        kernel=platform.release(),
        board=_board(root),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def cores_text(cores: object) -> str:
    """A number of cores in words."""
    return f"{cores} core" if cores == 1 else f"{cores} cores"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu(root: Path) -> str:
    names = ("model name", "Model", "cpu model", "Hardware")
    found: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, mark, value = line.partition(":")
        if mark and name.strip() in names:
            found.setdefault(name.strip(), " ".join(value.split()))
    for name in names:
        if found.get(name):
            return found[name]
    return _sysctl("machdep.cpu.brand_string") or platform.processor()


def _board(root: Path) -> str:
    board = _read(root / "proc/device-tree/model").strip("\x00\n ")
    return board or _sysctl("hw.model")


def _sysctl(name: str) -> str:
    """A value on macOS, ``""`` elsewhere."""
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _gpus(root: Path) -> tuple[Gpu, ...]:
    found = [_nvml_gpu(index) for index in range(nvml.device_count())]
    known = tuple(gpu for gpu in found if gpu is not None)
    return known or _proc_gpus(root)


def _nvml_gpu(index: int) -> Gpu | None:
    def describe(lib: Any) -> Gpu:
        handle = lib.nvmlDeviceGetHandleByIndex(index)
        memory = round(lib.nvmlDeviceGetMemoryInfo(handle).total / GIB)
        return Gpu(_text(lib.nvmlDeviceGetName(handle)), memory, _text(lib.nvmlSystemGetDriverVersion()))

    return nvml.query(describe)


def _proc_gpus(root: Path) -> tuple[Gpu, ...]:
    """The driver's own listing, for machines without pynvml."""
    gpus = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        for line in _read(file).splitlines():
            if line.startswith("Model:"):
                gpus.append(Gpu(line.split(":", 1)[1].strip()))
    return tuple(gpus)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def compute_device_name(device: str, hardware: Mapping[str, Any] | None = None) -> str:
    """Name of the processor behind a torch device (``cpu``, ``cuda:0``; anything else: the GPU if present).

    ``hardware``: a manifest's record; default: this machine's. Empty if unknown.
    """
    if hardware is None and device.startswith("cuda"):
        ordinal = int(device.partition(":")[2] or 0)
        found = nvml.of_cuda_device(lambda lib, dev: _text(lib.nvmlDeviceGetName(dev)), ordinal)
        if found is not None:
            return found
    facts = fingerprint().as_dict() if hardware is None else hardware
    gpus = [str(gpu["name"]) for gpu in facts.get("gpus", [])]
    if gpus and device != "cpu":
        place = device.partition(":")[2]
        return gpus[int(place)] if place.isdigit() and int(place) < len(gpus) else gpus[0]
    cpu, cores = facts.get("cpu", ""), facts.get("cores", 0)
    return f"{cpu}, {cores_text(cores)}" if cpu and cores else str(cpu or facts.get("board", ""))


def machine_mismatch(what: str, made_on: str, used_on: str) -> str | None:
    """A warning of one line if both are known and differ, else ``None``."""
    if not made_on or not used_on or made_on == used_on:
        return None
    return (
        f"{what} was made on {made_on}, but this machine is {used_on}: its times will be wrong. "
        "Run `wispprof profile-server` and `wispprof fit` here."
    )
