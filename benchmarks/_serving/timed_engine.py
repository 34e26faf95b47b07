"""An engine that takes the fitted time of each step and costs no processor time, as an accelerator does."""

from __future__ import annotations

import time
from collections.abc import Sequence

from wispprof.artifacts import AcceptanceTrace
from wispprof.fitting import FittedEstimator
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Sampling, ServedModel, StepInput, VerifyResult

_ELSEWHERE = -1


class TraceTarget:
    """A target that continues the prompts of a trace as it was recorded. A state is a place in its texts."""

    def __init__(self, trace: AcceptanceTrace, vocab: int) -> None:
        self.vocab = vocab
        self._places: dict[tuple[int, int], int] = {}
        self._next: dict[int, int] = {}
        for path in trace.paths:
            state = 0
            for number, token in enumerate((*path.prompt, *path.path)):
                if number >= len(path.prompt):
                    self._next[state] = token
                state = self._places.setdefault((state, token), len(self._places) + 1)

    def start(self, sampling: Sampling) -> int:
        return 0

    def feed(self, state: int, token: int) -> int:
        return self._places.get((state, token), _ELSEWHERE)

    def choose(self, state: int, position: int, sampling: Sampling) -> int:
        return self._next.get(state, 0)


class TimedEngine(FakeEngine):
    """Sleeps until a step's fitted time is over."""

    def __init__(
        self, trace: AcceptanceTrace, estimator: FittedEstimator, model: ServedModel, kv_tokens: int
    ):
        super().__init__(
            model.vocab_size,
            max_context=model.max_context,
            kv_tokens=kv_tokens,
            step_ms=lambda shape: estimator.predict(shape)[0],
            sleep=self._rest,
        )
        self.target = TraceTarget(trace, model.vocab_size)  # type: ignore[assignment]
        self._begun_s = 0.0

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        self._begun_s = time.perf_counter()
        return super().step(inputs)

    def _rest(self, seconds: float) -> None:
        time.sleep(max(0.0, self._begun_s + seconds - time.perf_counter()))
