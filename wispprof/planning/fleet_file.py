"""The description of a fleet (TOML): device classes, candidate servers, prices."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wispprof.artifacts.files import bundled_path
from wispprof.artifacts.workload import SeenTraffic, load_workload
from wispprof.errors import ArtifactMissing, PlanError, nearest, suggestion
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.devices import DeviceProfile, device_of

PRICES = "profiles/prices.toml"


@dataclass(frozen=True)
class DeviceClass:
    """Devices of one kind. ``slos``: tokens/s → share of the requests. ``device``: a shipped edge profile,
    its file or the ms of a draft step, in place of ``draft_tokens_per_s``.

    ``requests_per_h``: of a device in the busiest hour; ``mean_requests_per_h``: over the day (0: the same).
    ``prompt``, ``output``: medians; ``spread``: log-normal sigma of both. ``workload``: a file whose lengths,
    and whose ratio of the busiest hour to the mean, are taken instead.
    """

    name: str
    count: int
    requests_per_h: float
    slos: dict[str, float]
    draft_tokens_per_s: float = 0.0
    device: str = ""
    draft_w: float = 0.0
    rtt_ms: float = 30.0
    jitter_ms: float = 3.0
    loss: float = 0.0
    ttft_ms: float | None = None
    mean_requests_per_h: float = 0.0
    prompt: int = 512
    output: int = 256
    spread: float = 0.4
    reused: float = 0.0
    acceptance: float = 0.75
    workload: str = ""

    @property
    def link(self) -> LinkModel:
        return LinkModel(self.rtt_ms, jitter_ms=self.jitter_ms, loss=self.loss)

    def profile(self) -> DeviceProfile:
        """The device as the simulator takes it."""
        if self.device:
            found = device_of(self.device)
            return replace(found, name=self.name, draft_w=self.draft_w or found.draft_w)
        return DeviceProfile.from_speed(self.name, self.draft_tokens_per_s, draft_w=self.draft_w)


@dataclass(frozen=True)
class Candidate:
    """A server to choose from. ``server``: a shipped GPU profile, or an estimator file. ``gpu``: its key in
    the price list; ``gpus``: how many a server has (tensor parallel).

    ``price_per_h``, ``watts`` and ``idle_watts`` of a GPU, if not those of the price list. ``draft_ms``: a
    step of the server's own draft model, for server-side speculation (0: as its profile says); its drafts
    fare as the devices' do.
    """

    name: str
    server: str
    gpu: str
    gpus: int = 1
    price_per_h: float = 0.0
    watts: float = 0.0
    idle_watts: float = 0.0
    kv_tokens: int = 0
    max_servers: int = 4096
    draft_ms: float = 0.0


@dataclass(frozen=True)
class FleetSpec:
    """A fleet. ``systems``: to compare. ``target``: share of sessions, in total and in each class, that must
    meet their SLO. ``spare``: servers that may fail."""

    title: str
    model: str
    devices: tuple[DeviceClass, ...]
    servers: tuple[Candidate, ...]
    systems: tuple[str, ...]
    target: float = 0.95
    spare: int = 1
    prices_as_of: str = ""
    folder: Path = field(default_factory=Path)

    def workload(self, of: DeviceClass) -> SeenTraffic | None:
        return load_workload(self.folder / of.workload) if of.workload else None


def read_fleet(path: Path, systems: tuple[str, ...], prices: Path | None = None) -> FleetSpec:
    """Read and check a fleet's description; prices come from ``prices`` or the shipped list.

    Raises :class:`PlanError` that names the entry.
    """
    document = _toml(path)
    listed = _toml(prices or bundled_path(PRICES))
    title = str(document.pop("title", path.stem))
    model = str(document.pop("model", ""))
    target, spare = float(document.pop("target", 0.95)), int(document.pop("spare", 1))
    named = tuple(document.pop("systems", systems))
    if unknown := [name for name in named if name not in systems]:
        raise PlanError(f"There is no system {unknown[0]!r}.", suggestion(unknown[0], systems))
    devices = [_made(DeviceClass, entry, f"{path}: devices") for entry in _entries(document, "devices", path)]
    servers = [_made(Candidate, entry, f"{path}: servers") for entry in _entries(document, "servers", path)]
    if document:
        raise PlanError(f"{path} has an unknown entry {min(document)!r}.", "See docs/fleet.md.")
    for of in devices:
        _check_device(of, path)
    priced = tuple(
        _priced(server, listed.get("gpus", {}), prices or bundled_path(PRICES)) for server in servers
    )
    if not 0 < target <= 1 or spare < 0:
        raise PlanError(f"{path}: target must be a share above 0, and spare at least 0.", "Correct them.")
    as_of = str(listed.get("as_of", ""))
    return FleetSpec(title, model, tuple(devices), priced, named, target, spare, as_of, path.parent)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ArtifactMissing(f"There is no file {path}.", "Check the path.") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise PlanError(f"{path} is not TOML: {err}.", "See docs/fleet.md.") from err


def _entries(document: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    entries = document.pop(name, None)
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise PlanError(f"{path} has no [[{name}]].", "A fleet needs [[devices]] and [[servers]].")
    return entries


def _made(kind: Any, entry: dict[str, Any], where: str) -> Any:
    known = {each.name for each in fields(kind)}
    if unknown := sorted(set(entry) - known):
        raise PlanError(f"{where}: unknown {unknown[0]!r}.", suggestion(unknown[0], sorted(known)))
    try:
        return kind(**entry)
    except TypeError as err:
        raise PlanError(f"{where}, {entry.get('name', 'without a name')}: {err}.", "Add it.") from err


def _check_device(of: DeviceClass, path: Path) -> None:
    where = f"{path}, devices {of.name!r}"
    if of.count < 1 or of.requests_per_h <= 0 or of.prompt < 1 or of.output < 2:
        raise PlanError(
            f"{where}: count, requests_per_h, prompt and output must be above 0.", "Correct them."
        )
    if bool(of.device) == (of.draft_tokens_per_s > 0):
        raise PlanError(f"{where}: needs a device or draft_tokens_per_s, and not both.", "Give one of them.")
    try:
        speeds = [float(speed) for speed in of.slos]
    except ValueError:
        speeds = []
    if not speeds or min(speeds) <= 0 or min(of.slos.values()) <= 0:
        raise PlanError(
            f"{where}: slos must map tokens/s to shares.", "For example: slos = {4 = 0.7, 8 = 0.3}."
        )


def _priced(server: Candidate, gpus: dict[str, Any], prices: Path) -> Candidate:
    listed = gpus.get(server.gpu, {})
    price = server.price_per_h or float(listed.get("price_per_h", 0.0))
    watts = server.watts or float(listed.get("watts", 0.0))
    if price <= 0 or watts <= 0:
        near = nearest(server.gpu, gpus)
        raise PlanError(
            f"{prices} has no price and watts for the GPU {server.gpu!r} of {server.name!r}.",
            f"{near} It has {', '.join(gpus)}. Or give price_per_h and watts with the server.".lstrip(),
        )
    idle = server.idle_watts or float(listed.get("idle_watts", 0.0))
    return replace(server, price_per_h=price, watts=watts, idle_watts=idle)
