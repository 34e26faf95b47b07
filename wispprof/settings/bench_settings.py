"""What a bench offers: devices, their links and promises, how they draft, and when requests come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wispprof.artifacts import bundled
from wispprof.errors import ArtifactMissing, WispprofError
from wispprof.sessions.draft_scheduler import DraftingSettings
from wispprof.simulation.devices import DeviceProfile, LinkModel

__all__ = ["DEVICES", "BenchSettings", "device_of"]

DEVICES: Mapping[str, DeviceProfile] = MappingProxyType(
    {
        device.name: device
        for device in (
            DeviceProfile("fast", draft_ms=4.0, prefill_ms_per_token=0.05),
            DeviceProfile("medium", draft_ms=16.0, prefill_ms_per_token=0.2),
            DeviceProfile("slow", draft_ms=60.0, prefill_ms_per_token=1.0),
        )
    }
)
"""Round figures for those who have no profile: drafting at 250, 62 and 17 tokens/s."""


def device_of(text: str) -> DeviceProfile:
    """A device: a name of :data:`DEVICES`, the ms of a draft step (``16``), or an edge profile: its file,
    or the name of one that ships with the package (``rpi-5``).

    Raises :class:`WispprofError` on anything else, and what reading a profile raises.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        draft_ms = float(text)
    except ValueError:
        pass
    else:
        if not draft_ms > 0:
            raise WispprofError(f"A draft step of {text} ms is none.", "Give more than 0.")
        return DeviceProfile(f"{draft_ms:g}ms", draft_ms=draft_ms)
    path = Path(text)
    if not path.exists():
        try:
            path = bundled.path(f"profiles/{text}.jsonl")
        except (ArtifactMissing, ValueError) as err:
            raise WispprofError(
                f"There is no device {text!r}.",
                f"Choose one of {', '.join(DEVICES)}, a number of ms, or an edge profile: its file, "
                "or a shipped one such as rpi-5.",
            ) from err
    from wispprof.artifacts import load_profile
    from wispprof.artifacts.rows import EdgeRow

    rows = [row for row in load_profile(path).rows if isinstance(row, EdgeRow)]
    return DeviceProfile.from_rows(path.stem, rows)


@dataclass(frozen=True)
class BenchSettings:
    """One load under one way of drafting.

    ``system``: ``server-only`` (undrafted sessions), or a name of
    :data:`wispprof.simulation.systems.SYSTEMS` that says how edges draft (the batching policy is the
    server's own); ``controller``, ``options`` and ``drafting`` replace what it says. ``devices``: how
    many edges, each with its own connection; device ``i`` is ``device[i % len]`` and promises
    ``tokens_per_s[i % len]``. ``requests``: per device (closed fleet: one after the other, with a mean
    pause of ``think_ms``), or in all where ``rate_per_s`` gives Poisson arrivals. ``ramp_ms``: the
    first requests of a closed fleet are spread over it. ``hold``: devices of a closed fleet that are through
    with their requests go on until all are, so that the load stays what it was and fast devices count for
    all they did; what is unfinished then does not count. ``max_new``: tokens per request, at most what
    the trace's paths hold. ``link``: emulated on top of the real one. ``ca_file``: who vouches for a server
    behind ``wss://`` (``None``: the system knows).
    """

    system: str = "wisp"
    devices: int = 8
    device: tuple[DeviceProfile, ...] = (DEVICES["medium"],)
    tokens_per_s: tuple[float, ...] = (4.0,)
    ttft_ms: float | None = None
    requests: int = 2
    max_new: int = 48
    rate_per_s: float = 0.0
    think_ms: float = 0.0
    ramp_ms: float = 500.0
    hold: bool = False
    link: LinkModel = field(default_factory=lambda: LinkModel(rtt_ms=0.0))
    controller: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    drafting: DraftingSettings | None = None
    predictor: Path | None = None
    key: str = ""
    ca_file: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.requests < 1 or self.max_new < 2:
            raise WispprofError(
                "A bench needs a device, a request and two tokens per request.",
                "Raise the numbers.",
            )
        if not self.device or not self.tokens_per_s:
            raise WispprofError(
                "A bench needs a kind of device and a promise.", "Give one of each."
            )

    def load(self) -> dict[str, Any]:
        """What is offered, in words and numbers: the same for every system compared under it."""
        return {
            "devices": self.devices,
            "device": [f"{d.name} ({d.draft_ms:g} ms)" for d in self.device],
            "slo_tokens_per_s": list(self.tokens_per_s),
            "slo_ttft_ms": self.ttft_ms,
            "arrivals": f"poisson {self.rate_per_s:g}/s" if self.rate_per_s else "closed",
            "requests": self.requests if self.rate_per_s else self.requests * self.devices,
            "max_new": self.max_new,
            "rtt_ms": self.link.rtt_ms,
            "jitter_ms": self.link.jitter_ms,
            "seed": self.seed,
        }
