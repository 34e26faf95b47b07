"""What a report says of benches and of the answer: plain records, and how they lie in documents.

A bench document is one policy under one load, an answer document one request of a real edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from wispprof.artifacts import Document
from wispprof.errors import ArtifactDamaged
from wispprof.reporting.figures import PolicyBar, StepPoint
from wispprof.reporting.tables import Column, Table


@dataclass(frozen=True)
class TextSpan:
    """A stretch of generated text. ``origin``: ``draft`` (proposed and accepted) or ``target``."""

    text: str
    origin: str


@dataclass(frozen=True)
class Answer:
    """One generation by a real edge: ``stats`` as the edge client summed them up."""

    prompt: str
    pieces: tuple[TextSpan, ...]
    stats: Mapping[str, Any]

    @classmethod
    def of(cls, document: Document) -> Answer:
        """Raises :class:`ArtifactDamaged` where the document is not an answer."""
        payload = document.payload
        try:
            pieces = tuple(TextSpan(str(p["text"]), str(p["origin"])) for p in payload["pieces"])
            return cls(str(payload["prompt"]), pieces, dict(payload["stats"]))
        except (KeyError, TypeError, ValueError) as err:
            raise ArtifactDamaged(f"The answer lacks {err}.", "Run the demo again.") from err

    def payload(self) -> dict[str, Any]:
        pieces = [{"text": p.text, "origin": p.origin} for p in self.pieces]
        return {"prompt": self.prompt, "pieces": pieces, "stats": dict(self.stats)}

    @property
    def text(self) -> str:
        """What was generated."""
        return "".join(piece.text for piece in self.pieces)


class Result(Protocol):
    """What a bench gives: :class:`wispprof.bench.BenchResult`, or a simulated one."""

    @property
    def policy(self) -> str: ...

    @property
    def load(self) -> Mapping[str, Any]: ...

    @property
    def figures(self) -> Mapping[str, float]: ...

    @property
    def steps(self) -> Sequence[tuple[float, float, float]]: ...


@dataclass(frozen=True)
class Bench:
    """One policy under one load.

    ``load``: what was offered, the same for every policy of a comparison (see
    :meth:`wispprof.bench.BenchSettings.load`). ``figures``: scalar results by name, units in
    the names, ``None`` where unknown. ``steps``: (predicted p50, bound, measured) ms of the steps that
    were taken.
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
        except (KeyError, TypeError, ValueError) as err:
            raise ArtifactDamaged(f"A bench lacks {err}.", "Run it again.") from err

    @classmethod
    def of_result(cls, result: Result) -> Bench:
        """From a bench that just ran."""
        figures = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in result.figures.items()
        }
        return cls(result.policy, dict(result.load), figures, tuple(result.steps))

    @property
    def slos(self) -> tuple[float, ...]:
        """SLOs of the sessions, tokens/s."""
        return tuple(float(v) for v in self.load.get("slo_tokens_per_s", ()))

    def slo_text(self) -> str:
        """``12 tokens/s``, or the range of several classes."""
        speeds = sorted(set(self.slos))
        if not speeds:
            return "their SLO"
        if len(speeds) == 1:
            return f"{speeds[0]:g} tokens/s"
        return f"{speeds[0]:g} to {speeds[-1]:g} tokens/s"

    def load_words(self) -> str:
        """The load in half a sentence."""
        count = self.load.get("devices", "?")
        kinds = ", ".join(str(kind) for kind in self.load.get("device", ()))
        words = f"{count} replay edges"
        if kinds:
            words += f" that draft like {kinds}"
        words += f", SLO {self.slo_text()}"
        if self.load.get("rtt_ms"):
            words += f", over a {float(self.load['rtt_ms']):g} ms link"
        return words

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
    ("goodput_tokens_per_s", Column("goodput", "tok/s", best="max")),
    ("attainment", Column("met SLO", "sessions", 0, percent=True, best="max")),
    ("tokens_per_s", Column("all", "tok/s", best="max")),
    ("ttft_p50_ms", Column("TTFT p50", "ms", 0, best="min")),
    ("ttft_p95_ms", Column("TTFT p95", "ms", 0, best="min")),
    ("tpot_p50_ms", Column("TPOT p50", "ms", best="min")),
    ("tpot_p95_ms", Column("TPOT p95", "ms", best="min")),
    ("accepted_per_round", Column("accepted", "per round", 2, best="max")),
    ("wasted_share", Column("wasted", "of drafting", 0, percent=True, best="min")),
    ("step_p50_ms", Column("step", "p50 ms")),
    ("step_error", Column("step", "error", 0, percent=True, best="min")),
)


_BRIEF = (
    "goodput_tokens_per_s",
    "attainment",
    "tokens_per_s",
    "ttft_p50_ms",
    "tpot_p50_ms",
    "accepted_per_round",
    "step_error",
)


def bench_table(benches: Sequence[Bench], title: str = "", brief: bool = False) -> Table:
    """All policies side by side; columns that nobody measured are left out.

    ``brief``: those that fit into a terminal of 80 columns.
    """
    shown = [
        (name, column)
        for name, column in _COLUMNS
        if any(b.figure(name) is not None for b in benches) and (not brief or name in _BRIEF)
    ]
    return Table(
        title,
        (Column("policy"), *(column for _, column in shown)),
        tuple((b.policy, *(b.figure(name) for name, _ in shown)) for b in benches),
    )
