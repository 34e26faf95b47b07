"""The models that are going to be used: present, loadable, and a pair."""

from __future__ import annotations

from functools import cache
from typing import Any

from wispprof.artifacts import bundled_path
from wispprof.doctor.findings import DoctorContext, Finding

__all__ = ["engine", "models", "tokenizers"]


def _paths(situation: DoctorContext) -> tuple[str, str]:
    target = situation.target or str(bundled_path("models/reference-pair/target"))
    draft = situation.draft or str(bundled_path("models/reference-pair/draft"))
    return target, draft


@cache
def _load(path: str) -> Any:
    from wispprof.engines.loading import load_model

    return load_model(path, device="cpu")


def _said(side: str, info: Any) -> str:
    """Side, name, family and size; a folder that is called after its side is named once."""
    name = side if info.id == side else f"{side} {info.id}"
    return f"{name}: {info.family}, {info.parameters / 1e6:.1f} M"


def models(situation: DoctorContext) -> Finding:
    """Target and draft can be loaded (the bundled pair where none is named)."""
    target, draft = (_load(path).info for path in _paths(situation))
    if draft.parameters >= target.parameters:
        return Finding(
            "models",
            "warn",
            f"The draft ({draft.parameters:,} parameters) is no smaller than the target "
            f"({target.parameters:,}).",
            "Swap --target and --draft, or choose a smaller draft.",
        )
    return Finding(
        "models",
        "ok",
        f"{_said('target', target)} parameters; {_said('draft', draft)}",
    )


def tokenizers(situation: DoctorContext) -> Finding:
    """Draft and target mean the same by a token id."""
    target, draft = (_load(path).info for path in _paths(situation))
    for side, info in (("target", target), ("draft", draft)):
        if not info.tokenizer_hash:
            return Finding(
                "tokenizers",
                "fail",
                f"The {side} {info.id} has no tokenizer beside its weights.",
                "Copy the tokenizer files of its model into the folder.",
            )
    if target.tokenizer_hash != draft.tokenizer_hash:
        return Finding(
            "tokenizers",
            "fail",
            f"Target and draft have different tokenizers ({target.tokenizer_hash} and "
            f"{draft.tokenizer_hash}): a server will refuse this edge.",
            "Choose a draft of the target's own family.",
        )
    return Finding("tokenizers", "ok", f"the same on both sides ({target.tokenizer_hash})")


def engine(situation: DoctorContext) -> Finding:
    """The target computes: one forward gives finite numbers, twice the same."""
    import torch

    loaded = _load(_paths(situation)[0])
    ids = torch.arange(4, 12).unsqueeze(0) % loaded.info.vocab_size
    with torch.inference_mode():
        first, second = (loaded.model(ids, use_cache=False).logits for _ in range(2))
    if not bool(torch.isfinite(first).all()):
        return Finding(
            "engine",
            "fail",
            "The target's logits are not finite.",
            "The weights are damaged or overflow in this dtype: restore them, or use float32.",
        )
    if not torch.equal(first, second):
        return Finding(
            "engine",
            "warn",
            "The same forward gave different numbers twice.",
            "Kernels here are not deterministic: near ties may decode differently.",
        )
    return Finding("engine", "ok", "one forward of the target is finite and repeatable")
