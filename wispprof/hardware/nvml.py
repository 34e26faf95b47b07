"""NVIDIA's management library, if it is installed and answers. Never raises: absent means ``None``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["device_count", "library", "read"]

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
    """How many devices NVML sees; 0 without it."""
    found = read(lambda nvml: int(nvml.nvmlDeviceGetCount()))
    return found or 0


def read(ask: Callable[[Any], T]) -> T | None:
    """``ask(pynvml)``, or None where there is no library or the device does not support the question."""
    nvml = library()
    if nvml is None:
        return None
    try:
        return ask(nvml)
    except nvml.NVMLError:
        return None
