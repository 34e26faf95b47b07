"""The warm-up stays within the limits of an engine, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from wispprof.engines.warm_up import warm_up
from wispprof.errors import OutOfKvMemory
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import StepInput, VerifyResult


class Watched(FakeEngine):
    def __init__(self, full_from: int = 1 << 30) -> None:
        super().__init__(max_context=512)
        self.fed: list[list[int]] = []
        self._full_from = full_from

    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        self.fed.append([len(one.tokens) for one in inputs])
        if sum(self.fed[-1]) >= self._full_from:
            raise OutOfKvMemory("full", "")
        return super().step(inputs)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_every_number_of_rows_within_the_limits(most: int) -> None:
    engine = Watched()
    warm_up(engine, range(1, 33), longest=5, most=most)
    assert [sum(sizes) for sizes in engine.fed] == list(range(1, min(32, 5 * most) + 1))
    assert all(len(sizes) <= most and max(sizes) <= 5 for sizes in engine.fed)
    engine.audit({})


def test_it_ends_where_memory_does() -> None:
    engine = Watched(full_from=7)
    warm_up(engine, range(1, 33), longest=5)
    assert [sum(sizes) for sizes in engine.fed] == list(range(1, 8))
    engine.audit({})
