"""Rows of a profile as flat records: for tables on a screen, CSV and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wispprof.artifacts import Profile, StepRow
from wispprof.artifacts.rows import Row
from wispprof.errors import ProfileError
from wispprof.profiling.stats import median_interval

__all__ = ["export_rows", "row_record"]


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
