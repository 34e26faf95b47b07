"""Which surfaces there are, by name."""

from __future__ import annotations

from wispprof.errors import FitError
from wispprof.fitting.step_time_models import Forest, Staircase, StepTimeModel, WispLinear
from wispprof.fitting.wispprof_model import WispprofStepTime

__all__ = ["ESTIMATOR_KINDS", "model_class"]

_SURFACES: dict[str, type[StepTimeModel]] = {
    c.kind: c for c in (WispLinear, Staircase, Forest, WispprofStepTime)
}

ESTIMATOR_KINDS = tuple(_SURFACES)


def model_class(kind: str) -> type[StepTimeModel]:
    """The class of a surface; raises :class:`FitError` for an unknown name."""
    if kind not in _SURFACES:
        raise FitError(
            f"There is no estimator called {kind!r}.", f"Choose one of {', '.join(_SURFACES)}."
        )
    return _SURFACES[kind]
