"""ConfigSpec's published choices from its formulas, and what a choice by objective must satisfy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wispprof.errors import PlanError
from wispprof.simulation.configspec import DraftOption, Verifier

SMALL_ALPHA = {2: 0.70, 5: 0.546, 6: 0.52, 8: 0.44}
LARGE_ALPHA = {2: 0.76, 5: 0.622}
SMALL = {"rpi4b": (4.1, 0.0), "rpi5": (14.4, 8.3), "jetson": (92.0, 43.6)}
LARGE = {"rpi4b": (0.72, 0.0), "rpi5": (1.8, 8.3), "jetson": (24.5, 54.0)}
LENGTHS = range(2, 11)
PRICE = 0.90e-6
VERIFIER = Verifier(0.5, PRICE)


def small(device: str) -> DraftOption:
    speed, power = SMALL[device]
    return DraftOption(f"1B-Instruct on {device}", speed, SMALL_ALPHA, power)


def large(device: str) -> DraftOption:
    speed, power = LARGE[device]
    return DraftOption(f"8B on {device}", speed, LARGE_ALPHA, power)


# K, G tokens/s, η thousand tokens/$, E J/token (None: not published)
PUBLISHED = [
    (small("rpi4b"), "goodput", 2, 2.44, 1334, None),
    (large("rpi4b"), "cost", 2, 0.77, 1401, None),
    (small("rpi5"), "goodput", 6, 4.50, 763, 0.84),
    (large("rpi5"), "cost", 2, 1.55, 1401, 3.75),
    (small("rpi5"), "energy", 2, 3.76, 1334, 0.48),
    (small("jetson"), "goodput", 8, 7.65, 623, 0.85),
    (large("jetson"), "cost", 2, 4.35, 1401, 1.74),
    (small("jetson"), "energy", 2, 4.60, 1334, 0.39),
]


@pytest.mark.parametrize(("option", "objective", "k", "goodput", "cost", "energy"), PUBLISHED)
def test_published_choices_within_three_percent(option, objective, k, goodput, cost, energy):
    choice = VERIFIER.best([option], objective, LENGTHS)
    assert choice.k == k
    assert choice.scores.goodput == pytest.approx(goodput, rel=0.03)
    assert choice.scores.cost / 1000 == pytest.approx(cost, rel=0.03)
    if energy is not None:
        assert choice.scores.energy == pytest.approx(energy, rel=0.03)


@pytest.mark.parametrize("device", ["rpi4b", "rpi5", "jetson"])
def test_published_choice_of_model(device):
    both = [small(device), large(device)]
    assert VERIFIER.best(both, "goodput", LENGTHS).option is both[0]
    assert VERIFIER.best(both, "cost", LENGTHS).option is both[1]


def test_a_slower_link_would_have_changed_the_published_answer():
    """Negative control: the choice does depend on the verification time."""
    assert Verifier(0.05, PRICE).best([small("rpi5")], "goodput", LENGTHS).k < 6


options = st.builds(
    DraftOption,
    name=st.text(max_size=3),
    tokens_per_s=st.floats(0.5, 200),
    acceptance=st.floats(0.05, 0.95).map(lambda a: {k: a ** (k / 2) for k in (1, 4, 8)}),
    draft_w=st.floats(1, 60),
)


@given(st.lists(options, min_size=1, max_size=4), st.floats(0.01, 1))
def test_no_choice_beats_the_best_one(drafts, verify_s):
    lengths, verifier = range(1, 9), Verifier(verify_s, PRICE)
    scores = [verifier.score(option, k) for option in drafts for k in lengths]
    for objective, pick in (("goodput", max), ("cost", max), ("energy", min)):
        top = getattr(verifier.best(drafts, objective, lengths).scores, objective)
        assert top == pytest.approx(pick(getattr(s, objective) for s in scores))
    mixed = verifier.best(drafts, {"goodput": 1.0, "energy": 1.0}, lengths).scores
    assert not any(s.goodput > mixed.goodput and s.energy < mixed.energy for s in scores)


def test_zero_drafts_are_a_choice_and_billed_when_asked():
    option = DraftOption("slow", 0.5, {1: 0.1}, 5.0)
    assert Verifier(0.1, PRICE).best([option], "goodput", range(9)).k == 0
    plain = Verifier(0.1, PRICE).score(option, 0)
    assert plain.energy == 0.0
    assert plain.cost == float("inf")
    assert Verifier(0.1, PRICE, bill_bonus=True).score(option, 0).cost == pytest.approx(1 / PRICE)


def test_unknown_objectives_are_refused():
    with pytest.raises(PlanError, match="goodput"):
        VERIFIER.best([small("rpi5")], "speed", LENGTHS)
    with pytest.raises(PlanError):
        DraftOption("x", 0.0, {1: 0.5})
