"""Loads, links, devices, acceptance sources and costs of the simulator, each by itself."""

from __future__ import annotations

import math
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from wispprof.artifacts.rows import AcceptanceTrace, EdgeRow, TracePath
from wispprof.errors import ArtifactDamaged, ArtifactMissing, ProfileError
from wispprof.policies.controllers import ConfidenceAcceptance
from wispprof.policies.cost_model import price_batches
from wispprof.policies.linear_cost import LinearCost
from wispprof.settings.shared_settings import LinkModel
from wispprof.simulation.arrivals import Bursts, Lengths, Poisson, Replay, Request
from wispprof.simulation.devices import DeviceProfile, Link
from wispprof.simulation.request_traces import read_requests
from wispprof.simulation.scenario import pick
from wispprof.simulation.step_costs import KvOffload, SimulatedStepTimes, WithoutPrefixCache
from wispprof.simulation.synthetic_acceptance import SyntheticAcceptance
from wispprof.simulation.trace_replay import MemoPredictor, TraceAcceptance
from wispprof.types import BatchShape, Sampling

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
"""
MOONCAKE = """{"timestamp": 500, "input_length": 12, "output_length": 3, "hash_ids": [1]}
{"timestamp": 2500, "input_length": 20, "output_length": 9, "hash_ids": [2]}
"""
SECONDS = "".join(f'{{"timestamp": {n * 5.25}, "input_length": 12, "output_length": 3}}\n' for n in range(21))


# --- loads ---


def test_azure_traces_are_read_and_sorted(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(AZURE)
    first, second = read_requests(file)
    assert first == Request(0.0, 4808, 10)
    assert second[1:3] == (3180, 8)
    assert second.time_ms == pytest.approx(52.0, abs=0.1)


def test_azure_times_without_a_zone_are_utc_wherever_they_are_read(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "azure.csv"
    rows = [
        "2024-05-10 00:00:00.009930+00:00,1,2",
        "2024-05-10 00:00:05+00:00,1,2",
        "2024-05-10 00:00:06,1,2",
    ]
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    for zone in ("UTC", "America/Los_Angeles"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert [r.time_ms for r in read_requests(file)] == pytest.approx([0.0, 4990.07, 5990.07])
    monkeypatch.undo()
    time.tzset()


def test_mooncake_traces_are_read_and_replayed_faster(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.jsonl"
    file.write_text(MOONCAKE)
    recorded = read_requests(file)
    assert recorded == (Request(0.0, 12, 3, blocks=(1,)), Request(2000.0, 20, 9, blocks=(2,)))
    fast = list(Replay(recorded, speed=4.0, max_prompt=15).requests(Random(0), 1e9))
    assert [r[:3] for r in fast] == [(0.0, 12, 3), (500.0, 15, 9)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (AZURE + "yesterday,1,2\n", "line 4"),
        (AZURE + "2023-11-16 18:17:05,-1,2\n", "line 4"),
        ("a,b\n1,2\n", "line 1"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3"),
        (MOONCAKE + "{torn", "line 3"),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 1, "output_length": 1}', "line 3"),
        (SECONDS, "200 requests/s"),
        (MOONCAKE + "[" * 100_000, "line 3"),
        ("", "line 1"),
    ],
)
def test_a_damaged_trace_names_its_line(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(ArtifactDamaged, match=line):
        read_requests(file)


def test_a_missing_trace_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing):
        read_requests(tmp_path / "none.csv")


def test_poisson_has_its_rate_and_bursts_theirs() -> None:
    plain = list(Poisson(20.0).requests(Random(3), 100_000.0))
    assert len(plain) == pytest.approx(2000, rel=0.08)
    bursts = Bursts(5.0, 50.0, every_s=10.0, burst_s=2.0)
    times = [r.time_ms for r in bursts.requests(Random(3), 100_000.0)]
    assert times == sorted(times)
    inside = sum(bursts.rate(t) == 50.0 for t in times)
    assert inside == pytest.approx(1000, rel=0.1)
    assert len(times) - inside == pytest.approx(400, rel=0.15)


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0, 2), st.integers(0, 99))
def test_lengths_stay_legal(prompt: int, output: int, sigma: float, seed: int) -> None:
    p, o = Lengths(prompt, output, sigma, sigma, max_tokens=2048).draw(Random(seed))
    assert 1 <= p <= 2048
    assert 2 <= o <= 2048


def test_any_prefix_of_a_fleet_keeps_the_mix() -> None:
    mix = (("a", 1.0), ("b", 3.0))
    for count in (40, 400):
        share = sum(pick(mix, i, 0.6180339887) == "a" for i in range(count)) / count
        assert share == pytest.approx(0.25, abs=0.05)


# --- links ---


@given(
    st.floats(0, 200),
    st.floats(0, 50),
    st.floats(0, 0.5),
    st.lists(st.tuples(st.floats(0, 30), st.integers(50, 5000)), min_size=1, max_size=30),
)
@settings(max_examples=50)
def test_frames_stay_in_order_and_never_beat_light(
    rtt: float, jitter: float, loss: float, frames: list[tuple[float, int]]
) -> None:
    link = Link(LinkModel(rtt, jitter, loss, up_mbps=1.0), Random(1))
    now = last = 0.0
    for pause, size in frames:
        now += pause
        at = link.up(now, size)
        assert at >= now + rtt / 2 + size * 8 / 1000 - 1e-9
        assert at >= last
        last = at


def test_the_mean_round_trip_is_what_frames_take() -> None:
    profile = LinkModel(30.0, jitter_ms=4.0, loss=0.05)
    total, rounds = 0.0, 20_000
    link, now = Link(profile, Random(2)), 0.0
    for _ in range(rounds):
        now += 10_000.0  # far apart: no frame waits for another
        up = link.up(now, 0)
        total += link.down(up, 0) - now
    assert total / rounds == pytest.approx(profile.mean_rtt_ms, rel=0.05)


def test_impossible_links_are_refused() -> None:
    with pytest.raises(ValueError, match="loss"):
        LinkModel(10.0, loss=1.0)


# --- devices ---


def test_a_device_from_its_profile_rows() -> None:
    rows = [
        EdgeRow(f"s{c}", "draft_step", c, (10.0 + c / 100.0,) * 3, energy_j=0.05) for c in (0, 100, 400, 800)
    ]
    rows.append(EdgeRow("p", "prefill", 0, (128.0,), tokens=256))
    rows.append(EdgeRow("c", "controller", 0, (0.02,)))
    device = DeviceProfile.from_rows("d", rows)
    assert device.step_ms(500) == pytest.approx(15.02)
    assert device.prefill_ms_per_token == pytest.approx(0.5)
    assert device.draft_w > 0
    assert device.resuming_ms(99.0) == 0.0
    rows.append(EdgeRow("r", "round", 400, (62.0,), tokens=4, rested_ms=20.0))
    device = DeviceProfile.from_rows("d", rows)
    assert device.resume_ms == pytest.approx(62.0 - 4 * 14.0)
    assert device.resuming_ms(99.0) == device.resume_ms
    assert device.resuming_ms(0.0) == 0.0


def test_a_profile_without_draft_steps_is_refused() -> None:
    with pytest.raises(ProfileError, match="draft steps"):
        DeviceProfile.from_rows("d", [])


# --- acceptance ---


def cum_acceptance(acceptance: float, concentration: float, persistence: float, depth: int) -> list[float]:
    """P(first j + 1 proposals accepted): a run of r positions of equal ``q`` has Beta's r-th moment."""
    a, moments, accepted = acceptance * concentration, [1.0], [1.0]
    for r in range(depth):
        moments.append(moments[-1] * (a + r) / (concentration + r))
    for n in range(1, depth + 1):
        # The first run has length r < n and then a fresh q begins, or it covers all n.
        total = persistence ** (n - 1) * moments[n]
        for r in range(1, n):
            total += persistence ** (r - 1) * (1 - persistence) * moments[r] * accepted[n - r]
        accepted.append(total)
    return accepted[1:]


@pytest.mark.parametrize("persistence", [0.0, 0.6, 0.9])
def test_the_synthetic_source_has_the_acceptance_it_states(persistence: float) -> None:
    source = SyntheticAcceptance(0.7, concentration=2.0, persistence=persistence)
    output = source.output((1, 2), 10, 60_000)
    counts = np.zeros(5)
    for start in range(0, 59_000, 7):
        output.rollback(10)
        output.extend([1] * start)
        ahead = output.ahead(5)
        counts[:ahead] += 1
    measured = counts / len(range(0, 59_000, 7))
    assert measured == pytest.approx(cum_acceptance(0.7, 2.0, persistence, 5), abs=0.03)


def test_a_better_predictor_ranks_better_and_stays_calibrated() -> None:
    blurred = []
    for noise in (0.0, 1.0, 4.0):
        drawn = SyntheticAcceptance(0.75, noise=noise).output((5,), 1, 20_000)
        right = [d.token == t for d, t in zip(drawn.proposals, drawn.path, strict=True)]
        blurred.append(roc_auc_score(right, [p.features.confidence for p in drawn.proposals]))
    assert blurred[0] > blurred[1] > blurred[2] > 0.5
    source = SyntheticAcceptance(0.75, noise=1.0)
    output = source.output((5,), 1, 40_000)
    sure = sum(p.features.confidence for p in output.proposals) / 40_000
    share = sum(d.token == t for d, t in zip(output.proposals, output.path, strict=True)) / 40_000
    assert sure == pytest.approx(share, abs=0.01)


def _trace(depth: int = 4, length: int = 40) -> AcceptanceTrace:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(3):
        path = rng.integers(10, 100, length)
        drafts = np.zeros((length, depth), dtype=np.int64)
        accepted = np.zeros(length, dtype=np.int64)
        # A draft that is wrong exactly at every fifth position, and from there on.
        for row in range(length):
            wrong = False
            for j in range(depth):
                place = row + j
                wrong = wrong or place % 5 == number
                truth = int(path[place]) if place < length else 0
                drafts[row, j] = 1000 + place if wrong or place >= length else truth
            hits = drafts[row] == [int(path[row + j]) if row + j < length else -1 for j in range(depth)]
            accepted[row] = int(np.cumprod(hits).sum())
        features = rng.random((length, depth, 4)).astype(np.float32)
        # Within one text the features of a position do not depend on where the draft began.
        paths.append(TracePath((1, 2, number), tuple(map(int, path)), drafts, features, accepted))
    return AcceptanceTrace("t", "d", "hash", Sampling(), tuple(paths))


def test_a_replayed_output_proposes_what_was_recorded() -> None:
    source = TraceAcceptance(_trace(), ConfidenceAcceptance())
    output = source.output((3,), 7, 100)
    assert len(output.path) == 100
    output.open([0] * 7, Sampling())
    hits = 0
    for place in range(60):
        ahead = output.ahead(4)
        drafted = [output.draft() for _ in range(4)]
        want = list(output.path[place : place + 4])
        agreed = 0
        while agreed < 4 and drafted[agreed].token == want[agreed]:
            agreed += 1
        assert agreed == ahead
        hits += agreed
        output.rollback(7 + place)
        output.extend([output.path[place]])
        assert output.length == 7 + place + 1
    assert hits > 60


def test_a_trace_too_short_for_its_depth_is_refused() -> None:
    with pytest.raises(ProfileError, match="longer"):
        TraceAcceptance(_trace(depth=4, length=4), ConfidenceAcceptance())


def test_outputs_depend_on_the_seed_alone() -> None:
    for source in (SyntheticAcceptance(0.6), TraceAcceptance(_trace(), ConfidenceAcceptance())):
        one, same, other = (source.output(s, 5, 50) for s in ((1, 2), (1, 2), (2, 1)))
        first = [one.draft() for _ in range(20)]
        assert first == [same.draft() for _ in range(20)]
        assert first != [other.draft() for _ in range(20)]


def test_memo_asks_once() -> None:
    asked = []

    class Counting(ConfidenceAcceptance):
        def acceptance_prob(self, features, depth):  # type: ignore[no-untyped-def]
            asked.append(depth)
            return super().acceptance_prob(features, depth)

    memo = MemoPredictor(Counting())
    token = SyntheticAcceptance(0.6).output((1,), 1, 5).draft()
    assert {memo.acceptance_prob(token.features, 2) for _ in range(5)} == {
        ConfidenceAcceptance().acceptance_prob(token.features, 2)
    }
    assert asked == [2]


def test_rolling_back_further_than_held_is_refused() -> None:
    output = SyntheticAcceptance(0.6).output((1,), 3, 5)
    with pytest.raises(ValueError, match="roll"):
        output.rollback(4)


# --- costs ---

ITEMS = st.lists(st.tuples(st.integers(1, 64), st.integers(0, 4000), st.booleans()), min_size=1, max_size=12)


@given(ITEMS, st.tuples(st.integers(1, 64), st.integers(0, 4000), st.booleans()))
def test_costs_never_fall_and_add_up(items: list[tuple[int, int, bool]], more: tuple[int, int, bool]) -> None:
    for cost in (
        LinearCost(10.0, 0.2, 1e-4, 1e-6, 0.05, floor_rows=8),
        WithoutPrefixCache(LinearCost(10.0, 0.2)),
    ):
        batch = cost.start()
        assert batch.p50_ms == 0
        for item in items:
            batch = batch.add(*item)
        p50, bound = cost.predict(BatchShape.of(items))
        assert (batch.p50_ms, batch.bound_ms) == pytest.approx((p50, bound))
        assert batch.add(*more).p50_ms >= batch.p50_ms
        assert bound >= p50


def test_drawn_step_times_keep_the_stated_coverage() -> None:
    cost = LinearCost(10.0, 0.2, bound_ratio=1.2, covers=0.9)
    times = SimulatedStepTimes(cost, None, Random(0))
    items = [(3, 100, False)] * 5
    bound = cost.predict(BatchShape.of(items))[1]
    drawn = [times.sample(items)[1] for _ in range(4000)]
    assert sum(d <= bound for d in drawn) / 4000 == pytest.approx(0.9, abs=0.02)
    assert float(np.median(drawn)) == pytest.approx(times.sample(items)[0], rel=0.01)
    exact = SimulatedStepTimes(cost, 0.0, Random(0)).sample(items)
    assert exact[0] == exact[1]


def test_nonsense_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        LinearCost(-1.0)
    assert math.isfinite(LinearCost(1.0).coverage)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9000)), min_size=1, max_size=6),
    st.sampled_from([0, 24]),
)
def test_linear_costs_price_many_batches_as_they_price_one(items: list[tuple[int, int]], floor: int) -> None:
    cost = LinearCost(18.0, row_ms=0.2, kv_ms=1e-4, pair_ms=1e-6, item_ms=0.05, floor_rows=floor)
    new, cached = (np.array(column) for column in zip(*items, strict=True))
    batch = cost.start().add(3, 700)
    alone = [batch.add(*item) for item in items]
    p50, bound = batch.add_many(new, cached)  # type: ignore[attr-defined]
    assert np.allclose(p50, [one.p50_ms for one in alone])
    assert np.allclose(bound, [one.bound_ms for one in alone])
    in_turn = batch
    for item in items:
        in_turn = in_turn.add(*item)
    together = batch.add_all(new.tolist(), cached.tolist())  # type: ignore[attr-defined]
    assert together.p50_ms == in_turn.p50_ms
    inside = np.tril(np.ones((len(items), len(items)), dtype=np.int64))
    p50, bound = price_batches(cost, inside * new, cached)
    for count in range(1, len(items) + 1):
        whole = cost.predict(BatchShape.of(items[:count]))
        assert (p50[count - 1], bound[count - 1]) == pytest.approx(whole)


# --- caches in host memory ---


def test_the_least_recently_used_cache_leaves() -> None:
    small = KvOffload(100)
    assert small.take([("a", 0, 40), ("b", 0, 40)]) == 0
    assert small.take([("a", 40, 1)]) == 0
    assert small.take([("c", 0, 50)]) == 0  # b leaves
    assert small.take([("b", 40, 1), ("c", 50, 1)]) == 40  # and comes back, a leaves
    assert small.used == 41 + 51
    small.drop("b")
    small.drop("nobody")
    assert small.used == 51
    assert small.take([("a", 41, 1)]) == 41


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.integers(1, 9)),
            max_size=4,
            unique_by=lambda member: member[0],
        ),
        max_size=30,
    )
)
def test_the_card_never_holds_more_than_fits(steps: list[list[tuple[str, int, int]]]) -> None:
    small, large = KvOffload(80), KvOffload(10**6)
    for step in steps:
        assert 0 <= large.take(step) <= small.take(step) <= sum(cached for _, cached, _ in step)
        assert small.used <= 80
