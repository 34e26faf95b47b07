"""Batch shapes to measure: geometric axes within the capacity of the device.

Axes come from a named grid, a TOML file, or ranges as llama-bench writes them: ``1,2,8``, ``1-4``,
``64-1024*2`` (times two), ``0-512+128`` (steps of 128).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from wispprof.errors import ArtifactMissing, ProfileError
from wispprof.profiling.sweep_cost import choose_probes
from wispprof.profiling.workload import Workload
from wispprof.types import BatchShape, VerifyItem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Grid = TypeVar("Grid", bound="DataclassInstance")

_RANGE = re.compile(r"^(\d+)(?:-(\d+)(?:([*+])(\d+))?)?$")
_MOST_VALUES = 4096


@dataclass(frozen=True)
class Axes:
    """Axes of a server grid, in tokens and sessions. What does not fit the device is left out.

    Verify: ``items`` sessions × ``new`` tokens each (pending token and drafts; 1 is k = 0) × ``cached``
    each; contexts beyond the model's are cut to it. Skewed: batches of ``skew_items``
    sessions whose contexts and draft lengths spread over those axes. Prefill: ``chunk`` tokens over
    ``chunk_cached``, alone, and beside ``mixed_items`` verifying sessions. ``full_share``: batches that
    fill this share of the KV memory.
    """

    items: tuple[int, ...]
    new: tuple[int, ...]
    cached: tuple[int, ...]
    skew_items: tuple[int, ...] = ()
    chunk: tuple[int, ...] = ()
    chunk_cached: tuple[int, ...] = (0,)
    mixed_items: tuple[int, ...] = ()
    full_share: tuple[float, ...] = ()


@dataclass(frozen=True)
class DeviceCapacity:
    """Limits of the engine: KV tokens in all, sessions, tokens of a session, tokens of a step."""

    kv_tokens: int
    sessions: int
    context: int
    step_tokens: int = 1 << 30

    def holds(self, shape: BatchShape) -> bool:
        return (
            len(shape.items) <= self.sessions
            and shape.cached_tokens + shape.new_tokens <= self.kv_tokens
            and all(item.cached + item.new <= self.context for item in shape.items)
            and shape.new_tokens <= self.step_tokens
        )


GRIDS: dict[str, Axes] = {
    "quick": Axes(
        items=(1, 4, 16),
        new=(1, 5),
        cached=(64, 256, 1024),
        skew_items=(4, 8, 16),
        chunk=(64, 256),
        chunk_cached=(0, 512),
        mixed_items=(4,),
    ),
    "standard": Axes(
        items=(1, 2, 4, 8, 16, 32),
        new=(1, 2, 3, 5, 9),
        cached=(64, 256, 512, 1024, 2048),
        skew_items=(2, 4, 8, 16, 32),
        chunk=(32, 128, 512),
        chunk_cached=(0, 256, 1024),
        mixed_items=(2, 8, 16),
        full_share=(0.5, 0.95),
    ),
    "full": Axes(
        items=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        new=(1, 2, 3, 4, 5, 7, 9, 13),
        cached=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
        skew_items=(2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
        chunk=(16, 32, 64, 128, 256, 512, 1024, 2048),
        chunk_cached=(0, 256, 1024, 4096, 16384),
        mixed_items=(1, 4, 8, 16, 32, 64),
        full_share=(0.25, 0.5, 0.75, 0.95),
    ),
}


def parse_range(text: str) -> tuple[int, ...]:
    """``"1,4-16*2"`` → (1, 4, 8, 16). Raises :class:`ProfileError` for anything else."""
    values: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = _RANGE.match(part)
        if not found:
            raise ProfileError(
                f"{part!r} is not a range.", "Write 8, 1-4, 64-1024*2 or 0-512+128, with commas."
            )
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        sign, step = found[3] or "+", int(found[4] or 1)
        if last < first or step < 1 or (sign == "*" and (step < 2 or first < 1)):
            raise ProfileError(
                f"The range {part!r} never ends or is empty.",
                "Count upwards: first-last+step, or first-last*factor with first >= 1 and factor >= 2.",
            )
        value = first
        while value <= last:
            values.append(value)
            if len(values) > _MOST_VALUES:
                raise ProfileError(f"The range {text!r} has over {_MOST_VALUES} values.", "Use *2.")
            value = value * step if sign == "*" else value + step
    return tuple(sorted(set(values)))


def load_axes(name: str) -> Axes:
    """The server grid of :func:`load_grid`, from a file's ``[server]`` table."""
    return load_grid(name, "server", GRIDS)


def load_grid(name: str, section: str, grids: dict[str, Grid]) -> Grid:
    """A named grid, or a TOML file whose ``section`` (or the whole file) names axes.

    Missing axes come from the file's ``base`` grid (default ``quick``).
    """
    if name in grids:
        return grids[name]
    path = Path(name)
    if not path.is_file():
        raise ArtifactMissing(
            f"{name!r} is neither a grid nor a file.", f"Use {', '.join(grids)}, or a TOML file."
        )
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ProfileError(f"{path} is not TOML: {err}.", "Correct the file.") from None
    table = dict(document.get(section, document))
    base = str(table.pop("base", "quick"))
    if base not in grids:
        raise ProfileError(f"{path}: unknown base grid {base!r}.", f"Use {', '.join(grids)}.")
    return override_axes(grids[base], table, name)


def override_axes(axes: Grid, values: Mapping[str, object], where: str) -> Grid:
    """``axes`` with some fields replaced: lists of numbers or range strings, single numbers for scalars."""
    types = {field.name: str(field.type) for field in fields(axes)}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ProfileError(f"{where}: there is no axis {name!r}.", f"Axes are {', '.join(types)}.")
        number = int if "int" in types[name] else float
        if types[name].startswith("tuple"):
            if isinstance(value, str) and number is int:
                changed[name] = parse_range(value)
            elif isinstance(value, list | tuple) and all(map(_is_number, value)):
                changed[name] = tuple(map(number, value))
            else:
                raise ProfileError(f"{where}: {name} is not a list of numbers.", "Write [1, 2, 4].")
        elif _is_number(value):
            changed[name] = number(cast(float, value))
        else:
            raise ProfileError(f"{where}: {name} is not a number >= 0.", "Write a number.")
    return replace(axes, **changed)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def axes_record(axes: Any) -> dict[str, Any]:
    """Axes for the manifest, as they are read back from JSON."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(axes).items()}


def shape_features(shape: BatchShape) -> tuple[float, ...]:
    """Quantities that a step's time grows with: 1, new tokens, attended pairs, cached tokens, items."""
    return (
        1.0,
        float(shape.new_tokens),
        float(shape.attention_pairs),
        float(shape.cached_tokens),
        float(len(shape.items)),
    )


def server_workloads(axes: Axes, capacity: DeviceCapacity) -> list[Workload[BatchShape]]:
    """Every distinct shape of the grid that fits, verify shapes first."""
    workloads: dict[str, Workload[BatchShape]] = {}
    for kind, shape in _shapes(axes, capacity):
        key = shape.key()
        if capacity.holds(shape) and key not in workloads:
            workloads[key] = Workload(key, kind, shape, shape_features(shape))
    if not workloads:
        raise ProfileError(
            "No shape of this grid fits the engine.",
            "Allow more KV tokens or sessions, or choose smaller axes.",
        )
    return list(workloads.values())


def required_capacity(axes: Axes, context: int) -> DeviceCapacity:
    """The most that the axes can use of a model with this context, but for ``full_share``.

    ``context`` of the answer: tokens of the longest session.
    """
    new = max(axes.new, default=1)
    verify = min(context, max(axes.cached, default=context) + new)
    chunk = max((c + k for c in axes.chunk_cached for k in axes.chunk), default=0)
    sessions = max((*axes.items, *axes.skew_items, *(n + 1 for n in axes.mixed_items)), default=1)
    return DeviceCapacity(sessions * verify + chunk, sessions, min(context, max(verify, chunk)))


def longest_full_session(axes: Axes, kv_tokens: int) -> int:
    """Tokens of the longest session in the batches of ``full_share``, without a limit on contexts."""
    return int(kv_tokens * max(axes.full_share, default=0.0)) // _few(axes)


def _few(axes: Axes) -> int:
    """Number of sessions if a batch fills the memory with long contexts."""
    return max(1, max(axes.items) // 4)


def _shapes(axes: Axes, capacity: DeviceCapacity) -> Iterator[tuple[str, BatchShape]]:
    for items in axes.items:
        for new in axes.new:
            for cached in axes.cached:
                # Cut to the context: the last steps of a session are its slowest.
                if (cut := min(cached, capacity.context - new)) > 0:
                    yield "verify", BatchShape.uniform(items, new, cut)
    usable = [c for c in axes.cached if c + max(axes.new, default=1) <= capacity.context]
    for items in axes.skew_items:
        for shape in _skewed(items, usable, axes.new):
            yield "verify", shape
    for share in axes.full_share:
        for items in (max(axes.items), _few(axes)):
            new = axes.new[len(axes.new) // 2]
            cached = min(int(capacity.kv_tokens * share) // items, capacity.context) - new
            if cached > 0:
                yield "verify", BatchShape.uniform(items, new, cached)
    for chunk in axes.chunk:
        for cached in axes.chunk_cached:
            prompt = VerifyItem(chunk, cached, True)
            yield "prefill", BatchShape((prompt,))
            for items in axes.mixed_items:
                beside = min(usable, key=lambda c: abs(c - 256), default=64)
                for new in {axes.new[0], axes.new[-1]}:
                    verify = (VerifyItem(new, beside),) * items
                    yield "mixed", BatchShape((*verify, prompt))


def _skewed(items: int, cached: Sequence[int], new: Sequence[int]) -> Iterator[BatchShape]:
    """Ragged batches: one long context among short ones, contexts spread geometrically, one long
    draft among short ones, and both spread in opposite directions."""
    if items < 2 or len(cached) < 2:
        return
    short, long = cached[0], cached[-1]
    few, many = new[0], new[-1]
    spread = [cached[i * len(cached) // items] for i in range(items)]
    lengths = [new[i * len(new) // items] for i in range(items)]
    yield _batch([(many, long)] + [(many, short)] * (items - 1))
    yield _batch([(new[len(new) // 2], c) for c in spread])
    yield _batch([(many, spread[0])] + [(few, c) for c in spread[1:]])
    yield _batch(list(zip(lengths, reversed(spread), strict=True)))


def _batch(items: Iterable[tuple[int, int]]) -> BatchShape:
    return BatchShape(tuple(VerifyItem(new, cached) for new, cached in items))


def select_within_budget(
    workloads: Sequence[Workload[BatchShape]], budget_s: float, cost_s: Sequence[float], min_count: int = 0
) -> list[Workload[BatchShape]]:
    """The most informative workloads that fit: far apart in the logarithm of their work, corners first.

    ``cost_s``: expected seconds of each. Workloads that exceed the remaining time are skipped, but the first
    ``min_count`` are always taken.
    """
    seconds = {workload.key: cost for workload, cost in zip(workloads, cost_s, strict=True)}
    chosen: list[Workload[BatchShape]] = []
    left_s = budget_s
    for workload in choose_probes(workloads, len(workloads)):
        if len(chosen) < min_count or seconds[workload.key] <= left_s:
            chosen.append(workload)
            left_s -= seconds[workload.key]
    if not chosen:
        raise ProfileError(f"No workload fits into {budget_s:.0f} s.", "Give a larger --budget-minutes.")
    return chosen
