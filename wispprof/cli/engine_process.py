"""The process of a command that runs an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prepare_process(engine: str, vllm_args: Mapping[str, Any], ranks: int = 1) -> None:
    """Start the command again if ``engine`` needs another environment from its start. Commands call it
    before they load or bind anything."""
    if engine == "vllm":
        from wispprof.engines.vllm.cpu_process import restart_for_cpu

        restart_for_cpu(int(vllm_args.get("tensor_parallel_size", ranks)))
