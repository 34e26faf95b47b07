"""What a draft model would have proposed, and what the target would have said: replayed or drawn.

A :class:`Script` is one generation's whole future: the target's path, and for every position the proposal
that the draft makes there with the features it makes it with. It is a :class:`~wispprof.core.Drafter`, so the
edge of the simulator drives it exactly as it would drive a model, and controllers decide on real features.
"""

from wispprof.simulation.acceptance.script import AcceptanceSource, Script, mix
from wispprof.simulation.acceptance.synthetic import (
    SyntheticAcceptance,
    TrustConfidence,
    survival_curve,
)
from wispprof.simulation.acceptance.trace import MemoPredictor, TraceAcceptance, TraceReplay

__all__ = [
    "AcceptanceSource",
    "MemoPredictor",
    "Script",
    "SyntheticAcceptance",
    "TraceAcceptance",
    "TraceReplay",
    "TrustConfidence",
    "mix",
    "survival_curve",
]
