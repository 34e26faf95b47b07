"""Shared by the profilers: from a prepared sweep to a profile on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from wispprof.artifacts import Manifest, Profile, RowJournal, bundled_model, files, make_profile, save_profile
from wispprof.artifacts.journal import check_no_rows, journal_header
from wispprof.artifacts.manifest import command_line, library_versions, utc_now
from wispprof.artifacts.profile import profile_files
from wispprof.artifacts.rows import Row
from wispprof.errors import ArtifactError, PhysicsViolation
from wispprof.hardware import fingerprint, sensors
from wispprof.profiling.measurement_log import drift_summary
from wispprof.profiling.sweep import Sweep, SweepResult
from wispprof.profiling.sweep_cost import CostModel
from wispprof.profiling.workload import Runner, Workload
from wispprof.settings.profiler_settings import Output, SweepSettings
from wispprof.types import ModelInfo, Progress

if TYPE_CHECKING:
    from wispprof.engines.loading import LoadedModel

Subject = TypeVar("Subject")

_MEASURE_AGAIN = 5
"""How often rows that contradict each other are measured again."""


@dataclass(frozen=True)
class SweepPlan:
    """A dry run: workloads in the order of the grid, expected seconds, and what the estimate rests on."""

    workloads: tuple[Workload[Any], ...]
    expected_s: float
    basis: str


@dataclass(frozen=True)
class ProfilerSetup(Generic[Subject]):
    """Everything that is decided before the first workload. ``engine`` and ``measure`` go to the manifest.

    ``after_s``: seconds of steady measurement after the sweep. ``left_out``: number of workloads that do
    not fit into the budget; ``spare``: those of them that are measured if time is left.
    """

    kind: str
    runner: Runner[Subject]
    workloads: Sequence[Workload[Subject]]
    sentinel: Workload[Subject]
    cost: CostModel[Subject]
    sweep: SweepSettings
    model: ModelInfo
    engine: dict[str, Any]
    measure: dict[str, Any]
    after_s: float = 0.0
    left_out: int = 0
    spare: Sequence[Workload[Subject]] = ()
    close: Callable[[], None] = field(default=lambda: None)

    def announce(self) -> SweepPlan:
        """What :func:`collect_profile` would measure, and for how long."""
        states = [(workload, (), 0) for workload in self.workloads]
        seconds = self.cost.total(states, self.sentinel)[1] + self.after_s
        basis = f"a pilot of {self.cost.probes} workloads on this machine, just now"
        return SweepPlan(tuple(self.workloads), seconds, basis)


def collect_profile(
    setup: ProfilerSetup[Any],
    output: Output,
    *,
    check: Callable[[Sequence[Any]], object],
    finish: Callable[[SweepResult, RowJournal | None], tuple[tuple[Row, ...], dict[str, Any]]],
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
    budget_s: float | None = None,
) -> Profile:
    """Run the sweep, finish, and (with an output path) write the profile.

    ``check``: raises :class:`PhysicsViolation` for impossible times; rows that contradict each other are
    measured again first. ``finish``: measures after the sweep; returns all rows and additions to the
    manifest's summary. If one raises, the journal is kept.
    """
    manifest = begin_manifest(
        setup.kind, setup.model, setup.sweep, engine=setup.engine, measure=setup.measure
    )
    with _open_journal(output, manifest) as journal:
        sweep = Sweep(
            setup.runner,
            setup.workloads,
            setup.sweep,
            sentinel=setup.sentinel,
            journal=journal,
            sensors=sensors(setup.engine["device"]),
            clock=clock,
            progress=progress,
            cost=setup.cost,
            budget_s=budget_s,
            spare=setup.spare,
        )
        result = _checked(sweep, sweep.run(), check)
        rows, summary = finish(result, journal)
        setup.close()
        return finalize_profile(manifest, replace(result, rows=rows), output, journal, summary)


def _checked(sweep: Sweep[Any], result: SweepResult, check: Callable[[Sequence[Any]], object]) -> SweepResult:
    """The rows that pass ``check``. A busy machine makes times contradict each other: measure those again."""
    for attempt in itertools.count():
        try:
            check(result.rows)
            break
        except PhysicsViolation as err:
            again = sweep.measure_again(err.keys) if attempt < _MEASURE_AGAIN else None
            if again is None:
                raise _with_remedy(err, result.rows) from None
            result = again
    return result


def _with_remedy(err: PhysicsViolation, rows: Sequence[Row]) -> PhysicsViolation:
    references = [row for row in rows if row.kind == "sentinel"]
    off = sum("drift" in row.flags for row in references)
    if not off:
        return err
    busy = (
        f"The machine was busy: {off} of {len(references)} reference measurements deviated. When it is "
        "idle, --resume measures these shapes again; --overwrite starts over."
    )
    return PhysicsViolation(err.args[0], f"{err.hint} {busy}", err.keys)


def check_output(output: Output) -> None:
    """Refuse, before a model is loaded, to write where :func:`collect_profile` would refuse it later."""
    if output.path is None:
        return
    rows_file = profile_files(output.path)[0]
    files.check_writable(rows_file)
    if not output.resume and not output.overwrite:
        check_no_rows(journal_path(output.path))
    if rows_file.exists() and not journal_path(output.path).exists() and not output.overwrite:
        raise ArtifactError(f"{rows_file} exists.", "Choose another --out, or replace it with --overwrite.")


def resumed_header(output: Output) -> Mapping[str, Any]:
    """Header of the journal to resume; empty without one."""
    if output.path is None or not output.resume:
        return {}
    return journal_header(journal_path(output.path))


def load_pair_model(name: str, role: str, dtype: str, device: str) -> LoadedModel:
    """The named model; without a name the bundled one. ``role``: ``target`` or ``draft``."""
    from wispprof.engines.loading import load_model

    return load_model(name or bundled_model(role), dtype, device, draft=role == "draft")


def synchronizer(device: Any) -> Callable[[], None]:
    """A function that waits for a torch device; it does nothing for a CPU."""
    import torch

    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    return waits.get(device.type, lambda: None)


def journal_path(path: Path) -> Path:
    """File of the rows of an unfinished sweep: ``NAME.journal.jsonl``."""
    return profile_files(path)[0].with_suffix(".journal.jsonl")


@contextlib.contextmanager
def _open_journal(output: Output, manifest: Manifest) -> Iterator[RowJournal | None]:
    """The journal of this sweep; ``None`` without an output path.

    Its header contains what must be equal in all runs of one profile.
    """
    if output.path is None:
        yield None
        return
    check_output(output)
    path = journal_path(output.path)
    header = {
        "model": dataclasses.asdict(manifest.model),
        "engine": manifest.engine,
        "measure": manifest.measure,
        "seed": manifest.seed,
        "hardware": manifest.hardware.get("hash", ""),
    }
    with RowJournal(path, manifest.kind, header, resume=output.resume, overwrite=output.overwrite) as journal:
        yield journal


def begin_manifest(
    kind: str,
    model: ModelInfo,
    sweep: SweepSettings,
    *,
    engine: Mapping[str, Any],
    measure: Mapping[str, Any],
) -> Manifest:
    """A manifest with everything that is known before the first workload."""
    return Manifest(
        kind=kind,
        model=model,
        command=command_line(),
        seed=sweep.seed,
        engine=dict(engine),
        hardware=fingerprint().as_dict(),
        measure={**dataclasses.asdict(sweep), **measure},
        versions=library_versions(),
        started=utc_now(),
    )


def finalize_profile(
    manifest: Manifest,
    result: SweepResult,
    output: Output,
    journal: RowJournal | None,
    summary: Mapping[str, Any],
) -> Profile:
    """Make a profile of rows and manifest. Its files replace the journal."""
    drift = drift_summary(result.rows, float(manifest.measure["drift"]))
    expected_s = result.expected_s
    complete = replace(
        manifest,
        ended=utc_now(),
        summary={
            "seconds": round(result.seconds, 2),
            "expected_s": None if expected_s is None else round(expected_s, 2),
            "drift": drift,
            "noisy_rows": sum("noisy" in row.flags for row in result.rows if row.kind != "sentinel"),
            "refused": result.refused,
            "out_of_time": result.out_of_time,
            **summary,
        },
    )
    profile = make_profile(complete, result.rows)
    if output.path is not None:
        save_profile(profile, output.path)
        if journal is not None:
            journal.remove()
    return profile
