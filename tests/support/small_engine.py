"""A fake engine as a factory, to be found by name in another process."""

from __future__ import annotations

import os

from wispprof.engines import EngineOptions, LoadedEngine
from wispprof.errors import ModelMissing
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import StepInput, VerifyResult


class SmallEngine(FakeEngine):
    """Fails, or ends its process, when it is fed certain tokens."""

    BROKEN, FATAL = 90, 91

    def step(self, inputs: list[StepInput]) -> list[VerifyResult]:
        fed = [token for given in inputs for token in given.tokens]
        if self.FATAL in fed:
            os._exit(3)
        if self.BROKEN in fed:
            raise ZeroDivisionError("a kernel")
        return super().step(inputs)


def make(options: EngineOptions) -> LoadedEngine:
    """An engine of ``options.kv_tokens`` tokens; none if that is 1."""
    if options.kv_tokens == 1:
        raise ModelMissing("There are no weights.", "Find some.")
    engine = SmallEngine(96, max_context=256, kv_tokens=options.kv_tokens)
    return LoadedEngine(engine, engine.served, None)
