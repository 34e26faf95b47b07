"""Write the shipped edge profiles of devices that others measured: ``python -m tools.published_profiles``.

ConfigSpec (arXiv 2604.09722, TDIS 2026) gives, for a chosen K and a verification time of 0.5 s, goodput G,
cost efficiency eta and edge energy E of each device. By its definitions

    G = (K alpha + 1) / (K / v + 0.5),   eta = (K alpha + 1) / (K p),   E = P (K / v) / (K alpha + 1)

the drafting speed v follows from G and eta, and the energy of a drafted token, P / v, from E and eta. The
profiles contain nothing else: no dependence on context, no controller, no prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wispprof.artifacts import EdgeProfile, EdgeRow, Manifest, make_profile, save_profile
from wispprof.types import ModelInfo

CITATION = (
    "derived from ConfigSpec (arXiv 2604.09722, TDIS 2026), published choices for the target Llama-3.1-70B"
)
VERIFY_S = 0.5
DOLLARS_PER_TOKEN = 0.90e-6


@dataclass(frozen=True)
class PublishedChoice:
    """One cell of the paper's table: K, goodput (tokens/s), tokens per $, J per token (None: not given)."""

    k: int
    goodput: float
    tokens_per_dollar: float
    energy_j: float | None = None

    @property
    def tokens_per_round(self) -> float:
        """K alpha + 1."""
        return self.tokens_per_dollar * self.k * DOLLARS_PER_TOKEN

    @property
    def draft_ms(self) -> float:
        """Milliseconds of one drafted token, 1000 / v."""
        return 1000 * (self.tokens_per_round / self.goodput - VERIFY_S) / self.k

    @property
    def draft_energy_j(self) -> float | None:
        """Joules of one drafted token, P / v."""
        return None if self.energy_j is None else self.energy_j * self.tokens_per_round / self.k


@dataclass(frozen=True)
class PublishedDevice:
    """A device with a draft model, and the paper's choices for the two."""

    name: str
    device: str
    model: ModelInfo
    choices: tuple[PublishedChoice, ...]


_SMALL = ModelInfo("Llama-3.2-1B-Instruct Q4", "q4", 1_235_814_400, family="llama")
_LARGE = ModelInfo("Llama-3.1-8B Q4", "q4", 8_030_261_248, family="llama")

PUBLISHED: tuple[PublishedDevice, ...] = (
    PublishedDevice("rpi-4b", "Raspberry Pi 4B", _SMALL, (PublishedChoice(2, 2.44, 1334e3),)),
    PublishedDevice(
        "rpi-5",
        "Raspberry Pi 5",
        _SMALL,
        (PublishedChoice(6, 4.50, 763e3, 0.84), PublishedChoice(2, 3.76, 1334e3, 0.48)),
    ),
    PublishedDevice(
        "jetson-agx-orin",
        "Jetson AGX Orin",
        _SMALL,
        (PublishedChoice(8, 7.65, 623e3, 0.85), PublishedChoice(2, 4.60, 1334e3, 0.39)),
    ),
    PublishedDevice("rpi-4b-8b", "Raspberry Pi 4B", _LARGE, (PublishedChoice(2, 0.77, 1401e3),)),
    PublishedDevice("rpi-5-8b", "Raspberry Pi 5", _LARGE, (PublishedChoice(2, 1.55, 1401e3, 3.75),)),
    PublishedDevice(
        "jetson-agx-orin-8b",
        "Jetson AGX Orin",
        _LARGE,
        (PublishedChoice(2, 4.35, 1401e3, 1.74),),
    ),
)


def published_profile(entry: PublishedDevice) -> EdgeProfile:
    """The edge profile that the paper's figures imply: draft steps, and energy if it is given.

    The choice with the largest K determines the speed: drafting is the largest share of its round, so the
    rounding of the published figures matters least.
    """
    best = max(entry.choices, key=lambda choice: choice.k)
    cells = "; ".join(_cell(choice) for choice in entry.choices)
    citation = f"{CITATION}; {cells}"
    time_ms = (round(best.draft_ms, 3),)
    rows = [EdgeRow("draft_step 1@0", "draft_step", 0, time_ms, source="published", citation=citation)]
    if best.draft_energy_j is not None:
        rows.append(
            EdgeRow(
                "energy",
                "energy",
                0,
                time_ms,
                energy_j=round(best.draft_energy_j, 4),
                order=1,
                source="published",
                citation=citation,
            )
        )
    manifest = Manifest(
        kind="edge",
        model=entry.model,
        command="python -m tools.published_profiles",
        engine={"backend": "llama.cpp"},
        hardware={"board": entry.device},
        summary={"draft_tokens_per_s": round(1000 / best.draft_ms, 2)},
        source="published",
        citation=citation,
    )
    profile = make_profile(manifest, rows)
    assert isinstance(profile, EdgeProfile)
    return profile


def write_published(folder: Path, entries: Sequence[PublishedDevice] = PUBLISHED) -> list[Path]:
    """Write every published profile into ``folder``; returns the row files."""
    for entry in entries:
        save_profile(published_profile(entry), folder / entry.name)
    return [folder / f"{entry.name}.jsonl" for entry in entries]


def _cell(choice: PublishedChoice) -> str:
    text = f"K={choice.k}: G={choice.goodput} tok/s, eta={choice.tokens_per_dollar / 1e3:.0f} Ktok/$"
    return text if choice.energy_j is None else f"{text}, E={choice.energy_j} J/tok"


if __name__ == "__main__":
    for file in write_published(Path("profiles")):
        print(file)
