"""From settings to a server: loads the target, the estimator and the plan."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from wispprof import engines
from wispprof.engines import EngineOptions, LoadedEngine
from wispprof.errors import ModelMissing
from wispprof.openai_api import ChatTokenizer
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings
from wispprof.types import Engine, ServedModel

__all__ = [
    "build_server",
    "engine_options",
    "load_engine",
    "served_model",
    "warn_about_other_machines",
]

log = logging.getLogger("wispprof.server")


def build_server(
    settings: ServerSettings,
    engine: Engine | None = None,
    model: ServedModel | None = None,
    **parts: Any,
) -> VerificationServer:
    """A server that is not started yet. ``parts``: ready-made estimator, policy, … for
    :class:`VerificationServer`; what is not given is loaded as the settings say."""
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
        if tokenizer is not None:
            parts.setdefault("tokenizer", ChatTokenizer(tokenizer))
    return VerificationServer(engine, model, settings, **parts)


def warn_about_other_machines(settings: ServerSettings) -> list[str]:
    """A line for each artifact that was made on another machine, or of another estimator, than serves."""
    from wispprof.artifacts import read_document
    from wispprof.hardware import compute_device_name, machine_mismatch

    here = compute_device_name(settings.device)
    estimator = read_document(settings.estimator, "estimator") if settings.estimator else None
    plan = read_document(settings.plan, "plan") if settings.plan else None
    lines: list[str | None] = []
    if estimator is not None:
        made_on = estimator.inputs.get("machine", "")
        lines.append(machine_mismatch(f"The estimator {settings.estimator}", made_on, here))
    if plan is not None:
        made_on = plan.inputs.get("machine", "")
        lines.append(machine_mismatch(f"The plan {settings.plan}", made_on, here))
        made_of = plan.inputs.get("estimator", "")
        if estimator is not None and made_of and made_of != estimator.hash:
            lines.append(
                f"The plan {settings.plan} was made with another estimator than {settings.estimator}: "
                "make it anew with `wispprof plan`."
            )
    return [line for line in lines if line]


def load_engine(settings: ServerSettings) -> LoadedEngine:
    """The engine that the settings name, the identity of its target, and the tokenizer."""
    loaded = engines.load_engine(settings.engine, engine_options(settings))
    return loaded._replace(model=served_model(settings, loaded.model))


def engine_options(settings: ServerSettings) -> EngineOptions:
    """The settings that an engine is loaded with. Raises :class:`ModelMissing` without a target."""
    if not settings.target:
        raise ModelMissing("No target model was named.", "Give --target, a folder or a hub id.")
    return EngineOptions(
        settings.target,
        settings.dtype,
        settings.device,
        settings.kv_tokens,
        settings.max_sessions + settings.prefix_cache_sessions,
        settings.backend,
    )


def served_model(settings: ServerSettings, model: ServedModel) -> ServedModel:
    """``model`` under the name that edges ask for."""
    return replace(model, id=settings.target_id) if settings.target_id else model
