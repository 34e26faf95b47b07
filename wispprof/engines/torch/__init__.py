"""The built-in engine, on PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.types import ModelInfo, ServedModel

if TYPE_CHECKING:
    from wispprof.engines import EngineOptions
    from wispprof.engines.tensor_parallel import Ranks
    from wispprof.engines.torch.engine import TorchEngine

__all__ = ["load_torch_engine"]

_SHARE_OF_FREE_RAM = 0.25
_SHARE_OF_FREE_VRAM = 0.85
_MAX_CPU_TOKENS = 1 << 18


def load_torch_engine(
    options: EngineOptions, ranks: Ranks | None = None
) -> tuple[TorchEngine, ServedModel, Any]:
    """A warm engine, its target's identity, and the tokenizer. ``ranks``: over this rank's shard."""
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine

    loaded = load_model(options.target, options.dtype, options.device, ranks)
    info, device = loaded.info, loaded.device.type
    kv_tokens = options.kv_tokens
    if not kv_tokens and ranks is None:
        kv_tokens = _tokens_in_free_memory(device, info, shards=1)
    elif not kv_tokens and ranks is not None:
        # Ranks on one CPU share its memory; each GPU has its own.
        shards = 1 if device == "cpu" else ranks.size
        kv_tokens = ranks.all_reduce_min(_tokens_in_free_memory(device, info, shards))
    engine = TorchEngine(
        loaded,
        kv_tokens=kv_tokens,
        max_sessions=options.max_sessions,
        backend=options.backend,
    )
    engine.warm_up()
    name = Path(options.target).name or info.id
    model = ServedModel(name, info.tokenizer_hash, info.vocab_size, engine.max_context)
    return engine, model, loaded.tokenizer


def _tokens_in_free_memory(device: str, info: ModelInfo, shards: int) -> int:
    """KV tokens that fit into a share of the memory that is free now; one full context at least."""
    per_token = max(1, info.kv_bytes_per_token // shards)
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return max(info.max_context, int(free * _SHARE_OF_FREE_VRAM) // per_token)
    import psutil

    free = psutil.virtual_memory().available
    return max(info.max_context, min(int(free * _SHARE_OF_FREE_RAM) // per_token, _MAX_CPU_TOKENS))
