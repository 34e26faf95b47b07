"""An engine in a process of its own: same answers and errors; what is left when that process ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from raw_edge import edge
from small_engine import SmallEngine

from wispprof.artifacts import bundled_model
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines import EngineOptions
from wispprof.engines.engine_process import EngineProcess, can_separate, load_engine_process
from wispprof.engines.loading import load_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.errors import EngineError, EngineLost, InputRefused, ModelMissing, OutOfKvMemory
from wispprof.server import running_server, startup
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine
from wispprof.types import Sampling, StepInput, VerifyResult

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="sockets are not handed to a process here")

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OPTIONS = EngineOptions(bundled_model("target"), kv_tokens=64)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    loaded = load_engine_process("small_engine:make", OPTIONS)
    assert isinstance(loaded.engine, EngineProcess)
    yield loaded.engine
    loaded.engine.shutdown()


def test_it_answers_as_the_engine_itself(engine: EngineProcess) -> None:
    own = FakeEngine(96, max_context=256, kv_tokens=64)
    told = []
    for one in (own, engine):
        one.open("a", Sampling(0.8, seed=3), PROMPT)
        [first] = one.step([StepInput("a", PROMPT)])
        [second] = one.step([StepInput("a", [*first.tokens, 0, 0], drafts=2)])
        one.fork("a", "b", 4, Sampling())
        one.rollback("a", 6)
        one.audit({"a": 6, "b": 4})
        one.warm_up(every_size=True)
        told.append((first, second, one.cached("a"), one.kv_free, one.kv_tokens, set(one.sessions)))
        told[-1] += (one.capabilities, one.check_integrity("b"))
        one.close("a")
        one.close("b")
    assert told[0] == told[1]
    assert engine.kv_free == engine.kv_tokens == 64


def test_errors_are_the_engine_s_own(engine: EngineProcess) -> None:
    engine.open("a", Sampling())
    with pytest.raises(InputRefused, match="No session 'b' is open") as refused:
        engine.step([StepInput("b", [1])])
    assert refused.value.session == "b"
    with pytest.raises(OutOfKvMemory, match="65 new tokens, 64 free"):
        engine.step([StepInput("a", [1] * 65)])
    with pytest.raises(EngineError, match="already open"):
        engine.open("a", Sampling())
    with pytest.raises(EngineLost, match="ZeroDivisionError: a kernel"):
        engine.step([StepInput("a", [SmallEngine.BROKEN])])
    assert engine.cached("a") == 0


def test_a_process_that_ends_is_a_lost_engine(engine: EngineProcess) -> None:
    engine.open("a", Sampling())
    for _ in range(2):
        with pytest.raises(EngineLost, match="process ended"):
            engine.step([StepInput("a", [SmallEngine.FATAL])])
    assert (engine.kv_free, engine.capabilities.max_context) == (64, 256)
    engine.shutdown()
    with pytest.raises(EngineLost):
        engine.cached("a")


def test_a_target_that_cannot_be_loaded_says_why() -> None:
    before = psutil.Process().children()
    with pytest.raises(ModelMissing, match="There are no weights") as missing:
        load_engine_process("small_engine:make", replace(OPTIONS, kv_tokens=1))
    assert missing.value.hint == "Find some."
    assert psutil.Process().children() == before


def test_it_ends_when_nobody_holds_it() -> None:
    before = set(psutil.Process().children())
    engine = load_engine_process("small_engine:make", OPTIONS).engine
    [process] = set(psutil.Process().children()) - before
    del engine
    assert not process.is_running()


def test_only_the_own_engine_on_a_cpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_separate()
    settings = ServerSettings(device="cpu")
    assert startup._separate(settings)
    assert not startup._separate(replace(settings, in_process=True))
    assert not startup._separate(replace(settings, engine="vllm"))
    monkeypatch.setattr("wispprof.engines.loading.choose_device", lambda name: torch.device("meta"))
    assert not startup._separate(settings)
    monkeypatch.undo()
    monkeypatch.setattr("wispprof.hardware.machine_info.usable_cores", lambda: 1)
    assert not startup._separate(settings)


async def test_sessions_survive_a_killed_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server loads the engine again, in another process; texts are the target's own."""
    step, count = EngineProcess.step, 0

    def kill_once(engine: EngineProcess, inputs: Sequence[StepInput]) -> list[VerifyResult]:
        nonlocal count
        count += 1
        if count == 30:
            os.kill(process.pid, signal.SIGKILL)
        return step(engine, inputs)

    monkeypatch.setattr(EngineProcess, "step", kill_once)
    target = load_model(bundled_model("target"), "float32", "cpu")
    draft = load_model(bundled_model("draft"), "float32", "cpu")
    prompts = [[(7 * i + n) % 4000 + 2 for i in range(20 + n)] for n in range(6)]
    sampling = Sampling(0.8, seed=5)
    own = TorchEngine(target, kv_tokens=4096, max_sessions=8)
    wanted = []
    for prompt in prompts:
        own.open("a", sampling)
        text = list(own.step([StepInput("a", prompt)])[0].tokens)
        while len(text) < 24:
            text += own.step([StepInput("a", text[-1:])])[0].tokens
        own.close("a")
        wanted.append(text)
    settings = ServerSettings(admit="all", dtype="float32", device="cpu", kv_tokens=4096, max_sessions=8)
    before = set(psutil.Process().children())
    async with running_server(settings) as running:
        [process] = set(psutil.Process().children()) - before
        async with edge(running.split_url) as one:
            jobs = (
                one.generate(n, prompt, 24, k=4, drafter=TorchDrafter(draft), sampling=sampling)
                for n, prompt in enumerate(prompts)
            )
            assert await asyncio.gather(*jobs) == wanted
        assert running.server.loop.failed_steps == 1
        await running.server.check_integrity()
    assert set(psutil.Process().children()) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_it_runs_on_the_cores_it_is_given() -> None:
    core, before = max(os.sched_getaffinity(0)), set(psutil.Process().children())
    loaded = load_engine_process("small_engine:make", OPTIONS, [core])
    try:
        [process] = set(psutil.Process().children()) - before
        assert {tuple(os.sched_getaffinity(thread.id)) for thread in process.threads()} == {(core,)}
    finally:
        loaded.engine.shutdown()
