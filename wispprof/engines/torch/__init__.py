"""The built-in engine, on PyTorch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.types import ServedModel

if TYPE_CHECKING:
    from wispprof.engines import EngineOptions
    from wispprof.engines.loading import LoadedModel
    from wispprof.engines.tensor_parallel import Ranks
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.engines.torch.kv_size import KvSize

log = logging.getLogger("wispprof.engines")


def load_torch_engine(
    options: EngineOptions, ranks: Ranks | None = None
) -> tuple[TorchEngine, ServedModel, Any]:
    """A warm engine, its target's identity, and the tokenizer. ``ranks``: over this rank's shard.

    The engine serves fewer sessions and a shorter context than asked for if its device cannot hold more.
    """
    from wispprof.engines.loading import load_model
    from wispprof.engines.served_model import describe_model
    from wispprof.engines.torch.engine import TorchEngine

    loaded = load_model(options.target, options.dtype, options.device, ranks, options.full_digest)
    size = _kv_size(options, loaded)
    engine = TorchEngine(
        loaded,
        kv_tokens=size.kv_tokens,
        max_sessions=size.max_sessions,
        backend=options.backend,
        max_context=size.max_context,
    )
    engine.warm_up()
    info = loaded.info
    model = describe_model(
        Path(options.target).name or info.id,
        loaded.folder,
        loaded.model.config,
        loaded.tokenizer,
        weights=info.weights_hash,
        dtype=info.dtype,
        vocabulary=info.tokenizer_hash,
        max_context=engine.max_context,
        generation_config=options.generation_config,
    )
    return engine, model, loaded.tokenizer


def _kv_size(options: EngineOptions, loaded: LoadedModel) -> KvSize:
    """What the options name, and what memory allows for the rest; the same on every rank."""
    from wispprof.engines.torch.kv_size import KvSize, ram_kv_size, vram_kv_size

    info, ranks = loaded.info, loaded.ranks
    context = min(options.max_context or info.max_context, info.max_context)
    if options.kv_tokens:
        return KvSize(options.kv_tokens, options.max_sessions, min(context, options.kv_tokens))
    if loaded.device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(loaded.device)
        # Each GPU holds its rank's heads.
        per_token = max(1, info.kv_bytes_per_token // (ranks.size if ranks else 1))
        fit = vram_kv_size
    else:
        import psutil

        # Ranks on one CPU share its memory.
        free, per_token, fit = psutil.virtual_memory().available, info.kv_bytes_per_token, ram_kv_size
    if ranks:
        free = ranks.all_reduce_min(free)
    size = fit(free, per_token, options.max_sessions, context)
    if size.max_context < context or size.max_sessions < options.max_sessions:
        log.warning(
            "memory holds %d KV tokens: serving contexts up to %d tokens and %d sessions",
            *(size.kv_tokens, size.max_context, size.max_sessions),
        )
    return size
