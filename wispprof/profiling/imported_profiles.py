"""Import what ``llama-bench -o json`` printed as an edge profile.

llama-bench tells average and single speeds of ``n_prompt`` tokens at once and of ``n_gen`` tokens one by
one, over ``n_depth`` cached ones. Its generation leaves out sampling, so the rows are draft steps
without features: a little optimistic, and marked ``imported``.

Edge profiles of devices that were measured by others, derived from what they published.

ConfigSpec (arXiv 2604.09722, TDIS 2026) gives, for a chosen K and a verification time of 0.5 s, goodput
G, cost efficiency eta and edge energy E of each device. With its own definitions

    G = (K alpha + 1) / (K / v + 0.5),   eta = (K alpha + 1) / (K p),   E = P (K / v) / (K alpha + 1)

the drafting speed v follows from G and eta, and the energy of a drafted token, P / v, from E and eta.
Nothing else is known of these devices here: no dependence on context, no controller, no prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from wispprof.artifacts import (
    EdgeProfile,
    EdgeRow,
    Manifest,
    ModelRecord,
    make_profile,
    save_profile,
)
from wispprof.artifacts.files import parse_json, read_bytes
from wispprof.artifacts.manifest import command_line, library_versions
from wispprof.artifacts.profile import profile_files
from wispprof.errors import ArtifactDamaged, ArtifactError, ProfileError
from wispprof.settings.profiler_settings import Output

__all__ = [
    "PUBLISHED",
    "PublishedChoice",
    "import_results",
    "published_profile",
    "rows_of",
    "write_published",
]


def import_results(file: Path, output: Output) -> EdgeProfile:
    """Read the results of one model and write an edge profile.

    Raises :class:`ArtifactDamaged` for what is not llama-bench's JSON, :class:`ProfileError` where it
    holds several models or no generation test.
    """
    data = read_bytes(file, "llama-bench results", "Make it with: llama-bench -o json > FILE.")
    entries = parse_json(data, str(file))
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ArtifactDamaged(f"{file} is not a list of llama-bench tests.", "Use -o json.")
    if output.path is not None and not output.overwrite and profile_files(output.path)[0].exists():
        raise ArtifactError(
            f"{profile_files(output.path)[0]} exists.", "Choose another --out, or add --overwrite."
        )
    profile = make_profile(_manifest(entries, str(file)), rows_of(entries, str(file)))
    if output.path is not None:
        save_profile(profile, output.path)
    return cast(EdgeProfile, profile)


def rows_of(entries: Sequence[dict[str, Any]], where: str) -> list[EdgeRow]:
    """Prefill rows, draft steps and bursts; tests that mix prompt and generation are passed over."""
    rows: dict[str, EdgeRow] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            prompt, generated = int(entry["n_prompt"]), int(entry["n_gen"])
            depth = int(entry.get("n_depth", 0))
            speeds = [float(s) for s in entry.get("samples_ts") or [entry["avg_ts"]]]
            build = f"llama-bench, llama.cpp build {entry.get('build_commit', 'unknown')}"
        except (KeyError, TypeError, ValueError) as err:
            raise ArtifactDamaged(
                f"{where}, test {number}: {err!r} is missing or not a number.",
                "Make the file anew with: llama-bench -o json.",
            ) from None
        if (prompt and generated) or not speeds or min(speeds) <= 0:
            continue
        many = prompt if prompt else 1
        # A generation test grows from its depth on: on average half of it lies behind each token.
        context = depth if prompt else depth + generated // 2
        kind = "prefill" if prompt else "draft_step"
        row = EdgeRow(
            f"{kind} {many}@{context}",
            kind,
            context,
            tuple(round(1000 * many / speed, 6) for speed in speeds),
            many,
            source="imported",
            citation=build,
        )
        rows[row.key] = replace(row, order=len(rows))
    if not any(row.kind == "draft_step" for row in rows.values()):
        raise ProfileError(
            f"{where} holds no generation test.", "Run llama-bench with -n 64 or the like."
        )
    return list(rows.values())


def _manifest(entries: Sequence[dict[str, Any]], where: str) -> Manifest:
    first = entries[0] if entries else {}
    names = {str(entry.get("model_filename", "")) for entry in entries}
    if len(names) > 1:
        raise ProfileError(
            f"{where} holds tests of several models: {', '.join(sorted(names))}.",
            "Run llama-bench for one model at a time.",
        )
    kept = ("n_threads", "n_gpu_layers", "backends", "flash_attn", "type_k", "type_v")
    return Manifest(
        kind="edge",
        model=ModelRecord(
            id=Path(str(first.get("model_filename") or "unknown")).name,
            dtype=str(first.get("model_type", "")),
            parameters=_whole(first.get("model_n_params")),
        ),
        command=command_line(),
        engine={"backend": "llama.cpp", **{k: first[k] for k in kept if k in first}},
        hardware={
            "cpu": str(first.get("cpu_info", "")),
            "gpus": [{"name": str(first["gpu_info"])}] if first.get("gpu_info") else [],
        },
        versions=library_versions(),
        started=str(first.get("test_time", "")),
        ended=str(first.get("test_time", "")),
        source="imported",
        citation=f"llama-bench, llama.cpp build {first.get('build_commit', 'unknown')}",
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


CITATION = (
    "derived from ConfigSpec (arXiv 2604.09722, TDIS 2026), published choices for the target "
    "Llama-3.1-70B"
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
    """A device with a draft model, and the paper's choices that speak of the two."""

    name: str
    device: str
    model: ModelRecord
    choices: tuple[PublishedChoice, ...]


_SMALL = ModelRecord("Llama-3.2-1B-Instruct Q4", "q4", 1_235_814_400, family="llama")
_LARGE = ModelRecord("Llama-3.1-8B Q4", "q4", 8_030_261_248, family="llama")

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
    PublishedDevice(
        "rpi-5-8b", "Raspberry Pi 5", _LARGE, (PublishedChoice(2, 1.55, 1401e3, 3.75),)
    ),
    PublishedDevice(
        "jetson-agx-orin-8b",
        "Jetson AGX Orin",
        _LARGE,
        (PublishedChoice(2, 4.35, 1401e3, 1.74),),
    ),
)


def published_profile(entry: PublishedDevice) -> EdgeProfile:
    """The edge profile that the paper's figures imply: draft steps, and energy where it is given.

    The choice with the largest K determines the speed: there drafting is the largest share of the
    round, so rounding of the published figures weighs least.
    """
    best = max(entry.choices, key=lambda choice: choice.k)
    cells = "; ".join(_cell(choice) for choice in entry.choices)
    citation = f"{CITATION}; {cells}"
    time_ms = (round(best.draft_ms, 3),)
    rows = [
        EdgeRow("draft_step 1@0", "draft_step", 0, time_ms, source="published", citation=citation)
    ]
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
        command="python -m wispprof.profiling.imported_profiles",
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
    text = (
        f"K={choice.k}: G={choice.goodput} tok/s, eta={choice.tokens_per_dollar / 1e3:.0f} Ktok/$"
    )
    return text if choice.energy_j is None else f"{text}, E={choice.energy_j} J/tok"


if __name__ == "__main__":
    for file in write_published(Path("profiles")):
        print(file)
