"""Engines that the tests of this folder share: vLLM and the project's own, over the bundled target.

Run by ``make test-vllm`` in an environment of its own: vLLM pins its torch.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from wispprof.artifacts import bundled_model
from wispprof.drafters.torch_drafter import TorchDrafter
from wispprof.engines import EngineOptions, load_engine
from wispprof.engines.loading import LoadedModel, load_model
from wispprof.engines.torch.engine import TorchEngine
from wispprof.engines.vllm.build import prepare_environment
from wispprof.engines.vllm.engine import VllmEngine
from wispprof.types import ServedModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Plain vLLM runs in this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
prepare_environment()

TARGET = bundled_model("target")
EAGER = {"enforce_eager": True, "max_model_len": 2048}


def vllm_options(target: str = TARGET, **changes) -> EngineOptions:
    arguments = {**EAGER, **changes.pop("arguments", {})}
    given = {"dtype": "float32", "kv_tokens": 128 * 96, "max_tokens": 4096, "max_sessions": 64, **changes}
    return EngineOptions(target, arguments=arguments, **given)


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[VllmEngine, ServedModel]]:
    loaded = load_engine("vllm", vllm_options())
    yield loaded.engine, loaded.model
    loaded.engine.shutdown()


@pytest.fixture
def engine(served) -> Iterator[VllmEngine]:
    engine = served[0]
    yield engine
    for name in engine.sessions:
        engine.close(name)
    engine.audit({})
    assert engine.kv_free == engine.kv_tokens


@pytest.fixture(scope="session")
def target() -> LoadedModel:
    return load_model(TARGET, "float32", "cpu")


@pytest.fixture(scope="session")
def draft() -> LoadedModel:
    return load_model(bundled_model("draft"), "float32", "cpu")


@pytest.fixture
def drafter(draft):
    return lambda: TorchDrafter(draft)


@pytest.fixture(scope="session")
def own(target) -> TorchEngine:
    return TorchEngine(target, kv_tokens=1 << 16, max_sessions=64)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """50 prompts, longer and shorter than a block."""
    dice = random.Random(1)
    return [[dice.randrange(2, 4000) for _ in range(dice.choice((5, 40, 90, 140)))] for _ in range(50)]
