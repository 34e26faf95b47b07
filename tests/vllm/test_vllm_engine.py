"""The engine contract on vLLM: what a call changes, what it refuses, what an audit finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TARGET
from decoding import decode

from wispprof.backends import Engine
from wispprof.doctor import DoctorContext, examine, models, tokenizers, vllm, vllm_checks, vllm_target
from wispprof.engines import LoadedEngine
from wispprof.engines.tokenizers import read_tokenizer
from wispprof.engines.vllm.versions import changed_functions
from wispprof.errors import EngineError, EngineLost, InputRefused, OutOfKvMemory
from wispprof.types import Sampling, StepInput

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LONG = [(7 * i) % 4000 + 2 for i in range(300)]


def continuation(engine: Engine, session: str, prompt: list[int], length: int) -> list[int]:
    """Tokens after ``prompt``, of which the session caches some."""
    text: list[int] = []
    [result] = engine.step([StepInput(session, prompt[engine.cached(session) :])])
    text += result.tokens
    while len(text) < length:
        [result] = engine.step([StepInput(session, text[-1:])])
        text += result.tokens
    return text


def test_sessions_cache_what_they_were_fed(engine) -> None:
    can = engine.capabilities
    assert (can.max_context, can.fork, can.trees, can.families) == (2047, True, False, "any")
    engine.open("a", Sampling(), PROMPT)
    assert (engine.cached("a"), engine.kv_free) == (0, engine.kv_tokens)
    assert engine.step([StepInput("a", PROMPT[:5], needs_logits=False)])[0].tokens == ()
    [first] = engine.step([StepInput("a", PROMPT[5:])])
    [second] = engine.step([StepInput("a", [*first.tokens, 0, 0], drafts=2)])
    held = len(PROMPT) + 1 + second.accepted
    engine.audit({"a": held})
    engine.fork("a", "b", 4, Sampling())
    engine.rollback("a", 6)
    engine.audit({"a": 6, "b": 4})
    assert set(engine.check_integrity().errors) == {"a", "b"}
    assert set(engine.check_integrity("b").errors) == {"b"}


@pytest.mark.parametrize("length", [0, 5, 128, 200, 256, 299])
@pytest.mark.parametrize("prompt", [LONG, [*LONG[:290], *range(50, 60)]])
def test_a_rollback_keeps_what_it_should(engine, own, length: int, prompt: list[int]) -> None:
    """Whatever follows it, the same tokens or others, the text is that of a session without it."""
    [wanted] = decode(own, [LONG[:length] + prompt[length:]], 8)
    engine.open("a", Sampling(), LONG)
    continuation(engine, "a", LONG, 5)
    engine.rollback("a", length)
    assert engine.cached("a") == length
    assert continuation(engine, "a", LONG[:length] + prompt[length:], 8) == wanted
    engine.check_integrity("a")


def test_forks_share_whole_blocks(engine, own) -> None:
    engine.open("a", Sampling(), LONG)
    continuation(engine, "a", LONG, 1)
    free = engine.kv_free
    engine.fork("a", "b", 290, Sampling())
    engine.close("a")
    assert engine.kv_free >= free
    other = [*LONG[:290], 9, 9, 9]
    assert continuation(engine, "b", other, 8) == decode(own, [other], 8)[0]
    engine.check_integrity("b")


def test_a_prefix_is_found_again_by_its_owner(engine) -> None:
    """A session that opens with the tokens of a closed one takes its blocks over, if they are its owner's,
    and so do its forks and rollbacks."""
    computed, fresh = [], LONG[::-1]
    for name, owner in (("a", "one"), ("b", "one"), ("c", "two"), ("d", ""), ("e", "two")):
        engine.open(name, Sampling(), fresh, owner)
        run = engine._core.model_executor.execute_model
        counts: list[int] = []

        def count(scheduled, *args, run=run, counts=counts, **kwargs):
            counts.append(scheduled.total_num_scheduled_tokens)
            return run(scheduled, *args, **kwargs)

        engine._core.model_executor.execute_model = count
        engine.step([StepInput(name, fresh)])
        engine._core.model_executor.execute_model = run
        computed.append(sum(counts))
        if name == "e":
            engine.fork("e", "f", 280, Sampling())
            engine.rollback("e", 270)
            assert {engine._sessions[held].request.cache_salt for held in "ef"} == {"two"}
        else:
            engine.close(name)
    assert computed == [300, 300 - 256, 300, 300, 300 - 256]


def test_a_refused_call_changes_nothing(engine) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", PROMPT)])
    calls = [
        lambda: engine.open("a", Sampling()),
        lambda: engine.close("b"),
        lambda: engine.rollback("a", len(PROMPT) + 1),
        lambda: engine.fork("a", "b", len(PROMPT) + 1, Sampling()),
        lambda: engine.step([StepInput("a", [1]), StepInput("b", [1])]),
        lambda: engine.step([StepInput("a", [1]), StepInput("a", [1])]),
        lambda: engine.step([StepInput("a", [1] * 2041)]),
        lambda: engine.step([StepInput("a", [4096])]),
        lambda: engine.step([StepInput("a", [1] * 40, drafts=39)]),
    ]
    for call in calls:
        with pytest.raises(EngineError):
            call()
        engine.audit({"a": len(PROMPT)})
    engine.check_integrity()


def test_out_of_blocks_refuses_and_changes_nothing(engine) -> None:
    cached: dict[str, int] = {}

    def fill() -> None:
        for number in range(100):
            name = f"m{number}"
            engine.open(name, Sampling())
            engine.step([StepInput(name, [(i * 31 + number) % 4000 for i in range(2000)])])
            cached[name] = 2000

    with pytest.raises(OutOfKvMemory, match="KV blocks are needed"):
        fill()
    assert len(cached) == 6
    engine.close("m6")
    engine.audit(cached)
    engine.close("m0")
    engine.open("last", Sampling())
    engine.step([StepInput("last", [5] * 2000)])


@pytest.mark.parametrize(
    ("expected", "message"),
    [({}, "unknown sessions"), ({"a": 7}, "caches 8 tokens of a"), ({"a": 8, "c": 1}, "c")],
)
def test_an_audit_finds_what_differs(engine, expected: dict[str, int], message: str) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", PROMPT)])
    with pytest.raises(EngineError, match=message):
        engine.audit(expected)


@pytest.mark.parametrize("cached", [40, 200])
def test_damaged_kv_is_found(engine, cached: int) -> None:
    engine.open("a", Sampling())
    engine.step([StepInput("a", LONG[:cached])])
    engine.check_integrity()
    block = engine._scheduler.blocks_held(engine._sessions["a"].request)[0][0]

    def damage(worker) -> None:
        cache = worker.model_runner.kv_caches[1]
        worker.kept = cache[block].clone()
        cache[block] *= 1.01

    def mend(worker) -> None:
        worker.model_runner.kv_caches[1][block] = worker.kept

    engine.core.collective_rpc(damage)
    with pytest.raises(EngineError, match="Cached KV differs"):
        engine.check_integrity()
    engine.core.collective_rpc(mend)
    engine.check_integrity()


def test_a_failed_step_loses_the_engine(engine) -> None:
    engine.open("a", Sampling())

    def break_runner(worker) -> None:
        def fail(*args, **kwargs):
            raise RuntimeError("device is gone")

        worker.model_runner.execute_model = fail

    def mend_runner(worker) -> None:
        del worker.model_runner.execute_model

    engine.core.collective_rpc(break_runner)
    for _ in range(2):
        with pytest.raises(EngineLost, match="device is gone"):
            engine.step([StepInput("a", PROMPT)])
    engine.core.collective_rpc(mend_runner)
    engine._lost = ""


def test_this_vllm_has_every_function() -> None:
    assert changed_functions() == []


def test_logits_that_are_not_finite_name_their_session(engine, own) -> None:
    """The others go on as if nothing had been."""
    wanted = decode(own, [PROMPT, LONG], 6)
    for name, prompt in (("a", PROMPT), ("b", LONG)):
        engine.open(name, Sampling(), prompt)
        engine.step([StepInput(name, prompt[:-1], needs_logits=False)])
    inputs = [StepInput("a", PROMPT[-1:]), StepInput("b", LONG[-1:])]
    spoiled = engine._sessions["b"].request.request_id

    def spoil(worker) -> None:
        rows = worker._wispprof_rows
        decide = rows.decide

        def decide_spoiled(logits, counts):
            rows.decide = decide
            logits[worker.model_runner.input_batch.req_ids.index(spoiled)] = float("nan")
            return decide(logits, counts)

        rows.decide = decide_spoiled

    engine.core.collective_rpc(spoil)
    with pytest.raises(InputRefused, match="not finite") as refused:
        engine.step(inputs)
    assert refused.value.session == "b"
    engine.audit({"a": len(PROMPT) - 1, "b": len(LONG) - 1})
    assert [continuation(engine, n, p, 6) for n, p in (("a", PROMPT), ("b", LONG))] == wanted
    engine.check_integrity()


def test_vllm_s_own_metrics_are_told(engine) -> None:
    engine.open("a", Sampling())
    engine.open("b", Sampling())
    for name in ("a", "b"):
        engine.step([StepInput(name, LONG)])
    lines = engine.metrics_text().decode().splitlines()
    [running] = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    assert running.endswith(" 2.0")
    assert 'model_name="target"' in running
    assert all(line.startswith(("#", "vllm:")) for line in lines)


def test_doctor_says_what_the_target_runs_on(served, engine, monkeypatch) -> None:
    loaded = LoadedEngine(engine, served[1], read_tokenizer(Path(TARGET)))
    monkeypatch.setattr(vllm_checks, "load_vllm", lambda context: loaded)
    context = DoctorContext(engine="vllm")
    found = {one.check: one for one in examine(context, (vllm, vllm_target, models, tokenizers))}
    assert {one.status for one in found.values()} == {"ok"}, found
    assert found["vllm"].message.startswith("vLLM 0.32.0, tested")
    for part in ("target in float32 on cpu", "CPU_ATTN", "eager", "blocks of 128"):
        assert part in found["vllm target"].message
