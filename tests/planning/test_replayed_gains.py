"""A plan's speeds of a single session are those of its trace's answers, served again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from fake_pair import hash_trace

from wispprof.artifacts import AcceptanceTrace
from wispprof.planning import make_plan
from wispprof.planning.draft_table import EdgeCosts, speed_curve
from wispprof.planning.replayed_gains import Gain, SampledAnswers, replayed_gains, sampled_answers
from wispprof.planning.session_speed import LoadedStepTimes, runs_of_trace
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.answer_replay import STREAM, UNDRAFTED, AnswerReplay, SessionSteps, rounds_of, total
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import BatchCost, StepTimeEstimator

CONTEXT = 200
DEVICE = DeviceProfile("device", draft_ms=6.0, resume_ms=2.0)


@dataclass(frozen=True)
class Batch(BatchCost):
    new: int = 0

    @property
    def p50_ms(self) -> float:
        return 18.0 + 2.0 * self.new if self.new else 0.0

    @property
    def bound_ms(self) -> float:
        return self.p50_ms

    def add(self, new: int, cached: int, prefill: bool = False) -> Batch:
        return Batch(self.new + new)


class Steps(StepTimeEstimator):
    """18 ms, and 2 ms for each token."""

    @property
    def coverage(self) -> float:
        return 0.95

    def start(self) -> Batch:
        return Batch()


def few(accuracy: float) -> AcceptanceTrace:
    return hash_trace(paths=6, length=40, depth=6, accuracy=accuracy)


def sampled(accuracy: float) -> SampledAnswers:
    sample = sampled_answers(few(accuracy))
    assert sample is not None
    return sample


@pytest.mark.parametrize("rtt_ms", [1.0, 40.0])
def test_a_session_alone_is_planned_as_it_is_served(rtt_ms: float) -> None:
    trace = few(0.8)
    settings = PlanSettings(rtts_ms=(rtt_ms,), slos=(4.0,), k_max=5, contexts=(CONTEXT,), max_sessions=4)
    plan = make_plan(Steps(), [DEVICE], trace, settings)
    steps = SessionSteps(lambda new: 18.0 + 2.0 * new, lambda prompt: 20.0)
    replay = AnswerReplay(AnswerReplay.of(trace), DEVICE, rtt_ms)

    def served(system: object) -> float:
        return total(replay.serve(system, steps)).later_tokens_per_s  # type: ignore[arg-type]

    by_mode = {row.mode: row for row in plan.draft if row.load_level == 0}
    rounds = [served(UNDRAFTED), *(served(rounds_of(k)) for k in range(1, 6))]
    assert by_mode["round"].by_k == pytest.approx(rounds)
    assert max(by_mode["stream"].by_k) == pytest.approx(served(STREAM))
    assert by_mode["round"].expected_tokens_per_s == pytest.approx(by_mode["round"].by_k[by_mode["round"].k])


def test_drafts_made_while_a_round_is_out_count() -> None:
    """With drafts that are always right, the next round is drafted while the last one is verified."""
    times = LoadedStepTimes(Steps(), CONTEXT)
    sure = replayed_gains(sampled(1.0), times, DEVICE, 40.0, "round", 4)
    assert all(gain.speed > 1.05 for gain in sure[1:])
    assert sure[4].speed > 1.3
    never = replayed_gains(sampled(0.0), times, DEVICE, 40.0, "round", 4)
    assert all(gain.speed < 1.05 for gain in never[1:])
    assert never[2].drafted > 2.0  # they are made all the same


def test_gains_scale_speeds_and_leave_steps() -> None:
    trace, times = few(0.8), LoadedStepTimes(Steps(), CONTEXT)
    mean, slow = runs_of_trace(trace)
    plain = EdgeCosts(DEVICE, 20.0, "round", mean, slow)
    scaled = EdgeCosts(DEVICE, 20.0, "round", mean, slow, tuple(Gain(1.5, 2.0) for _ in range(4)))
    before, after = speed_curve(times, 3, plain, 3), speed_curve(times, 3, scaled, 3)
    for one, other in zip(before.mean, after.mean, strict=True):
        assert other.tokens_per_ms == pytest.approx(1.5 * one.tokens_per_ms)
        assert other.commits / other.round_ms == pytest.approx(other.tokens_per_ms)
        assert other.drafted == pytest.approx(2.0 * one.drafted)
        assert (other.step_ms, other.rows) == (one.step_ms, one.rows)
    assert after.slow == pytest.approx([1.5 * speed for speed in before.slow])


def test_some_answers_stand_for_many() -> None:
    many = hash_trace(paths=40, length=30, depth=4)
    sample = sampled_answers(many)
    assert sample is not None
    assert len(sample.answers) == 8
    prompts = [sample.answers.lengths(0, number)[0] for number in range(8)]
    assert prompts == [len(path.prompt) for path in many.paths[::5]]
    short = hash_trace(paths=2, length=3, depth=4)
    assert sampled_answers(short) is None
