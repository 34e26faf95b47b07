"""Short KV memory: which sessions wait, which are evicted, and that the text stays right."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from raw_edge import edge

from wispprof.policies import ScheduledItem
from wispprof.server import ServerSession, running_server
from wispprof.server.kv_scheduler import schedule_kv
from wispprof.server.prefix_cache import PrefixCache
from wispprof.sessions.session_state import SessionState
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeDrafter, FakeEngine
from wispprof.types import Sampling, Slo


class NullListener:
    key = ""

    def committed(self, *_: object) -> None: ...

    def failed(self, *_: object) -> None: ...


def session(name: str, prompt: int, *, started: bool = False, seen_ms: float = 0.0) -> ServerSession:
    state = SessionState(name, list(range(prompt)), slo=Slo(1.0), max_new=50, max_context=500, now_ms=seen_ms)
    if started:
        step_input = state.step_input(ScheduledItem(name, prefill=prompt), seen_ms)
        from wispprof.types import VerifyResult

        state.apply(VerifyResult(step_input.session, 0, (1,)), seen_ms)
    return ServerSession(state, Sampling(), NullListener(), 0, seen_ms, opened=True)


def ready(one: ServerSession, now: float = 0.0) -> ServerSession:
    one.state.merge(0, one.state.committed_len, [], [], now, 100.0, 0.0)
    return one


def test_all_sessions_run_if_memory_suffices() -> None:
    sessions = [
        session("a", 10),
        ready(session("b", 5, started=True)),
        session("c", 5, started=True),
    ]
    plan = schedule_kv(sessions, 11, 0, 0.0, 1000.0)
    assert {one.name for one in plan.runnable} == {"a", "b", "c"}
    assert (plan.tokens_to_free, plan.waiting, plan.evict) == (0, 0, [])


def test_cached_prefixes_go_first_then_idle_sessions_then_new_ones_wait() -> None:
    idle, newcomer = session("idle", 40, started=True), session("new", 30, seen_ms=5000.0)
    plan = schedule_kv([idle, newcomer], 10, 25, 5000.0, 1000.0)
    assert (plan.tokens_to_free, plan.evict) == (20, [])
    plan = schedule_kv([idle, newcomer], 10, 5, 5000.0, 1000.0)
    assert (plan.tokens_to_free, plan.evict) == (5, [idle])
    assert newcomer in plan.runnable
    awake = session("awake", 40, started=True, seen_ms=4900.0)
    plan = schedule_kv([awake, newcomer], 10, 0, 5000.0, 1000.0)
    assert (plan.evict, plan.waiting) == ([], 1)
    assert newcomer not in plan.runnable


def test_the_session_with_the_latest_deadline_is_evicted_last() -> None:
    near, far = session("near", 20, started=True), session("far", 20, started=True)
    near.state.merge(0, near.state.committed_len, [], [], 0.0, 10.0, 0.0)
    far.state.merge(0, far.state.committed_len, [], [], 0.0, 900.0, 0.0)
    plan = schedule_kv([far, near], 1, 0, 0.0, 1000.0)
    assert plan.evict == [far]
    assert plan.runnable == [near]


def test_a_half_prefilled_prompt_yields_to_a_decoding_session() -> None:
    half, decoding = session("half", 40), ready(session("decoding", 20, started=True))
    half.state.adopted(15)
    plan = schedule_kv([half, decoding], 0, 0, 0.0, 1000.0)
    assert plan.evict == [half]
    assert plan.runnable == [decoding]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), max_size=12),
    st.integers(0, 120),
    st.integers(0, 60),
)
def test_scheduled_sessions_fit(kinds, free: int, kept: int) -> None:
    sessions = []
    for number, (prompt, started, round_) in enumerate(kinds):
        one = session(f"s{number}", prompt, started=started)
        sessions.append(ready(one) if started and round_ else one)
    plan = schedule_kv(sessions, free, kept, 0.0, 1000.0)
    assert len({one.name for one in plan.runnable}) == len(plan.runnable)
    assert not {id(one) for one in plan.runnable} & {id(one) for one in plan.evict}
    asking = [one for one in plan.runnable if one.state.ready]
    need = sum(one.state.prompt_left or 1 for one in asking)
    freed = free + plan.tokens_to_free + sum(one.state.cached for one in plan.evict)
    # One session is always let in, or nothing would ever end.
    assert need <= freed or len(asking) == 1


def test_the_prefix_cache_evicts_by_use_number_and_time() -> None:
    kept = PrefixCache(max_sessions=2, ttl_ms=100.0)
    assert kept.insert("tiny", "", [1], 0.0) == ["tiny"]
    assert kept.insert("a", "", list(range(10)), 0.0) == []
    assert kept.insert("b", "", list(range(20)), 1.0) == ["a"]
    assert kept.insert("c", "", [9] * 10, 2.0) == []
    found = kept.find("", [*range(15), 99, 99])
    assert found is not None
    assert (found.session, found.length, found.whole) == ("b", 15, False)
    assert kept.insert("d", "", [8] * 10, 3.0) == ["c"]
    assert kept.find("", [7, 7]) is None
    assert kept.pop_expired(101.5) == ["b"]
    assert kept.tokens == 10


async def test_more_sessions_than_memory_get_the_right_text() -> None:
    """40 sessions of up to 60 tokens in a cache of 300 wait, are evicted, and get the right text."""
    engine = FakeEngine(64, kv_tokens=300, max_context=128)
    for policy in ("fcfs", "wispprof"):
        settings = ServerSettings(policy=policy, admit="all", idle_evict_ms=5.0, prefill_chunk=16)
        async with running_server(settings, engine=engine, model=engine.served) as running:
            async with edge(running.split_url) as one:
                prompts = [[number % 64, *range(number)] for number in range(40)]
                found = await asyncio.gather(
                    *(
                        one.generate(n, prompt, 20, drafter=FakeDrafter(engine.target))
                        for n, prompt in enumerate(prompts)
                    )
                )
            assert list(found) == [engine.target.generate(prompt, 20) for prompt in prompts]
            while len(running.server.manager):
                await asyncio.sleep(0.001)
            await running.server.check_integrity()
        assert engine.kv_free == 300
