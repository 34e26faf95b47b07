"""Checks that a profile is physically possible; raises :class:`PhysicsViolation` otherwise.

Four laws that a correct backend on any device passes:

1. *Floor*: no step reads its weights and KV faster, or multiplies faster, than any hardware could.
   (Timing without waiting for the device breaks this one.)
2. *Growth*: far more work takes more time. (A backend that ignores its batch breaks it.)
3. *Memory*: with enough KV to read beside the weights, longer contexts take more time.
4. *Order*: over all rows, time goes up with work.

Growth, memory and order compare the fastest sample of each row: a busy machine only adds time, and
must not make a correct backend appear faulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wispprof.artifacts.rows import EdgeRow, StepRow
from wispprof.errors import PhysicsViolation
from wispprof.types import BatchShape, ModelInfo

FASTEST_BYTES_PER_S = 40e12
"""Above what any device of 2026 reads weights at, from memory or from its caches."""
FASTEST_FLOPS = 20e15
"""Above any device's matrix rate at 16 bits or more."""

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PhysicsReport:
    """``growth``: time of the heaviest step over that of the lightest. ``order``: rank correlation of work
    and time. ``memory``: time ratio by context alone. ``None`` if there are too few rows."""

    growth: float | None
    order: float | None
    memory: float | None

    def as_dict(self) -> dict[str, float | None]:
        rounded = {name: getattr(self, name) for name in ("growth", "order", "memory")}
        return {k: None if v is None else round(v, 4) for k, v in rounded.items()}


def step_bytes(shape: BatchShape, model: ModelInfo) -> float:
    """Bytes a step must read: every weight once, every cached token once."""
    return model.parameters * _WIDTH.get(model.dtype, 2) + (shape.cached_tokens * model.kv_bytes_per_token)


def step_flops(shape: BatchShape, model: ModelInfo) -> float:
    """Floating-point operations of a step: two per weight and token, and attention's share."""
    width = _WIDTH.get(model.dtype, 2)
    # Scores and values: 2 + 2 operations per pair and channel; at least the KV heads' channels.
    channels = model.kv_bytes_per_token / (2 * width)
    return 2.0 * model.parameters * shape.new_tokens + 4.0 * channels * shape.attention_pairs


def check_physics(rows: Sequence[StepRow], model: ModelInfo) -> PhysicsReport:
    """Check the four laws. Raises :class:`PhysicsViolation` that names the law and the rows."""
    measured = [row for row in rows if row.source == "measured" and row.kind != "sentinel"]
    for row in measured:
        _floor(row, model)
    if len(measured) < 4:
        return PhysicsReport(None, None, None)
    return PhysicsReport(_growth(measured, model), _order(measured, model), _memory(measured, model))


def check_edge(rows: Sequence[EdgeRow]) -> None:
    """Check that a draft step takes as long as its forward, a round as its steps, many nodes as one, and that
    longer prompts take longer. Compares fastest samples. Raises :class:`PhysicsViolation`."""
    steps = {row.context: row for row in rows if row.kind == "draft_step"}
    bare = {row.context: row for row in rows if row.kind == "forward"}
    pairs = [(steps[c], bare[c]) for c in steps if c in bare]
    cheaper = [(s, f) for s, f in pairs if min(s.samples_ms) < 0.5 * min(f.samples_ms)]
    if pairs and len(cheaper) == len(pairs):
        step, forward = cheaper[0]
        raise PhysicsViolation(
            f"A draft step over {step.context} tokens takes {min(step.samples_ms):.3f} ms, its bare "
            f"forward {min(forward.samples_ms):.3f} ms.",
            _doubt("The draft step is probably timed without doing its work", step, forward),
            (row.key for pair in cheaper for row in pair),
        )
    for row in (row for row in rows if row.kind == "round" and row.context in steps):
        step = steps[row.context]
        if min(row.samples_ms) < 0.5 * row.tokens * min(step.samples_ms):
            raise PhysicsViolation(
                f"A round of {row.tokens} draft steps over {row.context} tokens takes "
                f"{min(row.samples_ms):.3f} ms, one step {min(step.samples_ms):.3f} ms.",
                _doubt("The round is probably timed without doing all its steps", row, step),
                (row.key, step.key),
            )
    nodes = sorted((row for row in rows if row.kind == "nodes"), key=lambda row: row.tokens)
    if nodes and min(nodes[-1].samples_ms) < 0.5 * min(nodes[0].samples_ms):
        raise PhysicsViolation(
            f"A forward of {nodes[-1].tokens} nodes takes {min(nodes[-1].samples_ms):.3f} ms, one of "
            f"{nodes[0].tokens} takes {min(nodes[0].samples_ms):.3f} ms.",
            _doubt("The forward is probably timed without computing all its nodes", nodes[0], nodes[-1]),
            (nodes[0].key, nodes[-1].key),
        )
    prefills = sorted((r for r in rows if r.kind == "prefill" and not r.context), key=lambda row: row.tokens)
    if len(prefills) >= 2 and prefills[-1].tokens >= 4 * prefills[0].tokens:
        short, long = prefills[0], prefills[-1]
        if min(long.samples_ms) < 1.05 * min(short.samples_ms) and long.tokens >= 256:
            raise PhysicsViolation(
                f"Prefilling {long.tokens} tokens takes {min(long.samples_ms):.3f} ms, {short.tokens} take "
                f"{min(short.samples_ms):.3f} ms.",
                _doubt("The backend seems to ignore its prompt", short, long),
                (short.key, long.key),
            )


def _floor(row: StepRow, model: ModelInfo) -> None:
    seconds = row.median_ms / 1000
    fastest_s = max(
        step_bytes(row.shape, model) / FASTEST_BYTES_PER_S, step_flops(row.shape, model) / FASTEST_FLOPS
    )
    if seconds <= 0 or seconds < fastest_s:
        raise PhysicsViolation(
            f"{row.key} took {row.median_ms:.4f} ms, faster than any hardware could read or multiply "
            f"({fastest_s * 1000:.4f} ms).",
            "The step is probably timed without waiting for the device to finish.",
        )


def _work(shape: BatchShape, model: ModelInfo) -> float:
    """Bytes, plus operations at a machine balance of 30 per byte; orders shapes."""
    return step_bytes(shape, model) + step_flops(shape, model) / 30


def _growth(rows: Sequence[StepRow], model: ModelInfo) -> float | None:
    work = [_work(row.shape, model) for row in rows]
    light, heavy = rows[int(np.argmin(work))], rows[int(np.argmax(work))]
    ratio = _fastest(heavy) / _fastest(light)
    if max(work) < 4 * min(work):
        return ratio
    if ratio < 1.15:
        raise PhysicsViolation(
            f"{heavy.key} does {max(work) / min(work):.0f} times the work of {light.key} and takes only "
            f"{ratio:.2f} times its time.",
            _doubt("The backend seems to ignore its batch", light, heavy),
            (light.key, heavy.key),
        )
    return ratio


def _memory(rows: Sequence[StepRow], model: ModelInfo) -> float | None:
    """Compare steps that differ in their context alone."""
    groups: dict[tuple[str, int, int], list[StepRow]] = {}
    for row in rows:
        items = row.shape.items
        if row.kind == "verify" and len(set(items)) == 1:
            groups.setdefault((row.kind, len(items), items[0].new), []).append(row)
    weights = model.parameters * _WIDTH.get(model.dtype, 2)
    best: tuple[float, StepRow, StepRow] | None = None
    for group in groups.values():
        short = min(group, key=lambda row: row.shape.cached_tokens)
        long = max(group, key=lambda row: row.shape.cached_tokens)
        extra = long.shape.cached_tokens - short.shape.cached_tokens
        share = extra * model.kv_bytes_per_token / max(weights, 1)
        if share >= 0.5 and (best is None or share > best[0]):
            best = (share, short, long)
    if best is None:
        return None
    share, short, long = best
    ratio = _fastest(long) / _fastest(short)
    if ratio < 1.05:
        raise PhysicsViolation(
            f"{long.key} reads {share:.1f} times the weights' bytes in KV more than {short.key} and takes "
            f"only {ratio:.2f} times its time.",
            _doubt("The backend seems to ignore its cache", short, long),
            (short.key, long.key),
        )
    return ratio


def _disturbed(row: EdgeRow | StepRow) -> bool:
    return not {"noisy", "drift"}.isdisjoint(row.flags)


def _doubt(fault: str, *rows: EdgeRow | StepRow) -> str:
    """Hint for times that do not vary. Disturbed rows may be the reason."""
    if any(map(_disturbed, rows)):
        return f"{fault}, or the machine was too busy to tell: measure again when it is quiet."
    return f"{fault}: do not trust these times."


def _order(rows: Sequence[StepRow], model: ModelInfo) -> float | None:
    from scipy.stats import rankdata

    work = np.array([_work(row.shape, model) for row in rows])
    if len(rows) < 8 or work.max() < 4 * work.min():
        return None
    times = np.array([_fastest(row) for row in rows])
    value = float(np.corrcoef(rankdata(work), rankdata(times))[0, 1])
    if not value > 0.5:
        raise PhysicsViolation(
            f"Over {len(rows)} shapes, time and work are barely related (rank correlation {value:.2f}).",
            "The backend seems to ignore its batch, or the machine is too disturbed to measure on.",
            (row.key for row in rows if _disturbed(row)),
        )
    return value


def _fastest(row: StepRow) -> float:
    return min(row.samples_ms)
