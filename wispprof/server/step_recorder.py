"""What is kept of every step: metrics, the step log, and the step-time tracker's observations."""

from __future__ import annotations

from typing import NamedTuple

from wispprof.artifacts.plan import BatchRow
from wispprof.server.metrics import Metrics, StepRecord
from wispprof.server.step_log import StepLog
from wispprof.server.step_time_tracker import StepTimeTracker
from wispprof.types import BatchShape

_DRIFT_EVERY_STEPS = 32


class EndedStep(NamedTuple):
    """A step that is committed. ``row``: the plan's row that limited it; ``p50_ms``, ``bound_ms``: as
    predicted for its shape."""

    reason: str
    shape: BatchShape
    row: BatchRow | None
    started_ms: float
    at_ms: float
    actual_ms: float
    p50_ms: float
    bound_ms: float
    committed: int


class StepRecorder:
    """Records steps after they ended."""

    def __init__(self, step_times: StepTimeTracker, metrics: Metrics) -> None:
        self.step_log: StepLog | None = None
        self._step_times = step_times
        self._metrics = metrics

    def record(self, ended: EndedStep, next_ms: float | None) -> None:
        """``next_ms``: the start of the step that followed at once."""
        shape, row, times = ended.shape, ended.row, self._step_times
        times.observe(shape, ended.p50_ms, ended.actual_ms)
        if next_ms is not None:
            times.cycle(next_ms - ended.started_ms, ended.p50_ms)
        if self.step_log is not None:
            self.step_log.append(shape, ended.actual_ms, ended.p50_ms, row)
        record = StepRecord(
            ended.at_ms,
            len(shape.items),
            shape.new_tokens,
            shape.prefill_tokens,
            ended.p50_ms,
            ended.bound_ms,
            ended.actual_ms,
            ended.committed,
            ended.reason,
            "" if row is None else row.cell,
            sum(1 for item in shape.items if item.prefill) if shape.prefill_tokens else 0,
        )
        self._metrics.step(record, row)
        if record.prefill_tokens:
            share = record.prefill_tokens / record.new_tokens
            times.prefilled(record.at_ms, share * ended.actual_ms)
        self._metrics.drift.set(times.ratio)
        if times.steps % _DRIFT_EVERY_STEPS == 0:
            self._metrics.drifted(times.drift)
