"""Profile rows as arrays, and the checks that refuse rows unfit for fitting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import ArrayTotals, FloatArray, decode_totals_of, select, totals_of
from wispprof.fitting.machine_speed import MachineSpeed, blocks_of, slowdown_of_rows
from wispprof.types import BatchShape, BatchTotals

MINIMUM_SHAPES = 12
"""Fewer distinct shapes do not determine the four linear terms and a held-out part."""

DISTRUSTED = frozenset({"drift", "throttled"})
TRUSTED_SHARE = 0.7
"""Distrusted rows are left out only if at least this share of the shapes remains."""
PRIOR_BLOCKS = 4.0
"""Weight of all shapes' spread against a shape's own, in blocks."""
SAME_SHAPE_FACTOR = 2.5
"""Medians of one shape further apart than this are not one model on one machine."""


@dataclass(frozen=True)
class Observations:
    """Rows as arrays; one entry per distinct shape, with the samples of all its rows.

    ``totals`` and ``decode``: of the whole shape, and of its items that are not prompt chunks.
    ``median_ms`` (n,): at the machine's typical speed. ``samples``: n arrays of times as measured.
    ``padded`` (n,): tokens that the step computed, 0 if unknown. ``groups``: the shape's key, which no
    split divides. ``speed_corrected``: the samples at the machine's typical speed. ``block_ms``: n arrays
    with the median of each block. ``flagged`` and ``left_out``: distrusted rows that were kept, and not.
    ``drift``: largest log ratio between machine speeds that medians were corrected for.
    """

    totals: ArrayTotals
    decode: ArrayTotals
    median_ms: FloatArray
    samples: tuple[FloatArray, ...]
    padded: FloatArray
    groups: tuple[str, ...]
    shapes: tuple[BatchShape, ...]
    speed_corrected: tuple[FloatArray, ...]
    block_ms: tuple[FloatArray, ...]
    flagged: int = 0
    left_out: int = 0
    drift: float = 0.0

    def __len__(self) -> int:
        return len(self.median_ms)

    def take(self, index: np.ndarray | Sequence[int]) -> Observations:
        """The observations at these positions (or under this mask)."""
        place = np.asarray(index)
        if place.dtype == bool:
            place = np.flatnonzero(place)
        return Observations(
            select(self.totals, place),
            select(self.decode, place),
            self.median_ms[place],
            tuple(self.samples[i] for i in place),
            self.padded[place],
            tuple(self.groups[i] for i in place),
            tuple(self.shapes[i] for i in place),
            tuple(self.speed_corrected[i] for i in place),
            tuple(self.block_ms[i] for i in place),
        )

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> Observations:
        """Gather rows by shape. Raises :class:`FitError` as :func:`check_rows` does.

        ``samples`` stay as measured and include those that a sweep set aside, if their order is known. A
        bound learned from them covers the machine as it is.
        """
        speed = MachineSpeed.of(rows)
        dense = speed is not None and speed.dense
        kept = check_rows(rows, dense)
        flagged = sum(bool(_distrusted(dense) & set(row.flags)) for row in kept)
        if speed is not None and not (speed.learned or flagged):
            speed = None  # no sign that rows follow the sentinel, or that they need correcting
        merged: dict[str, list[StepRow]] = {}
        for row in kept:
            merged.setdefault(row.shape.key(), []).append(row)
        shapes = [group[0].shape for group in merged.values()]
        gathered = [_gather(group, speed) for group in merged.values()]
        speed_corrected = tuple(np.concatenate(blocks) for _, blocks in gathered)
        slowdown = slowdown_of_rows(kept, speed) if speed else np.ones(len(kept))
        return cls(
            BatchTotals.stack([totals_of(s.items) for s in shapes]),
            BatchTotals.stack([decode_totals_of(s) for s in shapes]),
            np.array([float(np.median(samples)) for samples in speed_corrected]),
            tuple(raw for raw, _ in gathered),
            np.array(
                [max(row.padded_tokens for row in group) for group in merged.values()], dtype=np.float64
            ),
            tuple(merged),
            tuple(shapes),
            speed_corrected,
            tuple(np.array([np.median(block) for block in blocks]) for _, blocks in gathered),
            flagged,
            len(rows) - len(kept),
            float(np.ptp(np.log(slowdown))),
        )

    def repeat_noise(self) -> FloatArray:
        """Relative standard error of each shape's median, (n,): the spread of its blocks ÷ √blocks.

        Samples of one block share its moment and its memory, so blocks count. A few blocks say little
        about a shape's spread, so it is pooled with that of all shapes (Smyth 2004). A shape of one block
        has the spread of its samples ÷ √samples.
        """
        several = [block_ms for block_ms in self.block_ms if len(block_ms) > 1]
        spread = [float(np.log(block_ms).var(ddof=1)) for block_ms in several]
        # The median of chi-square over its degrees of freedom (Wilson and Hilferty), robust to outliers.
        typical = [
            s / (1 - 2 / (9 * (len(block_ms) - 1))) ** 3 for s, block_ms in zip(spread, several, strict=True)
        ]
        prior = float(np.median(typical)) if typical else 0.0
        noise = []
        for samples, block_ms in zip(self.samples, self.block_ms, strict=True):
            if len(block_ms) > 1:
                own, freedom = float(np.log(block_ms).var(ddof=1)), len(block_ms) - 1
                pooled = (PRIOR_BLOCKS * prior + freedom * own) / (PRIOR_BLOCKS + freedom)
                noise.append(math.sqrt(pooled / len(block_ms)))
                continue
            median = float(np.median(samples))
            mad = float(np.median(np.abs(samples - median))) * 1.4826
            noise.append(1.2533 * mad / math.sqrt(len(samples)) / median)
        return np.array(noise)


def _gather(rows: Sequence[StepRow], speed: MachineSpeed | None) -> tuple[FloatArray, list[FloatArray]]:
    """All samples of one shape as measured, and block by block at the machine's typical speed."""
    blocks = [(order, np.array(samples)) for row in rows for order, samples in blocks_of(row)]
    raw = np.concatenate([samples for _, samples in blocks])
    if speed is None:
        return raw, [samples for _, samples in blocks]
    slowdown = speed.slowdown([order for order, _ in blocks], float(np.median(raw)))
    return raw, [samples / slow for (_, samples), slow in zip(blocks, slowdown, strict=True)]


def _distrusted(dense: bool) -> frozenset[str]:
    """Flags of distrust. Drift is none if machine speed is known at every block."""
    return DISTRUSTED - {"drift"} if dense else DISTRUSTED


def check_rows(rows: Sequence[StepRow], dense: bool = False) -> list[StepRow]:
    """Return the rows worth fitting.

    Drifted and throttled rows are left out, unless too little would remain: a profile in which everything
    drifted is better than none. ``dense``: machine speed is known at every block, so drifted rows stay.

    Raises :class:`FitError` for NaN, infinite, zero or negative times, too few distinct shapes,
    columns that do not vary, and rows of one shape that contradict each other.
    """
    for row in rows:
        if not row.samples_ms:
            raise FitError(f"Row {row.key} has no samples.", "Measure it again.")
        if not row.shape.items:
            raise FitError(f"Row {row.key} has an empty batch shape.", "Drop the row.")
        for sample in row.samples_ms:
            if not math.isfinite(sample):
                raise FitError(f"Row {row.key} has a time that is {sample}.", "Measure it again.")
            if sample <= 0:
                raise FitError(
                    f"Row {row.key} has a time of {sample} ms; step times must be positive.",
                    "Check the clock of the profile and measure the row again.",
                )
    distinct = {row.shape.key() for row in rows}
    if len(distinct) < MINIMUM_SHAPES:
        raise FitError(
            f"{len(distinct)} distinct batch shapes are too few to fit and to hold some out; "
            f"{MINIMUM_SHAPES} are needed.",
            "Profile more of them: profile-server with --grid standard, or with more --budget-minutes.",
        )
    trusted = [row for row in rows if not _distrusted(dense) & set(row.flags)]
    remaining = len({row.shape.key() for row in trusted})
    enough = max(MINIMUM_SHAPES, TRUSTED_SHARE * len(distinct))
    kept = trusted if remaining >= enough else list(rows)
    _check_columns_vary(kept)
    _check_agreement(kept)
    return kept


def _check_columns_vary(rows: Sequence[StepRow]) -> None:
    totals = BatchTotals.stack([totals_of(row.shape.items) for row in rows])
    for values, name in ((totals.sum_new, "new tokens"), (totals.sum_cached, "cached tokens")):
        if np.ptp(values) == 0:
            raise FitError(
                f"Every row has {values[0]:.0f} {name}, so their cost cannot be fitted.",
                f"Profile shapes that differ in {name}.",
            )
    if np.ptp([row.median_ms for row in rows]) == 0:
        raise FitError(
            "Every row took the same time, whatever its shape.",
            "Check that the profile measured the model and not the clock.",
        )


def _check_agreement(rows: Sequence[StepRow]) -> None:
    medians: dict[str, list[float]] = {}
    for row in rows:
        medians.setdefault(row.shape.key(), []).append(row.median_ms)
    clashes = [k for k, v in medians.items() if max(v) > SAME_SHAPE_FACTOR * min(v)]
    repeated = sum(len(v) > 1 for v in medians.values())
    if len(clashes) >= 2 and len(clashes) > repeated / 2:
        times = medians[clashes[0]]
        raise FitError(
            f"{len(clashes)} shapes appear with contradicting times, such as {clashes[0]} with "
            f"{min(times):.3g} and {max(times):.3g} ms: two models or machines are mixed.",
            "Fit one profile of one model on one machine at a time.",
        )


def check_same_model(identities: Mapping[str, str]) -> None:
    """Refuse profiles of different models: maps a profile's name to its model's identity."""
    if len(set(identities.values())) > 1:
        named = ", ".join(f"{name} ({model})" for name, model in identities.items())
        raise FitError(
            f"Profiles of different models cannot be fitted together: {named}.", "Fit each of them alone."
        )


def read_step_log(path: Path) -> list[StepRow]:
    """Read a server's own step log: JSON lines ``{"shape": [[new, cached, prefill], …], "ms": 12.3}``.

    Raises :class:`FitError` naming the first line that is not such a record.
    """
    rows = []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise FitError(f"{path} cannot be read: {reason}.", "Name a step log.") from err
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            shape = BatchShape.of(record["shape"])
            taken = float(record["ms"])
        except (ValueError, KeyError, TypeError, IndexError, OverflowError) as err:
            raise FitError(
                f"Line {number} of {path} is not a step record ({err}).",
                'Each line reads {"shape": [[new, cached, prefill], …], "ms": 12.3}.',
            ) from err
        kind = "verify" if not shape.prefill_tokens else "mixed"
        rows.append(StepRow(f"log{number}", kind, shape, (taken,), order=number))
    return rows
