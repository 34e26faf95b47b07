"""The generation loop in virtual time: the text never changes, whatever is drafted, lost or late."""

from __future__ import annotations

import asyncio

import pytest
from fake_pair import drafting, edge, in_process, linear_cost, plain, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.edge import Generation, RequestStats
from wispprof.errors import ProtocolError, ServerUnreachable
from wispprof.protocol import Commit
from wispprof.settings.shared_settings import LinkModel, LinkSettings
from wispprof.testing.link_emulator import emulate_link
from wispprof.testing.virtual_time import run_virtual
from wispprof.types import Sampling

PROMPTS = [(n, n + 1, 7) for n in range(16)]


async def fleet(policy: str, sessions: int, **options: object) -> list[tuple[Generation, RequestStats]]:
    """``sessions`` generations at once over one link; each with its result."""
    async with in_process(policy) as server, edge(server.connect) as client:
        made = [drafting(client, prompt, **options) for prompt in PROMPTS[:sessions]]  # type: ignore[arg-type]
        stats = await asyncio.gather(*(generation.run() for generation in made))
        assert server.engine.sessions == ()  # type: ignore[attr-defined]
        return list(zip(made, stats, strict=True))


@pytest.mark.parametrize("policy", ["fcfs", "wisp", "wispprof"])
@pytest.mark.parametrize("k", [0, 1, 4, 8])
@pytest.mark.parametrize("proactive", [0, 6])
def test_split_text_is_the_targets_own(policy: str, k: int, proactive: int) -> None:
    for generation, stats in run_virtual(fleet(policy, 5, k=k, proactive=proactive)):
        assert list(generation.output) == truth(generation.request.tokens, 48)
        assert stats.finished == "length"
        assert stats.tokens == 48


def test_a_corrupted_commit_is_noticed() -> None:
    """Negative control: the comparison above does fail when one committed token is wrong."""

    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            generation = drafting(client, PROMPTS[0])
            decide = server.engine.step

            def corrupt(feeds):  # type: ignore[no-untyped-def]
                outcomes = decide(feeds)
                if generation.buffer.committed_len > 20:
                    outcomes = [o._replace(tokens=(*o.tokens[:-1], o.tokens[-1] ^ 1)) for o in outcomes]
                return outcomes

            server.engine.step = corrupt  # type: ignore[method-assign]
            await generation.run()
            assert list(generation.output) != truth(PROMPTS[0], 48)

    run_virtual(main())


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"])
def test_sampled_text_depends_on_the_seed_alone(policy: str) -> None:
    sampling = Sampling(0.8, 0, 0.9, seed=11)
    texts = {
        generation.output
        for k in (0, 1, 4, 8)
        for generation, _ in run_virtual(fleet(policy, 1, k=k, sampling=sampling))
    }
    assert texts == {tuple(truth(PROMPTS[0], 48, sampling))}
    other = run_virtual(fleet(policy, 1, sampling=Sampling(0.8, 0, 0.9, seed=12)))
    assert other[0][0].output not in texts


def test_a_server_only_session_sends_nothing_but_its_opening() -> None:
    async def main() -> RequestStats:
        async with in_process() as server, edge(server.connect) as client:
            generation = plain(client, PROMPTS[0])
            stats = await generation.run()
            assert list(generation.output) == truth(PROMPTS[0], 48)
            assert generation.traffic.up_frames == 1
            return stats

    stats = run_virtual(main())
    assert stats.drafted == 0
    assert stats.accepted_per_round == 0.0


def test_accounting_adds_up() -> None:
    for _, stats in run_virtual(fleet("wispprof", 3, accuracy=0.7)):
        # Every draft is committed, dropped, or overtaken by a commit that agreed with it.
        assert stats.drafted == stats.accepted + stats.matched + stats.dropped
        assert stats.draft_ms == pytest.approx(5.0 * stats.drafted)
        assert stats.wasted_ms <= stats.dropped_ms <= stats.draft_ms
        assert stats.accepted_by_position[0] <= stats.offered_by_position[0] <= stats.rounds
        assert sum(stats.accepted_by_position) == stats.accepted
        assert sum(stats.offered_by_position) == stats.verified_drafts


@given(
    accuracy=st.floats(0.0, 1.0),
    draft_ms=st.floats(0.5, 60.0),
    proactive=st.integers(0, 8),
    k=st.integers(0, 8),
    policy=st.sampled_from(["fcfs", "wisp", "wispprof"]),
    cuts=st.lists(st.floats(0.01, 0.6), max_size=3),
    end=st.sampled_from(["full", "stop", "cancel"]),
)
@settings(max_examples=40, deadline=None)
def test_each_draft_is_accepted_matched_or_dropped(
    accuracy: float, draft_ms: float, proactive: int, k: int, policy: str, cuts: list[float], end: str
) -> None:
    """Over random live runs: links that are cut, drafting that is switched, requests that are cancelled."""

    async def main() -> RequestStats:
        async with in_process(policy) as server, edge(server.connect, backoff_ms=5.0) as client:
            generation = drafting(
                client, PROMPTS[0], max_new=80, k=k, accuracy=accuracy, draft_ms=draft_ms, proactive=proactive
            )
            task = asyncio.create_task(generation.run())
            for number, pause_s in enumerate(cuts):
                await asyncio.sleep(pause_s)
                server.cut()
                if end == "stop":
                    generation.set_drafting(bool(number % 2))
            if end == "cancel":
                await asyncio.sleep(0.2)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return generation.stats

    stats = run_virtual(main())
    assert stats.drafted == stats.accepted + stats.matched + stats.dropped
    assert min(stats.accepted, stats.matched, stats.dropped) >= 0


def test_proactive_drafting_gains_and_never_lowers_acceptance() -> None:
    def run(proactive: int, rtt: float) -> RequestStats:
        async def main() -> RequestStats:
            async with in_process() as server:
                connect = emulate_link(server.connect, LinkSettings(LinkModel(rtt_ms=rtt)))
                async with edge(connect) as client:
                    generation = drafting(client, PROMPTS[1], max_new=200, proactive=proactive, accuracy=0.9)
                    return await generation.run()

        return run_virtual(main())

    for rtt in (5.0, 50.0):
        off, on = run(0, rtt), run(8, rtt)
        assert on.tokens_per_s > off.tokens_per_s
        assert on.proactive_hits > 0
        assert off.proactive_guesses == 0
        assert on.accepted_per_round >= 0.95 * off.accepted_per_round


def test_a_stream_is_never_slower_than_server_only_serving() -> None:
    def speed(drafts: bool, rtt: float, draft_ms: float) -> float:
        async def main() -> RequestStats:
            async with in_process("wispprof") as server:
                connect = emulate_link(server.connect, LinkSettings(LinkModel(rtt_ms=rtt)))
                async with edge(connect) as client:
                    if drafts:
                        made = drafting(
                            client,
                            PROMPTS[2],
                            max_new=160,
                            controller="wispprof",
                            draft_ms=draft_ms,
                        )
                    else:
                        made = plain(client, PROMPTS[2], 160)
                    return await made.run()

        return run_virtual(main()).tokens_per_s

    for rtt in (5.0, 100.0):
        for draft_ms in (2.0, 60.0):
            assert speed(True, rtt, draft_ms) >= 0.97 * speed(False, rtt, draft_ms)
    assert speed(True, 5.0, 2.0) > 1.3 * speed(False, 5.0, 2.0)


def test_a_draft_step_costs_its_time() -> None:
    slow = run_virtual(fleet("fcfs", 1, draft_ms=50.0))[0][1]
    fast = run_virtual(fleet("fcfs", 1, draft_ms=1.0))[0][1]
    assert slow.tokens_per_s < fast.tokens_per_s
    assert slow.accepted_per_round == fast.accepted_per_round


def test_drafting_never_passes_the_last_useful_position() -> None:
    for _, stats in run_virtual(fleet("fcfs", 2, max_new=3, k=8, proactive=8)):
        assert stats.tokens == 3
        assert stats.drafted <= 2 + 1  # one step may be under way when a commit overtakes it


def test_slack_falls_with_the_link() -> None:
    seen: dict[float, float] = {}
    for rtt in (0.0, 60.0):

        async def main(rtt: float = rtt) -> None:
            async with in_process() as server:
                connect = emulate_link(server.connect, LinkSettings(LinkModel(rtt_ms=rtt)))
                async with edge(connect) as client:
                    generation = drafting(client, PROMPTS[0], accuracy=1.0)
                    slacks: list[float] = []
                    send = client.draft

                    def spy(frame):  # type: ignore[no-untyped-def]
                        slacks.append(frame.slack_ms)
                        return send(frame)

                    client.draft = spy  # type: ignore[method-assign]
                    await generation.run()
                    seen[rtt] = slacks[-2]

        run_virtual(main())
    assert seen[0.0] - seen[60.0] == pytest.approx(60.0, abs=12.0)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"])
def test_twenty_sessions_survive_a_killed_server(policy: str) -> None:
    async def main() -> None:
        async with in_process(policy) as server, edge(server.connect, ping_ms=200.0) as client:
            prompts = [(n, 3, 5) for n in range(20)]
            made = [drafting(client, p, max_new=128, k=3, proactive=4) for p in prompts]
            running = [asyncio.create_task(g.run()) for g in made]
            for _ in range(2):
                while not client.up:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.35)
                server.refuse = True
                server.cut()
                await asyncio.sleep(3.0)
                server.refuse = False
            stats = await asyncio.gather(*running)
            for prompt, generation, stat in zip(prompts, made, stats, strict=True):
                assert list(generation.output) == truth(prompt, 128)
                assert stat.reopened >= 1
            assert client.reconnects >= 2
            assert server.engine.sessions == ()  # type: ignore[attr-defined]

    run_virtual(main())


@pytest.mark.parametrize("policy", ["fcfs", "wispprof"])
@pytest.mark.parametrize(
    "link",
    [
        LinkSettings(LinkModel(30.0, 10.0), cut_every_ms=700.0),
        LinkSettings(LinkModel(30.0), stall_every_ms=5000.0, stall_ms=2000.0),
        LinkSettings(LinkModel(60.0, 20.0, loss=0.05, up_mbps=0.5)),
    ],
    ids=["cuts", "stalls", "loss"],
)
def test_bad_links_change_no_token(policy: str, link: LinkSettings) -> None:
    async def main() -> None:
        async with in_process(policy) as server, edge(emulate_link(server.connect, link)) as client:
            made = [drafting(client, p, max_new=200, k=3, proactive=4) for p in PROMPTS[:6]]
            await asyncio.gather(*(g.run() for g in made))
            for prompt, generation in zip(PROMPTS, made, strict=False):
                assert list(generation.output) == truth(prompt, 200)
            if link.cut_every_ms:
                assert client.reconnects >= 2

    run_virtual(main())


def test_without_a_server_there_is_one_clear_error() -> None:
    async def main() -> None:
        async with in_process() as server:
            server.refuse = True
            with pytest.raises(ServerUnreachable, match=r"No server for .* s"):
                async with edge(server.connect, give_up_ms=2000.0):
                    pass

    run_virtual(main())


def test_a_lost_server_ends_the_request_unless_the_draft_may_go_on() -> None:
    async def main(fallback: bool) -> tuple[Generation, list[bool]]:
        async with in_process() as server, edge(server.connect, give_up_ms=1500.0) as client:
            generation = drafting(client, PROMPTS[0], accuracy=0.5, fallback=fallback)
            marks: list[bool] = []
            async for chunk in generation.stream():
                marks.append(chunk.verified)
                if len(marks) == 4:
                    server.refuse = True
                    server.cut()
            return generation, marks

    with pytest.raises(ServerUnreachable):
        run_virtual(main(False))
    generation, marks = run_virtual(main(True))
    verified = marks.index(False)
    assert verified >= 4
    assert not any(marks[verified:])
    stats = generation.stats
    assert stats.tokens + stats.draft_only == 48
    assert stats.drafted == stats.accepted + stats.matched + stats.dropped + stats.draft_only
    # What was committed is the target's; only what is marked may differ.
    assert list(generation.output) == truth(PROMPTS[0], 48)[: stats.tokens]
    assert "UNVERIFIED" in stats.line()


def test_offline_from_the_start_falls_back_too() -> None:
    async def main() -> RequestStats:
        async with in_process() as server:
            server.refuse = True
            async with edge(server.connect, give_up_ms=500.0, offline_ok=True) as client:
                with pytest.raises(ServerUnreachable):
                    await drafting(client, PROMPTS[0]).run()
                return await drafting(client, PROMPTS[0], fallback=True).run()

    stats = run_virtual(main())
    assert (stats.tokens, stats.draft_only) == (0, 48)


def test_a_server_of_another_model_is_found_out_on_resuming() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            generation = drafting(client, PROMPTS[0])
            task = asyncio.create_task(generation.run())
            await asyncio.sleep(0.1)
            known = generation.buffer.committed_len
            frame = generation.opening()
            assert frame.generated == known - len(PROMPTS[0])
            wrong = [token ^ 1 for token in generation.buffer.committed[-2:]]
            server._connections[0].reply(Commit(0, 0, known, wrong, 1, 1, 0.0, 0.0))
            with pytest.raises(ProtocolError, match="contradicts"):
                await task
            assert client.bad_frames == 1

    run_virtual(main())


def test_cancelling_a_request_releases_its_session() -> None:
    async def main() -> None:
        async with in_process() as server, edge(server.connect) as client:
            generation = drafting(client, PROMPTS[0], max_new=400)
            async for _ in generation.stream():
                break
            task = asyncio.create_task(drafting(client, PROMPTS[1], max_new=400).run())
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.1)
            assert server.engine.sessions == ()  # type: ignore[attr-defined]

    run_virtual(main())


def test_bytes_per_token_stay_small() -> None:
    async def main() -> tuple[float, float]:
        async with (
            in_process(cost=linear_cost(20.0)) as server,
            edge(server.connect) as client,
        ):
            await asyncio.gather(*(drafting(client, p, max_new=64, accuracy=0.7).run() for p in PROMPTS[:4]))
            tokens = 4 * 64
            return client.traffic.up_bytes / tokens, client.traffic.down_bytes / tokens

    up, down = run_virtual(main())
    assert up <= 40
    assert down <= 40


def test_a_streams_bytes_per_token_stay_small() -> None:
    """A device four times as fast as the server's steps: a frame a draft would be 70 bytes up."""

    async def main() -> tuple[float, float, int, int]:
        cost = linear_cost(20.0)
        async with in_process("wispprof", cost) as server:
            connect = emulate_link(server.connect, LinkSettings(LinkModel(20.0)))
            async with edge(connect) as client:
                runs = [
                    drafting(client, p, max_new=64, accuracy=0.7, controller="wispprof") for p in PROMPTS[:4]
                ]
                await asyncio.gather(*(run.run() for run in runs))
                sent = sum(run.stats.sent for run in runs)
                frames = sum(run.traffic.up_frames for run in runs)
                up, down = client.traffic.up_bytes / 256, client.traffic.down_bytes / 256
                return up, down, sent, frames

    up, down, sent, frames = run_virtual(main())
    assert up <= 40
    assert down <= 40
    assert frames < sent / 1.5
