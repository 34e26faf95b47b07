"""The engine contract, on every engine that this package ships, and engines and drafters found by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from wispprof.backends import Engine, IntegrityReport
from wispprof.drafters import load_gguf, make_drafter, needs_model
from wispprof.drafters.lookup_first import LookupFirst
from wispprof.drafters.ngram import LookupDrafter
from wispprof.engines import EngineOptions, LoadedEngine, load_engine
from wispprof.engines.loading import random_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError, InputRefused, ModelMissing, OutOfKvMemory, PluginError
from wispprof.settings.draft_settings import LlamaSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine, FakeTarget
from wispprof.types import Sampling, StepInput, VerifyResult

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(params=["torch dense", "torch paged", "fake", "fake trees"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if "fake" in request.param:
        return FakeEngine(96, max_context=256, kv_tokens=64, trees="trees" in request.param)
    loaded = random_model("tiny-llama", seed=1, device="cpu")
    backend = request.param.removeprefix("torch ")
    return TorchEngine(loaded, kv_tokens=64, max_sessions=4, backend=backend)


def test_sessions_cache_what_they_were_fed(engine: Engine) -> None:
    can = engine.capabilities
    assert (can.max_context, can.fork) == (256, True)
    assert can.trees or not isinstance(engine, TorchEngine)
    assert can.max_drafts == can.max_context - 1
    engine.open("a", Sampling(), PROMPT)
    assert (engine.cached("a"), engine.kv_free) == (0, engine.kv_tokens)
    assert engine.step([StepInput("a", PROMPT[:5], needs_logits=False)])[0].tokens == ()
    [first] = engine.step([StepInput("a", PROMPT[5:])])
    [second] = engine.step([StepInput("a", [*first.tokens, 0, 0], drafts=2)])
    held = len(PROMPT) + 1 + second.accepted
    assert len(second.tokens) == second.accepted + 1
    engine.audit({"a": held})
    engine.fork("a", "b", 4, Sampling())
    engine.rollback("a", 6)
    engine.audit({"a": 6, "b": 4})
    assert set(engine.check_integrity().errors) == {"a", "b"}
    assert set(engine.check_integrity("b").errors) == {"b"}
    engine.close("a")
    engine.close("b")
    engine.audit({})
    assert engine.kv_free == engine.kv_tokens


def test_a_tree_is_verified_or_refused(engine: Engine) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", PROMPT)])
    branched = StepInput("a", [1, 2, 3], drafts=2, parents=(-1, -1))
    if engine.capabilities.trees:
        for parents in ((-1,), (-1, 1), (0, -2)):
            with pytest.raises(InputRefused):
                engine.step([branched._replace(parents=parents)])
        engine.audit({"a": len(PROMPT)})
        assert len(engine.step([branched])[0].tokens) <= 2
        return
    with pytest.raises(InputRefused, match="not trees"):
        engine.step([branched])
    engine.audit({"a": len(PROMPT)})


def test_a_refused_call_changes_nothing(engine: Engine) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", PROMPT)])
    calls = [
        lambda: engine.open("a", Sampling()),
        lambda: engine.close("b"),
        lambda: engine.rollback("a", len(PROMPT) + 1),
        lambda: engine.fork("a", "b", len(PROMPT) + 1, Sampling()),
    ]
    for call in calls:
        with pytest.raises(EngineError):
            call()
        engine.audit({"a": len(PROMPT)})
    engine.open("b", Sampling())
    for at_fault in (
        StepInput("a", [1] * 300),
        StepInput("a", []),
        StepInput("a", [1], 1),
        StepInput("a", [1, 2], 1, needs_logits=False),
        StepInput("a", [96]),
        StepInput("a", [-1]),
        StepInput("c", [1]),
        StepInput("b", [1]),
    ):
        with pytest.raises(InputRefused) as caught:
            engine.step([StepInput("b", [1]), at_fault])
        assert caught.value.session == at_fault.session
        engine.audit({"a": len(PROMPT), "b": 0})
    engine.close("b")
    with pytest.raises(OutOfKvMemory):
        engine.step([StepInput("a", [1] * 60)])
    engine.audit({"a": len(PROMPT)})


@pytest.mark.parametrize(
    ("expected", "message"),
    [({}, "unknown sessions"), ({"a": 7}, "caches 8 tokens of a"), ({"a": 8, "c": 1}, "c")],
)
def test_an_audit_finds_what_differs(engine: Engine, expected: dict[str, int], message: str) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", PROMPT)])
    with pytest.raises(EngineError, match=message):
        engine.audit(expected)


class Minimal(Engine):
    """Only what an engine must have."""

    capabilities = FakeEngine().capabilities
    sessions: Sequence[str] = ()
    kv_tokens = kv_free = 10

    def open(self, session: str, sampling: Sampling, tokens: Sequence[int] = (), owner: str = "") -> None: ...
    def step(self, inputs: Sequence[StepInput]) -> list[VerifyResult]: ...
    def rollback(self, session: str, length: int) -> None: ...
    def close(self, session: str) -> None: ...
    def cached(self, session: str) -> int: ...
    def check_integrity(self, session: str | None = None) -> IntegrityReport: ...


def test_optional_methods_have_defaults() -> None:
    engine = Minimal()
    with pytest.raises(EngineError, match="Minimal cannot fork"):
        engine.fork("a", "b", 1, Sampling())
    engine.audit({})
    engine.warm_up()
    engine.shutdown()
    drafter = FakeDrafter(FakeTarget())
    drafter.prefill()
    assert drafter.can_draft
    assert drafter.max_context > 1 << 40


# --- by name --------------------------------------------------------------------------------------


def fake_engine(options: EngineOptions) -> LoadedEngine:
    engine = FakeEngine(kv_tokens=options.kv_tokens)
    return LoadedEngine(engine, engine.served, None)


def fake_drafter(model: object) -> FakeDrafter:
    return FakeDrafter(FakeTarget())


def test_an_engine_of_ones_own_is_found_by_module_and_name() -> None:
    loaded = load_engine(f"{__name__}:fake_engine", EngineOptions("any", kv_tokens=77))
    assert loaded.engine.kv_tokens == 77
    with pytest.raises(PluginError, match="torch"):
        load_engine("nothing", EngineOptions("any"))
    with pytest.raises(ModelMissing):
        load_engine("torch", EngineOptions("./nowhere/at/all"))


def test_drafters_are_found_by_name() -> None:
    assert isinstance(make_drafter("lookup"), LookupDrafter)
    assert isinstance(make_drafter("both", random_model("tiny-llama")), LookupFirst)
    assert isinstance(make_drafter(f"{__name__}:fake_drafter"), FakeDrafter)
    assert [needs_model(name) for name in ("model", "both", "lookup")] == [True, True, False]
    with pytest.raises(ValueError, match="needs a draft model"):
        make_drafter("model")
    with pytest.raises(ModelMissing, match="gguf"):
        load_gguf(Path("nothing.gguf"), LlamaSettings(), "cpu", None)
    with pytest.raises(PluginError, match="lookup"):
        make_drafter("nothing")
