"""vLLM's own Prometheus metrics, from the statistics of each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, Metric, generate_latest


class VllmMetrics:
    """Records what the scheduler of ``core`` reports. vLLM registers its metrics globally, by name."""

    def __init__(self, core: Any) -> None:
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        self._logger = PrometheusStatLogger(core.vllm_config)

    def record(self, outputs: Any) -> None:
        """The statistics in the outputs of a step."""
        for output in outputs.values():
            if output.scheduler_stats is not None:
                self._logger.record(output.scheduler_stats, None, engine_idx=0)

    def text(self) -> bytes:
        """All metrics whose names begin with ``vllm:``."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))
