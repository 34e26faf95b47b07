"""Settings that several commands and packages have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wispprof.errors import SettingsError
from wispprof.settings.fields import Settings, setting
from wispprof.settings.sources import named_value
from wispprof.types import Sampling

DEMO_FOLDER = Path("out/demo")
"""Where the demo writes, and what `wispprof report` reads if no folder is named."""


def device_setting() -> Any:
    """The field ``device`` of whatever runs a model."""
    return setting("auto", "Where the model runs: auto, cpu, cuda, cuda:N or mps.")


def dtype_setting() -> Any:
    """The field ``dtype`` of whatever runs a model."""
    return setting("float32", "Data type of weights and activations: float32, bfloat16 or float16.")


def engine_dtype_setting() -> Any:
    """The field ``dtype`` of whatever runs an engine."""
    return setting(
        "auto",
        "Data type of weights and activations: float32, bfloat16, float16, or auto: float32 on the torch "
        "engine, on vLLM what its own auto chooses for the model.",
    )


def backend_setting() -> Any:
    """The field ``backend`` of whatever runs an engine."""
    return setting(
        "auto", "KV cache layout of the torch engine: dense, paged, or auto (paged on CUDA, dense elsewhere)."
    )


def engine_setting() -> Any:
    """The field ``engine`` of whatever runs an engine."""
    return setting("torch", "Engine that runs the target: torch, vllm, vllm-http or one of your own.")


def vllm_args_setting() -> Any:
    """The field ``vllm_args`` of whatever may run vLLM."""
    return setting(
        {},
        "Argument of vLLM, as NAME=VALUE, such as quantization=fp8; repeatable.",
        option="vllm-arg",
        parse=named_value,
    )


def vllm_untested_setting() -> Any:
    """The field ``vllm_untested`` of whatever may run vLLM."""
    return setting(False, "Accept a version of vLLM that was not tested.")


@dataclass(frozen=True, slots=True)
class ServerAccess(Settings):
    """What a client shows a server, and whom it trusts."""

    key: str = setting("", "API key of the server.", secret=True, variable="WISPPROF_KEY")
    ca_file: Path | None = setting(None, "Certificate authority for wss://; default: the system's.")


@dataclass(frozen=True, slots=True)
class SamplingSettings(Settings):
    """How the target chooses a token, see :class:`~wispprof.types.Sampling`."""

    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", minimum=0)
    top_p: float = setting(1.0, "Nucleus; 1 switches it off.", minimum=0.01, maximum=1)
    top_k: int = setting(0, "Number of most likely tokens; 0 switches it off.", minimum=0)
    seed: int = setting(0, "Seed; the same seed gives the same text.", minimum=0)
    min_p: float = setting(
        0.0,
        "Least probability of a token, as a share of the likeliest one's; 0 switches it off.",
        minimum=0,
        maximum=1,
    )

    def sampling(self, offset: int = 0) -> Sampling:
        """The same for one request; ``offset`` is added to the seed."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed + offset, self.min_p)


@dataclass(frozen=True, slots=True)
class LinkModel(Settings):
    """A link between an edge and a server, simulated or emulated.

    A retransmission costs ``max(200 ms, 1.5 RTT)``: a small frame with nothing behind it does not trigger
    fast retransmission (RFC 6298 section 2.4, with the floor that Linux sets).
    """

    rtt_ms: float = setting(
        30.0, "Round trip of an empty frame, half of it each way.", unit="ms", minimum=0, option="rtt"
    )
    jitter_ms: float = setting(
        0.0, "Mean of an exponential delay added each way.", unit="ms", minimum=0, option="jitter"
    )
    loss: float = setting(0.0, "Probability that a frame needs a retransmission.", minimum=0, maximum=0.99)
    up_mbps: float = setting(0.0, "Uplink bandwidth; 0 is unlimited.", unit="Mbit/s", minimum=0, option="up")
    down_mbps: float = setting(
        0.0, "Downlink bandwidth; 0 is unlimited.", unit="Mbit/s", minimum=0, option="down"
    )

    @property
    def retransmission_ms(self) -> float:
        """Delay of one lost packet."""
        return max(200.0, 1.5 * self.rtt_ms)

    @property
    def mean_rtt_ms(self) -> float:
        """Mean round trip of an empty frame, which an edge measures in the long run."""
        lost = self.loss / (1.0 - self.loss)
        return self.rtt_ms + 2.0 * (self.jitter_ms + lost * self.retransmission_ms)


@dataclass(frozen=True, slots=True)
class LinkSettings(Settings):
    """An emulated link and its faults. Frames sent during a stall arrive after it."""

    link: LinkModel = field(default_factory=LinkModel)
    stall_every_ms: float = setting(
        0.0, "Interval between stalls of both directions; 0 is none.", unit="ms", minimum=0
    )
    stall_ms: float = setting(0.0, "Length of a stall.", unit="ms", minimum=0)
    cut_every_ms: float = setting(0.0, "Age at which a connection breaks; 0 is never.", unit="ms", minimum=0)
    seed: int = setting(0, "Seed of jitter and loss.")

    def check_together(self) -> None:
        if self.stall_ms and self.stall_ms >= self.stall_every_ms:
            raise SettingsError(
                f"A stall of {self.stall_ms} ms every {self.stall_every_ms} ms never ends.",
                "Make stalls shorter than their interval.",
            )

    def after_stall_ms(self, at_ms: float) -> float:
        """When something due at ``at_ms`` (since the link began) is delivered.

        Each period of ``stall_every_ms`` ends with its stall.
        """
        if not self.stall_ms:
            return at_ms
        period, into = divmod(at_ms, self.stall_every_ms)
        if into < self.stall_every_ms - self.stall_ms:
            return at_ms
        return (period + 1) * self.stall_every_ms
