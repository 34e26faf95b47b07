"""NVIDIA's management library. Never raises: without the library or a device the answer is ``None``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def library() -> Any | None:
    """The initialised ``pynvml`` module, or None without the package, the driver or a device."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def device_count() -> int:
    """Number of devices that NVML sees; 0 without it."""
    return query(lambda nvml: int(nvml.nvmlDeviceGetCount())) or 0


def of_cuda_device(question: Callable[[Any, Any], T], ordinal: int) -> T | None:
    """``question(pynvml, handle)`` of the GPU that torch calls ``cuda:ordinal``.

    CUDA numbers the devices of ``CUDA_VISIBLE_DEVICES`` by its own order, NVML all of the machine by their
    PCI address. So the GPU (or MIG instance) is found by its UUID. None if NVML does not know it.
    """

    def ask(nvml: Any) -> T:
        uuid = cuda_uuid(ordinal)
        if uuid is None:
            return question(nvml, nvml.nvmlDeviceGetHandleByIndex(ordinal))
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        return question(nvml, handle)

    return query(ask)


def cuda_uuid(ordinal: int) -> str | None:
    """UUID of a CUDA device, without prefix; None without torch, which then runs nothing on a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or ordinal >= torch.cuda.device_count():
        return None
    return str(torch.cuda.get_device_properties(ordinal).uuid)


def query(question: Callable[[Any], T]) -> T | None:
    """``question(pynvml)``; None without the library, or if the device does not support the question."""
    nvml = library()
    if nvml is None:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None
