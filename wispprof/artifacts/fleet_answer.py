"""The answer of ``wispprof fleet`` on disk: options ranked by price, and where drafting pays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from wispprof.artifacts import files
from wispprof.artifacts.document import read_document, write_document

FLEET_KIND = "fleet"


@dataclass(frozen=True, slots=True)
class FleetOption:
    """One way to serve the whole fleet: servers of one kind under one system.

    ``servers``: the fewest that hold the SLO; ``bought``: those and the spare ones. ``server``, ``gpu`` and
    ``gpus``: the candidate, its GPU, and how many of them a server has. ``dollars_per_h`` of all bought
    servers; ``dollars_per_mtoken``: over the mean load of a day. ``joules_per_token``: servers and drafting.
    ``attainment``: share of sessions that meet their SLO with ``servers`` servers, by simulating some of them
    behind the router; ``by_class``: of each device class. ``fleet_attainment`` and ``spare_attainment``: by
    simulating all servers, without and with the spare ones; ``None`` if they were not simulated.
    ``bound_by``: the limit reached first with one server less: ``kv``, ``ttft``, ``speed``; ``one`` if
    a single server suffices, ``dear`` if it was given up for its price (at least so many ``servers``),
    ``never`` if no number does. ``tightest``: the class that comes nearest to its
    limit. ``burst``: the greatest factor of a burst that the bought servers bear, ``None`` if not simulated.
    ``utilisation``: share of time that a server computes. ``simulated``: false if ``servers`` and
    ``attainment`` are estimates of the closed model.
    """

    system: str
    server: str
    gpu: str
    gpus: int
    servers: int
    bought: int
    dollars_per_h: float
    dollars_per_mtoken: float
    joules_per_token: float
    attainment: float | None
    by_class: dict[str, float]
    bound_by: str
    tightest: str
    utilisation: float
    simulated: bool
    fleet_attainment: float | None = None
    spare_attainment: float | None = None
    burst: float | None = None


@dataclass(frozen=True, slots=True)
class PayRow:
    """Whether drafting pays on a server at a load: ``gain`` is a session's best drafted over undrafted speed.

    ``sessions``: that the load level stands for; ``mode``: of the best draft length ``k``.
    """

    server: str
    gpu: str
    model: str
    load_level: int
    sessions: int
    gain: float
    k: int
    mode: str


@dataclass(frozen=True)
class FleetAnswer:
    """``options``: cheapest first; those that hold no SLO last. ``classes``: device classes in words.
    ``target``: the attainment asked for. ``prices_as_of``: date of the price list. ``complete``: false if it
    was interrupted; what was not simulated by then is an estimate."""

    title: str
    model: str
    options: tuple[FleetOption, ...]
    classes: tuple[str, ...]
    devices: int
    requests_per_s: float
    target: float
    spare: int
    prices_as_of: str
    pays: tuple[PayRow, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    @property
    def best(self) -> FleetOption | None:
        """The cheapest option that holds the SLO."""
        return next((o for o in self.options if o.bound_by not in ("never", "dear")), None)


def save_fleet(answer: FleetAnswer, path: Path) -> str:
    """Write an answer atomically; returns its content hash."""
    payload = asdict(answer)
    inputs = payload.pop("inputs")
    return write_document(Path(path), FLEET_KIND, payload, inputs)


def load_fleet(path: Path) -> FleetAnswer:
    """Read an answer; raises the artifact errors."""
    document = read_document(Path(path), FLEET_KIND)
    record = {**document.payload, "inputs": document.inputs}
    found: FleetAnswer = files.convert(
        record, FleetAnswer, f"fleet {path}", "Make it anew: `wispprof fleet`."
    )
    return found
