"""All figures of a draft-target pair on held-out files, and the model card that lists them.

Acceptance comes from an acceptance trace, as it trains predictors; the rest from :mod:`.evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.train_reference_pair import evaluate
from wispprof.artifacts.files import write_atomic
from wispprof.engines.loading import load_model
from wispprof.profiling.acceptance_trace import collect_trace
from wispprof.sampling.sampler import AcceptanceRates
from wispprof.settings.profiler_settings import TraceSettings
from wispprof.types import Sampling

__all__ = ["SAMPLINGS", "PairFigures", "SideFigures", "evaluate_pair", "write_card"]

SAMPLINGS = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_p=0.9),
    Sampling(temperature=0.6, top_p=0.95),
)


@dataclass(frozen=True)
class SideFigures:
    """One model. Losses in nats; ``step_ms``: one token over 128 cached, plain transformers."""

    parameters: int
    loss_per_token: float
    loss_per_byte: float
    held_out_tokens: int
    repetition: float
    step_ms: float


@dataclass(frozen=True)
class PairFigures:
    """``cum_acceptance[j]``: share of greedy proposals whose first ``j + 1`` tokens were all accepted."""

    target: SideFigures
    draft: SideFigures
    cum_acceptance: tuple[float, ...]
    agreement: tuple[tuple[Sampling, AcceptanceRates], ...]

    @property
    def step_ratio(self) -> float:
        """Cost of a draft step as a share of a target step."""
        return self.draft.step_ms / self.target.step_ms


def evaluate_pair(
    folder: Path,
    windows: int = 100,
    prompts: int = 50,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> PairFigures:
    """Measure the pair in ``folder/target`` and ``folder/draft`` on the held-out files."""
    texts = evaluate.held_out_texts()
    loaded = {side: load_model(str(folder / side), device="cpu") for side in ("target", "draft")}
    sides: dict[str, SideFigures] = {}
    for number, (side, model) in enumerate(loaded.items()):
        progress(number, 4, f"{side}: loss, repetition, step")
        loss = evaluate.held_out_loss(model.model, model.tokenizer, texts, max_windows=windows)
        sides[side] = SideFigures(
            parameters=model.info.parameters,
            loss_per_token=loss.per_token,
            loss_per_byte=loss.per_byte,
            held_out_tokens=loss.tokens,
            repetition=evaluate.repetition(model.model, model.tokenizer, texts),
            step_ms=evaluate.step_ms(model.model),
        )
    progress(2, 4, "agreement of sampled tokens")
    agreement = evaluate.agreement_table(
        loaded["target"].model,
        loaded["draft"].model,
        loaded["target"].tokenizer,
        texts,
        SAMPLINGS,
    )
    progress(3, 4, "greedy acceptance by position")
    trace = collect_trace(loaded["target"], loaded["draft"], TraceSettings(count=prompts))
    progress(4, 4, "")
    return PairFigures(
        target=sides["target"],
        draft=sides["draft"],
        cum_acceptance=tuple(float(s) for s in trace.cum_acceptance_by_position()),
        agreement=tuple(zip(SAMPLINGS, agreement, strict=True)),
    )


def write_card(folder: Path, figures: PairFigures) -> Path:
    """Write ``folder/README.md`` and ``folder/figures.json``; recipes come from the training's own logs."""
    record = json.dumps(asdict(figures), indent=1) + "\n"
    write_atomic(folder / "figures.json", record.encode())
    card = folder / "README.md"
    write_atomic(card, _card(folder, figures).encode())
    return card


def _recipe(folder: Path, side: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"{side}.json").read_text())
    return record


def _schedule(side: str, recipe: dict[str, Any]) -> str:
    (rows, length), (long_rows, long_length) = recipe["short"], recipe["long"]
    falling = f"the last {recipe['decay_share']:.0%}"
    if side == "target":
        return (
            f"{recipe['steps']:,} steps of {rows} × {length} tokens, {falling} of "
            f"{long_rows} × {long_length} with a falling learning rate"
        )
    return (
        f"{recipe['steps']:,} steps, in turn {rows} × {length} tokens of the target's own text and "
        f"{long_rows} × {long_length} of training files, {falling} with a falling learning rate"
    )


def _card(folder: Path, figures: PairFigures) -> str:
    rows, recipes = [], []
    for side, found in (("target", figures.target), ("draft", figures.draft)):
        log = _recipe(folder, side)
        shape, recipe = log["shape"], log["recipe"]
        rows.append(
            f"| {side} | {found.parameters / 1e6:.2f} M | {shape['layers']} × {shape['hidden']} | "
            f"{found.loss_per_token:.3f} | {found.loss_per_byte:.3f} | {found.repetition:.0%} | "
            f"{found.step_ms:.2f} |"
        )
        recipes.append(
            f"- {side}: {_schedule(side, recipe)}; Muon {recipe['muon_lr']:g} for matrices, "
            f"AdamW {recipe['adam_lr']:g} for the rest; {log['precision']} products; seed {recipe['seed']}."
        )
    cum_acceptance = " | ".join(f"{s:.3f}" for s in figures.cum_acceptance)
    positions = " | ".join(str(j + 1) for j in range(len(figures.cum_acceptance)))
    agreement = [
        f"| T = {s.temperature:g}, top-p {s.top_p:g} | {a.best:.3f} | {a.same_noise:.3f} | "
        f"{a.same_noise / a.best:.2f} | {a.independent:.3f} |"
        for s, a in figures.agreement
    ]
    return "\n".join(
        [
            "# Reference pair",
            "",
            "A small Llama-architecture target and a smaller draft, so that every command does real work",
            "without a GPU or a model hub. They complete Python in the manner of the standard library, and",
            "are good for nothing else. bf16 safetensors.",
            "",
            "Made by `python -m tools.train_reference_pair train`, figures by `evaluate --card`,",
            "on held-out files, 2 CPU cores.",
            "",
            "| model | parameters | layers × hidden | nats/token | nats/byte | repeated 4-grams | step ms |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"A draft step costs {figures.step_ratio:.2f} of a target step (one token over 128 cached, plain",
            "transformers). Repeated 4-grams: of 128 greedy tokens, the share seen before in the same text.",
            "",
            "Greedy acceptance: share of proposals whose first j tokens were all accepted.",
            "",
            f"| j | {positions} |",
            "|---|" + "---|" * len(figures.cum_acceptance),
            f"| survives | {cum_acceptance} |",
            "",
            "Sampled agreement on one token: best possible (Σ min(p, q), both filtered), drawn with the same",
            "position noise (as this project does), and drawn independently.",
            "",
            "| sampling | best possible | same noise | share of best | independent |",
            "|---|---|---|---|---|",
            *agreement,
            "",
            "## Data and recipe",
            "",
            "The sources of CPython's standard library (PSF licence), without third-party packages,",
            "code-page tables, duplicates and data files; 4 % of the files, chosen by a hash of their name,",
            "are held out whole. Byte-level BPE, vocabulary 4,096.",
            "",
            *recipes,
            "- The draft minimises KL(target ‖ draft); its embedding begins as the principal components of",
            "  the target's. The target's own text: half greedy, half sampled at T = 1.",
            "",
        ]
    )
