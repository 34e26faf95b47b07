"""Build vLLM's engine core from what a server asks for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wispprof.engines.vllm.cpu_workers import prepare_workers
from wispprof.engines.vllm.versions import check_vllm
from wispprof.errors import EngineError, SettingsError, WispprofError

if TYPE_CHECKING:
    from wispprof.engines import EngineOptions

_PACKAGE = "wispprof.engines.vllm"

_CPU_BLOCK, _GPU_BLOCK = 128, 16
_SHARE_OF_FREE_RAM = 0.25
_MAX_CPU_BYTES = 4 << 30

_OWN_ARGUMENTS = ("model", "scheduler_cls", "worker_extension_cls", "speculative_config", "async_scheduling")
"""Arguments of vLLM that this engine sets itself."""


def engine_arguments(options: EngineOptions) -> dict[str, Any]:
    """Arguments of vLLM's ``EngineArgs``; ``options.arguments`` override what is not this engine's own."""
    given = _given(options)
    if refused := sorted(set(given) & set(_OWN_ARGUMENTS)):
        raise SettingsError(f"--vllm-arg cannot set {', '.join(refused)}.", "wispprof sets it.")
    arguments: dict[str, Any] = {
        "model": options.target,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_num_seqs": options.max_items,
        "max_num_batched_tokens": options.max_tokens,
        "enable_prefix_caching": options.prefix_cache,
        "enable_chunked_prefill": True,
        "served_model_name": Path(options.target).name,
        "use_tqdm_on_load": False,
        **given,
        # A step is scheduled when the one before has been committed.
        "async_scheduling": False,
        "scheduler_cls": f"{_PACKAGE}.scheduler.GrantScheduler",
        "worker_extension_cls": f"{_PACKAGE}.worker.WorkerExtension",
        "speculative_config": {
            "method": "custom_class",
            "model": f"{_PACKAGE}.proposer.NoDrafts",
            "num_speculative_tokens": options.max_drafts,
        },
    }
    if options.max_context and "max_model_len" not in given:
        arguments["max_model_len"] = options.max_context + 1
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if options.kv_tokens and "num_gpu_blocks_override" not in given:
        size = int(given.get("block_size") or (_CPU_BLOCK if on_cpu else _GPU_BLOCK))
        arguments["num_gpu_blocks_override"] = -(-options.kv_tokens // size) + 1
    if on_cpu:
        arguments.setdefault("distributed_executor_backend", "mp")
        if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & set(given):
            arguments["kv_cache_memory_bytes"] = _share_of_ram()
    return arguments


def _given(options: EngineOptions) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.arguments.items()}


def _ranks(given: Mapping[str, Any]) -> int:
    return math.prod(int(given.get(f"{kind}_parallel_size", 1)) for kind in ("tensor", "pipeline"))


def _share_of_ram() -> int:
    """Bytes of KV on a CPU: vLLM would take nearly all memory."""
    import psutil

    return min(int(psutil.virtual_memory().available * _SHARE_OF_FREE_RAM), _MAX_CPU_BYTES)


def build_core(options: EngineOptions) -> Any:
    """vLLM's ``EngineCore``, loaded.

    Raises :class:`EngineError` if this vLLM lacks a function or cannot serve the target, and
    :class:`SettingsError` for an argument that vLLM does not know.
    """
    prepare_environment(_ranks(_given(options)))
    check_vllm(options.untested)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    arguments = engine_arguments(options)
    if unknown := sorted(set(arguments) - set(EngineArgs.__dataclass_fields__)):
        raise SettingsError(f"vLLM knows no argument {', '.join(unknown)}.", "See `vllm serve --help`.")
    try:
        config = EngineArgs(**arguments).create_engine_config()
        _check_rollback(config.model_config, options.target)
        return EngineCore(
            config, Executor.get_class(config), log_stats=not arguments.get("disable_log_stats")
        )
    except WispprofError:
        raise
    except Exception as err:
        lines = str(err).strip().splitlines()
        reason = lines[0] if lines else type(err).__name__
        raise EngineError(f"vLLM cannot serve {options.target}: {reason}") from err


def _check_rollback(model_config: Any, target: str) -> None:
    """Refuse a target that cannot be rolled back by length, before its weights are loaded."""
    if model_config.has_inner_state:
        raise EngineError(
            f"{target} keeps recurrent state ({model_config.architecture}), which cannot be rolled back by "
            "length.",
            "Use a model with attention only, or --engine vllm-http over a `vllm serve` of it.",
        )


def prepare_environment(ranks: int = 1) -> None:
    """Settings that vLLM reads from the environment when it is imported or starts its ``ranks`` workers; what
    the user set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    prepare_workers(ranks)
