"""Which batch shapes to measure: geometric axes over what the device can hold.

Axes come from a named grid, a TOML file, or ranges as llama-bench writes them: ``1,2,8``, ``1-4``,
``64-1024*2`` (times two), ``0-512+128`` (steps of 128).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wispprof.errors import ArtifactMissing, ProfileError
from wispprof.profiling.sweep_cost import choose_probes
from wispprof.profiling.workload import Workload
from wispprof.types import BatchShape, VerifyItem

__all__ = [
    "GRIDS",
    "Axes",
    "DeviceCapacity",
    "load_axes",
    "load_grid_file",
    "longest_full_session",
    "parse_axis",
    "parse_range",
    "required_capacity",
    "select_within_budget",
    "server_workloads",
    "shape_features",
]

Grid = TypeVar("Grid")

_RANGE = re.compile(r"^(\d+)(?:-(\d+)(?:([*+])(\d+))?)?$")
_MOST_VALUES = 4096


@dataclass(frozen=True)
class Axes:
    """Axes of a server grid, in tokens and sessions. What does not fit the device is left out.

    Verify: ``items`` sessions × ``new`` tokens each (pending token and drafts; 1 is k = 0) × ``cached``
    each; a context beyond the model's is measured at its very end. Skewed: batches of ``skew_items``
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
    """What the engine can hold: KV tokens in all, sessions at once, tokens a session, tokens a step."""

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
                f"The range {part!r} never ends or holds nothing.",
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
    """A named grid, or a TOML file whose ``[server]`` table names axes (lists or range strings).

    Axes that the file leaves out are those of its ``base`` grid (default ``quick``).
    """
    if name in GRIDS:
        return GRIDS[name]
    base, table = load_grid_file(name, "server", GRIDS)
    return override_axes(base, table, name)


def load_grid_file(name: str, section: str, grids: dict[str, Grid]) -> tuple[Grid, dict[str, Any]]:
    """A TOML file's base grid and what its ``section`` (or the whole file) changes of it."""
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
    return grids[base], table


def override_axes(axes: Axes, values: dict[str, Any], where: str) -> Axes:
    """``axes`` with some of them replaced by lists or range strings."""
    changed: dict[str, tuple[Any, ...]] = {}
    for name, value in values.items():
        if name not in Axes.__dataclass_fields__:
            known = ", ".join(Axes.__dataclass_fields__)
            raise ProfileError(f"{where}: there is no axis {name!r}.", f"Axes are {known}.")
        if name == "full_share":
            changed[name] = tuple(float(share) for share in _numbers(value, name, where))
        else:
            changed[name] = parse_axis(value, name, where)
    return replace(axes, **changed)


def parse_axis(value: object, name: str, where: str) -> tuple[int, ...]:
    """An axis as a list of numbers or a range string."""
    if isinstance(value, str):
        return parse_range(value)
    return tuple(int(number) for number in _numbers(value, name, where))


def _numbers(value: object, name: str, where: str) -> list[float]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in value
    ):
        raise ProfileError(f"{where}: {name} is not a list of numbers.", "Write [1, 2, 4].")
    return list(value)


def shape_features(shape: BatchShape) -> tuple[float, ...]:
    """What a step's time grows with: 1, new tokens, attended pairs, cached tokens, items."""
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
    """Tokens of the longest session in the batches of ``full_share``, did the context not end."""
    return int(kv_tokens * max(axes.full_share, default=0.0)) // _few(axes)


def _few(axes: Axes) -> int:
    """Sessions of the batch that fills the memory with long contexts rather than with many."""
    return max(1, max(axes.items) // 4)


def _shapes(axes: Axes, capacity: DeviceCapacity) -> Iterator[tuple[str, BatchShape]]:
    for items in axes.items:
        for new in axes.new:
            for cached in axes.cached:
                # A session ends with its context, and its last steps are the dearest it has.
                if (held := min(cached, capacity.context - new)) > 0:
                    yield "verify", BatchShape.uniform(items, new, held)
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
    workloads: Sequence[Workload[BatchShape]],
    budget_s: float,
    cost_s: Sequence[float],
    least: int = 0,
) -> list[Workload[BatchShape]]:
    """The most informative shots that fit: far apart in the logarithm of their work, corners first.

    ``cost_s``: expected seconds of each. A workload too dear for what is left is passed over. ``least``: so
    many of the first are taken whatever they cost.
    """
    price = {workload.key: cost for workload, cost in zip(workloads, cost_s, strict=True)}
    chosen, left = [], budget_s
    for workload in choose_probes(workloads, len(workloads)):
        if len(chosen) < least or price[workload.key] <= left:
            chosen.append(workload)
            left -= price[workload.key]
    if not chosen:
        raise ProfileError(
            f"Not one shot fits into {budget_s:.0f} s.", "Give a larger --budget-minutes."
        )
    return chosen
