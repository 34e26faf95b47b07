"""Settings of fleets of edges: simulated ones, and those that load a running server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.errors import PlanError, SettingsError
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.settings.fields import Settings, setting
from wispprof.settings.planner_settings import PlanSettings
from wispprof.settings.shared_settings import LinkModel, ServerAccess

if TYPE_CHECKING:
    from wispprof.simulation.devices import DeviceProfile


@dataclass(frozen=True)
class InputSettings(Settings):
    """What a simulation is based on. Shipped files replace what is not given."""

    server: str = setting("", "Estimator or profile, or a shipped GPU, as h200-sxm-qwen3-32b-vllm-bf16-tp1.")
    kv_tokens: int | None = setting(None, "Size of the server's KV cache.", unit="tokens", minimum=1)
    edge: Path | None = setting(None, "Edge profile: a file, or a shipped one by name, as rpi-5.")
    draft_tokens_per_s: float = setting(
        60.0, "Drafting speed without a profile.", unit="tokens/s", minimum=0.01, option="draft-speed"
    )
    trace: Path | None = setting(None, "Acceptance trace.")
    predictor: Path | None = setting(None, "Rejection predictor for the trace.")
    acceptance: float = setting(0.75, "Mean acceptance without a trace.", minimum=0.01, maximum=0.99)


@dataclass(frozen=True)
class LoadSettings(Settings):
    """Who sends simulated requests, when, and how long they are."""

    devices: int = setting(40, "Devices of a closed fleet.", minimum=1)
    arrivals: str = setting(
        "closed", "closed, poisson, bursts, or a request trace, as `wispprof traffic` reads them."
    )
    per_s: float = setting(1.0, "Request rate of poisson and bursts.", unit="requests/s", minimum=0)
    speed: float = setting(1.0, "Factor by which a request trace plays faster.", minimum=0.001)
    think_ms: float = setting(
        0.0, "Mean pause between a device's requests.", unit="ms", minimum=0, option="think"
    )
    prompt: int = setting(512, "Median prompt length.", unit="tokens", minimum=1)
    output: int = setting(128, "Median output length.", unit="tokens", minimum=2)
    spread: float = setting(0.3, "Log-normal sigma of both lengths.", minimum=0)


@dataclass(frozen=True)
class SimulationSettings(Settings):
    """Simulated fleets: one run of each system, or a search for its capacity."""

    inputs: InputSettings = field(default_factory=InputSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    link: LinkModel = field(default_factory=LinkModel)
    systems: tuple[str, ...] = setting(
        ("wispprof",),
        "System to simulate, such as wispprof, wisp, sled, specedge, fcfs, server-only, or a batching policy "
        "as MODULE:NAME; repeatable.",
        option="policy",
    )
    controller: str = setting(
        "", "Speculation controller of the edges, by name or MODULE:NAME; default: the system's."
    )
    compare: bool = setting(False, "Simulate all built-in systems; takes minutes.")
    capacity: bool = setting(False, "Search the most devices within --violations instead.")
    violations: float = setting(
        PlanSettings().violations, "Share of sessions that may miss their SLO.", minimum=0, maximum=0.99
    )
    tokens_per_s: tuple[float, ...] = setting(
        (4.0,), "SLO: token speed; repeatable, for equal shares.", unit="tokens/s", minimum=0.01, option="slo"
    )
    ttft_ms: float | None = setting(
        None, "SLO: time to the first token.", unit="ms", option="ttft", minimum=0
    )
    plan: Path | None = setting(None, "Plan that the edges of wispprof obey.")
    seconds: float = setting(120.0, "Simulated time.", unit="s", minimum=1)
    warmup_s: float | None = setting(
        None,
        "Time at the beginning that is not counted; default: a sixth of --seconds.",
        unit="s",
        minimum=0,
        option="warmup",
    )
    seed: int = setting(0, "Seed; equal seeds give equal runs.")
    out: Path | None = setting(None, "With --capacity: file for the curves, which `wispprof report` draws.")

    @property
    def uncounted_s(self) -> float:
        """Time at the beginning that is not counted."""
        return self.seconds / 6 if self.warmup_s is None else self.warmup_s

    def check_together(self) -> None:
        if self.uncounted_s >= self.seconds:
            raise SettingsError("--warmup must be shorter than --seconds.")
        if self.capacity and self.load.arrivals != "closed":
            raise PlanError("--capacity needs a closed fleet.", "Omit --arrivals.")
        if self.out is not None and not self.capacity:
            raise PlanError("--out writes the curves of --capacity.", "Add --capacity, or use --json.")


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
    max_new: int = setting(48, "Maximum tokens per request.", unit="tokens", minimum=2, option="max-tokens")
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
