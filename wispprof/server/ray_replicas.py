"""How many replicas: by the load level that the estimator gives them, not by how many connections they hold.

A connection says little: an edge may hold one for hours and ask for nothing, or run eight sessions over
it. The load level says how much the sessions now decoding stretch a step, which is what a promise feels.

The deployment: one verification server per replica, its doors as the replica's ASGI application.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from wispprof.errors import RuntimeFault
from wispprof.policies.load_level import LOAD_LEVELS
from wispprof.settings.server_settings import ServerSettings

__all__ = [
    "METRIC",
    "NAME",
    "LoadLevelPolicy",
    "deployment",
    "serve_replicas",
    "target_replicas",
]

METRIC = "load_level"
"""What a replica records of itself, 0 … 4."""


def target_replicas(levels: Sequence[float], current: int, low: float, high: float) -> int:
    """Replicas for these load levels, before the deployment's own limits.

    Above ``high`` on average one more for every ``high`` levels there are too many; below ``low`` one
    fewer, if those that stay would not be above ``high`` then. Between the two nothing changes.
    """
    if not levels:
        return current
    total = sum(levels)
    mean = total / len(levels)
    if mean > high:
        return current + max(1, math.floor((total - high * len(levels)) / high))
    if mean < low and current > 1 and total / (current - 1) <= high:
        return current - 1
    return current


class LoadLevelPolicy:
    """Ray Serve's autoscaling policy of a deployment whose replicas record :data:`METRIC`.

    Serve calls it with its context, holds the answer against the deployment's limits, and waits its own
    delays before it acts.
    """

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        if not 0 <= low < high < LOAD_LEVELS:
            raise ValueError(f"0 <= low < high < {LOAD_LEVELS} is needed, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        recorded: Mapping[Any, float] = (context.aggregated_metrics or {}).get(METRIC, {})
        current = int(context.target_num_replicas)
        return target_replicas(list(recorded.values()), current, self.low, self.high), {}


NAME = "wispprof"

_MAX_CONNECTIONS = 10_000
_MOST_REPLICAS_FACTOR = 4

log = logging.getLogger("wispprof.server")


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as err:
        raise RuntimeFault(
            "Replicas need Ray Serve, which is not installed.",
            'Install it: pip install "wispprof[ray]".',
        ) from err
    return ray, serve


def deployment(
    settings: ServerSettings,
    replicas: int,
    *,
    most: int = 0,
    build: Callable[[ServerSettings], Any] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """A Ray Serve application of ``replicas`` servers, scaled up to ``most`` by load level (0: fixed).

    ``build`` makes a replica's :class:`~wispprof.server.verification_server.VerificationServer`, not started;
    by default the settings' own. ``cpus`` and ``gpus`` are what Ray reserves for each.

    Raises :class:`RuntimeFault` where Ray Serve is not installed.
    """
    _, serve = _ray()

    # The class is made here so that Ray need not be there to import this module.
    class Replica:
        def __init__(self) -> None:
            from wispprof.server.startup import build_server

            self.server = (build or build_server)(settings)

        def __serve_build_asgi_app__(self) -> Any:
            from wispprof.server.app import make_app

            return make_app(self.server, lifespan=self._life)

        @contextlib.asynccontextmanager
        async def _life(self, _: Any) -> AsyncIterator[None]:
            await self.server.start()
            metrics = _metrics_of(self.server, settings, int(_rank(serve)))
            try:
                yield
            finally:
                await self.server.drain(0.0)
                await self.server.stop()
                if metrics is not None:
                    metrics.shutdown()

        def record_autoscaling_stats(self) -> dict[str, float]:
            return {METRIC: float(self.server.load_level)}

        def check_health(self) -> None:
            if not self.server.ready:
                raise RuntimeError("the step loop has ended")

    scaled: dict[str, Any] = {"num_replicas": replicas}
    if most > replicas:
        policy = {"policy_function": LoadLevelPolicy}
        scaled = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": most,
                "policy": policy,
            }
        }
    made = serve.deployment(
        name=NAME,
        max_ongoing_requests=_MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_timeout_ms / 1000.0,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **scaled,
    )
    return made(serve.ingress()(Replica)).bind()


def serve_replicas(
    settings: ServerSettings,
    replicas: int,
    announce: Callable[[], None],
    *,
    most: int = 0,
    build: Callable[[ServerSettings], Any] | None = None,
) -> None:
    """Deploy, and serve until SIGTERM or Ctrl-C. Blocks.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine. ``announce`` is called
    once when requests are taken. Raises :class:`RuntimeFault` without Ray, or where Ray cannot deploy.
    """
    ray, serve = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    over = threading.Event()
    previous = {
        one: signal.signal(one, lambda *_: over.set()) for one in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        serve.start(http_options=_http(settings))
        app = deployment(settings, replicas, most=most, build=build, gpus=_gpus(settings))
        try:
            serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as err:
            reason = str(err).strip().splitlines()[-1]
            raise RuntimeFault(
                f"Ray Serve could not start {replicas} replicas: {reason}",
                "See `ray status` for what the cluster has free, and the replicas' logs.",
            ) from err
        announce()
        over.wait()
        log.info("shutting down: replicas finish, edges resume elsewhere")
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
        serve.shutdown()
        if started:
            ray.shutdown()


def _http(settings: ServerSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.tls_cert is not None:
        options |= {
            "ssl_certfile": str(settings.tls_cert.absolute()),
            "ssl_keyfile": str(settings.tls_key.absolute()) if settings.tls_key else None,
        }
    return options


def _gpus(settings: ServerSettings) -> float:
    import torch

    wanted = settings.device.startswith("cuda") or settings.device == "auto"
    return 1.0 if wanted and torch.cuda.is_available() else 0.0


def _rank(serve: Any) -> int:
    rank = serve.get_replica_context().rank
    return int(getattr(rank, "rank", rank) or 0)


def _metrics_of(server: Any, settings: ServerSettings, rank: int) -> Any:
    """A replica's own /metrics, at the port after the server's by its rank: the proxy has only one."""
    from prometheus_client import start_http_server

    port = settings.port + 1 + rank
    try:
        listener, _ = start_http_server(port, settings.host, registry=server.metrics.registry)
    except OSError as err:
        log.warning("no metrics of replica %d: port %d: %s", rank, port, err.strerror)
        return None
    log.info("metrics of replica %d: http://%s:%d/metrics", rank, settings.host, port)
    return listener
