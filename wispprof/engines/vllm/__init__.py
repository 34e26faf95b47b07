"""vLLM as the engine: models, kernels, quantisation and ranks are vLLM's, steps are decided here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wispprof.types import ServedModel

if TYPE_CHECKING:
    from wispprof.engines import EngineOptions
    from wispprof.engines.vllm.engine import VllmEngine

__all__ = ["load_vllm_engine"]


def load_vllm_engine(options: EngineOptions) -> tuple[VllmEngine, ServedModel, Any]:
    """A warm engine, its target's identity, and the tokenizer (``None`` without one)."""
    from wispprof.engines.vllm.build import build_core

    core = build_core(options)
    # These modules import vLLM, which reads its environment then.
    from wispprof.engines.vllm.engine import VllmEngine
    from wispprof.engines.vllm.target import read_target

    info, model, tokenizer = read_target(core, options)
    engine = VllmEngine(core, info=info, max_sessions=options.max_sessions, max_drafts=options.max_drafts)
    engine.warm_up()
    return engine, model, tokenizer
