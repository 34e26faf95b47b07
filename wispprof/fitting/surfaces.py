"""Which surfaces there are, by name."""

from __future__ import annotations

from wispprof.errors import FitError
from wispprof.fitting.base import Surface
from wispprof.fitting.forest import Forest
from wispprof.fitting.hybrid import WispprofSurface
from wispprof.fitting.linear import WispLinear
from wispprof.fitting.staircase import Staircase

__all__ = ["ESTIMATOR_KINDS", "surface_class"]

_SURFACES: dict[str, type[Surface]] = {
    c.kind: c for c in (WispLinear, Staircase, Forest, WispprofSurface)
}

ESTIMATOR_KINDS = tuple(_SURFACES)


def surface_class(kind: str) -> type[Surface]:
    """The class of a surface; raises :class:`FitError` for an unknown name."""
    if kind not in _SURFACES:
        raise FitError(
            f"There is no estimator called {kind!r}.", f"Choose one of {', '.join(_SURFACES)}."
        )
    return _SURFACES[kind]
