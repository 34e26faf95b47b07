"""Settings that several commands and packages have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wispprof.settings.fields import Settings, setting
from wispprof.types import Sampling

__all__ = ["SamplingSettings", "ServerAccess", "device_setting", "dtype_setting"]


def device_setting() -> Any:
    """The field ``device`` of whatever runs a model."""
    return setting("auto", "Where the model runs: auto, cpu, cuda or cuda:N.")


def dtype_setting() -> Any:
    """The field ``dtype`` of whatever runs a model."""
    return setting(
        "float32",
        "Data type of weights and activations: float32, bfloat16 or float16.",
    )


@dataclass(frozen=True, slots=True)
class ServerAccess(Settings):
    """What a client shows a server, and whom it trusts."""

    key: str = setting("", "API key of the server.", secret=True)
    ca_file: Path | None = setting(None, "Certificate authority for wss://; default: the system's.")


@dataclass(frozen=True, slots=True)
class SamplingSettings(Settings):
    """How the target chooses a token, see :class:`~wispprof.types.Sampling`."""

    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", minimum=0)
    top_p: float = setting(1.0, "Nucleus; 1 switches it off.", minimum=1e-6, maximum=1)
    top_k: int = setting(0, "Number of most likely tokens; 0 switches it off.", minimum=0)
    seed: int = setting(0, "Seed; the same seed gives the same text.", minimum=0)

    def sampling(self, offset: int = 0) -> Sampling:
        """The same for one request; ``offset`` is added to the seed."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed + offset)
