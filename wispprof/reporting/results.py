"""What a report says of benches and of the answer: plain records, and how they lie in documents.

A bench document is one policy under one load, an answer document one request of a real edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wispprof.artifacts import Document
from wispprof.errors import ArtifactDamaged
from wispprof.reporting.figures import PolicyBar, StepPoint
from wispprof.reporting.tables import Column, Table

__all__ = ["Answer", "Bench", "Piece", "bench_table"]


@dataclass(frozen=True)
class Piece:
    """A stretch of generated text. ``origin``: ``draft`` (proposed and accepted) or ``target``."""

    text: str
    origin: str


@dataclass(frozen=True)
class Answer:
    """One generation by a real edge: ``stats`` as the edge client summed them up."""

    prompt: str
    pieces: tuple[Piece, ...]
    stats: Mapping[str, Any]

    @classmethod
    def of(cls, document: Document) -> Answer:
        """Raises :class:`ArtifactDamaged` where the document is not an answer."""
        payload = document.payload
        try:
            pieces = tuple(Piece(str(p["text"]), str(p["origin"])) for p in payload["pieces"])
            return cls(str(payload["prompt"]), pieces, dict(payload["stats"]))
        except (KeyError, TypeError, ValueError) as fault:
            raise ArtifactDamaged(f"The answer lacks {fault}.", "Run the demo again.") from fault

    def payload(self) -> dict[str, Any]:
        pieces = [{"text": p.text, "origin": p.origin} for p in self.pieces]
        return {"prompt": self.prompt, "pieces": pieces, "stats": dict(self.stats)}

    @property
    def text(self) -> str:
        """What was generated."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Bench:
    """One policy under one load.

    ``load``: what was offered, in words and numbers, the same for every policy of a comparison.
    ``figures``: scalar results by name, units in the names. ``steps``: (predicted p50, bound,
    measured) ms of the steps that were taken.
    """

    policy: str
    load: Mapping[str, Any]
    figures: Mapping[str, Any]
    steps: tuple[tuple[float, float, float], ...] = field(default=())

    @classmethod
    def of(cls, document: Document) -> Bench:
        """Raises :class:`ArtifactDamaged` where the document is not a bench."""
        payload = document.payload
        try:
            steps = tuple((float(p), float(b), float(m)) for p, b, m in payload.get("steps", ()))
            return cls(
                str(payload["policy"]), dict(payload["load"]), dict(payload["figures"]), steps
            )
        except (KeyError, TypeError, ValueError) as fault:
            raise ArtifactDamaged(f"A bench lacks {fault}.", "Run it again.") from fault

    def payload(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "load": dict(self.load),
            "figures": dict(self.figures),
            "steps": [list(step) for step in self.steps],
        }

    def figure(self, name: str) -> float | None:
        """A scalar result, ``None`` where it was not measured."""
        value = self.figures.get(name)
        return float(value) if isinstance(value, int | float) else None

    def bar(self) -> PolicyBar:
        return PolicyBar(
            self.policy,
            self.figure("goodput_tokens_per_s") or 0.0,
            self.figure("attainment") or 0.0,
            self.figure("tokens_per_s") or 0.0,
        )

    def points(self) -> list[StepPoint]:
        """Steps with a prediction, for the figure of predicted against measured."""
        return [StepPoint(p, b, m, self.policy) for p, b, m in self.steps if p > 0]


_COLUMNS: tuple[tuple[str, Column], ...] = (
    ("goodput_tokens_per_s", Column("goodput", "tokens/s", best="max")),
    ("attainment", Column("attainment", "of sessions", 0, percent=True, best="max")),
    ("tokens_per_s", Column("all tokens", "tokens/s", best="max")),
    ("ttft_p50_ms", Column("TTFT p50", "ms", 0, best="min")),
    ("ttft_p95_ms", Column("TTFT p95", "ms", 0, best="min")),
    ("tpot_p50_ms", Column("TPOT p50", "ms", best="min")),
    ("tpot_p95_ms", Column("TPOT p95", "ms", best="min")),
    ("accepted_per_round", Column("accepted", "per round", 2, best="max")),
    ("wasted_share", Column("wasted", "of drafting", 0, percent=True, best="min")),
    ("step_p50_ms", Column("step p50", "ms")),
    ("step_error", Column("step error", "median, predicted", 0, percent=True, best="min")),
)


def bench_table(benches: Sequence[Bench], title: str = "") -> Table:
    """All policies side by side; columns that nobody measured are left out."""
    shown = [(n, c) for n, c in _COLUMNS if any(b.figure(n) is not None for b in benches)]
    return Table(
        title,
        (Column("policy"), *(column for _, column in shown)),
        tuple((b.policy, *(b.figure(name) for name, _ in shown)) for b in benches),
    )
