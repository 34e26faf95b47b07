"""Build a server from its settings: load engine, estimator and plan."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from wispprof import engines
from wispprof.artifacts import bundled_model
from wispprof.backends import Engine
from wispprof.engines import EngineOptions, LoadedEngine
from wispprof.engines.engine_process import can_separate, load_engine_process
from wispprof.openai_api import ChatTokenizer
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import ServedModel

log = logging.getLogger("wispprof.server")


def build_server(
    settings: ServerSettings,
    engine: Engine | None = None,
    model: ServedModel | None = None,
    **parts: Any,
) -> VerificationServer:
    """A server that is not started. ``parts`` for :class:`VerificationServer` (estimator, policy, …)
    replace what the settings would load."""
    if (engine is None) != (model is None):
        raise ValueError("give both engine and model, or neither")
    if "estimator" not in parts and settings.estimator is not None:
        from wispprof.fitting import load_estimator

        parts["estimator"] = load_estimator(settings.estimator)
    if "plan" not in parts and settings.plan is not None:
        from wispprof.artifacts.plan import load_plan

        parts["plan"] = load_plan(settings.plan)
    for line in warn_about_other_machines(settings):
        log.warning(line)
    if engine is None or model is None:
        engine, model, tokenizer = load_engine(settings)
        engine.warm_up(
            every_size=True
        )  # What it compiles stays with the process, also if it is loaded again.
        parts.setdefault("reload", lambda: load_engine(settings).engine)
        parts["owns_engine"] = True
        if tokenizer is not None:
            parts.setdefault("tokenizer", ChatTokenizer(tokenizer))
    return VerificationServer(engine, model, fitted_settings(settings, engine), **parts)


def fitted_settings(settings: ServerSettings, engine: Engine) -> ServerSettings:
    """``settings`` with no more sessions, open and cached, than the engine holds."""
    held = engine.capabilities.max_sessions
    if settings.max_sessions + settings.prefix_cache_sessions <= held:
        return settings
    cached = min(settings.prefix_cache_sessions, held // 4)
    return replace(
        settings, max_sessions=min(settings.max_sessions, held - cached), prefix_cache_sessions=cached
    )


def warn_about_other_machines(settings: ServerSettings) -> list[str]:
    """One line per artifact made on another machine, or with another estimator than the server's."""
    from wispprof.artifacts import read_document
    from wispprof.hardware import compute_device_name, machine_mismatch

    here = compute_device_name(settings.device)
    paths = {"estimator": settings.estimator, "plan": settings.plan}
    read = {kind: read_document(path, kind) for kind, path in paths.items() if path}
    lines = [
        machine_mismatch(f"The {kind} {paths[kind]}", document.inputs.get("machine", ""), here)
        for kind, document in read.items()
    ]
    planned_with = read["plan"].inputs.get("estimator", "") if "plan" in read else ""
    if planned_with and "estimator" in read and planned_with != read["estimator"].hash:
        lines.append(
            f"The plan {settings.plan} was made with another estimator than {settings.estimator}. "
            "Make it again with `wispprof plan`."
        )
    return [line for line in lines if line]


def load_engine(settings: ServerSettings, cores: Collection[int] = ()) -> LoadedEngine:
    """The engine that the settings name, the identity of its target, and the tokenizer.

    ``cores``: of an engine in a process of its own; none: all.
    """
    name, options = settings.engine, engine_options(settings)
    if _separate(settings):
        loaded = load_engine_process(name, options, cores)
    else:
        loaded = engines.load_engine(name, options)
    return loaded._replace(model=served_model(settings, loaded.model))


def _separate(settings: ServerSettings) -> bool:
    """Whether the engine gets a process of its own. On a GPU that is unmeasured; vLLM's has workers."""
    if settings.engine != "torch" or settings.in_process or not can_separate():
        return False
    from wispprof.engines.loading import choose_device

    return choose_device(settings.device).type == "cpu"


def engine_options(settings: ServerSettings) -> EngineOptions:
    """The settings that an engine is loaded with; without a target, the bundled one."""
    arguments = dict(settings.vllm_args)
    if settings.engine == "vllm" and settings.tensor_parallel > 1:
        arguments = {"tensor_parallel_size": settings.tensor_parallel, **arguments}
    return EngineOptions(
        settings.target or bundled_model("target"),
        settings.dtype,
        settings.device,
        settings.kv_tokens,
        settings.max_sessions + settings.prefix_cache_sessions,
        settings.backend,
        settings.max_context,
        settings.full_digest,
        settings.generation_config,
        max_items=settings.max_items,
        max_tokens=settings.max_tokens,
        max_drafts=settings.max_drafts,
        prefix_cache=settings.prefix_cache_sessions > 0,
        arguments=arguments,
        untested=settings.vllm_untested,
    )


def served_model(settings: ServerSettings, model: ServedModel) -> ServedModel:
    """``model`` under the name that edges ask for."""
    return replace(model, id=settings.target_id) if settings.target_id else model
