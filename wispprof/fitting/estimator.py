"""The estimator that policies call: a surface for the median, a conformal factor for the bound.

Three ways to ask, one answer: ``predict`` a whole shape, ``add`` items one by one, or ``add_many`` and
``add_in_turn`` to price a thousand candidates at once over numpy arrays. Nothing here needs pandas,
scikit-learn or LightGBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from wispprof.artifacts.document import BAD_PAYLOAD, read_document, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.errors import ArtifactDamaged, FitError
from wispprof.fitting.batch_totals import (
    EMPTY,
    FloatArray,
    Totals,
    decode_totals_of,
    extend,
    extend_all,
    extend_in_turn,
    extend_many,
    totals_of,
)
from wispprof.fitting.conformal import RatioBound
from wispprof.fitting.registry import model_class
from wispprof.fitting.step_time_models import StepTimeModel
from wispprof.types import BatchCost, BatchShape, StepTimeEstimator

__all__ = ["Accumulator", "Domain", "FittedEstimator", "load_estimator"]

KIND = "estimator"


@dataclass(frozen=True)
class Domain:
    """The box of totals that was measured; ``low`` and ``high`` are (8,) as :class:`Totals`."""

    low: Totals
    high: Totals

    @classmethod
    def of(cls, totals: FloatArray) -> Self:
        return cls(
            Totals(*(int(v) for v in totals.min(axis=0))),
            Totals(*(int(v) for v in totals.max(axis=0))),
        )

    def __contains__(self, totals: Totals) -> bool:
        low, high = self.low, self.high
        return all(low[i] <= totals[i] <= high[i] for i in (0, 1, 2, 5, 6, 7))

    def above(self, totals: Totals) -> bool:
        """Whether the batch holds more of something than was ever measured."""
        high = self.high
        return (
            totals[1] > high[1]
            or totals[2] > high[2]
            or totals[0] > high[0]
            or totals[5] > high[5]
            or totals[6] > high[6]
            or totals[7] > high[7]
        )


class Accumulator(BatchCost):
    """A batch being built. Immutable; predictions are computed when asked, once.

    ``decode`` is the same batch without its prompt chunks: a bound may not fall below what the decode
    items alone would get, though prompt chunks have a factor of their own.
    """

    __slots__ = ("_bound", "_estimator", "_p50", "decode", "totals")

    def __init__(
        self, estimator: FittedEstimator, totals: Totals, decode: Accumulator | None
    ) -> None:
        self._estimator = estimator
        self.totals = totals
        self.decode = decode
        self._p50 = self._bound = -1.0

    @property
    def p50_ms(self) -> float:
        if self._p50 < 0:
            self._p50 = self._estimator.p50_of(self.totals)
        return self._p50

    @property
    def bound_ms(self) -> float:
        if self._bound < 0:
            estimator = self._estimator
            own = estimator.bound_of(self.totals, self.p50_ms)
            decode = self.decode
            self._bound = own if decode is None else max(own, decode.bound_ms)
        return self._bound

    @property
    def in_domain(self) -> bool:
        """Whether a batch like this one was measured."""
        return self.totals in self._estimator.domain

    def add(self, new: int, cached: int, prefill: bool = False) -> Accumulator:
        decode = self.decode
        if decode is not None:
            if not prefill:
                decode = decode.add(new, cached)
        elif prefill and self.totals[0]:
            decode = self
        elif prefill:
            decode = self._estimator.start()
        return Accumulator(self._estimator, extend(self.totals, new, cached, prefill), decode)

    def add_all(self, new: Sequence[int], cached: Sequence[int]) -> Accumulator:
        """The batch with n decode items more at once: n calls of :meth:`add`, one after the other."""
        decode = self.decode
        if decode is not None:
            decode = decode.add_all(new, cached)
        return Accumulator(self._estimator, extend_all(self.totals, new, cached), decode)

    def add_in_turn(self, new: Any, cached: Any) -> tuple[FloatArray, FloatArray]:
        """(p50, bound), each (n,), after each of n decode items that join one after another.

        Arguments are arrays of shape (n,). Equal to n calls of :meth:`add`, each on the one before."""
        p50, bound = self._estimator.predict_totals(extend_in_turn(self.totals, new, cached))
        if self.decode is not None:
            bound = np.maximum(bound, self.decode.add_in_turn(new, cached)[1])
        return p50, bound

    def add_many(
        self, new: Any, cached: Any, prefill: Any = False
    ) -> tuple[FloatArray, FloatArray]:
        """(p50, bound), each (n,), of this batch with each of n candidates added alone.

        Arguments are arrays of shape (n,) or scalars. Equal to n calls of :meth:`add`.
        """
        estimator = self._estimator
        p50, bound = estimator.predict_totals(extend_many(self.totals, new, cached, prefill))
        chunk = np.broadcast_to(np.asarray(prefill, dtype=bool), p50.shape)
        if self.decode is None and not chunk.any():
            return p50, bound
        decode = self.decode or self
        alone = np.full(len(p50), decode.bound_ms)
        if self.decode is not None and not chunk.all():
            _, grown = estimator.predict_totals(extend_many(decode.totals, new, cached))
            alone = np.where(chunk, alone, grown)
        elif self.decode is None:
            alone = np.where(chunk, alone, 0.0)
        return p50, np.maximum(bound, alone)


@dataclass(frozen=True)
class FittedEstimator(StepTimeEstimator):
    """Batch shape to p50 and bound. Make one with :func:`~wispprof.fitting.fit_estimator`.

    ``inflation``: beyond the measured domain the time that the physical terms add is multiplied by
    this in the bound. ``p50_scale`` and ``bound_scale`` carry what the drift monitor learnt since.
    """

    step_model: StepTimeModel
    ratio: RatioBound
    domain: Domain
    coverage: float = 0.95
    inflation: float = 1.5
    p50_scale: float = 1.0
    bound_scale: float = 1.0
    report: dict[str, Any] = field(default_factory=dict)
    _factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    _most: FloatArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_factors", self.ratio.at(self.coverage))
        most = np.array(self.domain.high, dtype=np.float64)
        most[3:5] = np.inf  # the products of the others, which have no box of their own
        object.__setattr__(self, "_most", most)

    @property
    def kind(self) -> str:
        return self.step_model.kind

    def with_coverage(self, coverage: float) -> FittedEstimator:
        """The same estimator with a bound of another coverage, in [0.5, 1)."""
        return replace(self, coverage=coverage)

    def with_scale(self, p50_scale: float, bound_scale: float) -> FittedEstimator:
        """The same estimator with its median and its bound multiplied."""
        if not (p50_scale > 0 and bound_scale > 0):
            raise ValueError(f"scales must be positive, got {p50_scale}, {bound_scale}")
        return replace(self, p50_scale=p50_scale, bound_scale=bound_scale)

    # --- asking -----------------------------------------------------------------------------------

    def start(self) -> Accumulator:
        return Accumulator(self, EMPTY, None)

    def predict(self, shape: BatchShape) -> tuple[float, float]:
        totals = totals_of(shape.items)
        p50 = self.p50_of(totals)
        bound = self.bound_of(totals, p50)
        if totals.prefill:
            decode = decode_totals_of(shape)
            bound = max(bound, self.bound_of(decode, self.p50_of(decode)))
        return p50, bound

    def predict_many(self, totals: FloatArray, decode: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(p50, bound) of n batches from their totals and those of their decode items, (n, 8) each."""
        p50, bound = self.predict_totals(totals)
        mixed = (totals[:, 7] > 0) & (decode[:, 0] > 0)
        if mixed.any():
            _, alone = self.predict_totals(decode[mixed])
            bound[mixed] = np.maximum(bound[mixed], alone)
        return p50, bound

    def in_domain(self, shape: BatchShape) -> bool:
        """Whether a batch like this one was measured; outside, the physical part extrapolates."""
        return totals_of(shape.items) in self.domain

    def regime(self, totals: Totals) -> int:
        """Index into :data:`~wispprof.fitting.conformal.REGIMES`."""
        return self.ratio.regime(self.step_model.p50(totals), totals.prefill > 0)

    # --- from totals ------------------------------------------------------------------------------

    def p50_of(self, totals: Totals) -> float:
        """Median milliseconds of a batch with these totals; 0 for the empty one."""
        return self.step_model.p50(totals) * self.p50_scale if totals[0] else 0.0

    def bound_of(self, totals: Totals, p50_ms: float) -> float:
        """The bound that belongs to a batch's own regime, given its median."""
        if not totals[0]:
            return 0.0
        raw = p50_ms / self.p50_scale
        small, large = self._factors[2:] if totals[7] else self._factors[:2]
        split = self.ratio.split_ms
        # Past the split the small factor's last value stays a floor, or the bound could fall there.
        bound = raw * small if raw < split else max(raw * large, split * small)
        if self.domain.above(totals):
            inside = self.step_model.inside(totals, self.domain.high)
            bound += max(0.0, raw - inside) * (self.inflation - 1.0)
        return bound * self.bound_scale

    def predict_totals(self, totals: FloatArray) -> tuple[FloatArray, FloatArray]:
        """:meth:`p50_of` and :meth:`bound_of` over rows (n, 8)."""
        raw = self.step_model.p50_many(totals)
        small: Any
        large: Any
        small, large, *mixed = self._factors
        chunk = totals[:, 7] > 0
        if chunk.any():
            small, large = np.where(chunk, mixed[0], small), np.where(chunk, mixed[1], large)
        split = self.ratio.split_ms
        bound = np.where(raw < split, raw * small, np.maximum(raw * large, split * small))
        over = totals > self._most
        if over.any():
            above = over.any(axis=1)
            high = np.array(self.domain.high, dtype=np.float64)
            inside = self.step_model.inside_many(totals[above], high)
            bound[above] += np.maximum(0.0, raw[above] - inside) * (self.inflation - 1.0)
        some = totals[:, 0] > 0
        return raw * self.p50_scale * some, bound * self.bound_scale * some

    # --- on disk ----------------------------------------------------------------------------------

    def save(
        self, path: Path, inputs: dict[str, str] | None = None, provenance: Provenance | None = None
    ) -> str:
        """Write the estimator as one JSON document; returns its content hash."""
        payload = {
            "kind": self.step_model.kind,
            "step_model": self.step_model.payload(),
            "bound": self.ratio.payload(),
            "domain": {"low": list(self.domain.low), "high": list(self.domain.high)},
            "coverage": self.coverage,
            "inflation": self.inflation,
            "p50_scale": self.p50_scale,
            "bound_scale": self.bound_scale,
            "report": self.report,
        }
        return write_document(Path(path), KIND, payload, inputs, provenance)


def load_estimator(path: Path, coverage: float | None = None) -> FittedEstimator:
    """Read an estimator. Raises the artifact errors, and :class:`ArtifactDamaged` for a bad payload."""
    payload = read_document(Path(path), KIND).payload
    try:
        step_model = model_class(str(payload["kind"])).from_payload(payload["step_model"])
        domain = payload["domain"]
        estimator = FittedEstimator(
            step_model,
            RatioBound.from_payload(payload["bound"]),
            Domain(
                Totals(*(int(v) for v in domain["low"])), Totals(*(int(v) for v in domain["high"]))
            ),
            float(payload["coverage"]),
            float(payload["inflation"]),
            float(payload["p50_scale"]),
            float(payload["bound_scale"]),
            dict(payload.get("report", {})),
        )
    except (*BAD_PAYLOAD, FitError) as err:
        raise ArtifactDamaged(
            f"{path} is not a complete estimator ({err}).", "Fit it anew with `wispprof fit`."
        ) from err
    return estimator if coverage is None else estimator.with_coverage(coverage)
