"""Two profiles beside each other: which shapes changed beyond noise; and several made into one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wispprof.artifacts import Profile, StepRow, make_profile
from wispprof.artifacts.provenance import command_line
from wispprof.artifacts.rows import Row
from wispprof.errors import ProfileError
from wispprof.profiling.stats import median_interval

__all__ = ["Change", "Comparison", "diff_profiles", "export_rows", "merge_profiles", "row_record"]


@dataclass(frozen=True)
class Change:
    """One key in both profiles. ``changed``: the confidence intervals of the medians do not meet, and
    the medians differ by more than the tolerance. ``doubtful``: a drift or throttling flag stands on it."""

    key: str
    before_ms: float
    after_ms: float
    changed: bool
    doubtful: bool

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms if self.before_ms > 0 else float("inf")


@dataclass(frozen=True)
class Comparison:
    """``same_machine`` and ``same_model`` by hash; rows of only one profile are listed by key."""

    rows: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    same_machine: bool
    same_model: bool
    drifted: bool

    @property
    def changed(self) -> tuple[Change, ...]:
        return tuple(row for row in self.rows if row.changed)

    @property
    def changed_share(self) -> float:
        return len(self.changed) / len(self.rows) if self.rows else 0.0

    @property
    def median_ratio(self) -> float:
        return statistics.median(row.ratio for row in self.rows) if self.rows else 1.0


def diff_profiles(before: Profile, after: Profile, tolerance: float = 0.05) -> Comparison:
    """Compare rows of equal key, sentinels left out. Raises :class:`ProfileError` for unequal kinds.

    A row counts as changed only where both tests say so: intervals apart (beyond the noise within
    each run) and medians further apart than ``tolerance`` (beyond what two runs of one machine do).
    """
    if before.manifest.kind != after.manifest.kind:
        raise ProfileError(
            f"A profile of kind {before.manifest.kind} cannot be compared with one of kind "
            f"{after.manifest.kind}.",
            "Name two of the same kind.",
        )
    old, new = _by_key(before), _by_key(after)
    both = [key for key in old if key in new]
    return Comparison(
        rows=tuple(_change(key, old[key], new[key], tolerance) for key in both),
        only_before=tuple(key for key in old if key not in new),
        only_after=tuple(key for key in new if key not in old),
        same_machine=before.manifest.hardware.get("hash") == after.manifest.hardware.get("hash"),
        same_model=before.manifest.model == after.manifest.model,
        drifted=any("drift" in row.flags for row in (*before.rows, *after.rows)),
    )


def _by_key(profile: Profile) -> dict[str, Row]:
    return {row.key: row for row in profile.rows if row.kind != "sentinel"}


def _change(key: str, before: Row, after: Row, tolerance: float) -> Change:
    low, high = median_interval(before.samples_ms)
    low_after, high_after = median_interval(after.samples_ms)
    apart = high < low_after or high_after < low
    one, other = before.median_ms, after.median_ms
    far = abs(other - one) > tolerance * max(one, 1e-9)
    doubtful = bool({"drift", "throttled"} & {*before.flags, *after.flags})
    return Change(key, one, other, apart and far, doubtful)


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile with the rows of all: same kind, model, engine and machine.

    Where several hold a key, the row without flags wins, then the one with more samples. Sentinels
    are kept of the first only: they speak of one run. Raises :class:`ProfileError` where they differ.
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
                raise ProfileError(
                    f"The profiles are of different {what}: {one} and {two}.",
                    "Merge only profiles of the same model on the same machine.",
                )
    best: dict[str, Row] = {}
    for profile in profiles:
        for key, row in _by_key(profile).items():
            if key not in best or _worth(row) > _worth(best[key]):
                best[key] = row
    sentinels = [row for row in first.rows if row.kind == "sentinel"]
    rows = [replace(row, order=order) for order, row in enumerate([*sentinels, *best.values()])]
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


def _identity(profile: Profile) -> tuple[object, ...]:
    """What must be equal of an engine; room for sessions does not change a step's time."""
    engine = profile.manifest.engine
    return tuple(engine.get(name) for name in ("backend", "device", "threads", "graphs"))


def _machine(profile: Profile) -> object:
    return profile.manifest.hardware.get("hash") or profile.manifest.citation


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
        for name in ("context", "tokens", "energy_j", "temperature_c", "payload_bytes"):
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
