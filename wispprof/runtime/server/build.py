"""From settings to a server: loads the target, the estimator and the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wispprof.errors import ModelMissing
from wispprof.runtime.server.engine import Engine, ServedModel
from wispprof.runtime.server.server import VerificationServer
from wispprof.runtime.server.settings import ServerSettings
from wispprof.runtime.server.text import TextSide

__all__ = ["build_server", "load_engine"]

_SHARE_OF_FREE_RAM = 0.25
_SHARE_OF_FREE_VRAM = 0.85
_MOST_CPU_TOKENS = 1 << 18


def build_server(
    settings: ServerSettings,
    engine: Engine | None = None,
    model: ServedModel | None = None,
    **parts: Any,
) -> VerificationServer:
    """A server that is not started yet. ``parts``: ready-made estimator, policy, … for
    :class:`VerificationServer`; what is not given is loaded as the settings say."""
    if (engine is None) != (model is None):
        raise ValueError("give both engine and model, or neither")
    if "estimator" not in parts and settings.estimator is not None:
        from wispprof.fitting import load_estimator

        parts["estimator"] = load_estimator(settings.estimator)
    if "plan" not in parts and settings.plan is not None:
        from wispprof.artifacts.plan import load_plan

        parts["plan"] = load_plan(settings.plan)
    if engine is None or model is None:
        engine, model, tokenizer = load_engine(settings)
        if tokenizer is not None:
            parts.setdefault("text", TextSide(tokenizer))
    return VerificationServer(engine, model, settings, **parts)


def load_engine(settings: ServerSettings) -> tuple[Engine, ServedModel, Any]:
    """The verifier engine of the settings' target, its identity, its tokenizer. Imports torch."""
    if not settings.target:
        raise ModelMissing("No target model was named.", "Give --target, a folder or a hub id.")
    from wispprof.lm.engine import VerifierEngine
    from wispprof.lm.loading import load_model

    loaded = load_model(settings.target, dtype=settings.dtype, device=settings.device)
    info = loaded.info
    engine = VerifierEngine(
        loaded,
        kv_tokens=settings.kv_tokens or _default_kv_tokens(loaded.device.type, info),
        max_sessions=settings.max_sessions + settings.kept_sessions,
        backend=settings.backend,
    )
    engine.warm_up()
    name = settings.target_id or Path(settings.target).name or info.id
    model = ServedModel(name, info.tokenizer_hash, info.vocab_size, engine.max_context)
    return engine, model, loaded.tokenizer


def _default_kv_tokens(device: str, info: Any) -> int:
    """As much cache as the memory that is free now can spare."""
    per_token = max(1, int(info.kv_bytes_per_token))
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return max(int(info.max_context), int(free * _SHARE_OF_FREE_VRAM) // per_token)
    import psutil

    free = psutil.virtual_memory().available
    tokens = int(free * _SHARE_OF_FREE_RAM) // per_token
    return max(int(info.max_context), min(tokens, _MOST_CPU_TOKENS))
