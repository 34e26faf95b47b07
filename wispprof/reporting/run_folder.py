"""A run: the artifacts that lie in one folder, whatever they are called, found by what they are.

``wispprof demo`` writes such a folder; the single commands do too when they are given the same
``--out``. Every part is optional: a report shows what there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.artifacts import (
    AcceptanceTrace,
    Document,
    EdgeProfile,
    ServerProfile,
    load_profile,
    load_trace,
    read_document,
    trace_hash,
)
from wispprof.artifacts.plan import Plan, load_plan
from wispprof.errors import ArtifactMissing

if TYPE_CHECKING:
    from wispprof.fitting import FittedEstimator

BENCH_KIND, ANSWER_KIND, CAPACITY_KIND = "bench", "answer", "capacity"
DOCUMENT_PREFIX, TRACE_FORMAT = "wispprof/", "wispprof/trace"


@dataclass(frozen=True)
class Source:
    """One file of the run: its ``kind``, its content ``hash``, and what it says it was made from."""

    file: str
    kind: str
    hash: str
    created: str = ""
    command: str = ""
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What was found. ``benches`` in the order in which they were made."""

    folder: Path
    server: ServerProfile | None = None
    edge: EdgeProfile | None = None
    trace: AcceptanceTrace | None = None
    estimator: FittedEstimator | None = None
    plan: Plan | None = None
    answer: Document | None = None
    capacity: Document | None = None
    benches: tuple[Document, ...] = ()
    sources: tuple[Source, ...] = ()

    def names(self) -> list[str]:
        """Files of the run, sorted."""
        return sorted(source.file for source in self.sources)

    def stale(self) -> list[str]:
        """Files made from something that now lies here in another state.

        An input counts only where the folder holds files of its kind: a plan made from an estimator
        that was moved elsewhere is not stale.
        """
        present: dict[str, set[str]] = {}
        for source in self.sources:
            for name in _kinds_as_inputs(source.kind):
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


def _kinds_as_inputs(kind: str) -> tuple[str, ...]:
    """Names under which others list a file of this kind among their inputs."""
    return ("profile", "server") if kind == "server" else (kind,)


def load_run(folder: Path) -> Run:
    """Read every artifact in ``folder`` (not below it).

    Where there are several of one kind, the one made last is taken; all benches are. Raises the
    artifact errors for a damaged or newer file, :class:`ArtifactMissing` where there is nothing.
    """
    if not folder.is_dir():
        raise ArtifactMissing(
            f"There is no folder {folder}.", "Name the folder of a run, or make one: wispprof demo."
        )
    found: dict[str, list[tuple[Source, Any]]] = {}
    for path in sorted(folder.iterdir()):
        kind = _kind_of(path)
        if kind is not None and (entry := _read(path, kind)) is not None:
            found.setdefault(entry[0].kind, []).append(entry)
    if not found:
        raise ArtifactMissing(
            f"{folder} holds no artifact of wispprof.",
            "Name the folder of a run, or make one: wispprof demo.",
        )

    def last(kind: str) -> Any:
        entries = sorted(found.get(kind, []), key=lambda entry: entry[0].created)
        return entries[-1][1] if entries else None

    benches = sorted(found.get(BENCH_KIND, []), key=lambda entry: entry[0].created)
    return Run(
        folder=folder,
        server=last("server"),
        edge=last("edge"),
        trace=last("trace"),
        estimator=last("estimator"),
        plan=last("plan"),
        answer=last(ANSWER_KIND),
        capacity=last(CAPACITY_KIND),
        benches=tuple(entry[1] for entry in benches),
        sources=tuple(source for entries in found.values() for source, _ in entries),
    )


def _kind_of(path: Path) -> str | None:
    """The kind a file claims to be, or ``None`` where it is not ours (cards, reports, journals)."""
    if path.name.endswith(".manifest.json"):
        return "profile"
    if path.suffix == ".json":
        # Damage shows when the file is read; here only its first lines matter.
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


def _read(path: Path, kind: str) -> tuple[Source, Any] | None:
    if kind == "profile":
        profile = load_profile(path)
        manifest = profile.manifest
        name = path.name.removesuffix(".manifest.json") + ".jsonl"
        return (
            Source(name, manifest.kind, profile.hash, manifest.started, manifest.command),
            profile,
        )
    if kind == "trace":
        trace = load_trace(path)
        return Source(path.name, kind, trace_hash(trace)), trace
    document = read_document(path, kind)
    made = document.provenance
    source = Source(path.name, kind, document.hash, made.created, made.command, document.inputs)
    return source, _READERS[kind](path, document)


def _estimator(path: Path, _: Document) -> FittedEstimator:
    from wispprof.fitting import load_estimator

    return load_estimator(path)


_READERS: dict[str, Callable[[Path, Document], Any]] = {
    "estimator": _estimator,
    "predictor": lambda _, document: document,
    "plan": lambda path, _: load_plan(path),
    BENCH_KIND: lambda _, document: document,
    ANSWER_KIND: lambda _, document: document,
    CAPACITY_KIND: lambda _, document: document,
}
