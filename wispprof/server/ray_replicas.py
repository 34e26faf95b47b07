"""Several servers behind one address, by Ray Serve, scaled by load level.

The number of connections says little: one edge may hold a connection and ask for nothing, another runs
eight sessions over one. The load level states by how much the decoding sessions slow a step down.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from starlette.datastructures import Headers

from wispprof.errors import RuntimeFault
from wispprof.openai_api.request_guard import bearer_key
from wispprof.policies.cost_model import LOAD_LEVELS
from wispprof.server.frame_checks import check_key
from wispprof.server.web_server import server_tls
from wispprof.settings.server_settings import ServerSettings

NAME = "wispprof"

METRIC = "load_level"
"""What a replica records for the autoscaler, 0 … 4."""

_MAX_CONNECTIONS = 10_000

log = logging.getLogger("wispprof.server")


def target_replicas(levels: Sequence[float], current: int, low: float, high: float) -> int:
    """Number of replicas for these load levels, before the deployment's limits.

    A mean above ``high`` adds one replica per ``high`` levels in excess. A mean below ``low`` removes
    one, unless the mean of the others would then exceed ``high``.
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
    """Ray Serve autoscaling policy for replicas that record :data:`METRIC`."""

    def __init__(self, low: float = 0.5, high: float = 2.0) -> None:
        if not 0 <= low < high < LOAD_LEVELS:
            raise ValueError(f"need 0 <= low < high < {LOAD_LEVELS}, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        recorded: Mapping[Any, float] = (context.aggregated_metrics or {}).get(METRIC, {})
        current = int(context.target_num_replicas)
        return target_replicas(list(recorded.values()), current, self.low, self.high), {}


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError as err:
        raise RuntimeFault(
            "Replicas need Ray Serve, which is not installed.",
            'Install it: pip install "ray[serve]".',
        ) from err
    return ray, serve


def deployment(
    settings: ServerSettings,
    replicas: int,
    *,
    max_replicas: int = 0,
    build: Callable[[ServerSettings], Any] | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """A Ray Serve application of ``replicas`` servers, up to ``max_replicas`` by load level (0: fixed).

    ``build`` makes a replica's server, not started; default:
    :func:`~wispprof.server.startup.build_server`. ``cpus`` and ``gpus``: what Ray reserves for each.
    Raises :class:`RuntimeFault` if Ray Serve is not installed.
    """
    _, serve = _ray()

    # Defined here so that this module imports without Ray.
    class Replica:
        def __init__(self) -> None:
            from wispprof.server.startup import build_server

            self.server = (build or build_server)(settings)

        def __serve_build_asgi_app__(self) -> Any:
            from wispprof.server.app import make_app
            from wispprof.server.engine_client import EngineClient

            return make_app(EngineClient.within(self.server), lifespan=self._life)

        @contextlib.asynccontextmanager
        async def _life(self, _: Any) -> AsyncIterator[None]:
            await self.server.start()
            rank = serve.get_replica_context().rank
            rank = int(getattr(rank, "rank", rank) or 0)
            metrics = _serve_metrics(self.server, settings, rank)
            try:
                yield
            finally:
                await self.server.drain(0.0)
                await self.server.stop()
                if metrics is not None:
                    metrics.shutdown()

        def record_autoscaling_stats(self) -> dict[str, float]:
            return {METRIC: float(self.server.manager.load_level)}

        def check_health(self) -> None:
            if not self.server.ready:
                raise RuntimeError("the engine loop has ended")

    scaling: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas > replicas:
        limits = {"min_replicas": replicas, "max_replicas": max_replicas}
        policy = {"policy_function": LoadLevelPolicy}
        scaling = {"autoscaling_config": {**limits, "policy": policy}}
    made = serve.deployment(
        name=NAME,
        max_ongoing_requests=_MAX_CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_timeout_ms / 1000.0,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **scaling,
    )
    return made(serve.ingress()(Replica)).bind()


def serve_replicas(
    settings: ServerSettings,
    replicas: int,
    announce: Callable[[], None],
    *,
    max_replicas: int = 0,
    build: Callable[[ServerSettings], Any] | None = None,
) -> None:
    """Deploy, and serve until SIGTERM or Ctrl-C. Blocks.

    Joins the Ray cluster that ``RAY_ADDRESS`` names, or starts one on this machine. ``announce`` is
    called once requests are admitted. Raises :class:`RuntimeFault` if Ray is missing or cannot deploy.
    """
    ray, serve = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    stop = threading.Event()
    previous = {one: signal.signal(one, lambda *_: stop.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve.start(http_options=_http(settings))
        app = deployment(settings, replicas, max_replicas=max_replicas, build=build, gpus=_gpus(settings))
        try:
            serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as err:
            reason = str(err).strip().splitlines()[-1]
            raise RuntimeFault(
                f"Ray Serve could not start {replicas} replicas: {reason}",
                "See `ray status` for free resources, and the replicas' logs.",
            ) from err
        announce()
        stop.wait()
        log.info("shutting down: replicas finish, edges resume on other servers")
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


def _serve_metrics(server: Any, settings: ServerSettings, rank: int) -> Any:
    """Serve a replica's own /metrics, on the server's port + 1 + rank: the proxy has only one.

    With TLS, and beyond loopback with an API key, as the server's own.
    """
    from prometheus_client import make_wsgi_app

    port, metrics = settings.port + 1 + rank, make_wsgi_app(server.metrics.registry)

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        key = bearer_key(Headers({"authorization": environ.get("HTTP_AUTHORIZATION", "")}))
        if settings.loopback or check_key(key, settings.api_keys):
            return metrics(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
        return [b""]

    try:
        listener = make_server(settings.host, port, guarded, _MetricsServer, _Quiet)
    except OSError as err:
        log.warning("no metrics of replica %d: port %d: %s", rank, port, err.strerror)
        return None
    if tls := server_tls(settings.tls_cert, settings.tls_key):
        listener.socket = tls.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=listener.serve_forever, daemon=True, name="metrics").start()
    scheme = "https" if settings.tls_cert is not None else "http"
    log.info("metrics of replica %d: %s://%s:%d/metrics", rank, scheme, settings.host, port)
    return listener


class _MetricsServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 10.0

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""
