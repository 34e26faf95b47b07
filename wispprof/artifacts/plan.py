"""The plan that servers and edges obey, as frozen records and as one JSON document.

:class:`BatchRow` limits a step, per SLO class and load level. :class:`DraftRow` says how far to draft and
when to stop, per device, round trip, load level, SLO class, mode and context. Every row keeps the figures
it was chosen by. ``context``: cached tokens of each session; 0 in plans of one context that do not say.

:mod:`wispprof.policies.cost_model` defines load levels. A plan repeats their bounds, so that a plan made
under other bounds is refused.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from wispprof.artifacts import files
from wispprof.artifacts.document import read_document, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.errors import PlanError

KIND = "plan"
MODES = ("stream", "round")


@dataclass(frozen=True, slots=True)
class BatchRow:
    """Limits of a step for an SLO class at a load level.

    ``sessions``: concurrent sessions that the level stands for. ``max_items``: most sessions in a step
    whose bound keeps within the class's time for the tokens it commits, at least ``sessions``.
    ``prefill_chunk``: most prompt tokens beside the level's sessions. ``token_budget``: most new tokens,
    items and chunk together. ``p50_ms`` and ``bound_ms``: of the level's step with that chunk.
    """

    tokens_per_s: float
    load_level: int
    sessions: int
    token_budget: int
    max_items: int
    prefill_chunk: int
    p50_ms: float
    bound_ms: float
    context: int = 0

    @property
    def cell(self) -> str:
        """Its name, ``slo/load[/context]``."""
        return f"{self.tokens_per_s:g}/{self.load_level}{_context(self.context)}"


@dataclass(frozen=True, slots=True)
class DraftRow:
    """How a device drafts in one cell.

    ``k``: most drafts of a round (mode ``round``), or most drafts verified in one step (``stream``); 0
    means do not draft. ``stop``: draft on only while the next token's cumulative acceptance probability
    is at least this. ``draft_ahead``: how far the edge may draft beyond the committed length it knows.
    ``expected_tokens_per_s``: of the mean session; ``slow_tokens_per_s``: of the session at the violation
    quantile; both with all sessions of the level drafting alike. ``by_k``: expected tokens/s for k = 0,
    1, 2 …; ``slow_by_k``, ``energy_by_k`` and ``dollars_by_k`` likewise. ``round_ms``: mean time from
    commit to commit; ``step_ms``: of the server's step in it; ``commits``: mean tokens per commit.
    ``server_tokens_per_ms``: tokens that the server commits per ms of step at this level. ``feasible``:
    the slow session meets ``tokens_per_s``. ``nearest_tokens_per_s``: the fastest SLO that the cell
    meets with any k.
    ``energy_j_per_token``: of drafting; ``dollars_per_mtoken``: of a million committed tokens, 0 without
    prices. ``nodes``, ``depth``, ``width`` and ``beams``: the draft tree to use instead of a chain, 0 for
    none; every other figure is that of the best chain.
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
    server_tokens_per_ms: float
    feasible: bool
    nearest_tokens_per_s: float
    energy_j_per_token: float = 0.0
    by_k: tuple[float, ...] = ()
    slow_by_k: tuple[float, ...] = ()
    dollars_per_mtoken: float = 0.0
    energy_by_k: tuple[float, ...] = ()
    dollars_by_k: tuple[float, ...] = ()
    context: int = 0
    nodes: int = 0
    depth: int = 0
    width: int = 0
    beams: int = 0

    @property
    def cell(self) -> str:
        """The name of the cell: ``device/rtt/load/slo/mode[/context]``, as ``plan explain`` takes it."""
        speed = f"{self.tokens_per_s:g}"
        place = f"{self.device}/{self.rtt_ms:g}/{self.load_level}/{speed}/{self.mode}"
        return place + _context(self.context)


def _context(context: int) -> str:
    """The last part of a cell's name."""
    return f"/{context}" if context else ""


def machine_of(device: str) -> str:
    """The machine in a device name ``machine:draft``."""
    return device.partition(":")[0]


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """Which of several draft models a machine should run in one cell: ``device`` names its rows.

    The other figures repeat those of that device's :class:`DraftRow`.
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
    context: int = 0

    @property
    def cell(self) -> str:
        """The name of the cell: ``machine/rtt/load/slo/mode[/context]``."""
        speed = f"{self.tokens_per_s:g}"
        place = f"{self.machine}/{self.rtt_ms:g}/{self.load_level}/{speed}/{self.mode}"
        return place + _context(self.context)


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """Most sessions of one class on one kind of device that meet their SLO.

    ``server_only``: without drafts; ``split``: with the best k in ``mode``. ``bound_by``: the limit that
    is reached first: ``time``, ``kv`` (cache memory) or ``limit`` (that of the search).
    """

    device: str
    rtt_ms: float
    tokens_per_s: float
    mode: str
    server_only: int
    split: int
    k: int
    bound_by: str
    context: int = 0


@dataclass(frozen=True, slots=True)
class MixRow:
    """Most sessions of several classes at once that each meet their SLO.

    ``slos``: the classes, tokens/s; ``shares``: of the sessions, summing to one; ``ks``: the draft length
    with which each class just meets its SLO at ``split`` sessions. The rest as in :class:`CapacityRow`.
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
    context: int = 0

    @property
    def mix(self) -> str:
        """The mix as text: ``4 tok/s 70 %, 8 tok/s 30 %``."""
        pairs = zip(self.slos, self.shares, strict=True)
        return ", ".join(f"{speed:g} tok/s {100 * share:.0f} %" for speed, share in pairs)


@dataclass(frozen=True, slots=True)
class BreakEvenRow:
    """From which acceptance on drafting pays. ``acceptance``: the trace's mean acceptance probability.

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
    context: int = 0


Row = TypeVar("Row", DraftRow, BatchRow, CapacityRow, BreakEvenRow, MixRow, ChoiceRow)


@dataclass(frozen=True)
class Plan:
    """Everything that the runtime obeys. Look-ups round in the safe direction and accept any range.

    A device is one draft model on one machine. If a machine may run several, its devices are called
    ``machine:draft``, and ``choices`` names the best by ``objective``.

    ``inputs`` maps names to content hashes (estimator, traces, profiles). ``context``: cached tokens per
    session that look-ups assume if they name none. ``notes``: remarks for the reader, in sentences.
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

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """Contexts planned for, rising; ``(context,)`` if rows do not say."""
        named = {row.context for row in self.draft} | {row.context for row in self.batch}
        return tuple(sorted(context or self.context for context in named)) or (self.context,)

    def nearest_context(self, context: int | None = None) -> int:
        """The planned context nearest to ``context`` by ratio; ``None``: the plan's own."""
        wanted = self.context if context is None else context
        if len(self.contexts) == 1:
            return self.contexts[0]
        return min(self.contexts, key=lambda c: (abs(_log(c) - _log(wanted)), c))

    def at_context(self, context: int) -> Plan:
        """The plan of one context alone; :meth:`nearest_context` says which it has."""

        def only(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            return tuple(r for r in rows if (r.context or self.context) == context)

        return replace(
            self,
            draft=only(self.draft),
            batch=only(self.batch),
            capacity=only(self.capacity),
            break_even=only(self.break_even),
            mixes=only(self.mixes),
            choices=only(self.choices),
            context=context,
        )

    def device_for(self, name: str) -> str:
        """The device whose rows ``name`` gets: its own. If it is empty, or a machine with several draft
        models, those of the slowest draft. Raises :class:`PlanError` for a name that the plan does not know.
        """
        if name in self.devices:
            return name
        like = [r for r in self.draft if not name or machine_of(r.device) == machine_of(name)]
        if not like:
            raise PlanError(f"The plan has no device {name!r}.", f"It has {', '.join(self.devices)}.")
        return max(like, key=lambda r: r.draft_ms).device

    def draft_row(
        self,
        device: str,
        rtt_ms: float,
        load_level: int,
        tokens_per_s: float,
        mode: str = "stream",
        context: int | None = None,
    ) -> DraftRow:
        """The row for a device: nearest context and round trip (by ratio), nearest level, and the slowest
        class that is at least as fast as ``tokens_per_s``, else the fastest.

        An unknown device takes the rows of the device whose draft step is slowest, of the same machine if
        possible: its ``draft_ahead`` and k are the most careful.
        Raises :class:`PlanError` if the plan has no rows of ``mode``.
        """
        cached = self.nearest_context(context)
        rows = [r for r in self.draft if r.mode == mode and (r.context or self.context) == cached]
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

    def batch_row(self, tokens_per_s: float, load_level: int, context: int | None = None) -> BatchRow:
        """The row for an SLO class, chosen as :meth:`draft_row` chooses."""
        cached = self.nearest_context(context)
        rows = [r for r in self.batch if (r.context or self.context) == cached]
        if not rows:
            raise PlanError("The plan has no batching table.", "Make it anew.")
        level = min({r.load_level for r in rows}, key=lambda v: (abs(v - load_level), v))
        speed = _class_of({r.tokens_per_s for r in rows}, tokens_per_s)
        return next(r for r in rows if (r.load_level, r.tokens_per_s) == (level, speed))

    def find(self, cell: str) -> DraftRow:
        """The row named ``device/rtt/load/slo[/mode][/context]``; for a machine, the row of the draft model
        that it should run there. Raises :class:`PlanError` if there is none."""
        parts = cell.split("/")
        if len(parts) == 4 or (len(parts) == 5 and parts[4] not in MODES):
            parts.insert(4, "stream")
        if len(parts) == 5 and (own := self.nearest_context()) and any(r.context for r in self.draft):
            parts.append(str(own))
        wanted = "/".join(parts)
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
    """Read a plan. Raises the artifact errors; :class:`ArtifactDamaged` names a field that is wrong."""
    document = read_document(Path(path), KIND)
    record = {**document.payload, "inputs": document.inputs, "hash": document.hash}
    plan: Plan = files.convert(record, Plan, f"plan {path}", "Make it anew with `wispprof plan`.")
    return plan


def _class_of(classes: set[float], tokens_per_s: float) -> float:
    fast_enough = [c for c in classes if c >= tokens_per_s * (1 - 1e-9)]
    return min(fast_enough) if fast_enough else max(classes)


def _log(value: float) -> float:
    return math.log(max(value, 0.5))
