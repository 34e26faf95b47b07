"""Two profiles beside each other: which shapes changed beyond noise.

A shape counts as changed where its time moved by more than a share that matters, and by more than noise
explains. Noise is judged on logarithms, from three sources: samples within a visit, visits of one sweep to
the same shape (each meets other memory and another moment), and the pace of the whole machine,
which differs between any two sessions and is taken from the sentinel. Few visits tell little
about a shape's own noise, so each is judged together with that of all shapes (Smyth 2004); the null
hypothesis is not "equal" but "no further apart than the tolerance" (McCarthy and Smyth 2009); and as
many shapes are tested at once, the share of false findings is what is bounded (Benjamini and Hochberg
1995).

Several profiles of one model on one machine made into one.

Rows of a profile as flat records: for tables on a screen, CSV and Parquet.
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
from wispprof.artifacts.manifest import ModelRecord, command_line
from wispprof.artifacts.rows import LinkRow, Row
from wispprof.errors import ProfileError
from wispprof.profiling.measurement_log import (
    discoveries,
    half_width,
    median_interval,
    relative_spread,
)

__all__ = [
    "ProfileDiff",
    "RowChange",
    "diff_profiles",
    "export_rows",
    "merge_profiles",
    "row_record",
]

FALSE_FINDINGS = 0.05
"""Largest expected share of false ones among the shapes reported as changed."""
_PRIOR_FREEDOM = 4.0
"""How many visits' worth all shapes together count against a shape's own visits."""
_DEFAULT_DRIFT = 0.10


@dataclass(frozen=True)
class RowChange:
    """One key in both profiles. ``p_value``: how likely noise alone would take the medians this much
    further apart than the tolerance. ``doubtful``: a drift or throttling flag stands on it."""

    key: str
    before_ms: float
    after_ms: float
    p_value: float
    changed: bool
    doubtful: bool

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms if self.before_ms > 0 else float("inf")


@dataclass(frozen=True)
class ProfileDiff:
    """``same_machine`` and ``same_model`` by hash; rows of only one profile are listed by key.

    ``sentinel_ratio``: how much slower the sentinel was after (1 where there was none); ``pace``: what
    of it was taken for the machine's own pace and divided out, 1 where it was too much for that.
    """

    rows: tuple[RowChange, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    same_machine: bool
    same_model: bool
    drifted: bool
    sentinel_ratio: float
    pace: float

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
    """Compare rows of equal key, sentinels left out. Raises :class:`ProfileError` for unequal kinds.

    ``tolerance``: relative difference of medians that does not matter. ``absolute``: a machine that
    was slower as a whole counts as changed. Without it, the sentinels' ratio is divided out as long as
    it is no more than a sweep itself would accept of a sentinel (its ``drift`` setting).
    """
    if before.manifest.kind != after.manifest.kind:
        raise ProfileError(
            f"A profile of kind {before.manifest.kind} cannot be compared with one of kind "
            f"{after.manifest.kind}.",
            "Name two of the same kind.",
        )
    old, new = _by_key(before), _by_key(after)
    both = [key for key in old if key in new]
    shift, error = _pace(before, after)
    most = float(before.manifest.measure.get("drift", _DEFAULT_DRIFT))
    pace = 0.0 if absolute or abs(shift) > math.log1p(most) else shift
    rows = [(old[key], new[key]) for key in both]
    noise = _Noise([*old.values(), *new.values()])
    p_values = [_p_value(one, other, noise, pace, error, tolerance) for one, other in rows]
    found = discoveries(p_values, FALSE_FINDINGS)
    return ProfileDiff(
        rows=tuple(
            RowChange(one.key, one.median_ms, other.median_ms, p, changed, _doubtful(one, other))
            for (one, other), p, changed in zip(rows, p_values, found, strict=True)
        ),
        only_before=tuple(key for key in old if key not in new),
        only_after=tuple(key for key in new if key not in old),
        same_machine=before.manifest.hardware.get("hash") == after.manifest.hardware.get("hash"),
        same_model=before.manifest.model == after.manifest.model,
        drifted=any("drift" in row.flags for row in (*before.rows, *after.rows)),
        sentinel_ratio=math.exp(shift),
        pace=math.exp(pace),
    )


class _Noise:
    """Variance of the logarithm of a row's median, from its own visits and from those of all rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        each = [_visit_variance(row) for row in rows]
        # The median of chi-square over its freedom (Wilson and Hilferty): no row's mishap counts.
        typical = [s / (1 - 2 / (9 * nu)) ** 3 for s, nu in each if nu]
        self._prior = statistics.median(typical) if typical else 0.0

    def of(self, row: Row) -> tuple[float, float]:
        """(variance, degrees of freedom)."""
        own, freedom = _visit_variance(row)
        if not freedom:
            return max(self._prior, _within(row)), _PRIOR_FREEDOM
        pooled = (_PRIOR_FREEDOM * self._prior + freedom * own) / (_PRIOR_FREEDOM + freedom)
        return pooled / (freedom + 1), _PRIOR_FREEDOM + freedom


def _visit_variance(row: Row) -> tuple[float, int]:
    """Variance of the logarithms of a row's visits' medians, and its degrees of freedom."""
    counts = [] if isinstance(row, LinkRow) else [n for _, n in row.blocks]
    if len(counts) < 2:
        return 0.0, 0
    ends = list(itertools.accumulate(counts))
    medians = [
        math.log(max(1e-12, statistics.median(row.samples_ms[end - count : end])))
        for end, count in zip(ends, counts, strict=True)
    ]
    return statistics.variance(medians), len(medians) - 1


def _within(row: Row) -> float:
    """Variance of the median from the samples alone: their interval's, or where six are missing, their
    range's."""
    width = half_width(row.samples_ms)
    if width < math.inf:
        return (width / 1.96) ** 2
    return (1.2533 * relative_spread(row.samples_ms)) ** 2 / max(1, len(row.samples_ms))


def _pace(before: Profile, after: Profile) -> tuple[float, float]:
    """Logarithm of how much slower the sentinel was after, and the variance of that."""
    shift, variance = 0.0, 0.0
    for sign, profile in ((-1.0, before), (1.0, after)):
        reference_samples = [row for row in profile.rows if row.kind == "sentinel"]
        calm = [row for row in reference_samples if "drift" not in row.flags] or reference_samples
        logs = [math.log(row.median_ms) for row in calm if row.median_ms > 0]
        if not logs:
            return 0.0, 0.0
        shift += sign * statistics.median(logs)
        if len(logs) > 1:
            variance += 1.571 * statistics.variance(logs) / len(logs)
    return shift, variance


def _p_value(
    one: Row, other: Row, noise: _Noise, pace: float, pace_variance: float, tolerance: float
) -> float:
    from scipy.special import stdtr

    if one.median_ms <= 0 or other.median_ms <= 0:
        return 1.0 if one.median_ms == other.median_ms else 0.0
    moved = abs(math.log(other.median_ms / one.median_ms) - pace)
    (v1, n1), (v2, n2) = noise.of(one), noise.of(other)
    error = math.sqrt(v1 + v2 + pace_variance)
    far, least = moved - math.log1p(tolerance), moved + math.log1p(tolerance)
    if error == 0:
        return 0.0 if far > 0 else 1.0
    return min(1.0, float(stdtr(n1 + n2, -far / error) + stdtr(n1 + n2, -least / error)))


def _by_key(profile: Profile) -> dict[str, Row]:
    return {row.key: row for row in profile.rows if row.kind != "sentinel"}


def _doubtful(one: Row, other: Row) -> bool:
    return bool({"drift", "throttled"} & {*one.flags, *other.flags})


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile with the rows of all: same kind, model, engine and machine.

    Where several hold a key, the row without flags wins, then the one with more samples. Orders go on from
    profile to profile. Sentinels are kept where all are of one shape, so that they tell how slow the
    machine was from one to the next; otherwise none are. Raises :class:`ProfileError` where they differ.
    """
    if len(profiles) < 2:
        raise ProfileError("Merging needs two profiles or more.", "Name them all.")
    first = profiles[0]
    for other in profiles[1:]:
        for what, one, two in (
            ("kinds", first.manifest.kind, other.manifest.kind),
            ("models", first.manifest.model, other.manifest.model),
            ("engines", _identity(first), _identity(other)),
            ("machines", _machine(first), _machine(other)),
        ):
            if one != two:
                one, two = _apart(one, two)
                raise ProfileError(
                    f"The profiles are of different {what}: {one} and {two}.",
                    "Merge only profiles of the same model on the same machine.",
                )
    best: dict[str, Row] = {}
    reference_samples: list[Row] = []
    start = 0
    for profile in profiles:
        for row in (_later(row, start) for row in profile.rows):
            if row.kind == "sentinel":
                reference_samples.append(row)
            elif row.key not in best or _worth(row) > _worth(best[row.key]):
                best[row.key] = row
        start = 1 + max((_last(row) for row in (*best.values(), *reference_samples)), default=0)
    if len({row.key for row in reference_samples}) > 1:
        reference_samples = []
    rows = sorted((*reference_samples, *best.values()), key=lambda row: row.order)
    manifest = replace(
        first.manifest,
        command=command_line(),
        ended=max(p.manifest.ended for p in profiles),
        started=min(p.manifest.started for p in profiles),
        summary={**first.manifest.summary, "merged": [p.hash for p in profiles]},
    )
    return make_profile(manifest, rows)


def _worth(row: Row) -> tuple[int, int]:
    return -len(row.flags), len(row.samples_ms)


def _identity(profile: Profile) -> dict[str, object]:
    """What must be equal of an engine; room for sessions does not change a step's time."""
    engine = profile.manifest.engine
    stated = {name: engine.get(name) for name in ("backend", "device", "threads")}
    return {
        **stated,
        "attention": engine.get("attention", "dense"),
        "graphs": bool(engine.get("graphs")),
    }


def _apart(one: object, two: object) -> tuple[object, object]:
    """Two things that differ, for a reader: of named properties only those that do."""
    if isinstance(one, ModelRecord) and isinstance(two, ModelRecord):
        one, two = asdict(one), asdict(two)
    if not isinstance(one, dict) or not isinstance(two, dict):
        return one, two
    names = [name for name in one if one[name] != two[name]]
    return tuple(", ".join(f"{name} {its[name]}" for name in names) for its in (one, two))


def _machine(profile: Profile) -> object:
    return profile.manifest.hardware.get("hash") or profile.manifest.citation


def _later(row: Row, start: int) -> Row:
    """The row with every place in its order of measurement moved on by ``start``."""
    if isinstance(row, LinkRow):
        return replace(row, order=row.order + start)
    return replace(
        row,
        order=row.order + start,
        blocks=tuple((order + start, count) for order, count in row.blocks),
        set_aside_blocks=tuple((order + start, count) for order, count in row.set_aside_blocks),
    )


def _last(row: Row) -> int:
    blocks = () if isinstance(row, LinkRow) else (*row.blocks, *row.set_aside_blocks)
    return max((order for order, _ in blocks), default=row.order)


def row_record(row: Row) -> dict[str, Any]:
    """A row as one flat record for tables: medians and interval, and the shape in numbers."""
    low, high = median_interval(row.samples_ms)
    finite = low > float("-inf")
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
        for name in (
            "context",
            "tokens",
            "rested_ms",
            "energy_j",
            "temperature_c",
            "payload_bytes",
        ):
            if hasattr(row, name):
                record[name] = getattr(row, name)
    return record | {
        "median_ms": row.median_ms,
        "low_ms": low if finite else min(row.samples_ms),
        "high_ms": high if finite else max(row.samples_ms),
        "samples": len(row.samples_ms),
        "flags": " ".join(row.flags),
        "order": row.order,
        "source": row.source,
    }


def export_rows(profile: Profile, path: Path) -> int:
    """Write the rows as ``.csv`` or ``.parquet`` (with the extra); returns how many.

    Raises :class:`ProfileError` for another ending or where the extra is missing.
    """
    import pandas as pd

    frame = pd.DataFrame([row_record(row) for row in profile.rows])
    ending = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".csv":
        frame.to_csv(path, index=False)
    elif ending == ".parquet":
        try:
            frame.to_parquet(path, index=False)
        except ImportError:
            raise ProfileError(
                "Parquet needs pyarrow.", "Install it with: pip install 'wispprof[parquet]'."
            ) from None
    else:
        raise ProfileError(f"Cannot export to {path.name!r}.", "Use a name in .csv or .parquet.")
    return len(frame)
