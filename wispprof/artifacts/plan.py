"""The plan: what the server and the edges obey, as frozen records, and as one JSON document.

Two tables carry the work. :class:`BatchRow` says, per SLO class and load level, how much a step may
hold. :class:`DraftRow` says, per device, round trip, load level, SLO class and mode, how far to draft
and when to stop. Every row keeps the figures it was chosen by, so a plan can explain itself.

Load levels are defined in :mod:`wispprof.policies.load_level`; a plan repeats their bounds, so that a plan
made under other bounds is refused rather than misread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from wispprof.artifacts.document import BAD_PAYLOAD, read_document, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.errors import ArtifactDamaged, PlanError

__all__ = [
    "BatchRow",
    "BreakEvenRow",
    "CapacityRow",
    "ChoiceRow",
    "DraftRow",
    "MixRow",
    "Plan",
    "load_plan",
    "machine_of",
    "save_plan",
]

KIND = "plan"
MODES = ("stream", "round")


@dataclass(frozen=True, slots=True)
class BatchRow:
    """What a step may hold for an SLO class at a load level.

    ``sessions``: concurrent sessions the level stands for. ``max_items``: most sessions a step may
    hold while its bound keeps within the class's time for the tokens it commits, never fewer than
    ``sessions``. ``prefill_chunk``: most prompt tokens beside the level's sessions.
    ``token_budget``: most new tokens, those items and that chunk together. ``p50_ms`` and ``bound_ms``:
    the level's step with that chunk.
    """

    tokens_per_s: float
    load_level: int
    sessions: int
    token_budget: int
    max_items: int
    prefill_chunk: int
    p50_ms: float
    bound_ms: float

    @property
    def cell(self) -> str:
        """Its name, ``slo/load``."""
        return f"{self.tokens_per_s:g}/{self.load_level}"


@dataclass(frozen=True, slots=True)
class DraftRow:
    """How a device drafts in one cell.

    ``k``: most drafts of a round (mode ``round``), or most drafts verified in one step (``stream``);
    0 means do not draft. ``stop``: draft on only while the cumulative acceptance probability of the next token is
    at least this. ``draft_ahead``: how far the edge may draft beyond the frontier it knows.
    ``expected_tokens_per_s``: of the mean session, ``slow_tokens_per_s``: of the session at the
    violation quantile; both with every session of the level drafting alike. ``by_k``: expected
    tokens/s for k = 0, 1, 2 …; ``slow_by_k`` likewise. ``round_ms``: mean time from commit to
    commit; ``step_ms``: of the server's step in it; ``commits``: mean tokens per commit.
    ``price``: tokens the server commits per ms of step at this level: what a ms of it is worth.
    ``feasible``: the slow session keeps ``tokens_per_s``. ``nearest_tokens_per_s``: the fastest
    promise that this cell could keep with any k. ``energy_j_per_token``: of drafting;
    ``dollars_per_mtoken``: of a million committed tokens, 0 where no prices were given;
    ``energy_by_k`` and ``dollars_by_k`` likewise for k = 0, 1, 2 ….
    """

    device: str
    rtt_ms: float
    load_level: int
    tokens_per_s: float
    mode: str
    k: int
    stop: float
    draft_ahead: int
    expected_tokens_per_s: float
    slow_tokens_per_s: float
    round_ms: float
    step_ms: float
    commits: float
    draft_ms: float
    price: float
    feasible: bool
    nearest_tokens_per_s: float
    energy_j_per_token: float = 0.0
    by_k: tuple[float, ...] = ()
    slow_by_k: tuple[float, ...] = ()
    dollars_per_mtoken: float = 0.0
    energy_by_k: tuple[float, ...] = ()
    dollars_by_k: tuple[float, ...] = ()

    @property
    def cell(self) -> str:
        """The name of the cell: ``device/rtt/load/slo/mode``, as ``plan explain`` takes it."""
        speed = f"{self.tokens_per_s:g}"
        return f"{self.device}/{self.rtt_ms:g}/{self.load_level}/{speed}/{self.mode}"


def machine_of(device: str) -> str:
    """The machine of a device name: what stands before the colon of ``machine:draft``."""
    return device.partition(":")[0]


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """Which of several drafts a machine should run in one cell: ``device`` is the name of its rows.

    The other figures are those of that device's :class:`DraftRow`, which holds the rest.
    """

    machine: str
    rtt_ms: float
    load_level: int
    tokens_per_s: float
    mode: str
    device: str
    k: int
    expected_tokens_per_s: float
    dollars_per_mtoken: float
    energy_j_per_token: float
    feasible: bool

    @property
    def cell(self) -> str:
        """The name of the cell: ``machine/rtt/load/slo/mode``."""
        speed = f"{self.tokens_per_s:g}"
        return f"{self.machine}/{self.rtt_ms:g}/{self.load_level}/{speed}/{self.mode}"


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """Most sessions of one class on one kind of device that keep their promise.

    ``server-only``: undrafted; ``split``: with the best k in ``mode``. ``bound_by``: what ends it:
    ``time``, ``kv`` (cache memory) or ``limit`` (the search's own limit).
    """

    device: str
    rtt_ms: float
    tokens_per_s: float
    mode: str
    server_only: int
    split: int
    k: int
    bound_by: str


@dataclass(frozen=True, slots=True)
class MixRow:
    """Most sessions of several classes at once of which each keeps its promise.

    ``slos``: the classes, tokens/s; ``shares``: of the sessions, summing to one; ``ks``: the draft length
    with which each class just keeps its promise at ``split`` sessions. The rest as in :class:`CapacityRow`.
    """

    device: str
    rtt_ms: float
    mode: str
    slos: tuple[float, ...]
    shares: tuple[float, ...]
    server_only: int
    split: int
    ks: tuple[float, ...]
    bound_by: str

    @property
    def mix(self) -> str:
        """The mix in words: ``4 tok/s 70 %, 8 tok/s 30 %``."""
        pairs = zip(self.slos, self.shares, strict=True)
        return ", ".join(f"{speed:g} tok/s {100 * share:.0f} %" for speed, share in pairs)


@dataclass(frozen=True, slots=True)
class BreakEvenRow:
    """Where drafting begins to pay. ``acceptance``: mean conditional acceptance of the trace.

    ``needed``: the least one at which some k ≥ 1 beats k = 0, ``None`` if none does. ``verdict``:
    ``split`` or ``server-only``. ``gain``: best drafted over undrafted tokens/s.
    """

    device: str
    rtt_ms: float
    load_level: int
    mode: str
    acceptance: float
    needed: float | None
    gain: float
    verdict: str


@dataclass(frozen=True)
class Plan:
    """Everything the runtime obeys. Look-ups round in the safe direction and never fail on range.

    A device is one draft model on one machine. Where a machine may run several, its devices are called
    ``machine:draft``, and ``choices`` says which is the best by ``objective``.

    ``inputs`` maps names to content hashes (estimator, traces, profiles). ``context``: cached tokens
    per session that the plan reckons with. ``notes``: what a reader should know, in sentences.
    """

    draft: tuple[DraftRow, ...]
    batch: tuple[BatchRow, ...]
    capacity: tuple[CapacityRow, ...] = ()
    break_even: tuple[BreakEvenRow, ...] = ()
    mixes: tuple[MixRow, ...] = ()
    choices: tuple[ChoiceRow, ...] = ()
    load_bounds: tuple[float, ...] = ()
    context: int = 0
    objective: str = "goodput"
    cum_acceptance: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hash: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.device for r in self.draft))

    @property
    def slo_classes(self) -> tuple[float, ...]:
        """Token speeds planned for, rising."""
        return tuple(sorted({r.tokens_per_s for r in self.batch}))

    def draft_row(
        self,
        device: str,
        rtt_ms: float,
        load_level: int,
        tokens_per_s: float,
        mode: str = "stream",
    ) -> DraftRow:
        """The row for a device: nearest round trip (by ratio), nearest level, the slowest class that
        is at least as fast as ``tokens_per_s`` (else the fastest). An unknown device takes the rows
        of the one whose draft step is slowest, of the same machine where there is one: its lead and its
        k are the most careful.

        Raises :class:`PlanError` where the plan has no rows of ``mode``.
        """
        rows = [r for r in self.draft if r.mode == mode]
        if not rows:
            raise PlanError(f"The plan has no rows for mode {mode!r}.", "Make it anew.")
        if not any(r.device == device for r in rows):
            machine = machine_of(device)
            like = [r for r in rows if machine_of(r.device) == machine]
            device = max(like or rows, key=lambda r: r.draft_ms).device
        rows = [r for r in rows if r.device == device]
        rtt = min({r.rtt_ms for r in rows}, key=lambda v: (abs(_log(v) - _log(rtt_ms)), v))
        level = min({r.load_level for r in rows}, key=lambda v: (abs(v - load_level), v))
        speed = _class_of({r.tokens_per_s for r in rows}, tokens_per_s)
        key = (rtt, level, speed)
        return next(r for r in rows if (r.rtt_ms, r.load_level, r.tokens_per_s) == key)

    def batch_row(self, tokens_per_s: float, load_level: int) -> BatchRow:
        """The row for an SLO class, chosen as :meth:`draft_row` chooses."""
        if not self.batch:
            raise PlanError("The plan has no batching table.", "Make it anew.")
        level = min({r.load_level for r in self.batch}, key=lambda v: (abs(v - load_level), v))
        speed = _class_of({r.tokens_per_s for r in self.batch}, tokens_per_s)
        return next(r for r in self.batch if (r.load_level, r.tokens_per_s) == (level, speed))

    def find(self, cell: str) -> DraftRow:
        """The row named ``device/rtt/load/slo[/mode]``; by a machine's name, the row of the draft that it
        should run there. Raises :class:`PlanError` naming some."""
        wanted = cell if cell.count("/") == 4 else f"{cell}/stream"
        for choice in self.choices:
            if choice.cell == wanted:
                wanted = wanted.replace(choice.machine, choice.device, 1)
                break
        for row in self.draft:
            if row.cell == wanted:
                return row
        some = ", ".join(r.cell for r in self.draft[:3])
        raise PlanError(f"The plan has no cell {cell!r}.", f"Cells look like {some}, …")


def save_plan(plan: Plan, path: Path, provenance: Provenance | None = None) -> str:
    """Write a plan atomically; returns its content hash."""
    payload = asdict(plan)
    del payload["inputs"], payload["hash"]
    return write_document(Path(path), KIND, payload, plan.inputs, provenance)


def load_plan(path: Path) -> Plan:
    """Read a plan. Raises the artifact errors; :class:`ArtifactDamaged` names a row that is wrong."""
    document = read_document(Path(path), KIND)
    payload = dict(document.payload)
    where = f"plan {path}"
    try:
        return Plan(
            draft=_rows(DraftRow, payload["draft"], where),
            batch=_rows(BatchRow, payload["batch"], where),
            capacity=_rows(CapacityRow, payload["capacity"], where),
            break_even=_rows(BreakEvenRow, payload["break_even"], where),
            # Older plans have none.
            mixes=_rows(MixRow, payload.get("mixes", ()), where),
            choices=_rows(ChoiceRow, payload.get("choices", ()), where),
            load_bounds=tuple(float(b) for b in payload["load_bounds"]),
            context=int(payload["context"]),
            objective=str(payload["objective"]),
            cum_acceptance=tuple(float(s) for s in payload["cum_acceptance"]),
            settings=dict(payload["settings"]),
            inputs=document.inputs,
            notes=tuple(str(n) for n in payload["notes"]),
            hash=document.hash,
        )
    except BAD_PAYLOAD as err:
        raise ArtifactDamaged(
            f"{where} is not a complete plan ({err}).", "Make it anew with `wispprof plan`."
        ) from err


Row = TypeVar("Row", DraftRow, BatchRow, CapacityRow, MixRow, ChoiceRow, BreakEvenRow)


def _rows(kind: type[Row], entries: Iterable[dict[str, Any]], where: str) -> tuple[Row, ...]:
    known = {f.name for f in fields(kind)}
    rows = []
    for number, entry in enumerate(entries, start=1):
        values: dict[str, Any] = {
            name: tuple(float(v) for v in value) if isinstance(value, list) else value
            for name, value in entry.items()
            if name in known
        }
        for each in fields(kind):
            if each.name in values and not _fits(values[each.name], str(each.type)):
                raise ArtifactDamaged(
                    f"{where}: {kind.__name__} {number}: {each.name} is {values[each.name]!r}, "
                    f"not {each.type}.",
                    "Make it anew with `wispprof plan`.",
                )
        try:
            rows.append(kind(**values))
        except TypeError as err:
            raise ArtifactDamaged(
                f"{where}: {kind.__name__} {number} is not whole ({err}).",
                "Make it anew with `wispprof plan`.",
            ) from err
    return tuple(rows)


def _fits(value: object, wanted: str) -> bool:
    """Whether a value from JSON is of a row's field type."""
    if value is None:
        return wanted.endswith("| None")
    if wanted.startswith("float"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, {"str": str, "bool": bool}.get(wanted, tuple))


def _class_of(classes: set[float], tokens_per_s: float) -> float:
    fast_enough = [c for c in classes if c >= tokens_per_s * (1 - 1e-9)]
    return min(fast_enough) if fast_enough else max(classes)


def _log(value: float) -> float:
    return math.log(max(value, 0.5))
