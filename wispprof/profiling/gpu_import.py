"""Server profiles of GPUs that nobody here has: ragged steps modelled from measured operators.

Rows are of three kinds. *Edge* rows put one row count that the tables measured on each row of the profile, so
that an estimator can keep the tile edges. The *grid* crosses sessions, new and cached tokens. *Ragged* rows
mix contexts and draft lengths, prompt chunks, and both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from wispprof.artifacts import Manifest, ServerProfile, StepRow, make_profile, save_profile
from wispprof.artifacts.manifest import library_versions, utc_now
from wispprof.artifacts.rows import MODELLED
from wispprof.errors import ProfileError
from wispprof.profiling.operator_steps import OperatorSteps, launch_ms
from wispprof.profiling.operator_tables import (
    PACKAGE,
    STEP_TOKENS,
    GpuTarget,
    OperatorTables,
    package_version,
    tables_hash,
)
from wispprof.profiling.profile_run import check_output
from wispprof.settings.profiler_settings import Output
from wispprof.types import BatchShape, Progress, VerifyItem

_CACHED = (64, 512, 2048, 8192, 32_768)
_SESSIONS = (1, 4, 16, 64, 128, 256)
_NEW = (1, 2, 3, 5, 9)
_CHUNKS = (128, 512, 2048, 8192)
_EDGE_CACHED, _EDGE_NEW = 128, 5
_RAGGED = 36
_SEED = 0
DRAFT_MODEL = "Qwen/Qwen3-0.6B"
"""The smallest model of the tables: stands for a draft model that runs on one GPU of the server."""
_DRAFT_SESSIONS, _DRAFT_CACHED = 128, 512
LEAST_CACHED = 131_072
"""Cached tokens of a step that every profile covers, also where memory holds fewer."""


def shapes(knots: Sequence[int], kv_tokens: int, max_context: int) -> Iterator[tuple[str, BatchShape]]:
    """(kind, shape) of every row: those of at most ``kv_tokens`` cached tokens, each shape once."""
    seen: set[str] = set()
    for kind, shape in _all_shapes(knots, max_context):
        fits = shape.cached_tokens + shape.new_tokens <= kv_tokens
        fits &= all(i.cached + i.new <= max_context for i in shape.items)
        if fits and shape.new_tokens <= STEP_TOKENS + 512 and (key := shape.key()) not in seen:
            seen.add(key)
            yield kind, shape


def _all_shapes(knots: Sequence[int], max_context: int) -> Iterator[tuple[str, BatchShape]]:
    for rows in knots:
        whole, rest = divmod(rows, _EDGE_NEW)
        if rows <= 640:
            items = [(_EDGE_NEW, _EDGE_CACHED)] * whole + [(rest, _EDGE_CACHED)] * (rest > 0)
            yield "verify", BatchShape.of(items)
        if 8 <= rows <= 256 and rows % 16 in (0, 1):
            yield "verify", BatchShape.uniform(rows, 1, _EDGE_CACHED)
        if rows >= 256:
            yield "prefill", BatchShape.of([(rows, 0, True)])
    for sessions in _SESSIONS:
        for new in _NEW:
            for cached in _CACHED:
                yield "verify", BatchShape.uniform(sessions, new, min(cached, max_context - new))
    for chunk in _CHUNKS:
        for cached in (0, 1024, 4096, 16_384):
            yield "prefill", BatchShape.of([(chunk, cached, True)])
        yield "prefill", BatchShape.of([(chunk // 4, 0, True)] * 4)
        for sessions in (4, 16, 64, 128, 256):
            for cached in (512, 4096):
                beside = [(1, cached)] * sessions
                yield "mixed", BatchShape.of([(min(chunk, STEP_TOKENS - sessions), 0, True), *beside])
        yield "mixed", BatchShape.of([(chunk - 64, 1024, True), *[(5, 1024)] * 12])
    rng = random.Random(_SEED)
    for number in range(_RAGGED):
        sessions = rng.choice((2, 4, 8, 16, 32, 64, 128))
        mean = rng.choice((256, 1024, 4096))
        ragged = [
            VerifyItem(rng.randint(1, 9), min(int(mean * rng.lognormvariate(0, 0.7)) + 1, max_context - 10))
            for _ in range(sessions)
        ]
        if number % 3 == 0:
            ragged.append(VerifyItem(rng.choice((128, 512, 1536)), rng.choice((0, 512, 2048)), True))
        kind = "mixed" if ragged[-1].prefill else "verify"
        yield kind, BatchShape(tuple(sorted(ragged)))


def import_profile(target: GpuTarget, output: Output, progress: Progress | None = None) -> ServerProfile:
    """The profile of ``target``; written if ``output`` has a path.

    Raises :class:`~wispprof.errors.ProfileError` without the package, or for what its tables lack.
    """
    check_output(output)
    started = utc_now()
    tables = OperatorTables(target)
    steps = OperatorSteps(tables)
    capacity = tables.memory.kv_tokens
    source = f"{PACKAGE} {package_version()}: {target.system}, {target.framework} {tables.tables_version}"
    digest = tables_hash(target.system)
    citation = f"{source}, {digest[:16]}"
    # Time does not depend on what fits; a fleet may wait in host memory, so rows go up to a useful load.
    chosen = list(shapes(steps.knots, max(capacity, LEAST_CACHED), tables.model_info.max_context))
    rows = []
    for order, (kind, shape) in enumerate(chosen):
        shares = tuple(round(share, 3) for share in steps.shares(shape))
        rows.append(
            StepRow(
                key if len(key := shape.key()) < 40 else f"ragged {order}",
                kind,
                shape,
                (round(steps.step_ms(shape), 4),),
                order=order,
                source=MODELLED,
                citation=citation,
                origins=shares,
            )
        )
        if progress is not None:
            progress(order + 1, len(chosen), shape.key()[:40])
    manifest = Manifest(
        kind="server",
        model=tables.model_info,
        command=target.command,
        engine={
            "backend": target.framework,
            "version": tables.tables_version,
            "tp": target.tp,
            "dtype": target.dtype,
            "kv_tokens": capacity,
            "max_context": tables.model_info.max_context,
            "device": "cuda",
        },
        hardware={"gpus": [{"name": target.system, "count": target.tp}]},
        summary={
            "weight_bytes_per_gpu": tables.memory.weight_bytes,
            "tables_hash": digest,
            **composition_checks(steps),
            "origins": _mean_origins(rows),
            "draft_step": draft_step(target),
        },
        versions={**library_versions(), PACKAGE: package_version()},
        started=started,
        ended=utc_now(),
        source=MODELLED,
        citation=source,
    )
    profile = cast(ServerProfile, make_profile(manifest, rows))
    if output.path is not None:
        save_profile(profile, output.path)
    return profile


def draft_step(target: GpuTarget) -> dict[str, Any]:
    """A decode step of :data:`DRAFT_MODEL` on one of the server's GPUs: ``ms`` alone, ``row_ms`` more for
    each further session. Empty if the tables lack it."""
    try:
        tables = OperatorTables(target._replace(model=DRAFT_MODEL, tp=1))
    except ProfileError:
        return {}
    alone, all_ms = (tables.decode_step(n, _DRAFT_CACHED) for n in (1, _DRAFT_SESSIONS))
    row_ms = max(0.0, (all_ms - alone) / (_DRAFT_SESSIONS - 1))
    return {"model": DRAFT_MODEL, "ms": round(alone, 4), "row_ms": round(row_ms, 5)}


def _mean_origins(rows: Sequence[StepRow]) -> dict[str, float]:
    names = ("measured", "interpolated", "formula")
    return {
        name: round(sum(row.origins[place] for row in rows) / len(rows), 3)
        for place, name in enumerate(names)
    }


def composition_checks(steps: OperatorSteps) -> dict[str, Any]:
    """What the composition changes, each as the largest share of a step.

    ``split``: a uniform batch priced as two groups. ``naive_split``: the same if attention of the two groups
    were simply added. ``rows_moved`` and ``head_moved``: how far the tables' own values lie from curves that
    never fall.
    """
    split, naive = 0.0, 0.0
    for sessions in (2, 8, 32, 128):
        for new in (1, 5, 9):
            for cached in (512, 2048, 8192):
                whole = BatchShape.uniform(sessions, new, cached)
                half = whole.items[: sessions // 2]
                # One token more or less keeps the groups apart.
                apart = BatchShape.of(
                    [(new, cached - 1)] * (sessions // 2) + [(new, cached + 1)] * (sessions // 2)
                )
                whole_ms = steps.step_ms(whole)
                split = max(split, abs(steps.step_ms(apart) / whole_ms - 1.0))
                added = 2 * launch_ms(steps.verify, half) - launch_ms(steps.verify, whole.items)
                naive = max(naive, abs(added) / whole_ms)
    return {
        "split": round(split, 5),
        "naive_split": round(naive, 4),
        "rows_moved": round(steps.rows.fall, 4),
        "head_moved": round(steps.head.fall, 4),
    }
