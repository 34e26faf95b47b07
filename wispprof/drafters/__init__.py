"""Drafter backends by name: a model, prompt lookup, both, or one of your own (docs/extending.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from wispprof.backends import Drafter
from wispprof.plugins import load

__all__ = ["DRAFTERS", "GgufDraft", "make_drafter", "needs_model"]


class GgufDraft(NamedTuple):
    """A draft model for llama.cpp. Its weights are mapped, so drafters share them."""

    path: Path
    device: str


def make_drafter(name: str, model: Any = None) -> Drafter:
    """Call the drafter factory ``name``: a function of the draft model to a
    :class:`~wispprof.backends.Drafter`.

    ``model``: a :class:`~wispprof.engines.loading.LoadedModel`, a :class:`GgufDraft`, or ``None``.
    Raises :class:`~wispprof.errors.PluginError` for an unknown name, and what the factory raises.
    """
    if model is None and needs_model(name):
        raise ValueError(f"the drafter {name!r} needs a draft model")
    drafter: Drafter = load("drafters", name, DRAFTERS)(model)
    return drafter


def needs_model(name: str) -> bool:
    """Whether this built-in drafter needs a draft model."""
    return name in ("model", "both")


def _model(model: Any) -> Drafter:
    if isinstance(model, GgufDraft):
        from wispprof.drafters.llama_cpp import LlamaCppDrafter

        return LlamaCppDrafter(model.path, gpu_layers=0 if model.device == "cpu" else -1)
    from wispprof.drafters.torch_drafter import TorchDrafter

    return TorchDrafter(model)


def _lookup(model: Any) -> Drafter:
    from wispprof.drafters.ngram import LookupDrafter

    return LookupDrafter()


def _both(model: Any) -> Drafter:
    from wispprof.drafters.ngram import LookupDrafter, LookupFirst

    return LookupFirst(LookupDrafter(), _model(model))


DRAFTERS = {"model": _model, "lookup": _lookup, "both": _both}
