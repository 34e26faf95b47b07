"""The estimator that policies call: a step-time model for the median, a conformal factor for the bound.

It answers in three ways, with equal results: ``predict`` a whole shape, ``add`` items one by one, or price
many candidates at once over numpy arrays. Nothing here needs pandas, scikit-learn or LightGBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import le
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from wispprof import plugins
from wispprof.artifacts.document import from_plain, load_fitted, write_document
from wispprof.artifacts.manifest import Provenance
from wispprof.fitting.batch_totals import (
    EMPTY,
    ArrayTotals,
    FloatArray,
    Totals,
    decode_totals_of,
    extend,
    extend_all,
    extend_in_turn,
    extend_many,
    select,
    totals_of,
    upper_corner,
)
from wispprof.fitting.conformal import RatioBound
from wispprof.fitting.step_time_models import Forest, Staircase, StepTimeModel, WispLinear
from wispprof.fitting.wispprof_model import WispprofStepTime
from wispprof.types import BatchCost, BatchShape, BatchTotals, StepTimeEstimator

KIND = "estimator"
MODELS: dict[str, type[StepTimeModel]] = {
    c.kind: c for c in (WispLinear, Staircase, Forest, WispprofStepTime)
}
ESTIMATOR_KINDS = tuple(MODELS)
CHECKED = ("items", "sum_new", "sum_cached", "max_cached", "max_new", "prefill")
"""Totals that bound the measured domain; the others follow from them."""


def model_class(kind: str) -> type[StepTimeModel]:
    """The class of a step-time model: built in, an entry point, or ``MODULE:CLASS``.

    Raises :class:`~wispprof.errors.PluginError` for an unknown name.
    """
    return cast("type[StepTimeModel]", plugins.load("estimators", kind, MODELS))


@dataclass(frozen=True)
class Domain:
    """The box of totals that was measured, from ``low`` to ``high``. ``sum_new_cached`` and ``sum_new_sq``
    follow from the others and are not checked."""

    low: Totals
    high: Totals

    @classmethod
    def of(cls, totals: ArrayTotals) -> Self:
        return cls(BatchTotals(*(int(column.min()) for column in totals)), upper_corner(totals))

    def __contains__(self, totals: Totals) -> bool:
        low = self.low._replace(sum_new_cached=0, sum_new_sq=0)
        return all(map(le, low, totals)) and not self.above(totals)

    def above(self, totals: Totals) -> bool:
        """Whether the batch holds more of something than was ever measured."""
        items, new, cached, _, _, max_cached, max_new, prefill = totals
        most = self.high
        return (
            new > most.sum_new
            or cached > most.sum_cached
            or items > most.items
            or max_cached > most.max_cached
            or max_new > most.max_new
            or prefill > most.prefill
        )

    def above_many(self, totals: ArrayTotals) -> NDArray[np.bool_]:
        """:meth:`above` of n batches, (n,)."""
        above = np.zeros(len(totals.items), dtype=bool)
        for name in CHECKED:
            above |= getattr(totals, name) > getattr(self.high, name)
        return above


class Accumulator(BatchCost):
    """A batch being built. Immutable; each prediction is computed once, when it is first read.

    ``decode``: the same batch without its prompt chunks. Prompt chunks have a factor of their own, and
    the bound may not fall below that of the decode items alone.
    """

    __slots__ = ("_bound", "_estimator", "_p50", "decode", "totals")

    def __init__(self, estimator: FittedEstimator, totals: Totals, decode: Accumulator | None) -> None:
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
        elif prefill and self.totals.items:
            decode = self
        elif prefill:
            decode = self._estimator.start()
        return Accumulator(self._estimator, extend(self.totals, new, cached, prefill), decode)

    def add_all(self, new: Sequence[int], cached: Sequence[int]) -> Accumulator:
        decode = self.decode
        if decode is not None:
            decode = decode.add_all(new, cached)
        return Accumulator(self._estimator, extend_all(self.totals, new, cached), decode)

    def add_in_turn(self, new: Any, cached: Any) -> tuple[FloatArray, FloatArray]:
        p50, bound = self._estimator.predict_totals(extend_in_turn(self.totals, new, cached))
        if self.decode is not None:
            bound = np.maximum(bound, self.decode.add_in_turn(new, cached)[1])
        return p50, bound

    def add_many(self, new: Any, cached: Any, prefill: Any = False) -> tuple[FloatArray, FloatArray]:
        estimator = self._estimator
        p50, bound = estimator.predict_totals(extend_many(self.totals, new, cached, prefill))
        if self.decode is None and (prefill is False or not np.any(prefill)):
            return p50, bound
        chunk = np.broadcast_to(np.asarray(prefill, dtype=bool), p50.shape)
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

    ``inflation``: outside the measured domain, the time that the model adds is multiplied by this in the
    bound. ``p50_scale`` and ``bound_scale``: corrections learned while serving.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "_factors", self.ratio.at(self.coverage))

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

    def predict_many(self, totals: ArrayTotals, decode: ArrayTotals) -> tuple[FloatArray, FloatArray]:
        """(p50, bound) of n batches from their totals and those of their decode items."""
        p50, bound = self.predict_totals(totals)
        mixed = (totals.prefill > 0) & (decode.items > 0)
        if mixed.any():
            _, alone = self.predict_totals(select(decode, mixed))
            bound[mixed] = np.maximum(bound[mixed], alone)
        return p50, bound

    def in_domain(self, shape: BatchShape) -> bool:
        """Whether a batch like this one was measured; outside, the model extrapolates."""
        return totals_of(shape.items) in self.domain

    def p50_of(self, totals: Totals) -> float:
        """Median milliseconds of a batch with these totals; 0 for the empty one."""
        return self.step_model.p50(totals) * self.p50_scale if totals.items else 0.0

    def bound_of(self, totals: Totals, p50_ms: float) -> float:
        """The bound that belongs to a batch's own regime, given its median."""
        if not totals.items:
            return 0.0
        raw = p50_ms / self.p50_scale
        small, large = self._factors[2:] if totals.prefill else self._factors[:2]
        split = self.ratio.split_ms
        # Past the split the bound stays at or above its last value before it, or it could fall there.
        bound = raw * small if raw < split else max(raw * large, split * small)
        if self.domain.above(totals):
            clipped = self.step_model.clipped(totals, self.domain.high)
            bound += max(0.0, raw - clipped) * (self.inflation - 1.0)
        return bound * self.bound_scale

    def predict_totals(self, totals: ArrayTotals) -> tuple[FloatArray, FloatArray]:
        """:meth:`p50_of` and :meth:`bound_of` of n batches, each (n,)."""
        raw = self.step_model.p50_many(totals)
        small: Any
        large: Any
        small, large, *mixed = self._factors
        if totals.prefill.any():
            chunk = totals.prefill > 0
            small, large = np.where(chunk, mixed[0], small), np.where(chunk, mixed[1], large)
        split = self.ratio.split_ms
        bound = np.where(raw < split, raw * small, np.maximum(raw * large, split * small))
        above = self.domain.above_many(totals)
        if above.any():
            clipped = self.step_model.clipped_many(select(totals, above), self.domain.high)
            bound[above] += np.maximum(0.0, raw[above] - clipped) * (self.inflation - 1.0)
        some = totals.items > 0
        return raw * self.p50_scale * some, bound * self.bound_scale * some

    def save(
        self, path: Path, inputs: dict[str, str] | None = None, provenance: Provenance | None = None
    ) -> str:
        """Write the estimator as one JSON document; returns its content hash."""
        payload = {
            "kind": self.step_model.kind,
            "step_model": self.step_model.payload(),
            "bound": self.ratio.payload(),
            "domain": asdict(self.domain),
            "coverage": self.coverage,
            "inflation": self.inflation,
            "p50_scale": self.p50_scale,
            "bound_scale": self.bound_scale,
            "report": self.report,
        }
        return write_document(Path(path), KIND, payload, inputs, provenance)


def load_estimator(path: Path, coverage: float | None = None) -> FittedEstimator:
    """Read an estimator. Raises the artifact errors, and :class:`ArtifactDamaged` for a bad payload."""
    estimator = load_fitted(Path(path), KIND, _from_payload)
    return estimator if coverage is None else estimator.with_coverage(coverage)


def _from_payload(kind: str, payload: dict[str, Any]) -> FittedEstimator:
    return FittedEstimator(
        model_class(kind).from_payload(payload["step_model"]),
        RatioBound.from_payload(payload["bound"]),
        from_plain(payload["domain"], Domain),
        float(payload["coverage"]),
        float(payload["inflation"]),
        float(payload["p50_scale"]),
        float(payload["bound_scale"]),
        dict(payload.get("report", {})),
    )
