"""From settings to a server: loads the target, the estimator and the plan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.errors import ModelMissing
from wispprof.openai_api import ChatTokenizer
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Engine, ServedModel

if TYPE_CHECKING:
    from wispprof.engines.tensor_parallel import Ranks
    from wispprof.engines.torch.engine import TorchEngine

__all__ = ["build_server", "load_engine", "warn_about_other_machines"]

log = logging.getLogger("wispprof.server")

_SHARE_OF_FREE_RAM = 0.25
_SHARE_OF_FREE_VRAM = 0.85
_MAX_CPU_TOKENS = 1 << 18


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
    for line in warn_about_other_machines(settings):
        log.warning(line)
    if engine is None or model is None:
        engine, model, tokenizer = load_engine(settings)
        if tokenizer is not None:
            parts.setdefault("tokenizer", ChatTokenizer(tokenizer))
    return VerificationServer(engine, model, settings, **parts)


def warn_about_other_machines(settings: ServerSettings) -> list[str]:
    """A line for each artifact that was made on another machine, or of another estimator, than serves."""
    from wispprof.artifacts import read_document
    from wispprof.hardware import compute_device_name, machine_mismatch

    here = compute_device_name(settings.device)
    estimator = read_document(settings.estimator, "estimator") if settings.estimator else None
    plan = read_document(settings.plan, "plan") if settings.plan else None
    lines: list[str | None] = []
    if estimator is not None:
        made_on = estimator.inputs.get("machine", "")
        lines.append(machine_mismatch(f"The estimator {settings.estimator}", made_on, here))
    if plan is not None:
        made_on = plan.inputs.get("machine", "")
        lines.append(machine_mismatch(f"The plan {settings.plan}", made_on, here))
        made_of = plan.inputs.get("estimator", "")
        if estimator is not None and made_of and made_of != estimator.hash:
            lines.append(
                f"The plan {settings.plan} was made with another estimator than {settings.estimator}: "
                "make it anew with `wispprof plan`."
            )
    return [line for line in lines if line]


def load_engine(
    settings: ServerSettings, ranks: Ranks | None = None
) -> tuple[TorchEngine, ServedModel, Any]:
    """The verifier engine of the settings' target, its identity, its tokenizer. Imports torch.

    ``ranks``: this rank's engine, over its share of the target.
    """
    if not settings.target:
        raise ModelMissing("No target model was named.", "Give --target, a folder or a hub id.")
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine

    loaded = load_model(settings.target, settings.dtype, settings.device, ranks)
    info = loaded.info
    kv_tokens = settings.kv_tokens or _default_kv_tokens(loaded.device.type, info, ranks)
    engine = TorchEngine(
        loaded,
        kv_tokens=kv_tokens,
        max_sessions=settings.max_sessions + settings.prefix_cache_sessions,
        backend=settings.backend,
    )
    engine.warm_up()
    name = settings.target_id or Path(settings.target).name or info.id
    model = ServedModel(name, info.tokenizer_hash, info.vocab_size, engine.max_context)
    return engine, model, loaded.tokenizer


def _default_kv_tokens(device: str, info: Any, ranks: Ranks | None) -> int:
    """As much cache as the memory that is free now can spare, on the rank that has least."""
    if ranks is not None:
        # Ranks on one CPU share its memory; each GPU has its own.
        share = 1 if device == "cpu" else ranks.size
        return ranks.all_reduce_min(_tokens_in_free_memory(device, info, share))
    return _tokens_in_free_memory(device, info, 1)


def _tokens_in_free_memory(device: str, info: Any, share: int) -> int:
    per_token = max(1, int(info.kv_bytes_per_token) // share)
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return max(int(info.max_context), int(free * _SHARE_OF_FREE_VRAM) // per_token)
    import psutil

    free = psutil.virtual_memory().available
    tokens = int(free * _SHARE_OF_FREE_RAM) // per_token
    return max(int(info.max_context), min(tokens, _MAX_CPU_TOKENS))
