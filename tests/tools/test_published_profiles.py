"""Published presets: the arithmetic, its inverse, and the shipped files."""

from __future__ import annotations

import pytest

from tools.published_profiles import PUBLISHED, VERIFY_S, published_profile
from wispprof.artifacts import bundled_path, load_edge

CHOICES = [(e.name, c) for e in PUBLISHED for c in e.choices]


@pytest.mark.parametrize(("name", "choice"), CHOICES)
def test_derived_speeds_give_the_published_goodput_back(name, choice):
    speed = 1000 / choice.draft_ms
    goodput = choice.tokens_per_round / (choice.k / speed + VERIFY_S)
    assert goodput == pytest.approx(choice.goodput)
    assert 0 < (choice.tokens_per_round - 1) / choice.k < 1  # alpha is a probability
    if choice.energy_j is not None:
        watts = choice.draft_energy_j * speed
        assert watts * choice.k / speed / choice.tokens_per_round == pytest.approx(choice.energy_j)
        assert 5 < watts < 60


@pytest.mark.parametrize("entry", [e for e in PUBLISHED if len(e.choices) > 1], ids=lambda e: e.name)
def test_choices_of_one_device_agree(entry):
    """Two cells of the table, rounded to two digits, must tell the same energy of a drafted token."""
    energies = [choice.draft_energy_j for choice in entry.choices]
    assert max(energies) / min(energies) < 1.05


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e.name)
def test_the_shipped_files_are_these(entry):
    shipped = load_edge(bundled_path(f"profiles/{entry.name}.jsonl"))
    assert shipped == published_profile(entry)
    assert {row.source for row in shipped.rows} == {"published"}
    assert all("2604.09722" in row.citation for row in shipped.rows)
