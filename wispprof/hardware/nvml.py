"""NVIDIA's management library. Never raises: without the library or a device the answer is ``None``."""

from __future__ import annotations

import functools
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


def query(question: Callable[[Any], T]) -> T | None:
    """``question(pynvml)``; None without the library, or if the device does not support the question."""
    nvml = library()
    if nvml is None:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None
