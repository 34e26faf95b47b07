"""The edge: a client that drafts, sends, and takes in what the server commits."""

from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import (
    Connection,
    ConnectionFactory,
    LinkLost,
    server_url,
    websocket_connections,
)
from wispprof.edge.draft_worker import ThreadWorker, TimedWorker
from wispprof.edge.generation import Generation
from wispprof.edge.request_stats import RequestStats
from wispprof.types import GenerationRequest

__all__ = [
    "Connection",
    "ConnectionFactory",
    "EdgeClient",
    "Generation",
    "GenerationRequest",
    "LinkLost",
    "RequestStats",
    "ThreadWorker",
    "TimedWorker",
    "server_url",
    "websocket_connections",
]
