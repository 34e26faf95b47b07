"""What a device uses is dealt to the requests that ran meanwhile, joule for joule."""

from __future__ import annotations

import pytest
from fake_pair import fake_runtime

from wispprof.edge.edge_runtime import Prompt
from wispprof.edge.energy_shares import EnergyShares
from wispprof.edge.request_stats import RequestStats
from wispprof.hardware import EnergyMeter, EnergyReading
from wispprof.sessions.draft_buffer import CommitEffect
from wispprof.types import Sampling


class Counter:
    """A meter of a device that has used :attr:`used` joules by now. ``deaf`` from some reading on."""

    sensor = "counter"

    def __init__(self) -> None:
        self.used = 0.0
        self.deaf = False
        self._begun: float | None = None

    def begin(self) -> None:
        assert self._begun is None, "one window at a time"
        self._begun = self.used

    def end(self) -> EnergyReading:
        assert self._begun is not None
        joules, self._begun = self.used - self._begun, None
        return EnergyReading(None if self.deaf else joules, 1.0, self.sensor)


def test_requests_side_by_side_pay_the_same_and_nothing_is_lost() -> None:
    meter = Counter()
    shares = EnergyShares(meter)
    meter.used = 5.0  # nobody's
    with shares.share() as first:
        meter.used += 4.0
        with shares.share() as second:
            meter.used += 6.0
        meter.used += 1.0
    meter.used += 9.0  # nobody's
    with shares.share() as third:
        meter.used += 2.0
    assert first.energy_j == pytest.approx(4.0 + 3.0 + 1.0)
    assert second.energy_j == pytest.approx(3.0)
    assert third.energy_j == pytest.approx(2.0)


def test_a_request_that_fails_leaves_the_others_their_windows() -> None:
    meter = Counter()
    shares = EnergyShares(meter)

    def fails() -> None:
        with shares.share():
            meter.used += 2.0
            raise KeyError

    with shares.share() as first:
        with pytest.raises(KeyError):
            fails()
        meter.used += 3.0
    assert first.energy_j == pytest.approx(4.0)


def test_no_sensor_means_no_figure() -> None:
    shares = EnergyShares(EnergyMeter())
    with shares.share() as one:
        pass
    assert one.energy_j is None
    meter = Counter()
    shares = EnergyShares(meter)
    with shares.share() as early:
        meter.used += 1.0
        with shares.share() as late:
            meter.deaf = True
        meter.deaf = False
    assert early.energy_j is None  # half a figure is none
    assert late.energy_j is None


async def test_an_answer_tells_its_energy() -> None:
    async with fake_runtime() as runtime:
        meter = Counter()
        runtime.device.energy = EnergyShares(meter)
        reply = runtime.reply(Prompt((1, 2, 3), 12, Sampling()))
        async for _ in reply.text():
            meter.used += 0.5
        assert reply.stats.energy_j == pytest.approx(meter.used)
        assert reply.stats.summary()["energy_j_per_token"] == pytest.approx(meter.used / 12)
        assert "J/token" in reply.stats.line()
        silent = runtime.reply(Prompt((1, 2, 3), 12, Sampling()))
        runtime.device.energy = EnergyShares(EnergyMeter())
        async for _ in silent.text():
            pass
        assert silent.stats.summary()["energy_j_per_token"] is None
        assert "J/token" not in silent.stats.line()


def test_acceptance_in_vllms_form() -> None:
    stats = RequestStats()
    assert stats.speculative_decoding() is None
    stats.commit(CommitEffect((1,)), 1.0, 0)  # the first token counts no round
    for drafted, accepted in ((4, 4), (4, 0), (2, 1), (0, 0), (4, 2)):
        effect = CommitEffect((1,) * (accepted + 1), accepted=accepted)
        stats.commit(effect, 2.0, drafted)
    assert stats.speculative_decoding() == {
        "mean_acceptance_length": 1.0 + 7 / 4,
        "draft_acceptance_rate": 7 / 14,
        "acceptance_histogram": [1, 1, 1, 0, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 7,
        "num_draft_tokens": 14,
        "num_spec_tokens": 4,
    }
