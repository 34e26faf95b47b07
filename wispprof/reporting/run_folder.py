"""The artifacts of a run: profiles, traces, plans, benches and the answer of an edge in one folder.

``wispprof demo`` writes such a folder, and so do single commands with the same ``--out``. Files are
recognized by their content. Every part is optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wispprof.artifacts import (
    AcceptanceTrace,
    Document,
    EdgeProfile,
    ServerProfile,
    files,
    load_profile,
    load_trace,
    read_document,
    trace_hash,
)
from wispprof.artifacts.fleet_answer import FLEET_KIND, FleetAnswer, load_fleet
from wispprof.artifacts.plan import Plan, load_plan
from wispprof.artifacts.workload import WORKLOAD_KIND
from wispprof.errors import ArtifactMissing
from wispprof.reporting.tables import Column, Table

if TYPE_CHECKING:
    from wispprof.fitting import FittedEstimator

BENCH_KIND, ANSWER_KIND, CAPACITY_KIND = "bench", "answer", "capacity"
DOCUMENT_PREFIX, TRACE_FORMAT = "wispprof/", "wispprof/trace"
HINT = "Name the folder of a run, or run `wispprof demo`."


@dataclass(frozen=True)
class StepPoint:
    """One step: predicted median, upper bound and measured time. ``group`` is its legend entry."""

    predicted_ms: float
    bound_ms: float
    measured_ms: float
    group: str


@dataclass(frozen=True)
class TextSpan:
    """A span of generated text. ``origin``: ``draft`` (proposed and accepted) or ``target``."""

    text: str
    origin: str


@dataclass(frozen=True)
class Answer:
    """One generation by a real edge, with the summary ``stats`` of the edge client."""

    prompt: str
    pieces: tuple[TextSpan, ...]
    stats: Mapping[str, Any]

    @classmethod
    def of(cls, document: Document) -> Answer:
        """Raises :class:`ArtifactDamaged` if the document is not an answer."""
        found: Answer = files.convert(document.payload, cls, "answer", "Run the demo again.")
        return found

    @property
    def text(self) -> str:
        """The generated text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def drafted_share(self) -> float:
        """Share of the characters that the edge drafted."""
        drafted = sum(len(piece.text) for piece in self.pieces if piece.origin == "draft")
        return drafted / max(1, len(self.text))


class Result(Protocol):
    """A finished bench: :class:`wispprof.bench.BenchResult`, or a simulated one."""

    @property
    def policy(self) -> str: ...

    @property
    def load(self) -> Mapping[str, Any]: ...

    @property
    def figures(self) -> Mapping[str, float]: ...

    @property
    def steps(self) -> Sequence[tuple[float, float, float]]: ...


@dataclass(frozen=True)
class Bench:
    """One policy under one load.

    ``load``: see :meth:`wispprof.bench.BenchSettings.load`; the same for every policy of a comparison.
    ``figures``: scalar results by name, ``None`` if unknown. ``steps``: (predicted median, upper bound,
    measured) ms of each step.
    """

    policy: str
    load: Mapping[str, Any]
    figures: Mapping[str, Any]
    steps: tuple[tuple[float, float, float], ...] = ()

    @classmethod
    def of(cls, document: Document) -> Bench:
        """Raises :class:`ArtifactDamaged` if the document is not a bench."""
        found: Bench = files.convert(document.payload, cls, "bench", "Run the bench again.")
        return found

    @classmethod
    def of_result(cls, result: Result) -> Bench:
        """The record of a bench that just ran."""
        figures = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in result.figures.items()
        }
        return cls(result.policy, dict(result.load), figures, tuple(result.steps))

    @property
    def slos(self) -> tuple[float, ...]:
        """SLOs of the sessions, tokens/s."""
        return tuple(float(v) for v in self.load.get("slo_tokens_per_s", ()))

    def slo_text(self) -> str:
        """``12 tokens/s``, or the range of several classes."""
        speeds = sorted(set(self.slos))
        if not speeds:
            return "their SLO"
        if len(speeds) == 1:
            return f"{speeds[0]:g} tokens/s"
        return f"{speeds[0]:g} to {speeds[-1]:g} tokens/s"

    def load_text(self) -> str:
        """The load as a phrase."""
        text = f"{self.load.get('devices', '?')} replay edges"
        if kinds := ", ".join(map(str, self.load.get("device", ()))):
            text += f" that draft like {kinds}"
        text += f", SLO {self.slo_text()}"
        if self.load.get("rtt_ms"):
            text += f", over a {float(self.load['rtt_ms']):g} ms link"
        return text

    def figure(self, name: str) -> float | None:
        """A scalar result; ``None`` if it was not measured."""
        value = self.figures.get(name)
        return float(value) if isinstance(value, int | float) else None

    @property
    def goodput(self) -> float:
        """Committed tokens/s of the sessions that met their SLO."""
        return self.figure("goodput_tokens_per_s") or 0.0

    @property
    def attainment(self) -> float:
        """Share of the sessions that met their SLO."""
        return self.figure("attainment") or 0.0

    @property
    def throughput(self) -> float:
        """All committed tokens/s."""
        return self.figure("tokens_per_s") or 0.0

    def points(self) -> list[StepPoint]:
        """Steps that have a prediction."""
        return [StepPoint(p, b, m, self.policy) for p, b, m in self.steps if p > 0]


_COLUMNS: dict[str, Column] = {
    "goodput_tokens_per_s": Column("goodput", "tok/s", best="max"),
    "goodput_ratio": Column("× server", "alone", 2),
    "goodput_ratio_low": Column("95 %", "from", 2),
    "goodput_ratio_high": Column("interval", "to", 2),
    "attainment": Column("met SLO", "sessions", 0, percent=True, best="max"),
    "tokens_per_s": Column("all", "tok/s", best="max"),
    "ttft_p50_ms": Column("TTFT p50", "ms", 0, best="min"),
    "ttft_p95_ms": Column("TTFT p95", "ms", 0, best="min"),
    "tpot_p50_ms": Column("TPOT p50", "ms", best="min"),
    "tpot_p95_ms": Column("TPOT p95", "ms", best="min"),
    "accepted_per_round": Column("accepted", "per round", 2, best="max"),
    "wasted_share": Column("wasted", "of drafting", 0, percent=True, best="min"),
    "step_p50_ms": Column("step", "p50 ms"),
    "step_error": Column("step", "error", 0, percent=True, best="min"),
}
_NOT_BRIEF = (
    "goodput_ratio_low",
    "goodput_ratio_high",
    "ttft_p95_ms",
    "tpot_p95_ms",
    "wasted_share",
    "step_p50_ms",
)


def bench_table(benches: Sequence[Bench], title: str = "", brief: bool = False) -> Table:
    """A row per policy, without columns that have no values. ``brief``: at most 80 characters wide."""
    shown = {
        name: column
        for name, column in _COLUMNS.items()
        if any(b.figure(name) is not None for b in benches) and not (brief and name in _NOT_BRIEF)
    }
    return Table(
        title, (Column("policy"), *shown.values()), tuple((b.policy, *map(b.figure, shown)) for b in benches)
    )


@dataclass(frozen=True)
class Source:
    """One file of the run, with the hashes of the ``inputs`` it was made from."""

    file: str
    kind: str
    hash: str
    created: str = ""
    command: str = ""
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The artifacts of one folder. ``benches`` are ordered by time."""

    folder: Path
    server: ServerProfile | None = None
    edge: EdgeProfile | None = None
    trace: AcceptanceTrace | None = None
    estimator: FittedEstimator | None = None
    plan: Plan | None = None
    answer: Document | None = None
    capacity: Document | None = None
    fleet: FleetAnswer | None = None
    benches: tuple[Document, ...] = ()
    sources: tuple[Source, ...] = ()

    def names(self) -> list[str]:
        """Files of the run, sorted."""
        return sorted(source.file for source in self.sources)

    def stale(self) -> list[str]:
        """Files whose inputs changed since. Inputs of a kind that the folder lacks are ignored."""
        present: dict[str, set[str]] = {}
        for source in self.sources:
            # Estimators list the server profile as "profile".
            for name in ("profile", "server") if source.kind == "server" else (source.kind,):
                present.setdefault(name, set()).add(source.hash)
        return sorted(
            source.file
            for source in self.sources
            if any(
                digest not in present[kind]
                for name, digest in source.inputs.items()
                if (kind := name.split(":")[0]) in present and digest
            )
        )


def load_run(folder: Path) -> Run:
    """Read every artifact in ``folder`` (not below it).

    Takes all benches, and the newest file of every other kind. Raises the artifact errors for a damaged
    or newer file, and :class:`ArtifactMissing` if the folder holds no artifact.
    """
    if not folder.is_dir():
        raise ArtifactMissing(f"There is no folder {folder}.", HINT)
    entries = [_read(path, kind) for path in sorted(folder.iterdir()) if (kind := _kind_of(path)) is not None]
    if not entries:
        raise ArtifactMissing(f"{folder} holds no artifact of wispprof.", HINT)
    entries.sort(key=lambda entry: entry[0].created)
    newest: dict[str, Any] = {source.kind: artifact for source, artifact in entries}
    return Run(
        folder=folder,
        server=newest.get("server"),
        edge=newest.get("edge"),
        trace=newest.get("trace"),
        estimator=newest.get("estimator"),
        plan=newest.get("plan"),
        answer=newest.get(ANSWER_KIND),
        capacity=newest.get(CAPACITY_KIND),
        fleet=newest.get(FLEET_KIND),
        benches=tuple(artifact for source, artifact in entries if source.kind == BENCH_KIND),
        sources=tuple(source for source, _ in entries),
    )


def _kind_of(path: Path) -> str | None:
    """The kind that a file states, or ``None`` if it is no artifact (cards, reports, journals)."""
    if path.name.endswith(".manifest.json"):
        return "profile"
    if path.suffix == ".json":
        head = path.read_bytes()[:400].decode("utf-8", "replace")
        for kind in _READERS:
            if f'"{DOCUMENT_PREFIX}{kind}"' in head:
                return kind
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            head = file.readline(400).decode("utf-8", "replace")
        if f'"{TRACE_FORMAT}"' in head:
            return "trace"
    return None


def _read(path: Path, kind: str) -> tuple[Source, Any]:
    if kind == "profile":
        profile = load_profile(path)
        manifest = profile.manifest
        name = path.name.removesuffix(".manifest.json") + ".jsonl"
        source = Source(name, manifest.kind, profile.hash, manifest.started, manifest.command)
        return source, profile
    if kind == "trace":
        trace = load_trace(path)
        return Source(path.name, kind, trace_hash(trace)), trace
    document = read_document(path, kind)
    made = document.provenance
    source = Source(path.name, kind, document.hash, made.created, made.command, document.inputs)
    reader = _READERS[kind]
    return source, reader(path) if reader else document


def _estimator(path: Path) -> FittedEstimator:
    from wispprof.fitting import load_estimator

    return load_estimator(path)


_READERS: dict[str, Callable[[Path], Any] | None] = {
    "estimator": _estimator,
    "predictor": None,
    "plan": load_plan,
    BENCH_KIND: None,
    ANSWER_KIND: None,
    CAPACITY_KIND: None,
    FLEET_KIND: load_fleet,
    WORKLOAD_KIND: None,
}
"""Kinds of documents and their readers; ``None``: the document itself."""
