"""From profile rows to arrays, and the refusals of rows that nothing should be fitted on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wispprof.artifacts.rows import StepRow
from wispprof.errors import FitError
from wispprof.fitting.batch_totals import FloatArray, decode_totals_of, totals_matrix, totals_of
from wispprof.fitting.machine_speed import MachineSpeed, drift_factors, visits_of
from wispprof.types import BatchShape

__all__ = ["MINIMUM_SHAPES", "Observations", "check_rows", "check_same_model", "read_step_log"]

MINIMUM_SHAPES = 12
"""Fewer distinct shapes than this leave the four linear terms and a held-out part undetermined."""

DISTRUSTED = frozenset({"drift", "throttled"})
TRUSTED_SHARE = 0.7
"""Distrusted rows are left out only where at least this share of the shapes remains."""
PRIOR_FREEDOM = 4.0
"""How many visits' worth the spread of all shapes counts against a shape's own visits."""
SAME_SHAPE_FACTOR = 2.5
"""Medians of one shape further apart than this are not one model on one machine."""


@dataclass(frozen=True)
class Observations:
    """Rows as arrays; one entry per distinct shape, with the samples of all its rows.

    ``totals`` and ``decode`` (n, 8): features of the whole shape and of its items that are not prompt
    chunks. ``median_ms`` (n,). ``samples``: n arrays of raw times. ``padded`` (n,): tokens the step
    really computed, 0 where unknown. ``groups``: the shape's key, which splits never divide.
    ``speed_corrected``: the same samples at the machine's typical pace, as ``median_ms`` is; ``blocks``: n arrays with
    the median of each visit's.
    ``flagged``: rows with a flag of distrust that are in nevertheless; ``left_out``: those that are not.
    ``drift``: largest log ratio between speeds of the machine that medians were corrected for.
    """

    totals: FloatArray
    decode: FloatArray
    median_ms: FloatArray
    samples: tuple[FloatArray, ...]
    padded: FloatArray
    groups: tuple[str, ...]
    shapes: tuple[BatchShape, ...]
    speed_corrected: tuple[FloatArray, ...]
    blocks: tuple[FloatArray, ...]
    flagged: int = 0
    left_out: int = 0
    drift: float = 0.0

    def __len__(self) -> int:
        return len(self.median_ms)

    @property
    def weights(self) -> FloatArray:
        """Weights that turn squared errors into squared relative errors."""
        return 1.0 / self.median_ms**2

    def take(self, index: np.ndarray | Sequence[int]) -> Observations:
        """The observations at these positions (or under this mask)."""
        place = np.asarray(index)
        if place.dtype == bool:
            place = np.flatnonzero(place)
        return Observations(
            self.totals[place],
            self.decode[place],
            self.median_ms[place],
            tuple(self.samples[i] for i in place),
            self.padded[place],
            tuple(self.groups[i] for i in place),
            tuple(self.shapes[i] for i in place),
            tuple(self.speed_corrected[i] for i in place),
            tuple(self.blocks[i] for i in place),
        )

    @classmethod
    def of(cls, rows: Sequence[StepRow]) -> Observations:
        """Gather rows by shape. Raises :class:`FitError` as :func:`check_rows` does.

        Where looks at a sentinel tell the machine's pace, ``median_ms`` is taken at its typical one.
        ``samples`` stay as measured, and those that a sweep set aside are among them where it says when they
        were taken, so that a bound learnt from them covers what the machine does.
        """
        pace = MachineSpeed.of(rows)
        close = pace is not None and pace.close
        kept = check_rows(rows, close)
        distrusted = DISTRUSTED - {"drift"} if close else DISTRUSTED
        flagged = sum(bool(distrusted & set(row.flags)) for row in kept)
        if pace is not None and not (pace.learnt or flagged):
            pace = None  # nothing says that rows follow the sentinel, nor that they would need it
        merged: dict[str, list[StepRow]] = {}
        for row in kept:
            merged.setdefault(row.shape.key(), []).append(row)
        shapes = [group[0].shape for group in merged.values()]
        gathered = [_gather(group, pace) for group in merged.values()]
        speed_corrected = tuple(np.concatenate(blocks) for _, blocks in gathered)
        factors = drift_factors(kept, pace) if pace else np.ones(len(kept))
        return cls(
            totals_matrix(shapes),
            np.array([decode_totals_of(s) for s in shapes], dtype=np.float64),
            np.array([float(np.median(samples)) for samples in speed_corrected]),
            tuple(raw for raw, _ in gathered),
            np.array(
                [max(row.padded_tokens for row in group) for group in merged.values()],
                dtype=np.float64,
            ),
            tuple(merged),
            tuple(shapes),
            speed_corrected,
            tuple(np.array([np.median(block) for block in blocks]) for _, blocks in gathered),
            flagged,
            len(rows) - len(kept),
            float(np.ptp(np.log(factors))),
        )

    def repeat_noise(self) -> FloatArray:
        """Relative standard error of each shape's median, (n,): the spread of its visits ÷ √visits.

        Visits to one shape meet other moments and other memory, which samples of one visit share. Few visits
        tell little of a shape's own spread, so each is judged together with that of all (as in Smyth 2004).
        Shapes of one visit have their samples alone: their spread ÷ √samples.
        """
        spread = [float(np.log(v).var(ddof=1)) for v in self.blocks if len(v) > 1]
        freedom = [len(v) - 1 for v in self.blocks if len(v) > 1]
        # The median of chi-square over its freedom (Wilson and Hilferty): no shape's mishap counts.
        typical = [s / (1 - 2 / (9 * nu)) ** 3 for s, nu in zip(spread, freedom, strict=True)]
        prior = float(np.median(typical)) if typical else 0.0
        noise = []
        for samples, blocks in zip(self.samples, self.blocks, strict=True):
            if len(blocks) > 1:
                own, nu = float(np.log(blocks).var(ddof=1)), len(blocks) - 1
                pooled = (PRIOR_FREEDOM * prior + nu * own) / (PRIOR_FREEDOM + nu)
                noise.append(math.sqrt(pooled / len(blocks)))
                continue
            median = float(np.median(samples))
            mad = float(np.median(np.abs(samples - median))) * 1.4826
            noise.append(1.2533 * mad / math.sqrt(len(samples)) / median)
        return np.array(noise)


def _gather(
    rows: Sequence[StepRow], pace: MachineSpeed | None
) -> tuple[FloatArray, list[FloatArray]]:
    """All samples of one shape as measured, and visit by visit at the machine's typical pace."""
    blocks = [(order, np.array(samples)) for row in rows for order, samples in visits_of(row)]
    raw = np.concatenate([samples for _, samples in blocks])
    if pace is None:
        return raw, [samples for _, samples in blocks]
    slow = pace.factors([order for order, _ in blocks], float(np.median(raw)))
    return raw, [samples / factor for (_, samples), factor in zip(blocks, slow, strict=True)]


def check_rows(rows: Sequence[StepRow], speed_corrected: bool = False) -> list[StepRow]:
    """Return the rows worth fitting.

    Drifted and throttled rows are left out, unless so many are that too little would remain: on a busy
    machine a profile in which everything drifted is still worth more than none. ``speed_corrected``: how slow the
    machine was at every visit is known, so that drift is no reason to leave a row out.

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
                    f"Row {row.key} has a time of {sample} ms; a step takes longer than nothing.",
                    "Check the clock of the profile and measure the row again.",
                )
    distinct = {row.shape.key() for row in rows}
    if len(distinct) < MINIMUM_SHAPES:
        raise FitError(
            f"{len(distinct)} distinct batch shapes are too few to fit and to hold some out; "
            f"{MINIMUM_SHAPES} are needed.",
            "Profile more of them: profile-server with --grid standard, or with more --budget-minutes.",
        )
    distrusted = DISTRUSTED - {"drift"} if speed_corrected else DISTRUSTED
    trusted = [row for row in rows if not distrusted & set(row.flags)]
    remaining = len({row.shape.key() for row in trusted})
    enough = max(MINIMUM_SHAPES, TRUSTED_SHARE * len(distinct))
    kept = trusted if remaining >= enough else list(rows)
    _check_columns_vary(kept)
    _check_agreement(kept)
    return kept


def _check_columns_vary(rows: Sequence[StepRow]) -> None:
    table = np.array([totals_of(row.shape.items) for row in rows], dtype=np.float64)
    for column, name in ((1, "new tokens"), (2, "cached tokens")):
        if np.ptp(table[:, column]) == 0:
            raise FitError(
                f"Every row has {table[0, column]:.0f} {name}, so their cost cannot be told.",
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
            f"Profiles of different models cannot be fitted together: {named}.",
            "Fit each of them alone.",
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
