"""Engine backends by name: the built-in ``torch``, or one of an installed package (docs/extending.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from wispprof.backends import Engine
from wispprof.plugins import load
from wispprof.types import ServedModel

__all__ = ["ENGINES", "EngineOptions", "LoadedEngine", "load_engine"]


@dataclass(frozen=True)
class EngineOptions:
    """What a server asks an engine factory for.

    ``target``: folder or hub id. ``dtype``: ``auto`` is the engine's choice. ``kv_tokens``: size of the KV
    cache, 0: what memory allows. ``backend``: KV cache layout. ``max_context``: tokens a session may cache,
    0: what the model and memory allow. ``full_digest``: identify the target by all bytes of its weights.
    ``generation_config``: where sampling defaults come from, see
    :func:`~wispprof.engines.served_model.describe_model`.
    ``max_items``, ``max_tokens``: sessions and new tokens of one step. ``max_drafts``: drafts of one session
    in a step. ``prefix_cache``: share the KV of equal prefixes. ``arguments``: passed through to an engine
    that takes its own. ``untested``: accept an engine version that was not tested.
    """

    target: str
    dtype: str = "auto"
    device: str = "auto"
    kv_tokens: int = 0
    max_sessions: int = 256
    backend: str = "auto"
    max_context: int = 0
    full_digest: bool = False
    generation_config: str = "auto"
    max_items: int = 64
    max_tokens: int = 1024
    max_drafts: int = 32
    prefix_cache: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    untested: bool = False


class LoadedEngine(NamedTuple):
    """A warm engine, the identity of its target, and the target's tokenizer (``None`` without one)."""

    engine: Engine
    model: ServedModel
    tokenizer: Any


def load_engine(name: str, options: EngineOptions) -> LoadedEngine:
    """Call the engine factory ``name``: a function of :class:`EngineOptions` to :class:`LoadedEngine`.

    Raises :class:`~wispprof.errors.PluginError` for an unknown name, and what the factory raises.
    """
    loaded: LoadedEngine = load("engines", name, ENGINES)(options)
    return loaded


def _load_torch(options: EngineOptions) -> LoadedEngine:
    from wispprof.engines.torch import load_torch_engine

    return LoadedEngine(*load_torch_engine(options))


def _load_vllm(options: EngineOptions) -> LoadedEngine:
    from wispprof.engines.vllm import load_vllm_engine

    return LoadedEngine(*load_vllm_engine(options))


def _load_vllm_http(options: EngineOptions) -> LoadedEngine:
    from wispprof.engines.vllm.http_engine import load_http_engine

    return LoadedEngine(*load_http_engine(options))


ENGINES = {"torch": _load_torch, "vllm": _load_vllm, "vllm-http": _load_vllm_http}
