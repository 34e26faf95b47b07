"""Checks of ``--engine vllm``: version, functions, the workers on a CPU, and the target on it."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

from wispprof.artifacts import bundled_model
from wispprof.doctor.findings import DoctorContext, Finding

_SESSION = "doctor"


def vllm(context: DoctorContext) -> Finding:
    """The installed vLLM has the functions that ``--engine vllm`` needs, and was tested with it."""
    from wispprof.engines.vllm.build import prepare_environment
    from wispprof.engines.vllm.versions import FUNCTIONS, TESTED_VERSIONS, check_vllm, installed_vllm

    installed = installed_vllm()
    if installed is None and context.engine != "vllm":
        return Finding("skip", "vLLM is not installed; only --engine vllm needs it")
    prepare_environment()
    check_vllm(untested=True)
    if (installed or "").split("+")[0] in TESTED_VERSIONS:
        return Finding("ok", f"vLLM {installed}, tested; its {len(FUNCTIONS)} functions are as expected")
    return Finding(
        "warn",
        f"vLLM {installed} was not tested with --engine vllm, but has the functions it needs.",
        f"Install vLLM {TESTED_VERSIONS[-1]}, or serve with --vllm-untested.",
    )


def vllm_on_cpu(context: DoctorContext) -> Finding:
    """On a CPU, vLLM's workers run with Intel's OpenMP."""
    from wispprof.engines.vllm.cpu_workers import on_cpu_build, openmp_library

    if not on_cpu_build():
        return Finding("skip", "only for vLLM's CPU build")
    preloaded = context.environ.get("LD_PRELOAD", "")
    library = openmp_library()
    if library is None and "iomp" not in preloaded:
        return Finding(
            "warn",
            "Intel's OpenMP is not installed; steps of few tokens take up to half as long again.",
            "Run `pip install intel-openmp`; --engine vllm then preloads it.",
        )
    return Finding("ok", f"workers preload {library or preloaded}")


def vllm_target(context: DoctorContext) -> Finding:
    """vLLM loads the target; two equal steps decide the same token."""
    if context.engine != "vllm":
        return Finding("skip", "only with --engine vllm")
    from wispprof.engines.vllm.target import provenance
    from wispprof.types import StepInput

    loaded = load_vllm(context)
    engine = loaded.engine
    tokens = [i % engine.vocab_size for i in range(4, 12)]
    decided = []
    for _ in range(2):
        engine.open(_SESSION, tokens=tokens)
        decided.append(engine.step([StepInput(_SESSION, tokens)])[0].tokens)
        engine.close(_SESSION)
    if decided[0] != decided[1]:
        return Finding(
            "warn",
            "Two equal steps decided different tokens.",
            "Kernels are not deterministic here; near ties may decode differently.",
        )
    facts = provenance(engine.core)
    device = engine.core.vllm_config.device_config.device_type
    graphs = "compiled" if facts["compiled"] else "eager"
    if facts["graph_mode"] != "none":
        graphs += f", {facts['graph_mode']} graphs"
    return Finding(
        "ok",
        f"{loaded.model.id} in {engine.capabilities.dtype} on {device}: {facts['attention']}, {graphs}, "
        f"{facts['runner']}, {engine.kv_tokens:,} KV tokens in blocks of {facts['block_tokens']}",
    )


def load_vllm(context: DoctorContext) -> Any:
    """The target on vLLM, loaded once."""
    return _load(context.target or bundled_model("target"), tuple(sorted(context.vllm_args.items())))


@cache
def _load(target: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    from wispprof.engines import EngineOptions, load_engine

    options = EngineOptions(target, max_sessions=4, max_items=4, arguments=dict(arguments), untested=True)
    loaded = load_engine("vllm", options)
    # The checks that need it are not the last to run.
    atexit.register(loaded.engine.shutdown)
    return loaded
