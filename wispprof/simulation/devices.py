"""Edge devices as the simulator sees them: how long a draft step and a prompt take, and what they draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from wispprof.artifacts.drafting import rested_share, resume_ms
from wispprof.artifacts.records import EdgeRow
from wispprof.errors import ProfileError

__all__ = ["DeviceProfile"]


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Speed and power of one kind of device with one draft model.

    ``draft_ms``: one draft step over an empty context; ``draft_ms_per_ktoken`` is added per 1,000
    cached tokens. ``controller_ms``: deciding after each token. ``prefill_ms_per_token``: the draft
    model reading the prompt. ``draft_w`` and ``idle_w``: power while drafting and while waiting.
    ``resume_ms``: what a rest adds to the first draft step after it.
    """

    name: str = "device"
    draft_ms: float = 16.0
    draft_ms_per_ktoken: float = 0.0
    controller_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    draft_w: float = 0.0
    idle_w: float = 0.0
    resume_ms: float = 0.0

    def step_ms(self, context: int) -> float:
        """One draft token over ``context`` tokens, the controller's decision included."""
        return self.draft_ms + self.draft_ms_per_ktoken * context / 1000.0 + self.controller_ms

    def resuming_ms(self, rested_ms: float) -> float:
        """What a draft step takes longer that begins this long after the last work of the device."""
        return self.resume_ms * rested_share(rested_ms)

    @classmethod
    def from_speed(cls, name: str, tokens_per_s: float, **more: float) -> DeviceProfile:
        """From a drafting speed alone, as publications give it."""
        return cls(name, draft_ms=1000.0 / tokens_per_s, **more)

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[EdgeRow]) -> DeviceProfile:
        """From a measured edge profile: least-squares line of ``draft_step`` medians over context,
        median of ``controller``, prefill per token, power while drafting, what a rest adds (0 without
        ``round`` rows).

        Raises :class:`ProfileError` without draft steps."""
        kinds: dict[str, list[EdgeRow]] = {}
        rows = list(rows)
        for row in rows:
            kinds.setdefault(row.kind, []).append(row)
        steps = kinds.get("draft_step") or kinds.get("sustained") or kinds.get("burst")
        if not steps:
            raise ProfileError(
                f"Edge profile {name} holds no draft steps.", "Run `wispprof profile-edge` again."
            )
        base, slope = _line([(r.context, r.median_ms / max(1, r.tokens)) for r in steps])
        control = kinds.get("controller", [])
        added = [resume_ms(rows, r.context) for r in kinds.get("round", [])]
        prefill = [r.median_ms / r.tokens for r in kinds.get("prefill", []) if r.tokens > 0]
        energies = [
            r.energy_j / (r.median_ms / 1000.0)
            for r in [*kinds.get("energy", []), *steps]
            if r.energy_j is not None and r.median_ms > 0
        ]
        return cls(
            name,
            draft_ms=base,
            draft_ms_per_ktoken=slope * 1000.0,
            controller_ms=statistics.median(r.median_ms for r in control) if control else 0.0,
            prefill_ms_per_token=statistics.median(prefill) if prefill else 0.0,
            draft_w=statistics.median(energies) if energies else 0.0,
            resume_ms=statistics.median(added) if added else 0.0,
        )


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope, neither below zero."""
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = (
        max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread) if spread else 0.0
    )
    base = mean_y - slope * mean_x
    return (base, slope) if base > 0 else (mean_y, 0.0)
