"""The edge: a client that drafts, sends, and takes in what the server commits."""

from wispprof.edge.client import EdgeClient
from wispprof.edge.connection import (
    Connection,
    ConnectionFactory,
    LinkLost,
    Traffic,
    server_url,
    websocket_connections,
)
from wispprof.edge.draft_worker import DraftStep, DraftWorker, ThreadWorker, TimedWorker
from wispprof.edge.generation import Generation
from wispprof.edge.request_stats import RequestStats
from wispprof.settings.edge_settings import ClientSettings, DraftingSettings
from wispprof.types import GenerationRequest

__all__ = [
    "ClientSettings",
    "Connection",
    "ConnectionFactory",
    "DraftStep",
    "DraftWorker",
    "DraftingSettings",
    "EdgeClient",
    "Generation",
    "GenerationRequest",
    "LinkLost",
    "RequestStats",
    "ThreadWorker",
    "TimedWorker",
    "Traffic",
    "server_url",
    "websocket_connections",
]
