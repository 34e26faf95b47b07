"""The edge: a client that drafts, sends, and takes in what the server commits."""

from wispprof.runtime.edge.client import EdgeClient
from wispprof.runtime.edge.dial import (
    Connection,
    Dial,
    LinkLost,
    Traffic,
    server_url,
    websocket_dial,
)
from wispprof.runtime.edge.session import Chunk, Generation, GenerationRequest
from wispprof.runtime.edge.settings import ClientSettings, DraftingSettings
from wispprof.runtime.edge.stats import RequestStats
from wispprof.runtime.edge.worker import DraftStep, DraftWorker, ThreadWorker, TimedWorker

__all__ = [
    "Chunk",
    "ClientSettings",
    "Connection",
    "Dial",
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
    "websocket_dial",
]
