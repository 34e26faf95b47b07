"""Compare, merge and export profiles.

The comparison asks which shapes changed by more than a tolerance and by more than noise explains. It judges
noise on logarithms, from three sources: samples of a block, blocks of one sweep (each has other memory and
another moment), and the speed of the whole machine, which the sentinel shows. A few blocks tell little
about one shape, so its variance is moderated by that of all shapes (Smyth 2004). The null hypothesis is a
difference within the tolerance (McCarthy and Smyth 2009). The false discovery rate over all shapes is
bounded (Benjamini and Hochberg 1995).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wispprof.artifacts import Profile, StepRow, make_profile
from wispprof.artifacts.manifest import command_line
from wispprof.artifacts.median_interval import half_width, median_interval
from wispprof.artifacts.rows import LinkRow, Row
from wispprof.errors import ProfileError
from wispprof.profiling.measurement_log import relative_spread
from wispprof.types import ModelInfo

FALSE_DISCOVERY_RATE = 0.05
"""Largest expected share of false ones among the shapes reported as changed."""
_PRIOR_DF = 4.0
"""Degrees of freedom with which the variance of all shapes counts against a shape's own."""
_DEFAULT_DRIFT = 0.10
_ENGINE_IDENTITY = {"backend": None, "device": None, "threads": None, "attention": "dense", "graphs": False}
"""Engine facts that must agree to merge, with their defaults; capacity does not change a step's time."""
_EDGE_AND_LINK_COLUMNS = (
    "context", "tokens", "rested_ms", "energy_j", "temperature_c", "payload_bytes",
)  # fmt: skip


# --- diff -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowChange:
    """One key in both profiles.

    ``p_value``: probability that noise alone moves the medians this far beyond the tolerance.
    ``doubtful``: either row is flagged ``drift`` or ``throttled``.
    """

    key: str
    before_ms: float
    after_ms: float
    p_value: float
    changed: bool
    doubtful: bool

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms if self.before_ms > 0 else math.inf


@dataclass(frozen=True)
class ProfileDiff:
    """``same_machine`` and ``same_model``: by hash. ``only_before`` and ``only_after``: keys of one
    profile.

    ``sentinel_ratio``: time of the sentinel after over before; 1 without sentinels. ``slowdown``: the part
    of it that was divided out as the machine's own; 1 if the ratio exceeds the allowed drift.
    """

    rows: tuple[RowChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    same_machine: bool
    same_model: bool
    drifted: bool
    sentinel_ratio: float
    slowdown: float

    @property
    def changed(self) -> tuple[RowChange, ...]:
        return tuple(row for row in self.rows if row.changed)

    @property
    def changed_share(self) -> float:
        return len(self.changed) / len(self.rows) if self.rows else 0.0

    @property
    def median_ratio(self) -> float:
        return statistics.median(row.ratio for row in self.rows) if self.rows else 1.0


def diff_profiles(
    before: Profile, after: Profile, tolerance: float = 0.05, *, absolute: bool = False
) -> ProfileDiff:
    """Compare rows of equal key, without sentinels. Raises :class:`ProfileError` for different kinds.

    ``tolerance``: relative difference of medians that does not matter. ``absolute``: a machine that is
    slower as a whole counts as changed. Otherwise the sentinels' ratio is divided out, if it is within the
    ``drift`` setting of the sweep.
    """
    if before.manifest.kind != after.manifest.kind:
        raise ProfileError(
            f"A profile of kind {before.manifest.kind} cannot be compared with one of kind "
            f"{after.manifest.kind}.",
            "Name two of the same kind.",
        )
    old, new = _by_key(before), _by_key(after)
    pairs = [(old[key], new[key]) for key in old if key in new]
    shift, shift_variance = _sentinel_shift(before, after)
    max_drift = float(before.manifest.measure.get("drift", _DEFAULT_DRIFT))
    slowdown = 0.0 if absolute or abs(shift) > math.log1p(max_drift) else shift
    noise = _Noise([*old.values(), *new.values()])
    p_values = [_p_value(one, other, noise, slowdown, shift_variance, tolerance) for one, other in pairs]
    changed = discoveries(p_values, FALSE_DISCOVERY_RATE)
    return ProfileDiff(
        rows=tuple(
            RowChange(one.key, one.median_ms, other.median_ms, p, found, _doubtful(one, other))
            for (one, other), p, found in zip(pairs, p_values, changed, strict=True)
        ),
        only_before=tuple(key for key in old if key not in new),
        only_after=tuple(key for key in new if key not in old),
        same_machine=before.manifest.hardware.get("hash") == after.manifest.hardware.get("hash"),
        same_model=before.manifest.model == after.manifest.model,
        drifted=any("drift" in row.flags for row in (*before.rows, *after.rows)),
        sentinel_ratio=math.exp(shift),
        slowdown=math.exp(slowdown),
    )


def discoveries(p_values: Sequence[float], rate: float = FALSE_DISCOVERY_RATE) -> list[bool]:
    """Which hypotheses to reject so that at most ``rate`` of the rejected are expected to be true."""
    if not p_values:
        return []
    from scipy.stats import false_discovery_control

    return [bool(p <= rate) for p in false_discovery_control(p_values)]


class _Noise:
    """Variance of the logarithm of a row's median, from its own blocks and those of all rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        each = [_block_variance(row) for row in rows]
        # Each divided by the median of chi-square over df (Wilson and Hilferty); outliers do not count.
        typical = [variance / (1 - 2 / (9 * df)) ** 3 for variance, df in each if df]
        self._prior = statistics.median(typical) if typical else 0.0

    def of(self, row: Row) -> tuple[float, float]:
        """(variance, degrees of freedom)."""
        own, df = _block_variance(row)
        if not df:
            return max(self._prior, _sample_variance(row)), _PRIOR_DF
        pooled = (_PRIOR_DF * self._prior + df * own) / (_PRIOR_DF + df)
        return pooled / (df + 1), _PRIOR_DF + df


def _block_variance(row: Row) -> tuple[float, int]:
    """Variance of the logarithms of the medians of a row's blocks, and its degrees of freedom."""
    counts = [] if isinstance(row, LinkRow) else [count for _, count in row.blocks]
    if len(counts) < 2:
        return 0.0, 0
    ends = itertools.accumulate(counts)
    medians = [
        math.log(max(1e-12, statistics.median(row.samples_ms[end - count : end])))
        for end, count in zip(ends, counts, strict=True)
    ]
    return statistics.variance(medians), len(medians) - 1


def _sample_variance(row: Row) -> float:
    """Variance of the median from the samples alone: their interval's, or their range's if fewer than
    six."""
    width = half_width(row.samples_ms)
    if width < math.inf:
        return (width / 1.96) ** 2
    return (1.2533 * relative_spread(row.samples_ms)) ** 2 / max(1, len(row.samples_ms))


def _sentinel_shift(before: Profile, after: Profile) -> tuple[float, float]:
    """Logarithm of the sentinel's time after over before, and its variance."""
    shift, variance = 0.0, 0.0
    for sign, profile in ((-1.0, before), (1.0, after)):
        references = [row for row in profile.rows if row.kind == "sentinel"]
        clean = [row for row in references if "drift" not in row.flags] or references
        logs = [math.log(row.median_ms) for row in clean if row.median_ms > 0]
        if not logs:
            return 0.0, 0.0
        shift += sign * statistics.median(logs)
        if len(logs) > 1:
            variance += 1.571 * statistics.variance(logs) / len(logs)
    return shift, variance


def _p_value(
    one: Row, other: Row, noise: _Noise, slowdown: float, shift_variance: float, tolerance: float
) -> float:
    from scipy.special import stdtr

    if one.median_ms <= 0 or other.median_ms <= 0:
        return 1.0 if one.median_ms == other.median_ms else 0.0
    moved = abs(math.log(other.median_ms / one.median_ms) - slowdown)
    (variance, df), (other_variance, other_df) = noise.of(one), noise.of(other)
    error = math.sqrt(variance + other_variance + shift_variance)
    beyond, within = moved - math.log1p(tolerance), moved + math.log1p(tolerance)
    if error == 0:
        return 0.0 if beyond > 0 else 1.0
    df += other_df
    return min(1.0, float(stdtr(df, -beyond / error) + stdtr(df, -within / error)))


def _by_key(profile: Profile) -> dict[str, Row]:
    return {row.key: row for row in profile.rows if row.kind != "sentinel"}


def _doubtful(one: Row, other: Row) -> bool:
    return bool({"drift", "throttled"} & {*one.flags, *other.flags})


# --- merge ----------------------------------------------------------------------------------------


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile with the rows of all: same kind, model, engine and machine.

    Of rows with equal keys the one with fewer flags wins, then the one with more samples. Orders continue
    from profile to profile. Sentinels are kept if all have the same shape, so that they show the speed of
    the machine throughout; otherwise none are. Raises :class:`ProfileError` if the profiles do not match.
    """
    if len(profiles) < 2:
        raise ProfileError("Merging needs two profiles or more.", "Name them all.")
    first = profiles[0]
    for other in profiles[1:]:
        _check_mergeable(first, other)
    best: dict[str, Row] = {}
    references: list[Row] = []
    start = 0
    for profile in profiles:
        for row in (_moved_on(row, start) for row in profile.rows):
            if row.kind == "sentinel":
                references.append(row)
            elif row.key not in best or _quality(row) > _quality(best[row.key]):
                best[row.key] = row
        start = 1 + max((_last_order(row) for row in (*best.values(), *references)), default=0)
    if len({row.key for row in references}) > 1:
        references = []
    rows = sorted((*references, *best.values()), key=lambda row: row.order)
    manifest = replace(
        first.manifest,
        command=command_line(),
        ended=max(p.manifest.ended for p in profiles),
        started=min(p.manifest.started for p in profiles),
        summary={**first.manifest.summary, "merged": [p.hash for p in profiles]},
    )
    return make_profile(manifest, rows)


def _check_mergeable(first: Profile, other: Profile) -> None:
    one, two = first.manifest, other.manifest
    for what, left, right in (
        ("kinds", one.kind, two.kind),
        ("models", one.model, two.model),
        ("engines", _engine_identity(first), _engine_identity(other)),
        ("machines", one.hardware.get("hash") or one.citation, two.hardware.get("hash") or two.citation),
    ):
        if left != right:
            left_text, right_text = _differences(left, right)
            raise ProfileError(
                f"The profiles are of different {what}: {left_text} and {right_text}.",
                "Merge only profiles of the same model on the same machine.",
            )


def _engine_identity(profile: Profile) -> dict[str, object]:
    engine = profile.manifest.engine
    return {name: engine.get(name, default) for name, default in _ENGINE_IDENTITY.items()}


def _differences(left: object, right: object) -> tuple[str, str]:
    """Both as text; of records only the fields that differ."""
    if isinstance(left, ModelInfo) and isinstance(right, ModelInfo):
        left, right = asdict(left), asdict(right)
    if not isinstance(left, dict) or not isinstance(right, dict):
        return str(left), str(right)
    names = [name for name in left if left[name] != right[name]]
    return (
        ", ".join(f"{name} {left[name]}" for name in names),
        ", ".join(f"{name} {right[name]}" for name in names),
    )


def _quality(row: Row) -> tuple[int, int]:
    return -len(row.flags), len(row.samples_ms)


def _moved_on(row: Row, start: int) -> Row:
    """The row with all its places in the order of measurement moved by ``start``."""
    if isinstance(row, LinkRow):
        return replace(row, order=row.order + start)
    return replace(
        row,
        order=row.order + start,
        blocks=tuple((order + start, count) for order, count in row.blocks),
        set_aside_blocks=tuple((order + start, count) for order, count in row.set_aside_blocks),
    )


def _last_order(row: Row) -> int:
    blocks = () if isinstance(row, LinkRow) else (*row.blocks, *row.set_aside_blocks)
    return max((order for order, _ in blocks), default=row.order)


# --- export ---------------------------------------------------------------------------------------


def row_record(row: Row) -> dict[str, Any]:
    """A row as a flat record for tables: median, interval, and the shape in numbers."""
    low, high = median_interval(row.samples_ms)
    if low == -math.inf:
        low, high = min(row.samples_ms), max(row.samples_ms)
    record: dict[str, Any] = {"key": row.key, "kind": row.kind}
    if isinstance(row, StepRow):
        shape = row.shape
        record |= {
            "items": len(shape.items),
            "new_tokens": shape.new_tokens,
            "cached_tokens": shape.cached_tokens,
            "max_cached": shape.max_cached,
            "attention_pairs": shape.attention_pairs,
            "prefill_tokens": shape.prefill_tokens,
            "padded_tokens": row.padded_tokens,
        }
    else:
        record |= {n: getattr(row, n) for n in _EDGE_AND_LINK_COLUMNS if hasattr(row, n)}
    return record | {
        "median_ms": row.median_ms,
        "low_ms": low,
        "high_ms": high,
        "samples": len(row.samples_ms),
        "flags": " ".join(row.flags),
        "order": row.order,
        "source": row.source,
    }


def export_rows(profile: Profile, path: Path) -> int:
    """Write the rows as ``.csv`` or ``.parquet``; returns their number.

    Raises :class:`ProfileError` for another file type, or for Parquet without pyarrow.
    """
    import pandas as pd

    frame = pd.DataFrame([row_record(row) for row in profile.rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix.lower():
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            try:
                frame.to_parquet(path, index=False)
            except ImportError:
                raise ProfileError(
                    "Parquet needs pyarrow.", "Install it with: pip install pyarrow."
                ) from None
        case _:
            raise ProfileError(f"Cannot export to {path.name!r}.", "Use a name in .csv or .parquet.")
    return len(frame)
