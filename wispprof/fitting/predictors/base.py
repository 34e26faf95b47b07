"""The manners of a rejection predictor's score: learned here, evaluated from plain numbers at the edge."""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np

from wispprof.core import DraftFeatures
from wispprof.fitting.features import FloatArray
from wispprof.fitting.predictors.data import TokenRows

__all__ = ["Scorer"]


class Scorer(Protocol):
    """Features of a draft token to a score that rises with the chance of acceptance."""

    kind: str

    def fit(self, rows: TokenRows) -> Self:
        """Learn from labelled tokens and return self; learned attributes end in ``_``."""

    def score(self, features: DraftFeatures, depth: int) -> float:
        """One token, in microseconds, with numpy at most."""

    def score_many(self, features: FloatArray, depth: np.ndarray) -> FloatArray:
        """Rows (n, 4) and depths (n,); returns (n,), equal to :meth:`score`."""

    def payload(self) -> dict[str, Any]:
        """Everything needed to evaluate it, as JSON."""

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Self:
        """A learned scorer from its payload."""
