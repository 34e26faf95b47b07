"""Settings of a load test: devices, links, SLOs, how edges draft, and when requests come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.fields import Settings, setting
from wispprof.settings.shared_settings import LinkModel, ServerAccess

if TYPE_CHECKING:
    from wispprof.simulation.devices import DeviceProfile


@dataclass(frozen=True)
class BenchSettings(Settings):
    """One load under one way of drafting.

    ``system``: ``server-only`` (sessions without drafts), or a name of
    :data:`wispprof.simulation.scenario.SYSTEMS` that says how edges draft; the server chooses the batching
    policy. ``controller``, ``options`` and ``drafting`` replace what the system says. Device ``i`` is
    ``device[i % len]`` (without any, the preset ``medium``), has the SLO ``tokens_per_s[i % len]`` and its
    own connection. ``link`` is emulated
    on top of the real one. A closed fleet starts spread over ``ramp_ms``. With ``hold``, devices that have
    finished go on until all have, so that the load stays constant; what is unfinished then does not count.
    """

    access: ServerAccess = field(default_factory=ServerAccess)
    system: str = "wisp"
    device: tuple[DeviceProfile, ...] = ()
    link: LinkModel = field(default_factory=lambda: LinkModel(rtt_ms=0.0))
    options: Mapping[str, Any] = field(default_factory=dict)
    drafting: DraftingSettings | None = None
    devices: int = setting(8, "Number of edge devices.", minimum=1)
    tokens_per_s: tuple[float, ...] = setting(
        (4.0,),
        "SLO: token speed; repeatable, devices take them in turn.",
        unit="tokens/s",
        minimum=0.01,
        option="slo",
    )
    ttft_ms: float | None = setting(
        None, "SLO: time to the first token.", unit="ms", option="ttft", minimum=0
    )
    requests: int = setting(2, "Requests per device; with --rate, of all devices.", minimum=1)
    max_new: int = setting(
        48, "Maximum tokens per request.", unit="tokens", minimum=2, option="max-tokens"
    )
    rate_per_s: float = setting(
        0.0, "Poisson arrivals; 0 is a closed fleet.", unit="requests/s", minimum=0, option="rate"
    )
    think_ms: float = setting(
        0.0, "Mean pause between a device's requests.", unit="ms", minimum=0, option="think"
    )
    ramp_ms: float = setting(
        500.0, "Time over which a closed fleet starts.", unit="ms", minimum=0, option="ramp"
    )
    hold: bool = setting(False, "Keep finished devices of a closed fleet busy until all are done.")
    controller: str = setting("", "Speculation controller; default: the system's.")
    predictor: Path | None = setting(None, "Rejection predictor made by `wispprof fit`.")
    seed: int = setting(0, "Seed of arrivals, jitter and loss.")
