"""The default KV cache fits the memory that the weights leave, pages of all sessions included."""

from __future__ import annotations

import pytest
import torch

from wispprof.engines import EngineOptions
from wispprof.engines.loading import random_model
from wispprof.engines.torch import load_torch_engine
from wispprof.engines.torch.kv_size import ram_kv_size, vram_kv_size
from wispprof.engines.torch.kv_store import KvGeometry
from wispprof.engines.torch.paged_kv import PagedKvStore
from wispprof.errors import OutOfKvMemory
from wispprof.server.startup import fitted_settings
from wispprof.settings.server_settings import ServerSettings
from wispprof.testing.fake_engine import FakeEngine

GIB = 1 << 30
LLAMA_8B = 2 * 32 * 8 * 128 * 2
"""KV bytes of a token of Llama-3.1-8B in bfloat16."""


@pytest.mark.parametrize("free_gib", [0.05, 0.5, 2, 7, 24, 60, 120])
@pytest.mark.parametrize("sessions", [1, 64, 1088])
@pytest.mark.parametrize("context", [2048, 131_072])
def test_what_is_allocated_fits(free_gib: float, sessions: int, context: int) -> None:
    free = int(free_gib * GIB)
    size = vram_kv_size(free, LLAMA_8B, sessions, context)
    on_meta = KvGeometry(layers=32, heads=32, kv_heads=8, head_dim=128, max_context=size.max_context)
    store = PagedKvStore(
        on_meta, 1.0, torch.bfloat16, torch.device("meta"), size.kv_tokens, size.max_sessions
    )
    assert 0.6 * free < store._data.nbytes <= 0.85 * free or free_gib < 0.5
    assert 1 <= size.max_sessions <= sessions
    assert size.max_context <= min(context, size.kv_tokens)
    # Most of it is for tokens, and nothing is cut where there is space.
    assert size.kv_tokens * LLAMA_8B >= 0.6 * store._data.nbytes or free_gib < 0.5
    if free_gib >= 60:
        assert (size.max_sessions, size.max_context) == (sessions, context)


def test_too_little_memory_is_said() -> None:
    for fit in (vram_kv_size, ram_kv_size):
        with pytest.raises(OutOfKvMemory, match=r"leave 0\.0 GB free"):
            fit(100_000, LLAMA_8B, 8, 4096)


def test_host_memory_holds_a_context_if_half_of_it_does() -> None:
    assert ram_kv_size(64 * GIB, LLAMA_8B, 8, 131_072).max_context == 131_072
    assert ram_kv_size(64 * GIB, LLAMA_8B, 8, 2048).kv_tokens == 131_072
    small = ram_kv_size(8 * GIB, LLAMA_8B, 8, 131_072)
    assert small.kv_tokens == small.max_context == 4 * GIB // LLAMA_8B


def test_a_context_option_and_a_small_cache_bound_sessions(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    random_model("tiny-llama", device="cpu").model.save_pretrained(folder)

    def context(**options: int) -> int:
        options = {"max_sessions": 4, "kv_tokens": 1000, **options}
        engine, model, _ = load_torch_engine(EngineOptions(str(folder), device="cpu", **options))
        assert model.max_context == engine.max_context
        assert len(model.identity) == 16
        return model.max_context

    assert context() == 256
    assert context(max_context=100) == 100
    assert context(max_context=10**9) == 256
    assert context(kv_tokens=80) == 80
    assert context(kv_tokens=0) == 256


@pytest.mark.parametrize(("held", "expected"), [(10_000, (1024, 64)), (200, (150, 50)), (1050, (986, 64))])
def test_a_server_opens_no_more_sessions_than_its_engine_holds(
    held: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    capabilities = engine.capabilities
    monkeypatch.setattr(FakeEngine, "capabilities", type(capabilities)("any", 256, 8, max_sessions=held))
    settings = fitted_settings(ServerSettings(), engine)
    assert (settings.max_sessions, settings.prefix_cache_sessions) == expected
